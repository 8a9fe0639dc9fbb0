"""The bytes of an input, plain or compressed.

A stream is read in pieces of bounded size, also if a compressed file expands to a huge one. A truncated archive raises
`BadStream` instead of ending like a complete text.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Callable
from typing import IO, Any, cast

from engine.data.read.inputs import STDIN, InputFile

_MAGIC = re.compile(rb"(?P<gz>\x1f\x8b)|(?P<zst>\x28\xb5\x2f\xfd)|(?P<bz2>BZh[1-9]1AY&SY)|(?P<xz>\xfd7zXZ\0)")
_MAGIC_BYTES = 10
_FRAME_BYTES = 2048  # compressed zstd bytes fed at once: in the worst case they expand 32,768 times
_WINDOW_BYTES = 1 << 31  # zstd window limit: that of `zstd --long=31`


class BadStream(Exception):
    """The file cannot be read or decompressed any further; the message says why."""


class ByteStream:
    """Decompressed bytes of one input. Use as a context manager; `offset` is the number of bytes read so far."""

    def __init__(self, file: InputFile):
        self.file = file
        self.offset = 0
        self._ahead = b""
        self._broken: BadStream | None = None
        self._spooled: IO[bytes] | None = None
        try:
            self._raw = _open(file)
        except OSError as err:
            raise BadStream(f"{err.strerror or err}; check its permissions") from err
        self._compression = file.compression
        self.detected_compression = ""  # compression found in the content but not in the name
        if file.once:
            try:
                pipe = _PeekedPipe(self._raw)
            except OSError as err:
                raise BadStream(f"{err.strerror or err}") from err
            self._raw, self._compression = cast(IO[bytes], pipe), self._compression or compression_of(pipe.head)
        elif not self._compression and "://" not in file.name:
            self._compression = self.detected_compression = self._detect_compression()
        self._unpacked: Any = _unpack(self._raw, self._compression)

    def _detect_compression(self) -> str:
        try:
            head = self._raw.read(_MAGIC_BYTES)
            self._raw.seek(0)
        except OSError as err:
            raise BadStream(f"{err.strerror or err}, at its beginning") from err
        return compression_of(head)

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(self, *_: object) -> None:
        if self._spooled is not None:
            self._spooled.close()
        if self.file.name != STDIN:
            self._raw.close()

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, b"" at the end. Raises BadStream for a damaged or truncated archive.

        Bytes before the damage are returned first, so that only the lost part is reported as lost.
        """
        if self._ahead:
            data, self._ahead = self._ahead[:size], self._ahead[size:]
            self.offset += len(data)
            return data
        if self._broken is not None:
            raise self._broken
        pieces: list[bytes] = []
        missing = size
        try:
            while missing and (piece := self._piece(missing, self.offset + size - missing)):
                pieces.append(piece)
                missing -= len(piece)
        except BadStream as err:
            self._broken = err
            if not pieces:
                raise
        self.offset += size - missing
        return b"".join(pieces)

    def peek(self, size: int) -> bytes:
        """The bytes that `read` returns next, without consuming them: `size` or more, fewer only at the end."""
        if len(self._ahead) < size:
            ahead, self._ahead = self._ahead, b""
            try:
                more = self.read(size - len(ahead))
            except BadStream:
                if not ahead:
                    raise
                more = b""
            self.offset -= len(more)
            self._ahead = ahead + more
        return self._ahead

    def _piece(self, size: int, offset: int) -> bytes:
        if not self._compression:
            try:
                return cast(bytes, self._unpacked.read(size))
            except OSError as err:
                raise BadStream(f"{err.strerror or err}, after {offset:,} bytes") from err
        done = f"after {offset:,} unpacked bytes or a little later"
        try:
            data: bytes = self._unpacked.read1(size)
        except EOFError as err:
            raise BadStream(f"the archive ends too early, {done}") from err
        except (zlib.error, lzma.LZMAError) as err:
            raise BadStream(f"the archive is damaged, {done}: {err}") from err
        except OSError as err:  # the decompressors raise it without errno for damage
            problem = f"{err.strerror}, {done}" if err.errno else f"the archive is damaged, {done}: {err}"
            raise BadStream(problem) from err
        if not data and not offset and not self._raw.tell():
            raise BadStream("the archive is empty: it does not even have a header")
        return data

    def skip(self, size: int, on_data: Callable[[bytes], None] | None = None) -> None:
        """Skip `size` bytes and pass them to `on_data`. Without it a plain file is not read, only a compressed one."""
        if on_data is None and not self._compression and not self.file.once:
            self.offset += size
            self._raw.seek(self.offset)
            self._ahead = b""
            return
        while size:
            data = self.read(min(size, 1 << 20))
            if not data:
                raise BadStream("is shorter than it was when the work began")
            size -= len(data)
            if on_data is not None:
                on_data(data)

    def seekable(self) -> IO[bytes]:
        """A seekable file, for formats that are read from their end; decompressed to a temporary file if necessary."""
        if not self._compression and not self.file.once:
            return self._raw
        try:
            if self._spooled is None:
                self._spooled = tempfile.TemporaryFile()  # noqa: SIM115  (closed by __exit__)
                while data := self.read(1 << 20):
                    self._spooled.write(data)
            self._spooled.seek(0)
        except OSError as err:
            raise BadStream(
                f"cannot be decompressed into {tempfile.gettempdir()} (TMPDIR): {err.strerror or err}"
            ) from err
        return self._spooled

    def consumed(self) -> int:
        """Stored bytes read so far, for progress."""
        return self._raw.tell()

    def describe_change(self) -> str:
        """How the file has changed since it was listed; "" if it has not, and for pipes and URLs (not checked)."""
        if self.file.once or "://" in self.file.name:
            return ""
        now = os.fstat(self._raw.fileno())
        if (now.st_size, str(now.st_mtime_ns)) == (self.file.num_bytes, self.file.stamp):
            return ""
        return f"it had {self.file.num_bytes:,} bytes when the work began, and has {now.st_size:,} now"

    def shrank(self) -> bool:
        """Whether the file has become shorter, so that some of its content may be lost."""
        return bool(self.describe_change()) and os.fstat(self._raw.fileno()).st_size < self.file.num_bytes


