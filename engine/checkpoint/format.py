"""The checkpoint format: a folder of safetensors files and one JSON manifest, written last.

    checkpoints/step_00000100/
        manifest.json            schema, step, config, data, and the location of every tensor
        rank00000.safetensors    one file for each rank: rectangles of canonical tensors

Tensors are *canonical* (unfused, global; engine.distributed.specs) and of several kinds: MODEL (master weights), and
the kinds of optimizer state that the manifest lists, such as "exp_avg" and "exp_avg_sq". For each tensor the manifest
lists the global shape, the dtype and the rectangles that make it up, so any layout can load a checkpoint of any other.
The folder is written under a temporary name, synced, and then renamed; it is complete if its manifest exists. "Latest"
is the highest complete step. Nothing is pickled. Every byte of the folder is covered by a digest: the manifest starts
with the digest of its remaining bytes, and lists the digests of every file's header and of every rectangle's blocks
(engine.checkpoint.tensorfile). Schemas 1 and 2 are still read: 1 has only one digest per file, both list no `kinds`.
"""

from __future__ import annotations

import hmac
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from engine.checkpoint.seal import SIGNED
from engine.checkpoint.storage import DISK, PROCESS_ERRNOS, Storage, read_file
from engine.checkpoint.tensorfile import DTYPES, TensorFile, rows_per_block
from engine.config.renames import to_current_names
from engine.errors import CheckpointError, SecretError, WrongSecretError
from engine.optim.update_rules import MODEL
from engine.util.files import SEALED

SCHEMA = 3
MANIFEST = "manifest.json"

_FILE_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_STEP_DIR = re.compile(r"step_(\d{8,})")


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileSlice(_Entry):
    """A stored rectangle of a tensor: file and key, offset in the tensor, and digests of its blocks of rows."""

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    digests: tuple[str, ...] = ()


class TensorEntry(_Entry):
    """A canonical tensor: global shape, dtype as safetensors names it, and the rectangles that make it up."""

    shape: tuple[int, ...]
    dtype: str
    slices: tuple[FileSlice, ...]


class FileEntry(_Entry):
    """Size of a file in bytes and digest of its header. xxh3_128: digest of the whole file (schema 1 only)."""

    size: int
    header: str = ""
    xxh3_128: str = ""


class Ancestor(_Entry):
    """A checkpoint resumed from. allowed (by checkpoint.allow), changed (others): field -> (value in it, after it)."""

    checkpoint: str
    step: int
    consumed_samples: int
    layout: dict[str, int]
    versions: dict[str, str]
    config: str
    allowed: dict[str, tuple[str, str]] = {}
    changed: dict[str, tuple[str, str]] = {}


class Manifest(_Entry):
    """Metadata of a checkpoint; see the module docstring. data: identifies corpus and tokenizer.

    optimizer: "steps", the number of updates (less than `step` if fp16 skipped some), and in fp16 the loss-scale state.
    lineage: ancestors of the run, oldest first. initial_values: the generator of the initial weights, "" if loaded or
    not recorded. state_kinds: see `kinds`. block_bytes: see `tensorfile.rows_per_block`.
    """

    schema_version: int = SCHEMA
    step: int
    consumed_samples: int
    consumed_tokens: int
    optimizer: dict[str, float] = {}
    state_kinds: tuple[str, ...] | None = None
    config: dict[str, Any]
    data: dict[str, Any]
    layout: dict[str, int]
    versions: dict[str, str]
    lineage: tuple[Ancestor, ...] = ()
    initial_values: str = ""
    block_bytes: int = 0
    tensors: dict[str, dict[str, TensorEntry]]
    files: dict[str, FileEntry]

    @property
    def kinds(self) -> tuple[str, ...] | None:
        """The kinds of optimizer state in this checkpoint; None if it holds only weights, such as an imported model."""
        older = tuple(kind for kind in self.tensors if kind != MODEL) or (None if self.tensors else ())
        return self.state_kinds if self.schema_version >= 3 else older

    def encode(self, storage: Storage = DISK) -> bytes:
        """The bytes of the manifest file."""
        return with_digest(self.model_dump_json(indent=1).encode(), storage)


