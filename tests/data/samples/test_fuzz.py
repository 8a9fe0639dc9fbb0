"""Damaged corpora: for any changed bytes, opening raises a DataError or every read stays inside the files."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.samples import indexed
from engine.data.samples.indexed import IndexedDataset
from engine.data.samples.order import SampleOrder
from engine.errors import DataError
from tests.support.corpora import BUILT, corpus

EDGES = [0, 1, 2, -1, 127, 128, 255, 256, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63)]
VOCAB = 500


def mutated(raw: bytes, rng: np.random.Generator) -> bytes:
    """One to three changes: a bit, a byte, an integer at a likely place, truncation, a repeat, a gap, random bytes."""
    out = bytearray(raw)
    for _ in range(int(rng.integers(1, 4))):
        kind, at = int(rng.integers(8)), int(rng.integers(max(1, len(out))))
        if kind == 0 and out:
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 1 and out:
            out[at] = int(rng.integers(256))
        elif kind in (2, 3, 4):
            size = int(rng.choice([1, 2, 4, 8]))
            at = int(rng.choice([9, 17, 18, 26])) if kind == 2 else 34 + (at // 4 * 4)
            value = int(rng.choice(len(EDGES)))
            out[at : at + size] = (EDGES[value] % 2 ** (8 * size)).to_bytes(size, "little")
        elif kind == 5:
            del out[at:]
        elif kind == 6:
            other = int(rng.integers(max(1, len(out))))
            out[at:at] = out[other : other + int(rng.integers(1, 40))]
        else:
            out[at : at + int(rng.integers(1, 20))] = rng.bytes(int(rng.integers(0, 20)))
    return bytes(out)


def look(prefix: Path) -> str:
    """Open and read as training does. Returns the outcome; anything but a DataError or valid reads fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = IndexedDataset(prefix, VOCAB)
    except DataError as error:
        text = str(error)
        assert str(prefix) in text and any(word in text for word in ("offset", "size", "id ", "JSON", "document")), text
        return "refused at open"
    pointers, lengths = data.pointers.astype(object), data.lengths.astype(object)
    size = data.dtype.itemsize
    assert all(
        p >= 0 and p % size == 0 and n >= 0 and p + n * size <= data.tokens.nbytes for p, n in zip(pointers, lengths)
    )
    assert sum(lengths) == data.num_tokens and data.tokens.nbytes == Path(f"{prefix}.bin").stat().st_size
    try:
        for native in (True, False) if BUILT else (False,):
            order = SampleOrder(data, 5, 1, native=native)
            rows = order.gather(np.arange(min(40, order.samples_per_epoch + 2)))
            assert rows.min() >= 0 and rows.max() < VOCAB
    except DataError:
        return "refused while reading"
    return "read, all of it inside"


def fuzz(tmp_path: Path, rounds: int, seed: int) -> Counter[str]:
    rng = np.random.default_rng(seed)
    corpus(tmp_path / "good", [3, 0, 5, 1, 9, 2, 11, 7, 6, 4], vocab_size=VOCAB)
    good = {suffix: Path(f"{tmp_path / 'good'}.{suffix}").read_bytes() for suffix in ("bin", "idx", "json")}
    seen: Counter[str] = Counter()
    for _ in range(rounds):
        changed = dict(good)
        for suffix in rng.choice(["bin", "idx", "idx", "idx", "json"], int(rng.integers(1, 3)), replace=False):
            changed[str(suffix)] = mutated(changed[str(suffix)], rng)
        for suffix, raw in changed.items():
            Path(f"{tmp_path / 'bad'}.{suffix}").write_bytes(raw)
        seen[look(tmp_path / "bad")] += 1
    return seen


def test_damage_is_rejected_or_harmless(tmp_path: Path) -> None:
    seen = fuzz(tmp_path, 800, 0)
    assert seen["refused at open"] > 400 and seen["read, all of it inside"] > 8 and sum(seen.values()) == 800


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_damage_is_rejected_or_harmless_at_length(tmp_path: Path) -> None:
    assert sum(fuzz(tmp_path, 22_000, 1).values()) == 22_000


