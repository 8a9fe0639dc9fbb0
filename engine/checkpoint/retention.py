"""Commits a written folder as the checkpoint of its step, and deletes or renames older ones. Runs on one rank only.

The order of operations makes crashes harmless: a name is synced before any later operation relies on it, and a folder
is renamed to a hidden name before it is deleted. Hidden names (`.step_...`) are never read; the next save removes those
that a crash left behind.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from engine.checkpoint.format import MANIFEST, read_manifest, step_dir, steps_descending
from engine.checkpoint.storage import Storage, remove_tree, write_file
from engine.errors import CheckpointError


def remove_leftovers(storage: Storage, root: Path, current: Path) -> None:
    """Remove the remains of interrupted saves and deletions. Errors are ignored, as the remains are harmless."""
    if storage.stat(root) is None:
        return
    for name in storage.list(root):
        if name.startswith(".step_") and name != current.name:
            with suppress(OSError):
                remove_tree(storage, root / name)


def commit(storage: Storage, temporary: Path, final: Path, manifest: bytes) -> Path | None:
    """Write the manifest and rename the folder to its final name, durably. Returns where a replaced folder was moved.

    A folder is replaced if this step had been saved before and the run then resumed from an earlier step, or if the
    earlier save was damaged. A crash between the two renames leaves no folder of this name: the run then resumes from
    that earlier step again.
    """
    write_file(storage, temporary / MANIFEST, manifest)
    storage.sync_folder(temporary)
    replaced = temporary.with_suffix(".replaced") if storage.stat(final) is not None else None
    if replaced is not None:
        storage.rename(final, replaced)
    storage.rename(temporary, final)
    storage.sync_folder(final.parent)
    return replaced


def rename_newer(storage: Storage, root: Path, step: int) -> list[str]:
    """Rename checkpoints of later steps, so that "latest" is the step that this run just saved. Returns notes."""
    notes = []
    for newer in steps_descending(root, storage):
        if newer > step:
            name = f"abandoned_{step_dir(root, newer).name}"
            while storage.stat(root / name) is not None:
                name += "_"
            storage.rename(step_dir(root, newer), root / name)
            notes.append(
                f"step {newer} is from before this run resumed at an earlier step; it was renamed to {root / name}"
            )
    if notes:
        storage.sync_folder(root)
    return notes


def delete_old(storage: Storage, root: Path, step: int, keep: int, keep_every: int, spike: int = 0) -> None:
    """Delete checkpoints before `step`, except the newest `keep` (`step` included) and multiples of `keep_every`.

    spike: step of a loss spike, 0 for none. The last checkpoint from before it is kept too: one of step spike - 2 or
    earlier, because the loss of a step is computed with the weights of the step before.

    The ranks that wrote the files of `step` have read them back; its manifest is read back here, before any deletion.
    Each folder is renamed first, so that no half-deleted folder has a checkpoint's name.
    """
    if not keep:
        return
    read_manifest(step_dir(root, step), storage)
    kept, old = 1, []
    spared = _before_spike(storage, root, spike) if spike else None
    for older in steps_descending(root, storage):
        if older >= step:
            continue
        if kept < keep:  # damaged ones are not counted, and kept while they may be useful
            kept += _is_complete(storage, step_dir(root, older))
        elif older != spared and not (keep_every and older % keep_every == 0):
            old.append(step_dir(root, older))
    trash = [folder.with_name(f".{folder.name}.deleted") for folder in old]
    for folder, hidden in zip(old, trash):
        if storage.stat(hidden) is not None:
            remove_tree(storage, hidden)
        storage.rename(folder, hidden)
    if old:
        storage.sync_folder(root)
    for hidden in trash:
        remove_tree(storage, hidden)


def _before_spike(storage: Storage, root: Path, spike: int) -> int | None:
    """Newest complete step with weights certainly from before the spike; if none, the newest step below `spike`."""
    before = [s for s in steps_descending(root, storage) if s < spike and _is_complete(storage, step_dir(root, s))]
    return next((s for s in before if s <= spike - 2), before[0] if before else None)


def _is_complete(storage: Storage, folder: Path) -> bool:
    try:
        read_manifest(folder, storage)
    except CheckpointError:
        return False
    return True