_FIRST_ENTRY = re.compile(rb'\{"(xxh3_128|hmac_sha256)": "([0-9a-f]*)')


def with_digest(body: bytes, storage: Storage = DISK) -> bytes:
    """The JSON object `body` with its digest inserted as the first entry: the bytes of a manifest file."""
    assert body.startswith(b"{")
    rest = b'",' + body[1:]
    return b'{"%s": "%s' % (storage.digest_name.encode(), storage.digest(rest).encode()) + rest


def parse_verified(data: bytes, path: Path, storage: Storage = DISK) -> Any:
    """Verify the digest of a manifest file and parse its JSON. Raises CheckpointError or ValueError if invalid.

    Raises SecretError if the checkpoint is signed or encrypted and `storage` has no secret, or the other way round.
    """
    first = _FIRST_ENTRY.match(data)
    kind = first[1].decode() if first else ""
    if data.startswith(SEALED) or (kind == SIGNED and storage.digest_name != SIGNED):
        protection = "encrypted" if data.startswith(SEALED) else "signed"
        raise SecretError(
            "checkpoint.secret-needed",
            f"{path}: is {protection}: give its secret (--checkpoint.secret in training, --secret elsewhere)",
        )
    if first and kind == storage.digest_name:
        wanted, rest = first[2].decode(), data[first.end() :]
        if not hmac.compare_digest(found := storage.digest(rest), wanted):
            if kind == SIGNED:
                raise WrongSecretError(
                    "checkpoint.wrong-secret",
                    f"{path}: the signature does not match: the secret is another one, or the manifest was changed",
                )
            raise CheckpointError(
                "checkpoint.manifest-digest-differs",
                f"{path}: damaged manifest (or an edited one): its digest is {found}, it states {wanted}; "
                "use another checkpoint",
            )
    raw = json.loads(data)
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and not 1 <= version <= SCHEMA:
        raise CheckpointError(
            "checkpoint.schema-unknown",
            f"{path}: schema version {version}; this engine reads 1 to {SCHEMA}: use the engine that wrote it",
        )
    if storage.digest_name == SIGNED and kind != SIGNED:
        raise SecretError(
            "checkpoint.not-signed",
            f"{path}: is not signed, so its origin is unknown. If you trust it, give no secret, or start from its "
            "weights with --checkpoint.init",
        )
    if not first and (version != 1 or "xxh3_128" in raw):
        raise ValueError("it does not start with its digest")
    raw.pop(kind, None)
    return raw


def step_dir(root: Path, step: int) -> Path:
    """Folder of the checkpoint of `step`."""
    return root / f"step_{step:08d}"


def read_manifest(folder: Path, storage: Storage = DISK) -> Manifest:
    """Read and check a manifest: digest, schema, plain file names, the folder's step, and all files' sizes."""
    path = folder / MANIFEST
    try:
        raw = parse_verified(read_file(storage, path), path, storage)
        manifest = Manifest.model_validate(raw)
        manifest = manifest.model_copy(update={"config": to_current_names(manifest.config)})
        _check_entries(manifest)
    except FileNotFoundError:
        raise CheckpointError(
            "checkpoint.incomplete", f"{folder}: no {MANIFEST}, so this is not a complete checkpoint"
        ) from None
    except (OSError, ValueError, RecursionError, ValidationError) as error:
        raise CheckpointError(
            "checkpoint.manifest-damaged", f"{path}: damaged manifest ({error}); use another checkpoint"
        ) from None
    named = _STEP_DIR.fullmatch(folder.name)
    if named and int(named[1]) != manifest.step:
        raise CheckpointError(
            "checkpoint.folder-of-another-step",
            f"{path}: is of step {manifest.step}, but its folder is named {folder.name}; rename the folder back",
        )
    for name, entry in manifest.files.items():
        if not _FILE_NAME.fullmatch(name) or name in (".", ".."):
            raise CheckpointError(
                "checkpoint.file-name-not-plain",
                f"{path}: {name!r} is not a plain file name; the manifest was tampered with",
            )
        status = storage.stat(folder / name)
        if status is None or status.kind != "file" or status.size != entry.size:
            found = "missing" if status is None else f"{status.size} bytes long"
            found = found if status is None or status.kind == "file" else "not a regular file"
            raise CheckpointError(
                "checkpoint.file-not-as-listed",
                f"{folder / name}: {found}, but the manifest lists {entry.size} bytes; use another checkpoint",
            )
    return manifest