def _open(file: InputFile) -> IO[bytes]:
    if file.name == STDIN:
        return sys.stdin.buffer
    if "://" in file.name:
        import fsspec

        try:
            return fsspec.open(file.name, "rb").open()
        except OSError:
            raise
        except Exception as err:
            raise OSError(f"{type(err).__name__}: {err}") from err
    return open(file.name, "rb")


def compression_of(head: bytes) -> str:
    """File suffix (".gz", ...) of the compression whose magic bytes `head` starts with; "" for none."""
    found = _MAGIC.match(head)
    return f".{found.lastgroup}" if found else ""


class _PeekedPipe:
    """A stream that cannot seek; its first bytes are read ahead into `head`."""

    def __init__(self, raw: IO[bytes]):
        self._raw, self._count = raw, 0
        self.head = self._head = raw.read(_MAGIC_BYTES)

    def read(self, size: int = -1) -> bytes:
        if self._head:
            size = len(self._head) if size < 0 else size
            data, self._head = self._head[:size], self._head[size:]
        else:
            data = self._raw.read(size)
        self._count += len(data)
        return data

    def tell(self) -> int:
        return self._count

    def close(self) -> None:
        self._raw.close()


def _unpack(raw: IO[bytes], compression: str) -> IO[bytes]:
    unpackers: dict[str, Callable[[IO[bytes]], Any]] = {
        ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
        ".bz2": lambda raw: io.BufferedReader(_ConcatenatedStreams(raw, bz2.BZ2Decompressor), 1 << 18),
        ".xz": lambda raw: io.BufferedReader(_ConcatenatedStreams(raw, lzma.LZMADecompressor, padding=b"\0"), 1 << 18),
        ".zst": lambda raw: io.BufferedReader(_ConcatenatedStreams(raw, _ZstdFrame, _FRAME_BYTES), 1 << 18),
    }
    return unpackers[compression](raw) if compression else raw


class _ZstdFrame:
    """A zstd frame with the interface of the standard library's decompressors."""

    needs_input = True

    def __init__(self) -> None:
        import zstandard

        new = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
        self._error, self._frame = zstandard.ZstdError, new.decompressobj()

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """All output of `data`: the library has no max_length, so callers pass little input at a time."""
        try:
            return self._frame.decompress(data)
        except self._error as err:
            raise zlib.error(str(err)) from err

    @property
    def eof(self) -> bool:
        return bool(self._frame.eof)

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data


class _ConcatenatedStreams(io.RawIOBase):
    """Reads one or more concatenated compressed streams.

    The libraries' own readers silently end at trailing garbage or at a truncated stream; this one raises.
    """

    def __init__(self, raw: IO[bytes], new: Callable[[], Any], at_once: int = 1 << 16, padding: bytes = b""):
        self._raw, self._new, self._at_once, self._padding = raw, new, at_once, padding
        self._member: Any = None
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input and (self._member is None or self._member.needs_input):
                self._input = self._raw.read(self._at_once)
                if not self._input:
                    if self._member is not None:
                        raise EOFError
                    return 0
            if self._member is None:
                self._input = self._input.lstrip(self._padding) if self._padding else self._input
                if not self._input:
                    continue
                self._member = self._new()
            data, self._input = self._input, b""
            self._output = memoryview(self._member.decompress(data, 1 << 18))
            if self._member.eof:
                self._input, self._member = self._member.unused_data, None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size
