"""No link is followed inside a run folder: whoever can put one there could choose what a run reads and overwrites."""

from __future__ import annotations

from pathlib import Path

from engine.errors import CheckpointError

# What a run folder holds, and in which of its folders there is more.
_RUN_FILES = ("lock", "config.toml", "metrics.jsonl", "exit.json", ".exit.json", "spike.json", "timeline.json")
_RUN_FOLDERS = (
    *("checkpoints", "tensorboard", "tokenizer", "tokenizer/additional_chat_templates", "hugging_face"),
    "hugging_face/extra",
)


def refuse_links(run_dir: Path) -> None:
    """Raise CheckpointError if something that a run reads or writes in its folder is a link."""
    inside = [run_dir / name for name in (*_RUN_FILES, *_RUN_FOLDERS)]
    for name in _RUN_FOLDERS:
        if (run_dir / name).is_dir():
            inside += sorted((run_dir / name).iterdir())
    for path in inside:
        if path.is_symlink():
            raise CheckpointError(
                "checkpoint.link",
                f"{path}: is a link, and none is followed inside a run folder: put what it leads to in its place, or "
                "remove it (the run folder itself may be a link)",
            )
