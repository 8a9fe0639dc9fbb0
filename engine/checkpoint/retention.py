"""Making a written folder the checkpoint of its step, and what becomes of the others. All on one rank.

Order is everything here: a name is synced before the next thing relies on it, and nothing is deleted under its own
name. Hidden names (`.step_...`) are never read; what a crash leaves of them, the next save removes.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from engine.checkpoint.format import MANIFEST, read_manifest, step_dir, steps_descending
from engine.checkpoint.storage import Storage, remove_tree, write_file
from engine.errors import CheckpointError


def tidy(storage: Storage, root: Path, current: Path) -> None:
    """Remove what killed saves and deletions have left behind, as far as possible: it does no harm."""
    if storage.stat(root) is None:
        return
    for name in storage.list(root):
        if name.startswith(".step_") and name != current.name:
            with suppress(OSError):
                remove_tree(storage, root / name)


def commit(storage: Storage, temporary: Path, final: Path, manifest: bytes) -> Path | None:
    """Write the manifest and give the folder its name, durably; returns where an older folder of that name now lies.

    There is one where this step had been saved before and the run went back behind it, or where that one was damaged.
    A crash between the two renames leaves neither under the name: the run goes on from where it had gone back to.
    """
    write_file(storage, temporary / MANIFEST, manifest)
    storage.sync_folder(temporary)
    replaced = temporary.with_suffix(".replaced") if storage.stat(final) is not None else None
    if replaced is not None:
        storage.rename(final, replaced)
    storage.rename(temporary, final)
    storage.sync_folder(final.parent)
    return replaced


def set_aside_newer(storage: Storage, root: Path, step: int) -> list[str]:
    """Rename checkpoints of later steps: the run went back behind them, so they are not what "latest" means."""
    notes = []
    for newer in steps_descending(root, storage):
        if newer > step:
            name = f"abandoned_{step_dir(root, newer).name}"
            while storage.stat(root / name) is not None:
                name += "_"
            storage.rename(step_dir(root, newer), root / name)
            notes.append(f"step {newer} was saved before this run went back behind it: it is now {root / name}")
    if notes:
        storage.sync_folder(root)
    return notes


def forget_old(storage: Storage, root: Path, step: int, keep: int, keep_every: int, spike: int = 0) -> None:
    """Delete all checkpoints before `step` but the newest `keep`, this one among them, and multiples of `keep_every`.

    spike: a step whose loss stands out, 0 for none. The last checkpoint from before it stays as well: of two steps
    before, as the loss of a step is that of the weights of the one before it.

    This one's files have been read back by the ranks that wrote them; its manifest is, here, before anything goes.
    Each is renamed away first, so that none is ever half there.
    """
    if not keep:
        return
    read_manifest(step_dir(root, step), storage)
    kept, old = 1, []
    spared = _before_spike(storage, root, spike) if spike else None
    for older in steps_descending(root, storage):
        if older >= step:
            continue
        if kept < keep:  # a damaged one does not count, and stays as long as it might be of use
            kept += _complete(storage, step_dir(root, older))
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
    """The newest complete step whose weights are known to be from before it; else the newest that may be."""
    before = [s for s in steps_descending(root, storage) if s < spike and _complete(storage, step_dir(root, s))]
    return next((s for s in before if s <= spike - 2), before[0] if before else None)


def _complete(storage: Storage, folder: Path) -> bool:
    try:
        read_manifest(folder, storage)
    except CheckpointError:
        return False
    return True
