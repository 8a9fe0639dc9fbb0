"""The .bin/.idx format: Megatron's bytes, and a clear error for every kind of invalid file."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.samples.index_file import write_index
from engine.data.samples.indexed import IndexedDataset, paths_of
from engine.data.samples.indexed_writer import IndexedWriter
from engine.data.samples.sidecar import entropy
from engine.errors import DataError
from tests.support.errors import raises

# Two documents [1, 2, 3], [7] with an empty one between them, u16, built with struct from the format's table.
GOLDEN_IDX = (
    b"MMIDIDX\x00\x00"
    + struct.pack("<Q", 1)
    + struct.pack("<B", 8)
    + struct.pack("<Q", 2)
    + struct.pack("<Q", 4)
    + struct.pack("<2i", 3, 1)
    + struct.pack("<2q", 0, 6)
    + struct.pack("<4q", 0, 1, 1, 2)
)
GOLDEN_BIN = struct.pack("<4H", 1, 2, 3, 7)


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 100) -> IndexedDataset:
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.int64))
        writer.finish({"eod": 0})
    return IndexedDataset(prefix, vocab_size)


def golden(tmp_path: Path, idx: bytes = GOLDEN_IDX, tokens: bytes = GOLDEN_BIN) -> Path:
    (tmp_path / "g.bin").write_bytes(tokens)
    (tmp_path / "g.idx").write_bytes(idx)
    return tmp_path / "g"


def test_golden_bytes_both_ways(tmp_path: Path) -> None:
    data = IndexedDataset(golden(tmp_path), vocab_size=8)
    assert [list(data[i]) for i in range(len(data))] == [[1, 2, 3], [7]]
    assert (data.num_documents, data.num_tokens, data.dtype, data.meta) == (2, 4, np.uint16, {})
    assert data.lengths.dtype == np.int32 and data.pointers.dtype == np.int64
    assert [data.locate(p) for p in range(4)] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    written = write(tmp_path / "w", [[1, 2, 3], [], [7]], vocab_size=8)
    assert (tmp_path / "w.idx").read_bytes() == GOLDEN_IDX
    assert (tmp_path / "w.bin").read_bytes() == GOLDEN_BIN
    assert written.meta["num_empty_documents"] == 1


@pytest.mark.parametrize("code,dtype", [(1, "u1"), (2, "i1"), (3, "i2"), (4, "i4"), (5, "i8"), (8, "u2")])
def test_reads_every_integer_type_and_tolerates_modes(tmp_path: Path, code: int, dtype: str) -> None:
    size = np.dtype(dtype).itemsize
    idx = struct.pack("<9sQBQQ2i2q3q2b", b"MMIDIDX\0\0", 1, code, 2, 3, 3, 1, 0, 3 * size, 0, 1, 2, 0, 0)
    data = IndexedDataset(golden(tmp_path, idx, np.array([1, 2, 3, 7], dtype).tobytes()), vocab_size=8)
    assert data.dtype == np.dtype(dtype) and [list(data[i]) for i in range(2)] == [[1, 2, 3], [7]]


@pytest.mark.parametrize("vocab_size,dtype", [(2, "u2"), (65499, "u2"), (65500, "i4"), (200_000, "i4")])
def test_writer_dtype_rule(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    data = write(tmp_path / "c", [[0, vocab_size - 1]], vocab_size)
    assert data.dtype == np.dtype(dtype) and list(data[0]) == [0, vocab_size - 1]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(0, 69_999), max_size=6), max_size=12), st.sampled_from([70_000, 65_499]))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], vocab_size: int) -> None:
    documents = [[t % vocab_size for t in d] for d in documents]
    prefix = tmp_path_factory.mktemp("rt") / "a.b"
    data = write(prefix, documents, vocab_size)
    kept = [d for d in documents if d]
    flat = [t for d in kept for t in d]
    assert [list(data[i]) for i in range(len(data))] == kept
    assert data.meta["num_tokens"] == len(flat) == data.num_tokens
    assert data.meta["max_token"] == max(flat, default=-1)
    boundaries = np.frombuffer(paths_of(prefix)[1].read_bytes()[34 + 12 * len(kept) :], "<i8")
    assert list(np.diff(boundaries)) == [int(bool(d)) for d in documents]


def test_offsets_beyond_32_bits() -> None:
    """Two documents of 2^31 - 1 tokens and one behind them; only the .idx is written."""
    lengths, out = np.array([2**31 - 1, 2**31 - 1, 5], np.int32), io.BytesIO()
    write_index(out, np.dtype("<i4"), lengths)
    offsets = np.frombuffer(out.getvalue(), "<i8", 3, 34 + 4 * len(lengths))
    assert offsets.tolist() == [0, 4 * (2**31 - 1), 8 * (2**31 - 1)]


def test_sidecar_entropy(tmp_path: Path) -> None:
    assert write(tmp_path / "u", [[1, 2], [3, 4]]).meta["unigram_entropy"] == pytest.approx(np.log(4))
    assert entropy(np.array([0, 5, 0])) == 0.0 == entropy(np.zeros(3, np.int64))


def patched(offset: int, fmt: str, value: int | bytes) -> bytes:
    out = bytearray(GOLDEN_IDX)
    struct.pack_into(fmt, out, offset, value)
    return bytes(out)


@pytest.mark.parametrize(
    "idx,tokens,words",
    [
        (b"", GOLDEN_BIN, "0 bytes"),
        (GOLDEN_IDX[:20], GOLDEN_BIN, "20 bytes"),
        (GOLDEN_IDX[:-1], GOLDEN_BIN, "size: found 89 bytes, expected 90"),
        (GOLDEN_IDX + b"\0" * 3, GOLDEN_BIN, "size: found 93 bytes"),
        (patched(0, "<4s", b"TNTI"), GOLDEN_BIN, "offset 0 (magic)"),
        (patched(9, "<Q", 2), GOLDEN_BIN, "offset 9 (version): found 2"),
        (patched(17, "<B", 6), GOLDEN_BIN, "offset 17 (dtype code): found 6"),
        (patched(17, "<B", 0), GOLDEN_BIN, "offset 17 (dtype code): found 0"),
        (patched(18, "<Q", 2**63), GOLDEN_BIN, "size: found 90 bytes"),
        (patched(26, "<Q", 0), GOLDEN_BIN, "offset 26 (boundaries): found 0"),
        (patched(34, "<i", -3), GOLDEN_BIN, "offset 34 (length of sequence 0): found -3"),
        (patched(34, "<i", 4), GOLDEN_BIN, "offset 50 (pointer of sequence 1): found 6, expected 8"),
        (patched(38, "<i", 2), GOLDEN_BIN, "g.bin: size: found 8 bytes, expected >= 10"),
        (patched(38, "<i", 0), GOLDEN_BIN, "g.bin: size: found 8 bytes, expected 6"),
        (patched(42, "<q", 2), GOLDEN_BIN, "offset 42 (pointer of sequence 0): found 2, expected 0"),
        (patched(50, "<q", 2**40), GOLDEN_BIN, "offset 50 (pointer of sequence 1)"),
        (patched(58, "<q", 1), GOLDEN_BIN, "offset 58 (first document boundary): found 1"),
        (patched(66, "<q", 2), GOLDEN_BIN, "offset 74 (document boundary 2): found 1"),
        (patched(82, "<q", 3), GOLDEN_BIN, "offset 82 (last document boundary): found 3, expected 2"),
        (GOLDEN_IDX, GOLDEN_BIN[:-1], "g.bin: size: found 7 bytes, expected >= 8"),
        (GOLDEN_IDX, GOLDEN_BIN + b"\0\0", "g.bin: size: found 10 bytes, expected 8"),
        (GOLDEN_IDX, b"", "g.bin: size: found 0 bytes"),
    ],
)
def test_every_corruption_is_rejected(tmp_path: Path, idx: bytes, tokens: bytes, words: str) -> None:
    with raises(DataError, "samples.corpus-damaged", words):
        IndexedDataset(golden(tmp_path, idx, tokens))


def test_missing_file_and_suffix_in_prefix(tmp_path: Path) -> None:
    with raises(DataError, "samples.corpus-not-found", tmp_path / "nothing.idx"):
        IndexedDataset(tmp_path / "nothing")
    with raises(DataError, "samples.corpus-not-found", "without the suffix"):
        IndexedDataset(tmp_path / "nothing.bin")


def test_empty_corpus_opens(tmp_path: Path) -> None:
    data = write(tmp_path / "e", [[], []])
    assert (len(data), data.num_tokens, data.meta["max_token"]) == (0, 0, -1)


@pytest.mark.parametrize("with_sidecar", [True, False])
def test_tokens_outside_the_vocabulary_are_rejected_at_open(tmp_path: Path, with_sidecar: bool) -> None:
    write(tmp_path / "v", [[1, 2], [], [3, 9, 8], [99]], 100)
    if not with_sidecar:
        (tmp_path / "v.json").unlink()
    IndexedDataset(tmp_path / "v", 100)
    with raises(DataError, "samples.token-outside-vocabulary", "document 1, token 1: id 9 ", "[0, 9)"):
        IndexedDataset(tmp_path / "v", 9)


def test_negative_token_is_rejected_at_open(tmp_path: Path) -> None:
    idx = patched(17, "<B", 3)  # i16
    with raises(DataError, "samples.token-outside-vocabulary", "document 1, token 0: id -7"):
        IndexedDataset(golden(tmp_path, idx, struct.pack("<4h", 1, 2, 3, -7)), vocab_size=8)


def test_sidecar_of_another_file_is_ignored_with_a_warning(tmp_path: Path) -> None:
    write(tmp_path / "s", [[1, 2, 50]])
    meta = json.loads((tmp_path / "s.json").read_text())
    (tmp_path / "s.json").write_text(json.dumps({**meta, "num_tokens": 4, "max_token": 1}))
    with (
        pytest.warns(UserWarning, match="describes another file"),
        raises(DataError, "samples.token-outside-vocabulary", "id 50"),
    ):
        IndexedDataset(tmp_path / "s", 10)
    (tmp_path / "s.json").write_text("{")
    with raises(DataError, "samples.sidecar-unreadable", tmp_path / "s.json"):
        IndexedDataset(tmp_path / "s")


@pytest.mark.parametrize("bad", [[100], [-1], [3, 65536 + 3]])
def test_writer_rejects_and_leaves_nothing(tmp_path: Path, bad: list[int]) -> None:
    with (
        raises(DataError, "samples.token-outside-vocabulary", "document 1: id"),
        IndexedWriter(tmp_path / "w", 100) as writer,
    ):
        writer.add(np.array([1]))
        writer.add(np.array(bad))
    assert list(tmp_path.iterdir()) == []


def test_writer_left_early_keeps_the_old_corpus(tmp_path: Path) -> None:
    write(tmp_path / "o", [[1, 2]])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "o", 100) as writer:
        writer.add(np.array([5]))
        raise KeyboardInterrupt
    with raises(DataError, "samples.writer-not-finished"), IndexedWriter(tmp_path / "o", 100) as writer:
        writer.add(np.array([5]))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with raises(DataError, "samples.tokens-not-integers", "float64(1,)"), IndexedWriter(tmp_path / "o", 100) as writer:
        writer.add(np.array([0.5]))


def test_disk_errors_are_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with raises(DataError, "data.cannot-write", tmp_path / "file"):
        IndexedWriter(tmp_path / "file" / "w", 10)
    writer = IndexedWriter(tmp_path / "full", 100)
    writer.add(np.zeros(1 << 16, np.int64))
    writer._bin.close()
    with open("/dev/full", "wb") as full:
        writer._bin = full
        with raises(DataError, "data.disk-full", tmp_path), writer:
            writer.finish({})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
