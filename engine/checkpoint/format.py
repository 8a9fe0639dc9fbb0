"""The checkpoint format: a folder of safetensors files and one JSON manifest, written last.

    checkpoints/step_00000100/
        manifest.json            schema, step, config, data, and where every tensor lies
        rank00000.safetensors    what each rank wrote: rectangles of canonical tensors

Tensors are *canonical* (unfused, global; see engine.sharding) and of three kinds: "model" (the master weights),
"exp_avg" and "exp_avg_sq". The manifest lists for each the global shape, the dtype and the rectangles that make it up,
so any layout reads any layout's checkpoint. A folder is complete when its manifest is there: it is written under a
temporary name, synced and renamed as a whole. "Latest" is the highest complete step; there is no pointer to go stale.
No pickle anywhere.
"""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from engine.errors import CheckpointError
from engine.files import sync_file

SCHEMA = 1
MANIFEST = "manifest.json"
MODEL = "model"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_FILE_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_STEP_DIR = re.compile(r"step_(\d{8,})")


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Slice(_Entry):
    """A rectangle of a tensor: which file and key hold it, and where it belongs."""

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class TensorEntry(_Entry):
    """A canonical tensor: global shape, dtype name of safetensors, and the rectangles that make it up."""

    shape: tuple[int, ...]
    dtype: str
    slices: tuple[Slice, ...]


class FileEntry(_Entry):
    """Size in bytes and XXH3-128 digest of one file."""

    size: int
    xxh3_128: str


class Ancestor(_Entry):
    """A checkpoint that this run went on from; `allowed`: what differed by permission, name -> (old, new)."""

    checkpoint: str
    step: int
    consumed_samples: int
    layout: dict[str, int]
    versions: dict[str, str]
    config: str
    allowed: dict[str, tuple[str, str]] = {}


class Manifest(_Entry):
    """Everything a checkpoint is; see the module text. `data` identifies corpus and tokenizer.

    optimizer: "steps", updates done (fewer than `step` where fp16 left some out), and the state of the loss scale.
    lineage: the checkpoints that the run went on from, oldest first.
    """

    schema_version: int = SCHEMA
    step: int
    consumed_samples: int
    consumed_tokens: int
    optimizer: dict[str, float] = {}
    config: dict[str, Any]
    data: dict[str, Any]
    layout: dict[str, int]
    versions: dict[str, str]
    lineage: tuple[Ancestor, ...] = ()
    tensors: dict[str, dict[str, TensorEntry]]
    files: dict[str, FileEntry]


def step_dir(root: Path, step: int) -> Path:
    """Folder of the checkpoint of one step."""
    return root / f"step_{step:08d}"


def read_manifest(folder: Path) -> Manifest:
    """Parse and check a manifest: schema, plain names, every file there with its size (digests: `verify_files`)."""
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
        if isinstance(raw, dict) and raw.get("schema_version") != SCHEMA:
            raise CheckpointError(
                f"{path}: schema version {raw.get('schema_version')}, this engine reads {SCHEMA}: "
                "use the engine version that wrote it"
            )
        manifest = Manifest.model_validate(raw)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST}, so this is not a complete checkpoint") from None
    except (OSError, ValueError, ValidationError) as error:
        raise CheckpointError(f"{path}: damaged manifest ({error}); take another checkpoint") from None
    for name, entry in manifest.files.items():
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{path}: {name!r} is not a plain file name; the manifest was tampered with")
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry.size:
            found = "missing" if size is None else f"{size} bytes long"
            raise CheckpointError(f"{file}: {found}, the manifest says {entry.size} bytes; take another checkpoint")
    return manifest


def file_digest(file: Path) -> str:
    """XXH3-128 of a file's bytes, hexadecimal."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as f:
        while block := f.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify_files(folder: Path, manifest: Manifest, *, part: int = 0, parts: int = 1) -> None:
    """Compare the digests of every `parts`-th file, from number `part` on, with the manifest."""
    for name in sorted(manifest.files)[part::parts]:
        found, wanted = file_digest(folder / name), manifest.files[name].xxh3_128
        if found != wanted:
            raise CheckpointError(
                f"{folder / name}: damaged: digest {found}, the manifest says {wanted}; take another checkpoint"
            )


def complete_steps(root: Path) -> list[int]:
    """Steps of all complete checkpoints under `root`, ascending. Temporary and damaged folders do not count."""
    steps = []
    for folder in root.glob("step_*"):
        match = _STEP_DIR.fullmatch(folder.name)
        if match is None:
            continue
        try:
            read_manifest(folder)
        except CheckpointError:
            continue
        steps.append(int(match[1]))
    return sorted(steps)


def find(path: Path) -> Path:
    """The checkpoint folder meant by a path: itself, or the newest one of a run or checkpoints folder."""
    if (path / MANIFEST).exists() or _STEP_DIR.fullmatch(path.name):
        read_manifest(path)
        return path
    for root in (path / "checkpoints", path):
        if steps := complete_steps(root):
            return step_dir(root, steps[-1])
    raise CheckpointError(f"{path}: no complete checkpoint here; give a run folder or a step_... folder")


def tensor_bytes(x: Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    flat = x.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write_safetensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> FileEntry:
    """Write a safetensors file tensor by tensor (no second copy of the whole), sync it, and return size and digest.

    The library's own writer takes the whole file as one bytes object; this streams and digests in the same pass.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, x in tensors.items():
        begin, end = end, end + x.numel() * x.element_size()
        header[name] = {"dtype": DTYPE_NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = xxhash.xxh3_128(), 0
    with file.open("wb") as f:
        head: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
        for block in chain(head, map(tensor_bytes, tensors.values())):
            f.write(block)
            digest.update(block)
            size += len(block)
        sync_file(f)
    return FileEntry(size=size, xxh3_128=digest.hexdigest())
