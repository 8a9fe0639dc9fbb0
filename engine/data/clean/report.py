"""The report of `engine clean`: counts of read, dropped and changed documents and of findings, with samples."""

from __future__ import annotations

import os
from typing import Any

from engine.data.clean.job import CleanJob
from engine.data.clean.rules import Counts, load_evaluations
from engine.data.read.account import ReadSummary
from engine.data.read.inputs import STDIN

INPUT_PREFIX = "input: "  # of the reasons for unreadable input


def report_of(job: CleanJob, counts: Counts, kept: tuple[int, int]) -> dict[str, Any]:
    """The report as a JSON object. kept: number of kept documents and of their text bytes."""
    options, source, evaluations = job.options, job.source, load_evaluations(job.options)
    return {
        "output": options.output,
        "inputs": [name if "://" in name or name == STDIN else os.path.abspath(name) for name in source.given],
        "files_in": len(source.files),
        "documents_in": counts.documents,
        "why_no_documents": "" if counts.documents else _read_summary(counts).describe(source),
        "text_bytes_in": counts.text_bytes,
        "documents_kept": kept[0],
        "text_bytes_kept": kept[1],
        "noticed": dict(sorted(counts.noticed.items())),
        "dropped": dict(sorted(counts.dropped.items())),
        "dropped_text_bytes": dict(sorted(counts.dropped_bytes.items())),
        "changed": dict(sorted(counts.changed.items())),
        "other_columns": "kept" if source.keep_other_columns else "omitted",
        "renamed_columns": dict(sorted(counts.renamed.items())),
        "quality_languages": dict(sorted(counts.judged.items())),
        "not_applied": dict(sorted(counts.not_applied.items())),
        "pii": {
            "mode": options.pii,
            "findings": dict(sorted(counts.pii_findings.items())),
            "documents": dict(sorted(counts.pii_documents.items())),
        },
        "evaluations": [
            {
                "file": name,
                "items": items,
                "too_short_to_look_for": short,
                "documents_dropped": counts.contaminated[name],
            }
            for name, items, short in zip(evaluations.files, evaluations.items, evaluations.short_items)
        ],
        "samples": dict(sorted(counts.samples.items())),
        "rules": options.rules(),
        "tasks": options.tasks,
    }


def _read_summary(counts: Counts) -> ReadSummary:
    """Counts of unreadable inputs and of notes, with examples."""
    dropped = {
        kind.removeprefix(INPUT_PREFIX): n for kind, n in counts.dropped.items() if kind.startswith(INPUT_PREFIX)
    }
    examples = {}
    for prefix, counted in ((f"dropped: {INPUT_PREFIX}", dropped), ("noticed: ", counts.noticed)):
        for kind in counted:
            examples[kind] = [_example(sample) for sample in counts.samples.get(f"{prefix}{kind}", [])]
    return ReadSummary(dropped, dict(counts.noticed), examples)


def _example(sample: dict[str, Any]) -> str:
    location = f"{sample['file']}:{sample['record']}" if sample["record"] else sample["file"]
    return f"{location}: {sample.get('detail', '')}"
