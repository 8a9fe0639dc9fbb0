"""Blends: every source within one sample of its share at every prefix, random access, and losses by source."""

from __future__ import annotations

import math
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.mixture import LEAST_SHARE
from engine.data.samples import blend as blend_module
from engine.data.samples.blend import (
    MAX_TOTAL,
    BlendedOrder,
    BlendPhase,
    SourceAssignment,
    block_state,
    integer_weights,
)
from engine.data.samples.loader import Loader
from engine.data.samples.native_index import select_index
from engine.data.samples.order import SampleOrder
from engine.distributed.context import ParallelContext
from engine.errors import DataError
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import MODEL, config, layout_of, micro_batch
from tests.support.corpora import BUILT, NATIVE, corpus
from tests.support.errors import raises
from tests.support.harness import run_ranks
from tests.support.shares import share_of

EDGE_CASES = [
    [1],
    [1, 1],
    [2, 1, 1],
    [7, 3],
    [1] * 13,
    [100, 1],
    [1, 199, 1],
    [300, 1, 1, 1, 1, 1, 1, 1],
    [45, 45, 1, 2, 3, 4],
    [999_983, 999_979, 500_009, 77_777],
    [2**39, 2**37 + 1, 2**38 - 3],
    [5, 5, 5, 1, 1, 1, 99, 98],
]


def outside(weights: list[int], start: int, counts: Any, sources: Any) -> int:
    """Number of (prefix, source) in a block that deviate by a sample or more from the share, in exact integers."""
    total, wrong, have = sum(weights), 0, [int(count) for count in counts]
    for i, source in enumerate([None, *sources.tolist()]):
        if source is not None:
            have[source] += 1
        n = start + i
        wrong += sum(abs(c * total - n * w) >= total for c, w in zip(have, weights))
        if sum(have) != n:
            wrong += 1
    return wrong


def check_block(weights: list[int], number: int) -> None:
    assignment = SourceAssignment(weights, native=False)
    array, start = np.array(weights, np.int64), number * assignment.block
    counts, sources, ordinals = blend_module.blend_block(array, start, assignment.block)
    assert outside(weights, start, counts, sources) == 0
    for k in range(len(weights)):
        assert ordinals[sources == k].tolist() == list(range(int((sources == k).sum())))
    after = counts + np.bincount(sources, minlength=len(weights))
    assert (
        after.tolist() == block_state(weights, sum(weights), start + assignment.block)[0]
    )  # where the next block starts
    if BUILT:
        native = select_index(True).blend_block(array, start, assignment.block)  # type: ignore[union-attr]
        assert all(np.array_equal(a, b) for a, b in zip(native, (counts, sources, ordinals)))


@pytest.mark.parametrize("weights", EDGE_CASES, ids=str)
def test_every_prefix_is_within_one_sample(weights: list[int]) -> None:
    for number in (0, 1, 2, 10**5 + 1, 2**51):  # the last one: samples beyond 2^61
        check_block(weights, number)


