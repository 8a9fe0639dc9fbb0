"""`engine prove`."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from engine.cli.common import Help, parse, print_result, single_process, split_settings
from engine.errors import EXIT_ERROR, EXIT_OK, ConfigError, FieldError

if TYPE_CHECKING:
    from engine.proof.prove import Check, Proof

_WIDTH = 31  # of the names of checks


@dataclass
class ProveOptions:
    """Prove that a layout computes what one process computes.

    Runs the config with the same options and tiny sizes, in float64, on processes of this machine: on the ranks of its
    layout and on one. Compares initial weights, losses, named sums, gradients, weights, validation and a resumed run,
    and names the tensor that differs most. Exit code 1: something differs.

    Settings of `engine train` follow as --section.name VALUE.
    """

    config: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="[CONFIG ...]")] = ()
    """config files; later ones win"""
    processes: int = 8
    """largest number of processes; degrees that need more are shrunk, with a note"""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """print one JSON object instead of text"""


HELP = Help(
    examples=(
        ("Prove the layout of a config", "engine prove run.toml"),
        (
            "Prove a preset in another layout, on at most 4 processes",
            "engine prove --model.preset llama-3-8b --parallel.tensor 4 --parallel.pipeline 2 --parallel.schedule zb-v "
            "--processes 4",
        ),
    ),
)


def run(args: list[str]) -> int:
    """Run the command; returns the exit code."""
    settings, rest = split_settings(args)
    o = parse(ProveOptions, rest, "prove", HELP)
    if o.processes < 1:
        raise ConfigError([FieldError("cli.too-small", "--processes", o.processes, "is below 1", "Use 2 or more.")])
    from engine.config.load import load

    resolved = load(o.config, settings, world=None, reject_idle=True)
    single_process("prove")  # needs torch, so config errors are reported first
    from engine.proof.prove import prove
    from engine.train.state import check_groups

    check_groups(resolved.config)
    proof = prove(resolved.config, o.processes, lambda text: print(f"{text} ...", file=sys.stderr, flush=True))
    print_result(list(_lines(proof)), _fields(proof) if o.json else None)
    return EXIT_OK if proof.passed else EXIT_ERROR


def _lines(proof: Proof) -> list[str]:
    """The proof as text of at most 80 columns, but for long names."""
    from engine.distributed.layout import describe

    model, count, failed = proof.config.model, proof.layout.world, sum(not check.passed for check in proof.checks)
    lines = [f"{count} process{'es' * (count > 1)} against one, in float64:"]
    lines += [f"{describe(proof.layout.degrees)}, {proof.config.parallel.schedule}"]
    lines += [f"{model.num_layers} layers of width {model.hidden_size}, {proof.config.train.steps} steps"]
    for note in proof.notes:
        lines += textwrap.wrap(f"note: {note}", 80, subsequent_indent="      ", break_long_words=False)
    lines += ["", f"{'':{_WIDTH}}{'differs':>9}{'limit':>7}  most in"]
    lines += [line for check in proof.checks for line in _check_lines(check)]
    verdict = (
        f"{failed} of {len(proof.checks)} checks failed" if failed else "the layout computes what one process does"
    )
    return [*lines, "", f"{verdict} ({proof.seconds:.0f} s)"]


def _check_lines(check: Check) -> Iterator[str]:
    error, limit = f"{check.error:.1e}" if check.error else "0", f"{check.limit:.0e}" if check.limit else "0"
    line = f"{check.what:{_WIDTH}}{error:>9}{limit:>7}"
    most = f"  {'' if check.passed else 'FAILED '}{check.worst} {check.problem}".rstrip()
    fits = len(line + most) <= 80
    yield line + most if fits else line
    if not fits:
        yield f"    {most.strip()}"


def _fields(proof: Proof) -> dict[str, Any]:
    checks = [
        {
            "what": check.what,
            "difference": check.error,
            "limit": check.limit,
            "passed": check.passed,
            "worst": check.worst,
            "problem": check.problem,
        }
        for check in proof.checks
    ]
    parallel = proof.config.parallel.model_dump()
    head = {"verb": "prove", "passed": proof.passed, "processes": proof.layout.world, "parallel": parallel}
    return head | {"notes": list(proof.notes), "checks": checks, "seconds": proof.seconds}
