"""The Loader: same samples for every layout and restart; its worker hides no error and does not outlive it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.data.samples.loader import Loader
from engine.data.samples.order import SampleOrder
from engine.errors import DataError
from tests.support.corpora import corpus
from tests.support.errors import raises
from tests.support.shares import share_of


def batches(order: SampleOrder, steps: int, micro: int, data_size: int, start: int = 0) -> list[list[list[int]]]:
    """The rows of each of `steps` global batches of 12, over all data ranks."""
    out: list[list[list[int]]] = [[] for _ in range(steps)]
    numbers: list[list[int]] = [[] for _ in range(steps)]
    for rank in range(data_size):
        sizes = {"global_batch_size": 12, "micro_batch_size": micro, "data_rank": rank, "data_size": data_size}
        with Loader(share_of(order, **sizes, start_sample=start)) as loader:
            for step in range(steps):
                for batch in next(loader):
                    assert batch.tokens.shape == batch.labels.shape == batch.weights.shape == (micro, order.seq_len)
                    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
                    assert batch.weights.dtype == torch.float64 and bool((batch.weights == 1).all())
                    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
                    numbers[step] += batch.samples.tolist()
                    out[step] += torch.cat([batch.tokens, batch.labels[:, -1:]], 1).tolist()
    assert [n for step in numbers for n in sorted(step)] == list(range(start, start + 12 * steps))
    return out


def test_layout_and_restarts_do_not_change_the_samples(tmp_path: Path) -> None:
    order = SampleOrder(corpus(tmp_path / "c", [17] * 20), 8, 1)  # 42 samples: five batches span two epochs
    expected = [order.gather(np.arange(12 * s, 12 * s + 12)).tolist() for s in range(5)]
    for micro, data_size in [(12, 1), (1, 1), (3, 4), (2, 2), (1, 12)]:
        assert batches(order, 5, micro, data_size) == expected
    assert batches(order, 2, 6, 2) + batches(order, 3, 1, 3, start=24) == expected


def loader_of(order: Any, prefetch: int = 2) -> Loader:
    return Loader(share_of(order, 2, 1, data_rank=0, data_size=1), prefetch=prefetch)


class FakeOrder:
    """Counts reads; fails at sample `fail_at`."""

    seq_len = 4

    def __init__(self, fail_at: int = 10**9):
        self.fail_at = fail_at
        self.reads = 0

    def gather(self, samples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        self.reads += 1
        if int(samples[-1]) >= self.fail_at:
            raise DataError("samples.torn", "torn at sample 4")
        return np.zeros((len(samples), 5), np.int64)

    def sources(self, samples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.zeros(len(samples), np.int64)


@pytest.mark.parametrize(
    ("sizes", "code"),
    [
        ((6, 4, 0, 1), "samples.batch-not-divisible"),
        ((8, 2, 0, 3), "samples.batch-not-divisible"),
        ((8, 2, 2, 2), "samples.data-rank-out-of-range"),
        ((8, 2, -1, 2), "samples.data-rank-out-of-range"),
        ((8, 0, 0, 1), "samples.sizes-out-of-range"),
    ],
)
def test_sizes_that_do_not_fit_are_rejected(sizes: tuple[int, int, int, int], code: str) -> None:
    with raises(DataError, code):
        Loader(share_of(FakeOrder(), *sizes))


def test_prefetch_errors_surface_in_their_place() -> None:
    with loader_of(FakeOrder(fail_at=4)) as loader:
        next(loader)
        next(loader)
        for _ in range(2):
            with raises(DataError, "samples.torn"):
                next(loader)


def test_prefetch_is_bounded_and_close_is_prompt() -> None:
    fake = FakeOrder()
    loader = loader_of(fake, prefetch=3)
    assert fake.reads == 0 and loader._worker is None
    next(loader)
    deadline = time.monotonic() + 5
    while fake.reads < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert fake.reads == 4  # one returned and three prefetched
    started = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - started < 1 and not loader._worker.is_alive()  # type: ignore[union-attr]
    with raises(DataError, "samples.loader-closed"):
        next(loader)


def test_forgotten_loader_ends_its_thread() -> None:
    loader = loader_of(FakeOrder())
    next(loader)
    worker = loader._worker
    assert isinstance(worker, threading.Thread)
    del loader
    worker.join(5)
    assert not worker.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_order_survives_a_fork(tmp_path: Path) -> None:
    """Tests and launchers fork after import: a child reads the same samples, with its own worker."""
    order = SampleOrder(corpus(tmp_path / "c", [17] * 20), 8, 1)
    loader = loader_of(order)
    child = os.fork()
    if child == 0:
        rows = torch.cat([batch.tokens for batch in next(loader)]).tolist()
        os._exit(0 if rows == order.gather(np.arange(2))[:, :-1].tolist() else 1)
    assert os.waitpid(child, 0)[1] == 0
