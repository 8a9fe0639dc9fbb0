"""Stages exchange any tuple of tensors: a toy model with four of them at each boundary equals plain autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batch import MicroBatch
from engine.distributed.collectives import all_reduce_
from engine.distributed.context import ParallelContext, make_context
from engine.distributed.layout import Layout
from engine.distributed.sharding import Parameter
from engine.distributed.specs import Chunk, ShardSpec
from engine.errors import PlanError
from engine.parallel.gradients import make_buckets
from engine.part import Boundary, BoundaryTensor, Output
from engine.pipeline.executor import execute, local_totals
from engine.pipeline.schedules import build, forward_only
from engine.pipeline.stage import Stage
from tests.support.cases import micro_batch
from tests.support.errors import raises
from tests.support.harness import run_ranks

B, S, D, VOCAB, MICROBATCHES = 2, 3, 4, 11, 4  # microbatches of each data rank
F64 = torch.float64


def values(stages: int) -> dict[str, Tensor]:
    """The matrices of all stages; the first also has two embeddings."""
    draw = torch.Generator().manual_seed(5)
    shapes: dict[str, tuple[int, int]] = {"states": (VOCAB, D), "encoded": (VOCAB, D)}
    for n in range(stages):
        shapes |= {f"{n}.mix": (D, D), f"{n}.read": (D, D), f"{n}.table": (VOCAB, D)}
    return {name: torch.randn(shape, generator=draw, dtype=F64) / 2 for name, shape in shapes.items()}


def global_batch(data: int, rank: int | None = None) -> list[MicroBatch]:
    """The microbatches of a data rank, or of all: uneven float weights, and shares that are not the weights."""
    found = []
    for n in range(MICROBATCHES * data):
        draw = torch.Generator().manual_seed(n)
        tokens = torch.randint(VOCAB, (B, S + 1), generator=draw)
        weights, shares = torch.rand(2, B, S, generator=draw, dtype=F64)
        whole = micro_batch(tokens[:, :-1], tokens[:, 1:], weights * (n + 1), torch.arange(B) + n * B)
        found.append(replace(whole, shares=shares))
    return found if rank is None else found[rank * MICROBATCHES : (rank + 1) * MICROBATCHES]


class ToyPart:
    """h, encoded, frozen, ids -> tanh(h mix + encoded read + table[ids] + frozen), encoded, frozen, ids + 1.

    h and encoded have the same shape. encoded passes through every stage as it is, and its gradient comes back. frozen
    is float without a gradient, ids are integers. The last stage ignores `encoded` if `ignore`.
    """

    sums = ("mean_id", "penalty")

    def __init__(self, stage: int, stages: int, *, ignore: bool = False, freeze: bool = False):
        self.first, self.last, self.ignore = stage == 0, stage == stages - 1, ignore
        names = (["states", "encoded"] if self.first else []) + [f"{stage}.{part}" for part in ("mix", "read", "table")]
        self.params = {
            name: Parameter(x, ShardSpec((Chunk(name, tuple(x.shape)),)))
            for name, x in values(stages).items()
            if name in names
        }
        self.mix, self.read, self.table = list(self.params.values())[-3:]
        self.frozen = freeze and self.first

    def boundary(self, batch: MicroBatch) -> Boundary:
        b, s = batch.tokens.shape
        state = BoundaryTensor((b, s, D), F64)
        still = BoundaryTensor((b, D), F64, grad=False), BoundaryTensor((b, s), torch.int64, grad=False)
        return () if self.first else (state, state, *still)

    def __call__(self, inputs: tuple[Tensor, ...], batch: MicroBatch) -> Output:
        if self.first:
            states, encoded = (self.params[name][batch.tokens] for name in ("states", "encoded"))
            inputs = states, encoded, encoded.detach().mean(1), batch.tokens
        h, encoded, frozen, ids = inputs
        read = torch.zeros(()) if self.last and self.ignore else encoded @ self.read
        h = torch.tanh(h @ self.mix + read + self.table[ids] + frozen[:, None])
        ids = (ids + 1) % VOCAB
        assert batch.shares is not None
        sums = {"penalty": 0.1 * (batch.shares * h.square().sum(-1)).sum(), "mean_id": (batch.shares * ids).sum()}
        if not self.last:
            return Output((h, encoded, frozen, ids), sums=sums)
        return Output(losses=(batch.weights * h.sum(-1)).sum(1), sums=sums)


def by_autograd(stages: int, data: int, *, ignore: bool = False, freeze: bool = False) -> dict[str, Any]:
    """Totals and gradients of one graph over the whole global batch."""
    w = {name: x.requires_grad_() for name, x in values(stages).items()}
    loss, penalty, mean_id = torch.zeros(3, dtype=F64)
    for batch in global_batch(data):
        h, encoded, ids = w["states"][batch.tokens], w["encoded"][batch.tokens], batch.tokens
        frozen = encoded.detach().mean(1, keepdim=True)
        for n in range(stages):
            read = 0 if ignore and n == stages - 1 else encoded @ w[f"{n}.read"]
            h = torch.tanh(h @ w[f"{n}.mix"] + read + w[f"{n}.table"][ids] + frozen)
            ids = (ids + 1) % VOCAB
            penalty = penalty + 0.1 * torch.einsum("bs,bsd->", batch.shares, h**2)
            mean_id = mean_id + (batch.shares * ids).sum()
        loss = loss + torch.einsum("bs,bsd->", batch.weights, h)
    (loss + penalty).backward()
    still = ("states", "encoded", "0.mix", "0.read", "0.table") if freeze else ()
    grads = {name: torch.zeros_like(x) if x.grad is None or name in still else x.grad for name, x in w.items()}
    return {"totals": [x.item() for x in (loss, mean_id, penalty)], "grads": {k: g.numpy() for k, g in grads.items()}}


def by_executor(ctx: ParallelContext, schedule: str, chunks: int, **toy: bool) -> dict[str, Any]:
    plan = build(schedule, ctx.pipeline.size, chunks, MICROBATCHES)
    stages = {}
    for n in plan.stages_of(ctx.pipeline.rank):
        part = ToyPart(n, plan.num_stages, **toy)
        params = list(part.params.values())
        for p in params if part.frozen else ():
            p.freeze()
        stages[n] = Stage(part, params, make_buckets([params], ctx, grad_dtype=F64, bucket_bytes=100, overlap=True))
    batches = global_batch(ctx.data.size, ctx.data.rank)
    scored = local_totals(execute(forward_only(plan, MICROBATCHES), stages, ctx, batches), ctx)
    done = execute(plan, stages, ctx, batches)
    for stage in stages.values():
        assert stage.buckets is not None and not stage.live and not stage.deferred
        stage.buckets.wait()
    totals = local_totals(done, ctx)
    assert torch.equal(totals, scored), "forward-only gives the same losses and sums"
    grads = {name: p.main_grad for stage in stages.values() for name, p in stage.part.params.items()}  # type: ignore[attr-defined]
    return {
        "names": list(done.sums),
        "totals": all_reduce_(totals, ctx.world).tolist(),
        "grads": {name: None if g is None else g.numpy().copy() for name, g in grads.items()},
    }


def equal_to_autograd(layout: Layout, schedule: str, chunks: int, transport: str = "auto", **toy: bool) -> None:
    expected = by_autograd(layout.pipeline * chunks, layout.data, **toy)
    ranks = run_ranks(layout, lambda ctx: by_executor(ctx, schedule, chunks, **toy), transport=transport)
    found: dict[str, Any] = {}
    for rank in ranks:
        assert rank["names"] == ["mean_id", "penalty"]
        assert rank["totals"] == pytest.approx(expected["totals"], rel=1e-13)
        found |= rank["grads"]
    assert found.keys() == expected["grads"].keys()
    for name, grad in expected["grads"].items():
        if found[name] is None:  # frozen
            assert not grad.any()
            continue
        assert np.abs(found[name] - grad).max() <= 1e-12 * max(1e-300, np.abs(grad).max()), name


@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-v", 2), ("dualpipe-v", 2)],
)
def test_any_tuple_of_tensors_crosses_stages(schedule: str, chunks: int) -> None:
    equal_to_autograd(Layout(4, pipeline=2, data=2), schedule, chunks)


@pytest.mark.parametrize("toy", [{"ignore": True}, {"freeze": True}], ids=str)
def test_unused_inputs_and_frozen_stages(toy: dict[str, bool]) -> None:
    """A part that does not use an input returns zeros for its gradient; a frozen part drops gradients."""
    equal_to_autograd(Layout(2, pipeline=2), "zb-v", 2, **toy)
    equal_to_autograd(Layout(2, pipeline=2), "1f1b", 1, "gloo", **toy)


def test_four_stages_and_tensor_ranks_count_once() -> None:
    equal_to_autograd(Layout(4, pipeline=4), "1f1b", 1, "gloo")
    equal_to_autograd(Layout(4, tensor=2, pipeline=2), "dualpipe-v", 2)
    equal_to_autograd(Layout(), "zb-v", 2)  # all stages on one rank: nothing is sent


def shortened(x: BoundaryTensor) -> BoundaryTensor:
    return replace(x, shape=(*x.shape[:-1], x.shape[-1] - 1))


@pytest.mark.parametrize(
    ("change", "values"),
    [
        (lambda b: (shortened(b[0]), *b[1:]), "float64 [2, 3, 3]"),
        (lambda b: b[:-1], "stage 1 takes float64 [2, 3, 4], float64 [2, 3, 4], float64 [2, 4]"),
        (lambda b: (*b[:3], replace(b[3], dtype=torch.int32)), "int32 [2, 3]"),
        (lambda b: (b[0], replace(b[1], grad=False), *b[2:]), "tensor 1 with a gradient"),
    ],
    ids=["shape", "count", "dtype", "gradient"],
)
def test_a_boundary_that_does_not_fit_is_an_error(change: Any, values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    boundary = ToyPart.boundary
    monkeypatch.setattr(ToyPart, "boundary", lambda self, batch: () if self.first else change(boundary(self, batch)))
    with raises(PlanError, "pipeline.boundary-mismatch", "stage 0", values):
        by_executor(make_context(Layout(), 0, dtype=F64), "zb-v", 2)


@pytest.mark.parametrize(
    ("change", "values"),
    [
        (lambda part, out: replace(out, losses=torch.zeros(B)), "returned losses, but is not the last"),
        (lambda part, out: replace(out, losses=None), "stage 1 is last, without losses"),
        (lambda part, out: replace(out, sums={"extra": torch.zeros(())}), "returned the sums extra"),
    ],
    ids=["losses too early", "no losses", "unknown sum"],
)
def test_an_output_that_does_not_fit_is_an_error(change: Any, values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, wrong = ToyPart.__call__, 0 if "not the last" in values else 1

    def changed(self: ToyPart, inputs: Any, batch: MicroBatch) -> Output:
        out = call(self, inputs, batch)
        return change(self, out) if self.last == bool(wrong) else out

    monkeypatch.setattr(ToyPart, "__call__", changed)
    with raises(PlanError, "pipeline.boundary-mismatch", values):
        by_executor(make_context(Layout(), 0, dtype=F64), "zb-v", 2)


def test_the_first_part_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToyPart, "boundary", lambda self, batch: (BoundaryTensor((B, S), F64),))
    with raises(PlanError, "pipeline.boundary-mismatch", "no stage before"):
        by_executor(make_context(Layout(), 0, dtype=F64), "zb-v", 2)
