"""The sample order: C++ == numpy == an oracle that materialises the whole stream."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.samples import keyed, native_index
from engine.data.samples.indexed import IndexedDataset
from engine.data.samples.keyed import derive, derive_key, permute
from engine.data.samples.order import ORDER_VERSION, SampleOrder
from engine.data.samples.stream import blocks_of
from engine.errors import DataError
from tests.support.corpora import BUILT, NATIVE, corpus
from tests.support.errors import raises


def raw_corpus(prefix: Path, lengths: list[int]) -> IndexedDataset:
    """Like `corpus`, but an empty document is a sequence of length 0, as other writers produce it."""
    total = sum(lengths)
    n = len(lengths)
    pointers = (np.cumsum(lengths) - lengths) * 4
    idx = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, n, n + 1) + np.array(lengths, "<i4").tobytes()
    Path(f"{prefix}.idx").write_bytes(idx + pointers.astype("<i8").tobytes() + np.arange(n + 1, dtype="<i8").tobytes())
    Path(f"{prefix}.bin").write_bytes(np.arange(1, total + 1, dtype="<i4").tobytes())
    return IndexedDataset(prefix)


def permutation_oracle(n: int, key: int, x: int) -> int:
    """One index through the Feistel network, from the definition, in Python integers."""
    if n == 1:
        return 0
    bits = 2
    while 2**bits < n:
        bits += 2
    half = bits // 2
    while True:
        left, right = divmod(x, 2**half)
        for r in range(8):
            mixed = keyed.mix64((right + keyed.mix64((key + (r + 1) * 0x9E3779B97F4A7C15) % 2**64)) % 2**64)
            left, right = right, left ^ (mixed % 2**half)
        x = left * 2**half + right
        if x < n:
            return x


def document_oracle(documents: int, seed: int, epoch: int, blocks: int, group_blocks: int) -> list[int]:
    """All documents in the order of an epoch, from the definition."""
    keys = {purpose: derive_key(seed, purpose, epoch) for purpose in ("blocks", "documents", "rounds")}
    at_place = {permutation_oracle(blocks, keys["blocks"], block): block for block in range(blocks)}
    result: list[int] = []
    for group in range(-(-blocks // group_blocks)):
        members = []  # the documents of each block, in the order of its passes
        for place in range(group * group_blocks, min((group + 1) * group_blocks, blocks)):
            block = at_place[place]
            inside = list(range(block * documents // blocks, (block + 1) * documents // blocks))
            turn = derive(keys["documents"], block) % len(inside)
            members.append(inside[turn:] + inside[:turn])
        for number in range(4 * max(map(len, members))):
            low, high = ((number % 4 + end) * len(members) // 4 for end in (0, 1))
            key = derive(derive(keys["rounds"], group), number)
            for i in range(high - low):
                member = members[low + permutation_oracle(high - low, key, i)]
                result += member[number // 4 : number // 4 + 1]
    return result


def stream_oracle(data: IndexedDataset, seed: int, epoch: int, blocks: int, group_blocks: int = 1024) -> list[int]:
    """The whole stream of an epoch as a list."""
    order = document_oracle(len(data), seed, epoch, blocks, group_blocks)
    assert sorted(order) == list(range(len(data)))
    return [token for document in order for token in data[document].tolist()]


def sample_oracle(data: IndexedDataset, seq_len: int, seed: int, sample: int, blocks: int, group: int) -> list[int]:
    n = (data.num_tokens - 1) // seq_len
    stream = stream_oracle(data, seed, sample // n, blocks, group)
    k = permutation_oracle(n, derive_key(seed, "samples", sample // n), sample % n)
    return stream[k * seq_len : k * seq_len + seq_len + 1]


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection_and_native_agrees(n: int, key: int) -> None:
    index = np.arange(n, dtype=np.int64)
    result = permute(n, key, index)
    assert sorted(result.tolist()) == index.tolist()
    assert result[n // 2] == permutation_oracle(n, key, n // 2)
    if BUILT:
        assert np.array_equal(result, native_index._index_or_warn().permute(n, key, index))  # type: ignore[union-attr]


@pytest.mark.parametrize("n", [2**31 - 1, 2**32 + 1, 2**40 + 12345, 2**62, 2**63 - 1])
@pytest.mark.parametrize("native", NATIVE)
def test_permutation_in_64_bits(n: int, native: bool) -> None:
    function: Any = native_index._index_or_warn().permute if native else permute  # type: ignore[union-attr]
    index = np.array([0, 1, n // 3, n - 2, n - 1], np.int64)
    assert function(n, 99, index).tolist() == [permutation_oracle(n, 99, int(i)) for i in index]


def test_permutation_is_not_far_from_uniform() -> None:
    """All 24 orders of 4 come up about as often as each other; with a missing round or key some orders never do."""
    seen = [tuple(permute(4, derive(7, i), np.arange(4)).tolist()) for i in range(4800)]
    counts = np.array([seen.count(order) for order in set(seen)])
    assert len(counts) == 24 and ((counts - 200) ** 2 / 200).sum() < 60  # chi-square, 23 degrees: p ~ 4e-5
    big = permute(100_000, 3, np.arange(100_000))
    assert abs(np.corrcoef(big[:-1], big[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.arange(100_000), big)[0, 1]) < 0.02


def test_order_is_frozen(tmp_path: Path) -> None:
    """Resuming an old run needs the old order: these digests may only change together with ORDER_VERSION."""
    data = corpus(tmp_path / "c", [(7 * i) % 23 for i in range(3000)])
    several = corpus(tmp_path / "d", [(7 * i) % 23 for i in range(60_000)])  # 3 or 4 documents per block
    digests = [SampleOrder(data, 16, 1234, native=False).digest(0, 3000)]
    digests.append(SampleOrder(several, 16, 1234, native=False).digest(0, 1000))
    assert (ORDER_VERSION, digests) == (2, ["ad7188c7bca569e2ffb2375467586784", "60d307da72d1721584fd4ae93ceb1f09"])


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    seq_len=st.integers(1, 12),
    seed=st.integers(0, 2**64 - 1),
    blocks=st.integers(1, 40),
    group=st.sampled_from([1, 3, 4, 9, 1024]),
)
def test_equals_the_oracle(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, seed: int, blocks: int, group: int
) -> None:
    data = raw_corpus(tmp_path_factory.mktemp("o") / "c", lengths)
    if data.num_tokens <= seq_len:
        with raises(DataError, "samples.corpus-too-small", data.num_tokens):
            SampleOrder(data, seq_len, seed)
        return
    n = (data.num_tokens - 1) // seq_len
    samples = np.array([0, n - 1, n, 3 * n - 1, 2 * n // 3], np.int64)
    blocks = min(blocks, len(data))
    expected = [sample_oracle(data, seq_len, seed, int(i), blocks, group) for i in samples]
    for native in [False, True] if BUILT else [False]:
        order = SampleOrder(data, seq_len, seed, native=native, blocks=blocks, group_blocks=group)
        assert order.samples_per_epoch == n and order.tail == data.num_tokens - 1 - n * seq_len
        assert order.gather(samples).tolist() == expected
        for row, sample in zip(expected, samples.tolist()):
            parts = [data[document][offset : offset + take] for document, offset, take in order.parts(sample)]
            assert np.concatenate(parts).tolist() == row and all(len(part) for part in parts)
        assert order.gather_tail(1).tolist() == stream_oracle(data, seed, 1, blocks, group)[n * seq_len :]


@pytest.mark.parametrize("native", NATIVE)
def test_more_documents_than_a_group(tmp_path: Path, native: bool) -> None:
    """Default blocks and groups: one document per block for so few, in 3 groups of up to 1,024."""
    data = corpus(tmp_path / "c", [i % 5 for i in range(2700)])
    order = SampleOrder(data, 7, 5, native=native)
    samples = np.array([0, 1, 100, order.samples_per_epoch, 2 * order.samples_per_epoch - 1], np.int64)
    expected = [sample_oracle(data, 7, 5, int(i), len(data), 1024) for i in samples]
    assert order.gather(samples).tolist() == expected


@pytest.mark.parametrize(
    ("documents", "blocks"),
    [(1, 1), (1000, 1000), (16_384, 16_384), (16_385, 16_384), (100_000, 16_384), (6_553_599, 16_384)]
    + [(6_553_600, 65_536), (8_000_000, 65_536), (10**8, 2**18), (10**9, 2**22)],
)
def test_blocks_of(documents: int, blocks: int) -> None:
    assert blocks_of(documents) == blocks


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_each_token_exactly_once_an_epoch(tmp_path: Path, native: bool, epoch: int) -> None:
    data = corpus(tmp_path / "c", [3, 0, 5, 1, 9, 2, 30, 11, 7, 6, 4, 3])  # 81 tokens: 80 samples of 1
    order = SampleOrder(data, 1, 3, native=native, blocks=3, group_blocks=2)
    n = order.samples_per_epoch
    pairs = order.gather(np.arange(epoch * n, (epoch + 1) * n))
    assert len({tuple(p) for p in pairs.tolist()}) == n == 80
    assert sorted(set(pairs.ravel().tolist())) == list(range(1, 82))
    inside = pairs[pairs[:, 1] == pairs[:, 0] + 1]
    assert len(inside) >= 80 - 10  # a document stays in one piece: only its end is followed by something else


def test_epochs_and_seeds_differ(tmp_path: Path) -> None:
    data = corpus(tmp_path / "c", [20] * 50)
    order = SampleOrder(data, 10, 3)
    n = order.samples_per_epoch
    digests = {order.digest(e * n, n) for e in range(4)} | {SampleOrder(data, 10, 4).digest(0, n)}
    assert len(digests) == 5
    assert order.digest(5, 300) == SampleOrder(data, 10, 3).digest(5, 300)  # independent of earlier reads


@pytest.mark.parametrize("native", NATIVE)
def test_positions_beyond_32_bits(tmp_path: Path, native: bool) -> None:
    """A sparse .bin of 5e9 one-byte tokens without disk usage: token and sample numbers exceed 2^32."""
    lengths = np.array([2**31 - 1, 1_500_000_000, 1_000_000_000, 352_516_353], np.int64)
    total = int(lengths.sum())
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 1, 4, 5)
    tail = (np.cumsum(lengths) - lengths).astype("<i8").tobytes() + np.arange(5, dtype="<i8").tobytes()
    (tmp_path / "v.idx").write_bytes(header + lengths.astype("<i4").tobytes() + tail)
    with open(tmp_path / "v.bin", "wb") as out:
        out.truncate(total)
        for document, mark in enumerate((11, 22, 33, 44)):  # one at each document's last token
            out.seek(int(lengths[: document + 1].sum()) - 1)
            out.write(bytes([mark]))
    for blocks in (1, 4):
        order = SampleOrder(IndexedDataset(tmp_path / "v"), 1, 8, native=native, blocks=blocks)
        n = order.samples_per_epoch
        assert n == total - 1 > 2**32
        for epoch in (0, 3, 2**20):
            documents = document_oracle(4, 8, epoch, blocks, 1024)
            for boundary, document in list(zip(np.cumsum(lengths[documents]), documents))[:3]:
                key = derive_key(8, "samples", epoch)
                sample = epoch * n + _inverse(n, key, int(boundary) - 1)  # the two tokens around it
                assert order.gather(np.array([sample])).tolist() == [[11 * (document + 1), 0]]


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("documents", [1, 2, 3, 5, 16, 17, 64, 255, 1000, 1023, 1024, 1025, 1300, 2047, 3000])
def test_groups_of_every_size(tmp_path: Path, native: bool, documents: int) -> None:
    """The last group is smaller, so its permutations differ; one document per row, so that rows show the order."""
    data = corpus(tmp_path / "c", [4] * documents + [1])
    blocks = documents - documents // 3
    order = SampleOrder(data, 4, 9, native=native, blocks=blocks)
    stream = np.array(stream_oracle(data, 9, 0, blocks))
    index = permute(order.samples_per_epoch, derive_key(9, "samples", 0), np.arange(order.samples_per_epoch))
    assert np.array_equal(order.gather(np.arange(len(index))), stream[index[:, None] * 4 + np.arange(5)])


def _inverse(n: int, key: int, target: int) -> int:
    """The j that the permutation maps to `target`: rounds and cycle walking in reverse."""
    half = ((n - 1).bit_length() + 1) // 2
    x = target
    while True:
        left, right = divmod(x, 2**half)
        for r in reversed(range(keyed.ROUNDS)):
            round_key = keyed.mix64((key + (r + 1) * keyed._GOLDEN) % 2**64)
            left, right = right ^ (keyed.mix64((left + round_key) % 2**64) % 2**half), left
        x = left * 2**half + right
        if x < n:
            return x


@pytest.mark.parametrize("native", NATIVE)
def test_lying_sidecar_is_caught_while_gathering(tmp_path: Path, native: bool) -> None:
    corpus(tmp_path / "c", [10] * 20, vocab_size=1000)
    meta = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps({**meta, "max_token": 5}))
    order = SampleOrder(IndexedDataset(tmp_path / "c", vocab_size=200), 8, 0, native=native)
    with raises(DataError, "samples.token-outside-vocabulary", "c.bin: document 19, token 9: id 200 ", "[0, 200)"):
        order.gather(np.arange(order.samples_per_epoch))


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("vocab_size", [None, 100])
def test_negative_token_is_caught_while_gathering(tmp_path: Path, native: bool, vocab_size: int | None) -> None:
    data = raw_corpus(tmp_path / "c", [4, 3])
    changed = data.tokens.copy()
    changed[5] = -1  # after the checks of opening
    data.tokens, data.vocab_size = changed, vocab_size
    with raises(DataError, "samples.token-outside-vocabulary", "document 1, token 1: id -1 "):
        SampleOrder(data, 6, 0, native=native).gather(np.array([0]))


@pytest.mark.skipif(not BUILT, reason="engine._index is not built")
def test_native_never_leaves_its_arrays() -> None:
    index: Any = native_index._index_or_warn()
    good: dict[str, Any] = {
        "tokens": np.arange(10, dtype=np.uint16),
        "lengths": np.array([4, 6], np.int32),
        "pointers": np.array([0, 8], np.int64),
        "blocks": 2,
        "group_blocks": 1,
        "block_key": 3,
        "document_key": 1,
        "round_key": 1,
    }
    asked: dict[str, Any] = {"positions": np.array([0, 7], np.int64), "count": 3, "limit": 100}
    assert index.Stream(**good).gather(**asked)[0].tolist() == [[0, 1, 2], [7, 8, 9]]
    bad: list[tuple[str, Any]] = [
        ("positions", np.array([8])),
        ("positions", np.array([-1])),
        ("positions", np.array([10])),
        ("positions", np.array([2**62])),
        ("positions", np.array([0.0])),
        ("pointers", np.array([0, 10])),
        ("pointers", np.array([-2, 8])),
        ("pointers", np.array([2, 8])),
        ("pointers", np.array([0, 2**62])),
        ("pointers", np.array([0, -(2**63)])),
        ("pointers", np.array([0, 9])),
        ("pointers", np.array([0])),
        ("lengths", np.array([4, 7], np.int32)),
        ("lengths", np.array([-4, 6], np.int32)),
        ("lengths", np.array([4.0, 6.0])),
        ("tokens", np.arange(10.0)),
        ("tokens", np.arange(20, dtype=np.uint16)[::2]),
        ("tokens", np.arange(9, dtype=np.uint16)),
        ("tokens", np.arange(10, dtype=">u2")),
        ("count", 0),
        ("limit", 0),
        ("blocks", 0),
        ("blocks", -1),
        ("blocks", 3),
        ("blocks", 2**62),
        ("group_blocks", 0),
        ("group_blocks", 1025),
    ]
    for name, value in bad:
        with pytest.raises((ValueError, IndexError)):
            changed = {**good, **asked, name: value}
            index.Stream(**{key: changed[key] for key in good}).gather(**{key: changed[key] for key in asked})
    for name, at, value in [("lengths", 0, -4), ("lengths", 1, 2**31 - 1), ("pointers", 1, 2**40), ("pointers", 0, -2)]:
        there = {**good, name: good[name].copy()}
        stream = index.Stream(**there)
        stream.gather(**asked)
        there[name][at] = value  # the file changes after its groups were summed
        with pytest.raises(IndexError):
            stream.gather(np.array([0, 0, 4, 5]), 5, 100)
    for n, key, at in [(0, 1, [0]), (5, 1, [5]), (5, 1, [-1]), (2**64 - 1, 1, [0])]:
        with pytest.raises((ValueError, IndexError)):
            index.permute(n, key, np.array(at))


def test_fallback_warns_once_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = corpus(tmp_path / "c", [9] * 30)
    expected = SampleOrder(data, 8, 1, native=False).digest(0, 100)
    if BUILT:
        assert SampleOrder(data, 8, 1, native=True).digest(0, 100) == expected
    monkeypatch.setitem(sys.modules, "engine._index", None)
    native_index._index_or_warn.cache_clear()
    try:
        with pytest.warns(UserWarning) as caught:
            orders = [SampleOrder(data, 8, 1), SampleOrder(data, 8, 1)]
        assert len(caught) == 1 and "computed in numpy" in str(caught[0].message)
        assert not orders[0].native and orders[1].digest(0, 100) == expected
        with raises(DataError, "samples.extension-missing"):
            SampleOrder(data, 8, 1, native=True)
    finally:
        native_index._index_or_warn.cache_clear()


def test_arguments_are_checked(tmp_path: Path) -> None:
    data = corpus(tmp_path / "c", [9] * 30)
    for seq_len, seed in [(0, 1), (8, -1), (8, 2**64)]:
        with raises(DataError, "samples.order-arguments", seq_len, seed):
            SampleOrder(data, seq_len, seed)
    with raises(DataError, "samples.sample-numbers", ">= 0", -1):
        SampleOrder(data, 8, 1).gather(np.array([-1]))


@pytest.mark.parametrize("native", NATIVE)
def test_an_order_may_begin_later(tmp_path: Path, native: bool) -> None:
    data = corpus(tmp_path / "c", [9] * 30)
    order, later = (SampleOrder(data, 8, 1, native=native) for _ in range(2))
    later.begin_at(5)
    assert np.array_equal(later.gather(np.arange(5, 80)), order.gather(np.arange(75)))
    assert later.parts(40) == order.parts(35)
    with raises(DataError, "samples.sample-numbers", ">= 5"):
        later.gather(np.array([4]))


def test_a_short_corpus_is_a_tail(tmp_path: Path) -> None:
    data = corpus(tmp_path / "c", [3, 4])
    order = SampleOrder(data, 16, 1, short=True)
    assert (order.samples_per_epoch, order.tail) == (0, 6)
    assert sorted(order.gather_tail().tolist()) == list(range(1, 8))
    with raises(DataError, "samples.corpus-too-small", "7 tokens", "seq_len + 1 = 17"):
        SampleOrder(data, 16, 1)
    with raises(DataError, "samples.corpus-too-small", "1 tokens are too few for one label"):
        SampleOrder(corpus(tmp_path / "d", [1]), 16, 1, short=True)