@settings(deadline=None, max_examples=40)
@given(
    weights=st.lists(st.one_of(st.integers(1, 9), st.integers(100, 999)), min_size=1, max_size=9),
    number=st.integers(0, 2**40),
)
def test_every_prefix_of_any_blend(weights: list[int], number: int) -> None:
    check_block([max(w, sum(weights) // 400) for w in weights], number)


def test_a_boundary_that_ignores_releases_is_seen() -> None:
    """The rule at block boundaries is necessary: choosing only by deadlines leaves some block without a schedule."""

    def by_deadline(weights: list[int], total: int, n: int) -> tuple[list[int], list[int], list[int]]:
        counts = [n * w // total for w in weights]
        part = [n * w % total for w in weights]
        due = sorted((-(-(total - p) // w), k) for k, (p, w) in enumerate(zip(part, weights)) if p)
        ahead = [0] * len(weights)
        for _, k in due[: n - sum(counts)]:
            ahead[k], counts[k] = 1, counts[k] + 1
        return counts, part, ahead

    right, broken = blend_module.block_state, 0
    try:
        for faulty in (False, True):
            blend_module.block_state = by_deadline if faulty else right  # type: ignore[assignment]
            for weights in EDGE_CASES:
                for number in range(1, 6):
                    try:
                        counts, sources, _ = blend_module.blend_block(np.array(weights), number * 1024, 1024)
                        broken += faulty and outside(weights, number * 1024, counts, sources) > 0
                    except ValueError:
                        assert faulty
                        broken += 1
    finally:
        blend_module.block_state = right
    assert broken > 0


@pytest.mark.skipif(not BUILT, reason="engine._index is not built")
def test_random_access_far_out_and_many_sources() -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(1000, 9000, 40_000).tolist()  # more than fit in Megatron's int16
    assignment = SourceAssignment(weights)
    far = np.array([0, 10**8, 2**33 + 5, 2**50], np.int64)
    sources, numbers = assignment.locate(far)
    assert sources.min() >= 0 and sources.max() < 40_000
    total = sum(weights)
    for n, k, number in zip(far.tolist(), sources.tolist(), numbers.tolist()):
        assert abs(number * total - n * weights[k]) < total
        assert assignment.counts(n).sum() == n and assignment.counts(n)[k] == number
    assert len(np.unique(assignment.locate(np.arange(200_000))[0])) == 40_000


@pytest.mark.skipif(not BUILT, reason="engine._index is not built")
def test_64_sources_over_a_hundred_million_samples_are_ready_at_once() -> None:
    weights = np.random.default_rng(1).integers(100, 10_000, 64).tolist()
    started = time.perf_counter()
    assignment = SourceAssignment(weights)
    assignment.locate(np.array([0]))
    last = assignment.counts(10**8)
    assert time.perf_counter() - started < 0.5  # some milliseconds; Megatron's greedy loop: 11.7 s
    assert all(abs(int(c) * sum(weights) - 10**8 * w) < sum(weights) for c, w in zip(last, weights))


@pytest.mark.parametrize("native", NATIVE)
def test_order_of_reading_does_not_matter(native: bool) -> None:
    assignment = SourceAssignment([5, 3, 1], native=native)
    samples = np.random.default_rng(0).permutation(5000)
    sources, numbers = assignment.locate(samples.astype(np.int64))
    straight = SourceAssignment([5, 3, 1], native=native).locate(np.arange(5000))
    assert np.array_equal(sources, straight[0][samples]) and np.array_equal(numbers, straight[1][samples])
    for k in range(3):  # each sample of a source once, in the source's order
        assert straight[1][straight[0] == k].tolist() == list(range(int((straight[0] == k).sum())))


def test_the_turns_are_frozen() -> None:
    """Resuming an old run needs the same assignment of samples to sources."""
    turn = SourceAssignment([7, 2, 1], native=False).locate(np.arange(20))[0]
    assert "".join(map(str, turn.tolist())) == "00010010020001001002"


def test_integer_weights() -> None:
    assert integer_weights([Fraction("0.7"), Fraction("0.3")]) == [7, 3]
    assert integer_weights([Fraction(1, 3), Fraction(1, 6)]) == [2, 1]
    huge = integer_weights([Fraction(10**17 + 1), Fraction(3 * 10**17)])
    assert sum(huge) <= MAX_TOTAL and huge[1] / huge[0] == pytest.approx(3, rel=1e-11)
    assert Fraction(1, 2**21) == LEAST_SHARE
    assert SourceAssignment(integer_weights([Fraction(1), Fraction(2**21 - 1)]), native=False).block == 2**22


@pytest.mark.parametrize(
    ("weights", "values"),
    [([], [1, "2^40"]), ([0, 1], [1, "2^40"]), ([2**40, 1], [1, "2^40"]), ([1, 2**21], [1, 2097153, "2^21"])],
)
def test_invalid_weights_are_rejected(weights: list[int], values: list[object]) -> None:
    with raises(DataError, "samples.blend-weights", *values):
        SourceAssignment(weights, native=False)


@pytest.mark.skipif(not BUILT, reason="engine._index is not built")
def test_native_rejects_what_would_overflow() -> None:
    make = select_index(True).blend_block  # type: ignore[union-attr]
    one = np.array([1, 1], np.int64)
    for weights, start, length in [
        (np.array([], np.int64), 0, 1024),
        (np.array([0, 1]), 0, 1024),
        (np.array([-1, 5]), 0, 1024),
        (np.array([2**40, 1]), 0, 1024),
        (np.array([2**63 - 1, 2**63 - 1]), 0, 1024),
        (one.astype(np.int32), 0, 1024),
        (one, -1, 1024),
        (one, 2**63 - 1, 1024),
        (one, 0, 0),
        (one, 0, 2**23),
        (np.array([1, 100_000]), 0, 1024),  # no window fits: an error, never an out-of-bounds read
        (np.array([1, 100_000]), 99_500, 1024),
    ]:
        try:
            counts, sources, _ = make(weights, start, length)
        except ValueError:
            continue
        assert len(sources) == length and sources.max() < len(weights) and counts.min() >= 0


def two_orders(tmp_path: Path, native: bool | None = None) -> list[SampleOrder]:
    datasets = [corpus(tmp_path / name, [17] * count) for name, count in (("a", 30), ("b", 8), ("c", 50))]
    return [SampleOrder(dataset, 8, seed, native=native) for seed, dataset in enumerate(datasets)]


PHASES = (BlendPhase(0, (7, 3, 0)), BlendPhase(100, (1, 1, 2)), BlendPhase(160, (0, 0, 1)))


@pytest.mark.parametrize("native", NATIVE)
def test_each_source_goes_through_its_own_order_across_changes(tmp_path: Path, native: bool) -> None:
    orders = two_orders(tmp_path, native)
    blend = BlendedOrder(orders, PHASES, native=native)
    sources, numbers = blend.locate(np.arange(400))
    rows = blend.gather(np.arange(400))
    seen = [0, 0, 0]
    for i, (k, number) in enumerate(zip(sources.tolist(), numbers.tolist())):
        assert blend.counts(i).tolist() == seen and number == seen[k]
        seen[k] += 1
        assert rows[i].tolist() == orders[k].gather(np.array([number]))[0].tolist()
    for phase, end in zip(PHASES, (100, 160, 400)):
        share = np.array(phase.weights) / sum(phase.weights)
        done = blend.counts(end) - blend.counts(phase.start)
        assert (abs(done - share * (end - phase.start)) < 1).all()
    assert seen[1] > orders[1].samples_per_epoch  # it was read more than once
    assert np.array_equal(BlendedOrder(orders, PHASES[:2]).locate(np.arange(160))[1], numbers[:160])


def test_every_source_starts_again_where_another_order_ended(tmp_path: Path) -> None:
    """begin_at sample 130, inside a phase: each source starts at its epoch 0, and the assignment is unchanged."""
    before, blend = two_orders(tmp_path), BlendedOrder(two_orders(tmp_path), PHASES)
    blend.begin_at(130)
    sources, rows, seen = blend.sources(np.arange(130, 400)), blend.gather(np.arange(130, 400)), [0, 0, 0]
    assert np.array_equal(sources, BlendedOrder(before, PHASES).sources(np.arange(130, 400))) and len(set(sources)) == 3
    for k, row in zip(sources.tolist(), rows.tolist()):
        assert row == before[k].gather(np.array([seen[k]]))[0].tolist()
        seen[k] += 1


def test_phases_are_checked(tmp_path: Path) -> None:
    orders = two_orders(tmp_path)
    for phases in ((), (BlendPhase(1, (1, 1, 1)),), (BlendPhase(0, (1, 1, 1)), BlendPhase(0, (1, 2, 1)))):
        with raises(DataError, "samples.blend-phases", 0):
            BlendedOrder(orders, phases)
    with raises(DataError, "samples.blend-weights", 3):
        BlendedOrder(orders, (BlendPhase(0, (1, 1)),))
    with raises(DataError, "samples.blend-lengths"):
        BlendedOrder([orders[0], SampleOrder(orders[1].dataset, 7, 0)], (BlendPhase(0, (1, 1)),))
    with raises(DataError, "samples.sample-numbers", ">= 0"):
        BlendedOrder(orders, PHASES).gather(np.array([-1]))


def test_the_loader_tells_sources_and_layouts_do_not_matter(tmp_path: Path) -> None:
    blend = BlendedOrder(two_orders(tmp_path), PHASES)
    for micro, size in ((12, 1), (3, 2), (1, 4)):
        got: list[int] = []
        for rank in range(size):
            sizes = {"global_batch_size": 12, "micro_batch_size": micro, "data_rank": rank, "data_size": size}
            with Loader(share_of(blend, **sizes, start_sample=96)) as loader:
                for batch in next(loader):
                    assert batch.sources is not None and batch.sources.dtype == torch.int64
                    got += batch.sources.tolist()
        assert got == blend.sources(np.arange(96, 108)).tolist()


@pytest.mark.parametrize("degrees", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 4), (2, 2, 1)])
def test_losses_by_source_add_up_to_the_loss_in_every_layout(degrees: tuple[int, int, int]) -> None:
    tensor, pipeline, data = degrees
    cfg = config(
        math.prod(degrees), parallel_tensor=tensor, parallel_pipeline=pipeline, parallel_data=data, train_steps=1
    )
    one = config(1)
    expected = run_ranks(layout_of(one), lambda ctx: per_source(one, ctx))[0]
    for loss, by_source in run_ranks(layout_of(cfg), lambda ctx: per_source(cfg, ctx)):
        assert set(by_source) == {0, 2}  # no sample of source 1 in this step, or only masked ones
        assert by_source == pytest.approx(expected[1], rel=1e-11)
        assert (by_source[0] * 21 + by_source[2] * 5) / 26 == pytest.approx(loss, rel=1e-13)
        assert by_source[0] != pytest.approx(by_source[2], rel=1e-6)


def per_source(cfg: Any, ctx: ParallelContext) -> tuple[float, dict[int, float]]:
    """Loss and losses by source of one step on four samples with 16, 5, 0 and 5 counted tokens."""
    rows = torch.from_numpy(np.random.default_rng(3).integers(0, MODEL["vocab_size"], (4, 17)))
    mask = torch.arange(16)[None, :] < torch.tensor([16, 5, 0, 5])[:, None]
    sources = torch.tensor([0, 2, 1, 0])
    batches = []
    for i in range(ctx.data.rank * 4 // ctx.data.size, (ctx.data.rank + 1) * 4 // ctx.data.size):
        part = slice(i, i + 1)
        tokens, labels = rows[part, :-1].contiguous(), rows[part, 1:].contiguous()
        batches.append(micro_batch(tokens, labels, mask[part], sources=sources[part]))
    result = train_step(setup(cfg, ctx), batches, num_sources=3)
    return result.loss, result.by_source


@pytest.mark.skipif(not BUILT, reason="engine._index is not built")
def test_more_sources_and_samples_than_32_bits_or_int16_hold(tmp_path: Path) -> None:
    """40,000 orders of one small corpus, each with its own seed: distant samples have the tokens of their source."""
    data = corpus(tmp_path / "c", [5, 9, 2, 30, 4])
    orders = [SampleOrder(data, 6, seed) for seed in range(40_000)]
    weights = tuple(np.random.default_rng(1).integers(1000, 9000, len(orders)).tolist())
    blend = BlendedOrder(orders, [BlendPhase(0, weights), BlendPhase(2**33, weights[::-1])])
    samples = np.array([0, 2**31, 2**33 - 1, 2**33, 2**40 + 7], np.int64)
    sources, numbers = blend.locate(samples)
    assert sources.max() > 32_767
    rows = blend.gather(samples)
    for row, source, number in zip(rows, sources, numbers):
        assert row.tolist() == orders[source].gather(np.array([number]))[0].tolist()
    assert blend.counts(2**40).sum() == 2**40
