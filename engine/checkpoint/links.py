"""Rejects symbolic links inside a run folder: a planted link would decide which files a run reads and overwrites."""

from __future__ import annotations

from pathlib import Path

from engine.errors import CheckpointError

# Contents of a run folder, and the subfolders that are searched for links.
_RUN_FILES = ("lock", "config.toml", "metrics.jsonl", "exit.json", ".exit.json", "spike.json", "timeline.json")
_RUN_FOLDERS = (
    *("checkpoints", "tensorboard", "tokenizer", "tokenizer/additional_chat_templates", "hugging_face"),
    "hugging_face/extra",
)


def reject_links(run_dir: Path) -> None:
    """Raise CheckpointError if any file or folder that a run reads or writes in its folder is a link."""
    inside = [run_dir / name for name in (*_RUN_FILES, *_RUN_FOLDERS)]
    for name in _RUN_FOLDERS:
        if (run_dir / name).is_dir():
            inside += sorted((run_dir / name).iterdir())
    for path in inside:
        if path.is_symlink():
            raise CheckpointError(
                "checkpoint.link",
                f"{path}: is a symbolic link; links inside a run folder are not followed. Replace the link with its "
                "target, or remove it (the run folder itself may be a link)",
            )
