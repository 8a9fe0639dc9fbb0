"""One `engine clean` command: its options and inputs, its tasks, and the paths of parts and outputs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.clean.contamination import evaluation_files
from engine.data.clean.options import CleanOptions
from engine.data.read.document_source import DocumentSource
from engine.data.read.inputs import InputFile
from engine.data.workfolder import RERUN, json_round_trip

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_VERSION = 4  # of the part format; increased when a rule gives another result


@dataclass(frozen=True)
class CleanJob:
    """Options and inputs of one `engine clean` command."""

    options: CleanOptions
    source: DocumentSource

    @property
    def work_folder(self) -> Path:
        return Path(f"{self.options.output}.work")

    @property
    def suffix(self) -> str:
        return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if self.options.output.endswith(s)), "")

    def output_path(self, name: str) -> Path:
        """corpus/clean.jsonl.zst -> corpus/clean-NAME."""
        return Path(f"{self.options.output.removesuffix(self.suffix)}-{name}")

    @property
    def output_paths(self) -> list[Path]:
        """All output files."""
        return [Path(self.options.output), self.output_path("dropped.jsonl"), self.output_path("report.json")]

    def missing(self) -> list[int]:
        """Tasks without a part."""
        return [task for task in range(self.options.tasks) if not self.part(task).is_dir()]

    def part(self, task: int) -> Path:
        return self.work_folder / f"part-{task:05d}"

    def files(self, task: int) -> tuple[int, int]:
        """Range [first, end) of input files of a task. Every file belongs to exactly one task."""
        weights = [file.num_bytes + 1 for file in self.source.files]
        ends = itertools.accumulate(weights)
        total = sum(weights)
        files_of_task = [
            i for i, (end, size) in enumerate(zip(ends, weights)) if (end - size) * self.options.tasks // total == task
        ]
        return (files_of_task[0], files_of_task[-1] + 1) if files_of_task else (0, 0)

    def settings(self) -> dict[str, Any]:
        """Everything the result depends on, as read back from JSON."""
        o, source, evaluations = self.options, self.source, evaluation_files(self.options.decontaminate)
        settings = {
            "version": _VERSION,
            "inputs": [_identity(file) for file in source.files],
            "evaluation files": [_identity(file) for file in evaluations],
            "json keys": list(source.keys),
            "format": source.format,
            "keep columns": source.keep_other_columns,
            "rules": o.rules(),
            "tasks": o.tasks,
            "dropped text": o.dropped_text,
            "on error": o.on_error,
        }
        return json_round_trip(settings)

    def resume_hint(self) -> str:
        """How to resume once there is space on the disk."""
        return f"{RERUN[:-1]}: complete parts are kept."

    def interrupt_hint(self) -> str:
        """Message after a signal: which work is kept, and how to resume."""
        tasks, missing, again = self.options.tasks, len(self.missing()), "give the same command again"
        if self.source.reads_once:
            return f"nothing is kept of standard input; {again}"
        if missing == tasks == 1:
            return f"nothing is kept yet; {again} (with --tasks N, each of the N parts is kept once it is finished)"
        if missing == tasks:
            return f"nothing is kept yet; {again}"
        return f"{tasks - missing} of {tasks} parts are kept in {self.work_folder}; {again} to resume with the rest"

    def output_bytes(self, text_bytes: float) -> int:
        """Estimated size of the output: lines of JSON, about a third of it if compressed."""
        return int(1.1 * text_bytes if self.suffix == ".jsonl" else 0.4 * text_bytes)


def _identity(file: InputFile) -> str:
    return f"{file.name}: {file.num_bytes:,} bytes (stamp {file.stamp})"
