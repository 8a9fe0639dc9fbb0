"""Reads torch's zip archives (.pt files, and the blobs in .distcp files), memory-mapped and without unpickling.

An archive has NAME/data.pkl, which describes the tensors (read by `symbolic`), and NAME/data/N, the raw little-endian
storages, uncompressed. All sizes, offsets, shapes and strides in a file are checked against the actual bytes, with
Python integers, before anything is read. Storages stay mapped: reading a rectangle copies only that rectangle.
Checksums: torch writes the CRC-32 of each storage (0 if disabled) but does not check it on load. Here it is checked
when a storage is first read.
"""

from __future__ import annotations

import io
import math
import mmap
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.interop.megatron.symbolic import Call, Global, Persistent, is_call, parse, shown

MAX_DIRECTORY_BYTES = 16 << 20  # of an archive's table of contents: about 200,000 storages
MAX_DIMS = 8

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Tensors are copied as unsigned integers, because numpy has no bfloat16. Item size -> dtype.
_UINTS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def map_file(path: Path) -> memoryview:
    """Memory-map a file read-only. Raises CheckpointError."""
    try:
        if not path.is_file():
            raise CheckpointError("interop.megatron-file-missing", f"{path}: is missing, or not a regular file")
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:
        raise CheckpointError("interop.megatron-file-unreadable", f"{path}: cannot be mapped: {error}") from None


@dataclass(frozen=True)
class Record:
    """A member of an archive: its bytes and its CRC-32 in the archive (0: none)."""

    data: memoryview
    crc: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a mapped storage. offset, strides: in values, not bytes."""

    archive: Archive
    record: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self, begin: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Copy the rectangle of `shape` at `begin`. The caller guarantees that it is inside the tensor."""
        data = self.archive.read_member(self.record)
        size = self.dtype.itemsize
        first = self.offset + sum(b * s for b, s in zip(begin, self.strides))
        strides = tuple(s * size for s in self.strides)
        values = np.ndarray(shape, _UINTS[size], data, first * size, strides).copy()
        return torch.from_numpy(values).view(self.dtype)


@dataclass
class Archive:
    """An open archive. value: parsed data.pkl; tensors in it are calls, which `tensor` converts to StoredTensors."""

    where: str
    records: dict[str, Record]
    value: Any
    _checked: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, data: memoryview, where: str) -> Archive:
        """Read an archive's table of contents and data.pkl. Raises CheckpointError."""
        if bytes(data[:4]) != b"PK\x03\x04":
            raise CheckpointError(
                "interop.megatron-archive-not-zip",
                f"{where}: is not a zip archive, which torch writes since 1.6; save it again with a newer torch",
            )
        archive = cls(where, _records(data, where), None)
        if (order := archive.records.get("byteorder")) is not None and bytes(order.data[:8]) != b"little":
            raise CheckpointError(
                "interop.megatron-archive-byte-order",
                f"{where}: byte order {shown(bytes(order.data[:8]))}; only little-endian is read",
            )
        archive.value = parse(archive.read_member("data.pkl"), f"{where}: data.pkl")
        return archive

    def read_member(self, name: str) -> memoryview:
        """The bytes of a member; its checksum is verified on first use."""
        record = self.records.get(name)
        if record is None:
            raise CheckpointError(
                "interop.megatron-archive-member-missing",
                f"{self.where}: has no {shown(name)}; it is damaged or not a torch archive",
            )
        if name not in self._checked:
            if record.crc and (found := zlib.crc32(record.data)) != record.crc:
                raise CheckpointError(
                    "interop.megatron-archive-checksum-differs",
                    f"{self.where}: {name}: damaged: checksum {found:08x}, the archive lists {record.crc:08x}; "
                    "use another copy",
                )
            self._checked.add(name)
        return record.data

    def tensor(self, value: object, name: str) -> StoredTensor:
        """Convert a call from `self.value` to a tensor. name: for messages. Raises CheckpointError."""
        where = f"{self.where}: {name}"
        if is_call(value, "torch._utils _rebuild_parameter") and isinstance(value, Call) and value.args:
            value = value.args[0]
        if not isinstance(value, Call) or not is_call(value, "torch._utils _rebuild_tensor_v2"):
            raise CheckpointError("interop.megatron-not-a-tensor", f"{where}: is {shown(value)}, not a plain tensor")
        if len(value.args) < 4 or not isinstance(value.args[0], Persistent):
            raise CheckpointError("interop.megatron-not-a-tensor", f"{where}: a tensor without a storage")
        key, dtype = _storage(value.args[0].id, where)
        offset: object = value.args[1]
        shape, strides = sizes(value.args[2], where), sizes(value.args[3], where)
        if not is_count(offset) or len(shape) != len(strides):
            raise CheckpointError(
                "interop.megatron-tensor-malformed",
                f"{where}: shape {list(shape)} with strides {list(strides)} at {shown(offset)}",
            )
        record = self.records.get(f"data/{key}")
        number = math.prod(shape)
        have = len(record.data) // dtype.itemsize if record else 0
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
        if record is None or number > have or (number and last >= have):
            raise CheckpointError(
                "interop.megatron-tensor-outside-storage",
                f"{where}: shape {list(shape)}, strides {list(strides)}, offset {offset} exceed the {have} "
                f"values of storage {key}; the file is damaged: use another copy",
            )
        return StoredTensor(self, f"data/{key}", dtype, offset, shape, strides)


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value is an integer from 0 to 2^63 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def sizes(value: object, where: str) -> tuple[int, ...]:
    """Check that a value is a shape: a tuple of at most MAX_DIMS counts, or torch.Size. Raises CheckpointError."""
    if isinstance(value, Call) and is_call(value, "torch Size") and len(value.args) == 1:
        value = value.args[0]
    if not isinstance(value, tuple) or len(value) > MAX_DIMS or not all(is_count(x) for x in value):
        raise CheckpointError("interop.megatron-shape-malformed", f"{where}: {shown(value)} is not a shape")
    return value


