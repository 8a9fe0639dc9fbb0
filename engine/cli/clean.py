"""`engine clean`; its options and their checks are engine/data/clean/options.py."""

from __future__ import annotations

from engine.cli.common import Help, parse, stops_on_signals
from engine.errors import EXIT_OK
from engine.util.signals import Interrupts

HELP = Help(
    examples=(
        ("Clean a folder with the default rules", "engine clean --input raw --output clean/web.jsonl"),
        (
            "Keep English documents of good quality and mask personal data",
            "engine clean --input raw --output clean/web.jsonl.zst --language en --quality gopher c4 --pii mask",
        ),
    ),
    groups={
        "input": ("input", "include", "exclude", "json_key", "format", "on_error"),
        "output": ("output", "keep_columns", "dropped_text", "overwrite"),
        "text": ("normalise", "fix_mojibake", "width", "chinese"),
        "filter": ("language", "language_threshold", "quality", "quality_language"),
        "decontamination": ("decontaminate", "decontaminate_key", "decontaminate_words", "fold_numbers"),
        "pii": ("pii", "pii_kinds"),
        "duplicates": ("exact_duplicates", "minhash_bands", "minhash_rows", "minhash_words"),
        "execution": ("tasks", "executor", "workers", "slurm_partition", "slurm_time"),
    },
)


@stops_on_signals
def run(args: list[str], stop: Interrupts) -> int:
    """Run the command; returns the exit code."""
    from engine.cli.clean_console import show_clean_report
    from engine.cli.prepare_console import prepare_progress
    from engine.data.clean.options import CleanOptions
    from engine.data.clean.run import clean

    options = parse(CleanOptions, args, "clean", HELP)
    with prepare_progress() as progress:
        report = clean(options, progress, stop)
    if report is None:
        out = options.output
        print(f"tasks of {out} are still running; when they are done, give the same command again to finish it")
    else:
        show_clean_report(report)
    return EXIT_OK
