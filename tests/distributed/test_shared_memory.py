"""Shared memory between ranks: results equal those of gloo for all sizes, strides, dtypes, orders and timings.

Rings are tiny here, so that most operations are larger than a ring and every wrap-around is tested.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from engine.distributed import failure, shared_memory
from engine.distributed.collectives import (
    Pending,
    all_gather_into_start,
    all_gather_start,
    all_reduce_,
    all_reduce_start,
    gather_json,
    post,
    reduce_scatter_start,
)
from engine.distributed.context import ParallelContext, make_context
from engine.distributed.layout import Layout
from engine.errors import ConfigError
from tests.support.errors import raises
from tests.support.harness import run_ranks
from tests.support.launched import ranks as launched

pytestmark = pytest.mark.skipif(shared_memory.load()[0] is None, reason=shared_memory.load()[1])

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]
RankFunction = Callable[[ParallelContext], Any]


def tensor(draw: random.Random, shape: tuple[int, ...], dtype: torch.dtype, rank: int) -> Tensor:
    """Random values that depend on the state of `draw` and the rank only; sometimes with strides."""
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30) * 16 + rank)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 9
    x = x.abs().to(dtype) if dtype in (torch.uint8, torch.bool) else x.to(dtype)
    if draw.random() < 0.3 and len(shape) > 1:  # the same values, laid out the other way round
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    return x


def operations(ctx: ParallelContext, seed: int, count: int, sleeps: float = 0.0) -> list[Tensor]:
    """Random collectives and messages, several in flight, waited for in random order; returns the results in order."""
    draw, own, axis = random.Random(seed), random.Random(seed * 64 + ctx.rank), ctx.data
    results: dict[int, Tensor] = {}
    pending: list[tuple[int, Pending]] = []
    for number in range(count):
        dtype = draw.choice(TYPES)
        shape = (axis.size * draw.choice([0, 1, 2, 7]), draw.choice([1, 3, 64, 1000]))
        kind = draw.choice(["reduce", "gather", "into", "scatter", "message"])
        x = tensor(draw, shape, dtype, ctx.rank)
        if own.random() < sleeps:
            time.sleep(own.random() * 0.01)
        if kind == "reduce":
            started = all_reduce_start(x, axis, draw.choice(["sum", "max", "min"]))
        elif kind == "gather":
            started = all_gather_start(x, axis)
        elif kind == "into":
            started = all_gather_into_start(x.contiguous().view(-1), axis)
        elif kind == "scatter":
            started = reduce_scatter_start(x, axis)
        else:
            turn = draw.randrange(1, axis.size)
            to, source = (axis.rank + turn) % axis.size, (axis.rank - turn) % axis.size
            sent, received = post([(x.contiguous(), to)], [(torch.empty(shape, dtype=dtype), source)], axis)
            pending += [(-1, sent[0])]
            started = received[0]
        pending.append((number, started))
        while len(pending) > own.choice([0, 3, 12]):
            which, ready = pending.pop(own.randrange(len(pending)))
            results[which] = ready.wait()
    for which, ready in pending:
        results[which] = ready.wait()
    return [results[number] for number in range(count)]


def run(world: int, job: RankFunction, transport: str = "shared", ring: int = 0) -> list[Any]:
    before = shared_memory.RING, shared_memory.PAIR_RING
    if ring:
        shared_memory.RING = shared_memory.PAIR_RING = ring
    try:
        return run_ranks(Layout(world, data=world), job, transport=transport)
    finally:
        shared_memory.RING, shared_memory.PAIR_RING = before


def same(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}[a.dtype]
    close = torch.allclose(a.double(), b.double(), rtol=tolerance, atol=20 * tolerance, equal_nan=True)
    return a.dtype == b.dtype and a.shape == b.shape and close


@pytest.mark.parametrize(("world", "ring"), [(2, 4096), (2, 0), (3, 8192), (4, 4096), (8, 8192)])
def test_results_are_those_of_gloo(world: int, ring: int) -> None:
    seed = world * 100 + ring

    def job(ctx: ParallelContext) -> list[Tensor]:
        return operations(ctx, seed, 60)

    for own, other in zip(run(world, job, ring=ring), run(world, job, "gloo"), strict=True):
        assert all(map(same, own, other))


@pytest.mark.parametrize("world", [2, 4])
def test_stress(world: int) -> None:
    """Ranks sleep at random points, and there are more ranks than cores."""

    def job(ctx: ParallelContext) -> list[Tensor]:
        return operations(ctx, 7, 150, sleeps=0.2)

    for own, other in zip(run(world, job, ring=4096), run(world, job, "gloo"), strict=True):
        assert all(map(same, own, other))


def test_every_rank_has_the_same_bits() -> None:
    """Also in two rounds, where each rank sums only one part; and they equal a sum in the order of ranks."""

    def job(ctx: ParallelContext) -> tuple[Tensor, Tensor]:
        draw = random.Random(3)
        parts = [tensor(draw, (300, 257), torch.float32, rank) for rank in range(5)]
        return all_reduce_(parts[ctx.rank].clone(), ctx.data), functools.reduce(torch.add, parts)

    for total, expected in run(5, job):
        assert torch.equal(total, expected)


def test_a_nan_is_not_lost() -> None:
    def job(ctx: ParallelContext) -> list[Tensor]:
        x = torch.tensor([ctx.rank, 1.0, 2.0]).index_fill(0, torch.tensor([ctx.rank]), torch.nan)
        return [all_reduce_(x.clone().to(t), ctx.data, op) for op in ("max", "min", "sum") for t in TYPES[:4]]

    for results in run(3, job):
        assert all(bool(x.isnan().all()) for x in results)


def test_tensors_are_kept_until_an_operation_is_done_without_a_wait() -> None:
    def job(ctx: ParallelContext) -> float:
        for _ in range(20):
            all_reduce_start(torch.full((5000,), 1.0), ctx.data)  # larger than the ring; the tensor is not held here
            torch.full((5000,), 7.0)
        return float(all_reduce_(torch.ones(1), ctx.data).item())

    assert run(2, job, ring=4096) == [2.0, 2.0]


def test_a_blocked_rank_serves_every_axis() -> None:
    """The ranks wait for two axes in opposite orders, with operations that are larger than their rings."""

    def job(ctx: ParallelContext) -> list[float]:
        axes = [ctx.data, ctx.tensor]
        started = [all_reduce_start(torch.full((9000,), 1.0 + i), axis) for i, axis in enumerate(axes)]
        order = started if ctx.rank % 2 else started[::-1]
        for pending in order:
            pending.wait()
        return [float(pending.wait().sum()) for pending in started]

    before = shared_memory.RING
    shared_memory.RING = 4096
    try:
        assert run_ranks(Layout(4, data=2, tensor=2), job, transport="shared") == [[18000.0, 36000.0]] * 4
    finally:
        shared_memory.RING = before


def test_ranks_that_disagree_raise_an_error() -> None:
    def job(ctx: ParallelContext) -> str:
        try:
            if ctx.rank == 0:
                all_reduce_(torch.ones(4), ctx.data, "max")
            else:
                all_gather_start(torch.ones(4), ctx.data).wait()
        except (RuntimeError, ConnectionError) as error:
            return str(error)
        return ""

    texts = run(2, job)
    assert (
        "position 1 of the group makes an all-gather of 16 x byte where position 0 makes an all-reduce of 4" in texts[0]
    )
    assert "float32 (max)" in texts[0] and "position 0 of the group makes" in texts[1]


def test_ranks_that_disagree_are_rejected_from_then_on() -> None:
    """Every later call on any link raises the same message: the state of the other ranks is not known."""

    def job(ctx: ParallelContext) -> list[str]:
        def message_of(call: Callable[[], Any]) -> str:
            with pytest.raises(RuntimeError) as error:
                call()
            return str(error.value)

        x, other = torch.ones(4), 1 - ctx.data.rank
        first = message_of(lambda: all_reduce_start(x, ctx.data, "max" if ctx.rank == 0 else "min").wait())
        calls: list[Callable[[], Any]] = [
            lambda: all_reduce_start(x, ctx.data, "max"),
            lambda: all_gather_start(x, ctx.world),
            lambda: post([(x, other)], [], ctx.data),
            lambda: post([], [(x, other)], ctx.data),
        ]
        return [first, *map(message_of, calls)]

    for texts in run(2, job):
        assert "ranks disagree: position" in texts[0] and set(texts) == {texts[0]}


def test_a_fork_cannot_use_its_parents_link() -> None:
    """It may create a new one and drop the parent's, and the parent's still works."""

    def in_fork(ctx: ParallelContext) -> str:
        with pytest.raises(RuntimeError, match="belongs to the process that made it") as error:
            all_reduce_start(torch.ones(1), ctx.data)
        assert ctx.data.link is not None
        del ctx.data.link.channel
        file = os.memfd_create("own")
        make = functools.partial(
            shared_memory.load()[0].Channel, file, 5, ranks=2, ring=4096, pair_ring=4096, spin=False
        )
        ends = [make(rank=0, make=True), make(rank=1, make=False)]
        x = torch.ones(2, 5)
        for end, part in zip(ends, x, strict=True):
            end.start(1, 0, 0, part.data_ptr(), part.data_ptr(), 5)
        assert all(end.wait(0, 0, 1, 1.0) for end in ends) and bool((x == 2).all())
        return str(error.value)

    def job(ctx: ParallelContext) -> tuple[float, str]:
        started = all_reduce_start(torch.ones(9000), ctx.data)  # larger than a ring: not complete before the fork
        reading, writing = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                os.write(writing, in_fork(ctx).encode())
            except BaseException as error:
                os.write(writing, repr(error).encode())
            os._exit(0)
        os.close(writing)
        os.waitpid(pid, 0)
        with os.fdopen(reading) as pipe:
            text = pipe.read().replace(str(pid), "CHILD").replace(str(os.getpid()), "PARENT")
        return float(started.wait().sum()), text

    message = "this link of shared memory belongs to the process that made it (PARENT); its fork (CHILD) cannot use it"
    assert run(2, job, ring=4096) == [(18000.0, message)] * 2


def test_a_type_that_cannot_be_added_is_rejected() -> None:
    def job(ctx: ParallelContext) -> None:
        with pytest.raises(TypeError, match="complex64 are not reduced"):
            all_reduce_(torch.ones(1, dtype=torch.complex64), ctx.data)
        assert all_gather_start(torch.ones(1, dtype=torch.complex64), ctx.data).wait().shape == (2,)

    run(2, job)


def test_silence_is_an_error_that_names_the_rank() -> None:
    def job(ctx: ParallelContext) -> str:
        assert ctx.data.link is not None
        ctx.data.link.timeout_s = 0.5
        if ctx.rank == 1:
            time.sleep(2)
            return ""
        with pytest.raises(TimeoutError) as error:
            all_reduce_(torch.ones(1), ctx.data)
        return str(error.value)

    assert run(2, job)[0] == "Timed out waiting 0.5 s in shared memory"


def test_a_rank_that_left_after_its_part_is_not_missed() -> None:
    def job(ctx: ParallelContext) -> float:
        started = all_reduce_start(torch.ones(3), ctx.data)
        if ctx.rank == 0:
            time.sleep(0.5)  # meanwhile the other rank has exited
        return float(started.wait().sum())

    assert run(2, job) == [6.0, 6.0]


def test_signal_handlers_run_while_a_rank_waits() -> None:
    def job(ctx: ParallelContext) -> bool:
        seen: list[int] = []
        signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
        others = gather_json(os.getpid(), ctx.data, ctx.device)
        if ctx.rank == 0:
            time.sleep(0.2)
            os.kill(others[1], signal.SIGUSR1)
            time.sleep(0.5)
            return all_reduce_(torch.ones(1), ctx.data).item() == 2
        at: list[float] = []
        signal.signal(signal.SIGUSR1, lambda number, frame: at.append(time.monotonic()))
        all_reduce_(torch.ones(1), ctx.data)
        return bool(at) and time.monotonic() - at[0] > 0.2

    assert run(2, job) == [True, True]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("pidfd_open", ("rank 1", "not implemented")),
        ("memfd_create", ("segment", "not implemented")),
    ],
)
def test_every_rank_knows_why(name: str, why: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the rank that could use it; and if Python lacks the function, because it was built on an old system."""

    def job(ctx: ParallelContext) -> str:
        return ctx.describe_transports()

    def rejected(_: ParallelContext) -> str:
        with raises(ConfigError, "distributed.no-shared-memory", *why) as error:
            make_context(
                Layout(2, data=2),
                dist.get_rank(),
                connect=True,
                dtype=torch.float64,
                transport="shared",
            )
        return str(error.value)

    real = getattr(os, name)

    def fails(*args: Any) -> Any:
        if dist.get_rank() == (name == "pidfd_open"):
            raise OSError(errno.ENOSYS, "not implemented")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fails)
        assert run(2, job, "auto") == ["gloo"] * 2
        texts = run(2, rejected, "gloo")
        assert texts[0] == texts[1]
    monkeypatch.delattr(os, name)
    assert f"built without os.{name}" in shared_memory.load()[1] and run(2, job, "auto") == ["gloo"] * 2