def _storage(identity: object, where: str) -> tuple[str, torch.dtype]:
    """("storage", type, key, device, number of values) -> (key, dtype)."""
    if isinstance(identity, tuple) and len(identity) == 5 and identity[0] == "storage":
        _, kind, key, _, _ = identity
        plain = isinstance(key, str) and re.fullmatch(r"[0-9]{1,9}", key)
        if plain and isinstance(kind, Global) and kind.module == "torch" and kind.name in STORAGES:
            return key, STORAGES[kind.name]
        raise CheckpointError(
            "interop.megatron-storage-not-read",
            f"{where}: storage {shown(key)} of type {shown(kind)} is not read, only {', '.join(STORAGES)}",
        )
    raise CheckpointError("interop.megatron-storage-malformed", f"{where}: {shown(identity)} is not a storage")


class _Window(io.RawIOBase):
    """File object for `zipfile` over a mapped range; a single read returns at most MAX_DIRECTORY_BYTES."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, origin: int = 0) -> int:
        at = offset + (0, self.at, len(self.data))[origin]
        if at < 0:
            raise OSError("seeks before the beginning")
        self.at = at
        return at

    def read(self, size: int = -1) -> bytes:
        end = len(self.data) if size < 0 else min(len(self.data), self.at + size)
        if end - self.at > MAX_DIRECTORY_BYTES:
            raise OSError(f"a table of contents of {end - self.at} bytes; at most {MAX_DIRECTORY_BYTES} are read")
        block = bytes(self.data[self.at : end])
        self.at = max(self.at, end)
        return block

    def readinto(self, buffer: Any) -> int:
        raise io.UnsupportedOperation


def _records(data: memoryview, where: str) -> dict[str, Record]:
    """Member name without the archive's prefix -> record."""
    try:
        with zipfile.ZipFile(_Window(data)) as archive:
            members = archive.infolist()
            end = archive.start_dir
        found: dict[str, Record] = {}
        for member in members:
            root, _, name = member.filename.partition("/")
            if not name or name in found or root != members[0].filename.partition("/")[0]:
                raise CheckpointError(
                    "interop.megatron-archive-member-repeated",
                    f"{where}: member {shown(member.filename)} is misplaced or duplicated",
                )
            found[name] = Record(_member(data, member, end, where), member.CRC)
        return found
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        NotImplementedError,
        struct.error,
        ValueError,
        OSError,
        EOFError,
        OverflowError,
        IndexError,
    ) as error:
        raise CheckpointError(
            "interop.megatron-archive-damaged", f"{where}: damaged archive ({shown(str(error))}); use another copy"
        ) from None


def _member(data: memoryview, member: zipfile.ZipInfo, end: int, where: str) -> memoryview:
    """The bytes of a member. Its local header must match the table of contents, and its bytes end before `end`."""
    at, name = member.header_offset, shown(member.filename)
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 or member.compress_size != member.file_size:
        raise CheckpointError(
            "interop.megatron-archive-member-compressed",
            f"{where}: member {name} is compressed or encrypted; torch stores plain bytes",
        )
    if at < 0 or at + 30 > end:
        raise CheckpointError(
            "interop.megatron-archive-member-out-of-place",
            f"{where}: member {name} starts at {at}, outside the archive",
        )
    magic, name_bytes, extra_bytes = struct.unpack("<4s22xHH", data[at : at + 30])
    begin = at + 30 + name_bytes + extra_bytes
    local = bytes(data[at + 30 : at + 30 + name_bytes])
    if magic != b"PK\x03\x04" or local != member.orig_filename.encode():
        raise CheckpointError(
            "interop.megatron-archive-member-out-of-place",
            f"{where}: member {name}: its header is not at {at}; the archive is damaged",
        )
    if begin + member.file_size > end:
        raise CheckpointError(
            "interop.megatron-archive-member-out-of-place",
            f"{where}: member {name} ends at {begin + member.file_size}, after the end of the data at {end}",
        )
    return data[begin : begin + member.file_size]
