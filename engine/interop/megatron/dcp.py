"""Reads checkpoints of torch.distributed.checkpoint (DCP), such as Megatron's `torch_dist`, without unpickling.

    .metadata        a pickle: name -> global shape, dtype and chunks; (name, offset) -> file, position, length
    __R_N.distcp     concatenated blobs, each a torch archive (`archive`) with one chunk

`.metadata` is parsed to inert nodes (`symbolic`), and everything in it is checked: file names are plain and in the same
folder, ranges are inside the files, chunks are inside the shapes, and blobs have exactly the listed shape and dtype.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError
from engine.interop.megatron.archive import Archive, StoredTensor, is_count, map_file, sizes
from engine.interop.megatron.sharded_tensor import ShardedTensor, TensorPart
from engine.interop.megatron.symbolic import Call, Global, is_call, parse, shown

METADATA = ".metadata"
_DCP_MODULE = "torch.distributed.checkpoint.metadata"
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_DTYPES = {str(x).removeprefix("torch."): x for x in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


@dataclass(frozen=True)
class _BlobRange:
    """File and byte range of a blob."""

    file: str
    offset: int
    length: int


class DcpFolder:
    """The tensors of a DCP folder: `names()` lists them, `tensor(name)` opens one. Files are mapped on first use."""

    def __init__(self, folder: Path):
        self.folder, self.where = folder, str(folder / METADATA)
        root = parse(map_file(folder / METADATA), self.where)
        state = self._state(root, f"{_DCP_MODULE} Metadata", "the metadata")
        entries, places = state.get("state_dict_metadata"), state.get("storage_data")
        if not isinstance(entries, dict) or not isinstance(places, dict):
            raise CheckpointError(
                "interop.megatron-metadata-empty",
                f"{self.where}: has no tensors or no storage locations; it is damaged or not DCP metadata",
            )
        if not all(isinstance(name, str) for name in entries):
            raise CheckpointError(
                "interop.megatron-tensor-name-malformed",
                f"{self.where}: the name of a tensor is not a string; the file is damaged",
            )
        self._entries: dict[str, Any] = entries
        self._places = self._index(places)
        self._files: dict[str, memoryview] = {}
        self._blobs: dict[_BlobRange, StoredTensor] = {}

    def names(self) -> list[str]:
        """Names of all tensors (without byte objects)."""
        return [
            name for name, entry in self._entries.items() if not is_call(entry, f"{_DCP_MODULE} BytesStorageMetadata")
        ]

    def tensor(self, name: str) -> ShardedTensor:
        """A tensor whose chunks are not yet opened, and not yet checked to cover it. Raises CheckpointError."""
        where = f"{self.where}: {shown(name)}"
        state = self._state(self._entries[name], f"{_DCP_MODULE} TensorStorageMetadata", shown(name))
        shape, chunks = sizes(state.get("size"), where), state.get("chunks")
        properties = state.get("properties")
        if not isinstance(properties, Call) or not isinstance(properties.state, tuple) or not isinstance(chunks, list):
            raise CheckpointError(
                "interop.megatron-entry-malformed", f"{where}: has no dtype or no chunks; the file is damaged"
            )
        kind = properties.state[0] if properties.state else None
        if not isinstance(kind, Global) or kind.module != "torch" or kind.name not in _DTYPES:
            raise CheckpointError(
                "interop.megatron-dtype-not-read",
                f"{where}: dtype {shown(kind)} is not read, only {', '.join(_DTYPES)}",
            )
        dtype = _DTYPES[kind.name]
        parts = []
        for chunk in chunks:
            fields = self._state(chunk, f"{_DCP_MODULE} ChunkStorageMetadata", shown(name))
            offset, size = sizes(fields.get("offsets"), where), sizes(fields.get("sizes"), where)
            if len(offset) != len(shape) or len(size) != len(shape):
                raise CheckpointError(
                    "interop.megatron-chunk-malformed",
                    f"{where}: chunk {list(size)} at {list(offset)} of shape {list(shape)}; damaged",
                )
            place = self._places.get((name, offset))
            if place is None:
                raise CheckpointError(
                    "interop.megatron-chunk-missing",
                    f"{where}: the chunk at {list(offset)} has no storage location; the file is damaged",
                )
            parts.append(TensorPart(offset, size, self._opener(name, place, size, dtype), (0,) * len(shape)))
        return ShardedTensor(where, dtype, shape, tuple(parts))

    def _opener(
        self, name: str, place: _BlobRange, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Callable[[], StoredTensor]:
        return partial(self._blob, name, place, shape, dtype)

    def _blob(self, name: str, place: _BlobRange, shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
        if place not in self._blobs:
            if place.file not in self._files:
                self._files[place.file] = map_file(self.folder / place.file)
            data, end = self._files[place.file], place.offset + place.length
            where = f"{self.folder / place.file}: {shown(name)}, bytes {place.offset} to {end}"
            if end > len(data):
                raise CheckpointError(
                    "interop.megatron-file-cut-short",
                    f"{where}: the file has {len(data)} bytes; it is truncated: use another copy",
                )
            archive = Archive.open(data[place.offset : end], where)
            self._blobs[place] = archive.tensor(archive.value, "the chunk")
        found = self._blobs[place]
        if found.shape != shape or found.dtype != dtype:
            raise CheckpointError(
                "interop.megatron-chunk-differs-from-metadata",
                f"{self.folder / place.file}: {shown(name)}: is {found.dtype} of shape {list(found.shape)}, "
                f"but {METADATA} lists {dtype} of {list(shape)}; the files do not belong together",
            )
        return found

    def _index(self, places: dict[Any, Any]) -> dict[tuple[str, tuple[int, ...]], _BlobRange]:
        """(name, offset of the chunk) -> range of its blob, without byte objects."""
        found: dict[tuple[str, tuple[int, ...]], _BlobRange] = {}
        for index, place in places.items():
            key = self._state(index, f"{_DCP_MODULE} MetadataIndex", "a storage location")
            info = self._state(place, "torch.distributed.checkpoint.filesystem _StorageInfo", "a storage location")
            name, where = key.get("fqn"), f"{self.where}: {shown(key.get('fqn'))}"
            if not isinstance(name, str):
                raise CheckpointError(
                    "interop.megatron-tensor-name-malformed", f"{where}: is not a name; the file is damaged"
                )
            if key.get("offset") is None:
                continue
            file, offset, length = info.get("relative_path"), info.get("offset"), info.get("length")
            if not isinstance(file, str) or not _FILE.fullmatch(file):
                raise CheckpointError(
                    "interop.megatron-file-name-not-plain",
                    f"{where}: is stored in {shown(file)}, which is not a plain file name; the file was manipulated",
                )
            if not is_count(offset) or not is_count(length):
                raise CheckpointError(
                    "interop.megatron-place-malformed",
                    f"{where}: is stored at {shown(offset)} with {shown(length)} bytes; damaged",
                )
            if info.get("transform_descriptors"):
                raise CheckpointError(
                    "interop.megatron-chunk-compressed",
                    f"{where}: is compressed or encrypted; save it without DCP extensions",
                )
            at = sizes(key["offset"], where)
            if (name, at) in found:
                raise CheckpointError(
                    "interop.megatron-chunk-repeated", f"{where}: the chunk at {list(at)} is listed twice; damaged"
                )
            found[name, at] = _BlobRange(file, offset, length)
        return found

    def _state(self, value: object, name: str, label: str) -> dict[Any, Any]:
        """Attributes of an object of class `name`. label: for messages. Raises CheckpointError for anything else."""
        if not isinstance(value, Call) or not is_call(value, name) or not isinstance(value.state, dict):
            raise CheckpointError(
                "interop.megatron-object-of-another-class",
                f"{self.where}: {label} is {shown(value)}, not {name.split()[-1]}; damaged",
            )
        return value.state