def test_without_shared_memory_gloo_is_used_or_the_run_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    def job(ctx: ParallelContext) -> tuple[Any, ...]:
        return ctx.world.link is None, ctx.describe_transports(), all_reduce_(torch.ones(1), ctx.data).item()

    assert run(2, job) == [(False, "shared memory", 2.0)] * 2
    assert run(2, job, "gloo") == [(True, "gloo", 2.0)] * 2
    monkeypatch.setattr(shared_memory, "_namespace", os.getpid)  # as of ranks in two containers
    assert run(2, job, "auto") == [(True, "gloo", 2.0)] * 2
    with pytest.raises(
        AssertionError, match=r"parallel\.transport = 'shared': rank 1 cannot open the memory of rank 0"
    ):
        run(2, job, "shared")
    monkeypatch.setattr(shared_memory, "load", lambda: (None, "engine._shared is not available (of course)"))
    assert run(2, job, "auto") == [(True, "gloo", 2.0)] * 2


@pytest.mark.parametrize("transport", ["shared", "gloo"])
def test_a_killed_rank_ends_the_others_with_one_message(
    transport: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure, "_LINGER_S", 0.0)
    monkeypatch.setattr(failure, "PATIENCE_S", 1.0)

    def job(ctx: ParallelContext) -> int:
        for step in range(1000):
            if ctx.rank == 2 and step == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            started = [all_reduce_start(torch.ones(100_000), ctx.world) for _ in range(3)]
            for pending in started:
                pending.wait()
        return 0

    begin = time.monotonic()
    results = launched(job, tmp_path, world=3, transport=transport)
    printed = [line for r in results for line in r.text.splitlines() if line.startswith("error: ")]
    assert [r.code for r in results] == [1, 1, -signal.SIGKILL] and len(printed) == 1, results
    assert "lost contact with rank 2, which exited without an error message (killed? out of memory?)" in printed[0]
    assert transport == "gloo" or "the process of rank 2 (" in printed[0]
    assert time.monotonic() - begin < 30


def test_nothing_is_left_behind() -> None:
    before = set(os.listdir("/dev/shm"))

    def job(ctx: ParallelContext) -> int:
        all_reduce_(torch.ones(1), ctx.data)
        links = [entry.path for entry in os.scandir("/proc/self/fd")]
        names = [os.readlink(path) for path in links if os.path.lexists(path)]
        return sum("memfd" in name and "engine-board" not in name for name in names)  # the board stays open for readers

    assert run(2, job) == [0, 0]
    assert set(os.listdir("/dev/shm")) - before == set()
