"""Functions on forked ranks: what comes back, and what a rank that fails, ends or hangs becomes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.distributed.collectives import all_reduce_
from engine.distributed.context import ParallelContext
from engine.distributed.layout import Layout
from engine.errors import DataError
from engine.proof.ranks import RankError, pack, run, unpack

TWO = Layout(2, data=2)


def test_results_come_back_by_rank() -> None:
    def job(ctx: ParallelContext) -> dict[str, Any]:
        total = all_reduce_(torch.full((3,), ctx.rank + 1.0, dtype=ctx.dtype), ctx.world)
        return {"rank": ctx.rank, "total": total.numpy(), "nested": [{"n": np.float64(1 / 3)}, (1, None)]}

    for transport in ("auto", "gloo"):
        found = run(TWO, job, torch.float32, transport)
        assert [x["rank"] for x in found] == [0, 1]
        assert all(x["total"].tolist() == [3, 3, 3] and x["total"].dtype == np.float32 for x in found)
        assert found[0]["nested"] == [{"n": 1 / 3}, [1, None]]


def test_messages_keep_dtypes_shapes_and_values() -> None:
    arrays = [np.zeros((0, 3)), np.arange(6, dtype=np.int32).reshape(2, 3)[:, ::2], np.array(1 + 2j), np.ones(3, bool)]
    value = {"a": arrays, "b": {"c": arrays[1].T, "d": float("nan"), "e": 0.1}}
    found = unpack(pack(value))
    for x, y in zip([*found["a"], found["b"]["c"]], [*arrays, arrays[1].T]):
        assert x.dtype == y.dtype and x.shape == y.shape and np.array_equal(x, y) and x.flags.writeable
    assert found["b"]["d"] != found["b"]["d"] and found["b"]["e"] == 0.1


@pytest.mark.parametrize(
    "value", [{1, 2}, object(), np.array([object()]), torch.ones(1)], ids=["set", "object", "objects", "tensor"]
)
def test_other_objects_are_refused(value: object) -> None:
    with pytest.raises(TypeError):
        pack([value])


def test_a_rank_that_fails_is_named_with_its_code() -> None:
    def expected(ctx: ParallelContext) -> None:
        if ctx.rank == 1:
            raise DataError("data.damaged", "corpus.bin is damaged")
        time.sleep(30)

    with pytest.raises(RankError) as caught:
        run(TWO, expected)
    assert (caught.value.rank, caught.value.code) == (1, "data.damaged") and "corpus.bin" in str(caught.value)

    def unexpected(ctx: ParallelContext) -> None:
        assert ctx.rank == 0, "a fault"
        time.sleep(30)

    with pytest.raises(RankError) as caught:
        run(TWO, unexpected)
    assert (caught.value.rank, caught.value.code) == (1, "proof.rank-failed") and "a fault" in caught.value.trace


def test_a_rank_that_ends_is_named() -> None:
    with pytest.raises(RankError) as caught:
        run(TWO, lambda ctx: os._exit(3) if ctx.rank == 1 else time.sleep(30))
    assert (caught.value.rank, caught.value.code) == (1, "proof.rank-killed")


def test_ranks_that_hang_are_ended(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankError) as caught:
        run(TWO, lambda ctx: time.sleep(600), timeout_s=1.0)
    assert caught.value.code == "proof.ranks-hang" and "rank 0, 1 " in str(caught.value)
    assert "in <lambda>" in capfd.readouterr().err


def test_ranks_end_after_their_caller_was_killed(tmp_path: Path) -> None:
    def job(ctx: ParallelContext) -> np.ndarray[Any, Any]:
        (tmp_path / f"{ctx.rank}").write_text(str(os.getpid()))
        time.sleep(1)
        return np.zeros(1 << 20)  # more than a pipe holds

    if not (caller := os.fork()):
        run(TWO, job)
        os._exit(0)
    files, deadline = [tmp_path / "0", tmp_path / "1"], time.monotonic() + 50
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(caller, signal.SIGKILL)
    os.waitpid(caller, 0)
    while any(Path(f"/proc/{file.read_text()}").exists() for file in files):
        assert time.monotonic() < deadline, "a rank still runs"
        time.sleep(0.05)