def test_a_check_that_is_left_out_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "_check_sequences", lambda *_: None)
    with pytest.raises((AssertionError, ValueError)):
        fuzz(tmp_path, 2000, 0)


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 5), st.integers(-2, 2**31 - 1)), max_size=8),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    wrong=st.one_of(st.none(), st.tuples(st.integers(0, 7), st.sampled_from(EDGES[:8] + EDGES[12:]))),
    most=st.one_of(st.integers(0, 60), st.just(2**40), st.just(2**63 - 1)),
    threads=st.integers(1, 4),
    many=st.booleans(),
)
@pytest.mark.skipif(not BUILT, reason="engine._index is not built")
def test_native_checks_say_what_the_reference_says(
    lengths: list[int], itemsize: int, wrong: tuple[int, int] | None, most: int, threads: int, many: bool
) -> None:
    array = np.array(lengths, np.int32)
    if many:  # boundaries of blocks (4,096 sequences) and threads (4,100), and random places around them
        fill = np.arange(4094, dtype=np.int32) % 5
        array = np.concatenate([fill, array, fill, array[:3], fill])
    pointers = (np.cumsum(array, dtype=np.int64) - array) * itemsize
    at = wrong[0] + 4092 * many if wrong else 0
    if wrong and at < len(pointers):
        pointers[at] = wrong[1]
    module = indexed.native_index()
    assert module is not None
    assert module.check_sequences(array, pointers, itemsize, most, threads) == indexed.check_sequences(
        array, pointers, itemsize, most
    )
    assert module.check_rising(pointers, threads) == indexed.check_rising(pointers)
    boundaries = np.arange(len(array) + 1, dtype=np.int64)
    boundaries[at % len(boundaries)] = wrong[1] if wrong else at % len(boundaries)
    assert module.check_rising(boundaries, threads) == indexed.check_rising(boundaries)


@pytest.mark.skipif(not BUILT, reason="engine._index is not built")
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_every_place_is_looked_at(threads: int) -> None:
    """One wrong number anywhere, also at boundaries of blocks and threads, is found at its position."""
    module = indexed.native_index()
    assert module is not None
    lengths = (np.arange(9001) % 7).astype(np.int32)
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * 2
    total = int(lengths.sum()) * 2
    assert module.check_sequences(lengths, pointers, 2, total, threads) == (-1, total)
    cu_seqlens = [*range(0, 9001, 4096), *range(0, 9001, 9001 // threads + 1)]
    for i in sorted({0, 9000, *range(0, 9001, 97), *(b + d for b in cu_seqlens for d in (-2, -1, 0, 1) if b)}):
        pointers[i] += 2
        assert module.check_sequences(lengths, pointers, 2, total, threads) == (i, pointers[i] - 2)
        assert module.check_rising(pointers, threads) == (i + 1 if lengths[i : i + 1] == 0 and i < 9000 else -1)
        pointers[i] -= 2
        pointers[i:] += 2  # a gap: everything after it is consistent again
        assert module.check_sequences(lengths, pointers, 2, total + 2, threads) == (i, pointers[i] - 2)
        pointers[i:] -= 2
        kept, lengths[i] = lengths[i], -1
        assert module.check_sequences(lengths, pointers, 2, total, threads) == (i, -1)
        lengths[i] = kept


@pytest.mark.skipif(not BUILT, reason="engine._index is not built")
def test_native_checks_reject_wrong_arguments() -> None:
    module = indexed.native_index()
    assert module is not None
    one, two = np.zeros(1, np.int32), np.zeros(2, np.int64)
    for arguments in [
        (one, two, 2, 0),
        (one, two[:1], 0, 0),
        (one, two[:1], 9, 0),
        (one, two[:1], 2, -1),
        (two, two, 2, 0),
        (one, two[:1], 2, 0, 0),
    ]:
        with pytest.raises(ValueError, match=r"check_sequences|lengths"):
            module.check_sequences(*arguments)
    longest = np.full(3, 2**31 - 1, np.int32)
    assert module.check_sequences(longest, np.cumsum(longest, dtype=np.int64) * 8 - (2**31 - 1) * 8, 8, 2**62)[0] == -1
