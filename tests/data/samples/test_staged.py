"""Changing sequence lengths: each length reads whole epochs of a separate order, counted by brute force."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from engine.config.load import load
from engine.config.phases import Position, phases_of
from engine.data.samples.blend import BlendedOrder, BlendPhase
from engine.data.samples.corpora import open_training, resume_data
from engine.data.samples.order import SampleOrder
from engine.data.samples.staged import Length, StagedOrder
from engine.errors import DataError
from tests.support.corpora import corpus
from tests.support.errors import raises

LENGTHS = (Length(0, 8), Length(30, 16), Length(75, 4))
PHASES = (BlendPhase(0, (3, 1)), BlendPhase(20, (1, 2)), BlendPhase(75, (0, 1)))


def orders(folder: Path) -> list[SampleOrder]:
    return [SampleOrder(corpus(folder / name, [17] * count), 8, 5 + count) for name, count in (("a", 12), ("b", 20))]


def test_every_length_reads_epochs_of_its_order(tmp_path: Path) -> None:
    """One corpus: in each length, samples are those of the plain order, in epochs that no other length has read."""
    source = orders(tmp_path)[0]
    staged, epoch = StagedOrder([source], (), LENGTHS), 0
    ends = [length.start for length in LENGTHS[1:]] + [400]
    for length, end in zip(LENGTHS, ends):
        plain = SampleOrder(source.dataset, length.seq_len, source.seed)
        first = epoch * plain.samples_per_epoch
        expected = plain.gather(np.arange(first, first + end - length.start))
        assert np.array_equal(staged.gather(np.arange(length.start, end)), expected)
        epoch += -(-(end - length.start) // plain.samples_per_epoch)
    assert staged.epochs(400)[0] == pytest.approx(30 / 25 + 45 / 12 + 325 / 50)


def test_sources_of_a_blend_are_counted_over_all_lengths(tmp_path: Path) -> None:
    """Sources are those of the blend of one length; each source's samples in a length are consecutive, none twice."""
    sources = orders(tmp_path)
    staged, blend = StagedOrder(sources, PHASES, LENGTHS), BlendedOrder(sources, PHASES)
    begun: Counter[int] = Counter()
    for length, end in zip(LENGTHS, [30, 75, 110]):
        numbers = np.arange(length.start, end)
        assert np.array_equal(staged.sources(numbers), blend.sources(numbers))
        for k, source in enumerate(sources):
            plain = SampleOrder(source.dataset, length.seq_len, source.seed)
            mine = numbers[blend.sources(numbers) == k]
            first = begun[k] * plain.samples_per_epoch
            if len(mine):
                assert np.array_equal(staged.gather(mine), plain.gather(np.arange(first, first + len(mine))))
            begun[k] += -(-len(mine) // plain.samples_per_epoch)


def test_an_allowed_length_in_the_past_changes_nothing_read(tmp_path: Path) -> None:
    """4 steps at 32; then a phase from step 3 with 64 is allowed. What was read stays, and no shuffle is used twice."""
    corpus(tmp_path / "a", [90] * 20)
    values = {"data.train": str(tmp_path / "a"), "model.vocab_size": "60000", "train.seq_len": "32"}
    before = open_training(load([], values).config, None)
    cfg = load([], values | {"phase.1.from_step": "3", "phase.1.seq_len": "64"}).config
    past, run, numbers = dict(before.metadata), phases_of(cfg), np.arange(32)
    for step, tokens in ((4, 4 * 8 * 32), (6, 4 * 8 * 32 + 2 * 8 * 64)):
        data = resume_data(open_training(cfg, None), cfg, run.resumed(Position(step, 8 * step, tokens)), past)
        assert isinstance(data.order, StagedOrder) and isinstance(before.order, SampleOrder)
        assert data.order.lengths == (Length(0, 32), Length(32, 64))
        assert np.array_equal(data.order.gather(numbers), before.order.gather(numbers))
        longer = SampleOrder(before.order.dataset, 64, before.order.seed)
        longer.begin_at(32, -(-32 // before.order.samples_per_epoch))
        assert np.array_equal(data.order.gather(numbers + 32), longer.gather(numbers + 32))
        past = dict(data.metadata)


def test_samples_of_two_lengths_are_no_batch(tmp_path: Path) -> None:
    staged = StagedOrder(orders(tmp_path)[:1], (), LENGTHS)
    with raises(DataError, "samples.lengths-mixed", "29", "30"):
        staged.gather(np.array([29, 30]))
    before = staged.gather(np.array([40]))
    staged.begin_at(0)  # what a run does whose order did not change
    assert np.array_equal(staged.gather(np.array([40])), before)
    staged.begin_at(40)
    with raises(DataError, "samples.sample-numbers", "40"):
        staged.gather(np.array([39]))