def _check_entries(manifest: Manifest) -> None:
    """Raise ValueError if entries of a manifest are inconsistent, even when its digest is right."""
    if unlisted := manifest.tensors.keys() - {MODEL, *(manifest.kinds or ())}:
        raise ValueError(f"it has tensors of kinds that it does not list: {', '.join(sorted(unlisted))}")
    for kind, entries in manifest.tensors.items():
        for name, entry in entries.items():
            if entry.dtype not in DTYPES:
                raise ValueError(f"{kind} {name}: dtype {entry.dtype!r} is not one of {', '.join(DTYPES)}")
            for part in entry.slices:
                inside = len(part.offset) == len(part.shape) == len(entry.shape) and all(
                    o >= 0 and n > 0 and o + n <= size for o, n, size in zip(part.offset, part.shape, entry.shape)
                )
                if not inside:
                    raise ValueError(f"{kind} {name}: {part.offset}+{part.shape} is outside {entry.shape}")
                if manifest.schema_version > 1:
                    rows = rows_per_block(part.shape, DTYPES[entry.dtype].itemsize, manifest.block_bytes)
                    num_blocks = -(-part.shape[0] // rows)
                    if len(part.digests) != num_blocks:
                        raise ValueError(f"{kind} {name}: {len(part.digests)} digests for {num_blocks} blocks")


def unexpected_files(folder: Path, manifest: Manifest, storage: Storage = DISK) -> list[str]:
    """Non-hidden files that the manifest does not list. (Hidden files come from file systems and tools.)"""
    return [n for n in storage.list(folder) if n not in manifest.files and n != MANIFEST and not n.startswith(".")]


def whole_file_digest(file: Path, storage: Storage = DISK) -> str:
    """Hexadecimal XXH3-128 of all bytes of a file, as schema 1 recorded it."""
    found = xxhash.xxh3_128()
    source = storage.open(file)
    try:
        for begin in range(0, source.size, 8 << 20):
            block = memoryview(bytearray(min(8 << 20, source.size - begin)))
            source.read_into(begin, block)
            found.update(block)
    finally:
        source.close()
    return found.hexdigest()


def find_damage(folder: Path, manifest: Manifest, storage: Storage = DISK, *, uncached: bool = False) -> Iterator[str]:
    """Read all files and yield a message for each corruption, naming the file and the tensor."""
    yield from (
        f"{folder / name}: does not belong to this checkpoint" for name in unexpected_files(folder, manifest, storage)
    )
    for name in sorted(manifest.files):
        yield from find_file_damage(folder / name, manifest, storage, uncached=uncached)


def verify_all(folder: Path, manifest: Manifest, storage: Storage = DISK) -> None:
    """Read all files. Raises CheckpointError with everything that `find_damage` reports."""
    if found := list(find_damage(folder, manifest, storage)):
        raise CheckpointError(
            "checkpoint.damaged", f"{folder}: {len(found)} errors:\n" + "\n".join(f"  - {text}" for text in found)
        )


def find_file_damage(
    file: Path, manifest: Manifest, storage: Storage = DISK, *, uncached: bool = False
) -> Iterator[str]:
    """Yield a message for each corruption in one file of a checkpoint. uncached: bypass the page cache if possible."""
    entry = manifest.files[file.name]
    if manifest.schema_version == 1:
        found = whole_file_digest(file, storage)
        if found != entry.xxh3_128:
            yield f"{file}: damaged: digest {found}, the manifest lists {entry.xxh3_128}"
        return
    try:
        opened = TensorFile(file, storage, header=entry.header, uncached=uncached)
    except (OSError, CheckpointError) as error:
        yield str(error)
        return
    try:
        for kind, entries in manifest.tensors.items():
            for name, tensor in entries.items():
                for part in tensor.slices:
                    if part.file == file.name:
                        yield from _find_slice_damage(opened, kind, name, tensor.dtype, part, manifest.block_bytes)
    finally:
        opened.close()


def _find_slice_damage(
    opened: TensorFile, kind: str, name: str, dtype: str, part: FileSlice, block_bytes: int
) -> Iterator[str]:
    if opened.entries.get(part.key, ())[:2] != (dtype, part.shape):
        yield f"{opened.file}: has no {dtype} tensor {part.key} of shape {list(part.shape)}, which the manifest lists"
        return
    for block in range(len(part.digests)):
        try:
            verify_block(opened, part, block, dtype, block_bytes)
        except CheckpointError as error:
            yield f"{error} (tensor {kind} {name})"


def block_rows(part: FileSlice, block: int, dtype: str, block_bytes: int) -> tuple[int, int, int]:
    """(first row, end row (exclusive), bytes) of block number `block` of a rectangle."""
    itemsize = DTYPES[dtype].itemsize
    rows = rows_per_block(part.shape, itemsize, block_bytes)
    first, last = block * rows, min((block + 1) * rows, part.shape[0])
    size = itemsize * (last - first)
    for n in part.shape[1:]:
        size *= n
    return first, last, size


def verify_block(
    opened: TensorFile, part: FileSlice, block: int, dtype: str, block_bytes: int, into: memoryview | None = None
) -> memoryview:
    """Read a block of a rectangle (into `into`) and verify its digest. Raises CheckpointError if it differs."""
    first, last, size = block_rows(part, block, dtype, block_bytes)
    into = memoryview(bytearray(size)) if into is None else into
    try:
        found = opened.read_rows(part.key, first, last, into)
    except OSError as error:
        if error.errno in PROCESS_ERRNOS:
            raise
        raise CheckpointError(
            "checkpoint.file-unreadable",
            f"{opened.file}: {part.key}: {error.strerror or error}; use another checkpoint",
        ) from None
    if part.digests and found != part.digests[block]:
        raise CheckpointError(
            "checkpoint.digest-differs",
            f"{opened.file}: damaged: digest {found} of {part.key} rows {first}..{last - 1}, "
            f"the manifest lists {part.digests[block]}; use another checkpoint",
        )
    return into


def steps_descending(root: Path, storage: Storage = DISK) -> list[int]:
    """Steps of all checkpoint folders under `root`, newest first, including incomplete ones."""
    if (status := storage.stat(root)) is None or status.kind == "file":
        return []
    found = [(name, _STEP_DIR.fullmatch(name)) for name in storage.list(root)]
    steps = [int(match[1]) for name, match in found if match and name == step_dir(root, int(match[1])).name]
    return sorted(steps, reverse=True)


def newest_step(root: Path, storage: Storage = DISK, before: int | None = None) -> int | None:
    """The highest complete step under `root` (below `before`, if given). Warns about newer damaged ones.

    Raises SecretError if a newer one needs a secret, or if no checkpoint can be read with this secret: a run must not
    start from step 0 in a folder of checkpoints that it cannot open.
    """
    wrong_secret: WrongSecretError | None = None
    for step in steps_descending(root, storage):
        if before is not None and step >= before:
            continue
        try:
            if (status := storage.stat(step_dir(root, step))) is not None and status.kind != "folder":
                raise CheckpointError("checkpoint.not-a-folder", f"{step_dir(root, step)}: is a link or not a folder")
            read_manifest(step_dir(root, step), storage)
            return step
        except WrongSecretError as error:
            wrong_secret = wrong_secret or error
            reason = str(error)
        except SecretError:
            raise
        except CheckpointError as error:
            reason = str(error)
        warnings.warn(f"skipped: {reason}", stacklevel=2)
    if wrong_secret is not None:
        raise wrong_secret
    return None


def find_checkpoint(path: Path, storage: Storage = DISK) -> Path:
    """The checkpoint folder that a path names: the path itself, or the newest one of a run or checkpoints folder."""
    if (path / MANIFEST).exists() or _STEP_DIR.fullmatch(path.name):
        read_manifest(path, storage)
        return path
    for root in (path / "checkpoints", path):
        if (step := newest_step(root, storage)) is not None:
            return step_dir(root, step)
    raise CheckpointError(
        "checkpoint.not-found", f"{path}: there is no complete checkpoint here; give a run folder or a step_... folder"
    )
