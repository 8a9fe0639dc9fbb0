"""Counts the bytes of live tensor storages while code runs: what the memory sheet is compared with.

A dispatch mode sees the result of every torch operation, in the forward, in the backward and inside autograd functions.
Each storage is counted once, from the operation that returns it until it is freed.

`count_rank` runs steps of one rank of any layout alone: its collectives return at once, with tensors of the right size
and any values, so no other rank is needed. With fake tensors it computes nothing, so that the model may be large.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import traceback
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.batch import MicroBatch, Sequence
from engine.config.derived import derive
from engine.config.schema import Config
from engine.distributed.context import Axis, ParallelContext, make_context
from engine.optim.precision import PRECISIONS
from engine.pipeline.executor import execute
from engine.train.state import TrainState, setup


class LiveStorages(TorchDispatchMode):
    """While active, `now` is the bytes of the live storages that were made meanwhile, and `peak` the most so far.

    trace: keep the stack at the peak in `where`, to find what a term misses.
    """

    def __init__(self, *, trace: bool = False):
        super().__init__()
        self.now = self.peak = 0
        self.trace, self.where = trace, ""
        self._live: dict[int, tuple[weakref.ref[Any], int]] = {}

    def reset(self) -> None:
        """Forget the peak."""
        self.peak = self.now

    def _add(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or x.device.type == "meta":
            return

        def freed(_: object) -> None:
            del self._live[key]
            self.now -= size

        self._live[key] = weakref.ref(storage, freed), size
        self.now += size
        if self.now > self.peak:
            self.peak = self.now
            if self.trace:
                self.where = "".join(traceback.format_stack(limit=14)[:-2])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._add(x)
        return out


def count_rank(cfg: Config, rank: int, *, fake: bool = False) -> tuple[int, int]:
    """The bytes of live storages of a rank between two steps, and the most during a step. fake: with fake tensors."""
    derived, dtype = derive(cfg), PRECISIONS[cfg.train.precision].compute
    with _alone(cfg, rank), ExitStack() as modes:
        if fake:
            modes.enter_context(FakeTensorMode())
            # under this mode a Parameter is a FakeTensor that is marked as one
            is_parameter = lambda cls, x: type.__instancecheck__(cls, x) or getattr(x, "_is_param", False)  # noqa: E731
            modes.enter_context(patch.object(torch.nn.parameter._ParameterMeta, "__instancecheck__", is_parameter))
        live = modes.enter_context(LiveStorages())
        state = setup(cfg, _with_groups(make_context(derived.layout, rank, dtype=dtype)), derived)
        for _ in range(1 if fake else 2):
            gc.collect()  # of the step before, whose objects refer to each other
            live.reset()
            before = live.now
            _step(state)
    return before, live.peak


@contextmanager
def _alone(cfg: Config, rank: int) -> Iterator[None]:
    """Process groups without other ranks, and what a rank would hear from them about the stages."""
    derived = derive(cfg)
    layout, phase = derived.layout, derived.phases.at(1)
    width = phase.seq_len // (layout.tensor if layout.sequence else 1)
    dtype = str(PRECISIONS[cfg.train.precision].compute).removeprefix("torch.")
    hidden = ((width, phase.micro_batch_size, cfg.model.hidden_size), dtype, True)
    stages = range(derived.first_plan.num_stages)
    heard = [{str(n): {"boundary": [hidden] * (n > 0), "sums": [], "trainable": True} for n in stages}]
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        stack.enter_context(patch("engine.distributed.collectives._reduce_scatter", _reduce_scatter))
        stack.enter_context(patch("engine.pipeline.executor.gather_json", lambda *_: heard))
        stack.enter_context(patch("engine.train.state.gather_json", lambda value, *_: [value]))
        yield


@dataclasses.dataclass
class _Scattering:
    """A reduce-scatter in flight: as in gloo and NCCL, it holds its input until it is waited for."""

    source: torch.Tensor

    def wait(self) -> None:
        """Return at once."""


def _reduce_scatter(out: torch.Tensor, source: torch.Tensor, **_: Any) -> _Scattering:
    return _Scattering(source)


def _with_groups(ctx: ParallelContext) -> ParallelContext:
    """The context with a process group of the right size for each axis."""

    @functools.cache
    def group(ranks: tuple[int, ...]) -> Any:
        return dist.new_group(list(ranks))

    def connected(axis: Axis) -> Axis:
        return dataclasses.replace(axis, group=group(axis.ranks)) if axis.size > 1 else axis

    fields = {field.name: getattr(ctx, field.name) for field in dataclasses.fields(ctx)}
    axes = {name: connected(value) for name, value in fields.items() if isinstance(value, Axis)}
    others = {name: connected(axis) for name, axis in ctx.others.items()}
    return dataclasses.replace(ctx, others=others, **axes)


def _step(state: TrainState) -> None:
    """A step as `train_step` takes it, without the values that the host reads."""
    phase = state.phase
    b, s = phase.micro_batch_size, phase.seq_len

    def column(dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(b, s, dtype=dtype)

    given = [column(torch.float64) for _ in range(state.plan.microbatches)]  # weights before the objective
    batches = [
        MicroBatch(
            column(torch.int64),
            column(torch.int64),
            column(torch.float64),
            torch.zeros(b, dtype=torch.int64),
            Sequence.of_rows(s),
            shares=column(torch.float64),
        )
        for _ in given
    ]
    for stage in state.buckets:
        stage.zero_grad()
    execute(state.plan, state.stages, state.ctx, batches)
    for stage in state.buckets:
        stage.wait()
    state.norms.local()
    state.optimizer.step(1e-3)
    state.wait_for_weights()
