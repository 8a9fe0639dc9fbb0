"""AdamW over flat buckets, the learning rate, gradient norms and clipping, and FLOPs."""

from __future__ import annotations

import gc
import math
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.config.derived import derive
from engine.config.load import load
from engine.config.schema import Config, LrScheduleConfig, ModelConfig, OptimizerConfig
from engine.distributed.context import ParallelContext, make_context
from engine.distributed.layout import Layout
from engine.distributed.sharding import Parameter, cut_piece, parameters, piece_of, units
from engine.distributed.specs import Chunk, Role, ShardSpec
from engine.model.build import StageShape, num_parameters, stage_shapes, tensor_shapes
from engine.model.layers import Build
from engine.model.transformer import Transformer
from engine.ops import native
from engine.optim.clip import NormCounter, clip_factor, sum_squares
from engine.optim.lr import learning_rate
from engine.optim.optimizer import Optimizer
from engine.optim.update_rules import RULES
from engine.parallel.gradients import GradBuckets, make_buckets
from engine.planner.flops import flops_per_token
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import config, layout_of, micro_batch, random_batches
from tests.support.harness import run_ranks
from tests.support.numbers import named

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def context(dtype: torch.dtype) -> ParallelContext:
    return make_context(Layout(), 0, dtype=dtype)


def make(dtype: torch.dtype, grad_dtype: torch.dtype, values: dict[str, Tensor]) -> tuple[list[Parameter], GradBuckets]:
    """Parameters with the given values, in two units and buckets of at least 512 bytes; vectors have no decay."""
    ctx = context(dtype)
    params = []
    for name, x in values.items():
        spec = ShardSpec((Chunk(name, tuple(x.shape)),), role=Role.VECTOR if x.dim() == 1 else Role.MATRIX)
        params.append(Parameter(x.to(dtype, copy=True), spec))
    return params, make_buckets([params[:2], params[2:]], ctx, grad_dtype=grad_dtype, bucket_bytes=512, overlap=False)


def values(seed: int) -> dict[str, Tensor]:
    shapes = {"a": (7, 5), "b": (13,), "c": (3, 67), "d": (1,), "e": (9, 2)}
    return {name: named(shape, seed, name) for name, shape in shapes.items()}


def test_adamw_equals_torch() -> None:
    """Ten steps with a changing rate, matrices with and vectors without weight decay, several buckets with padding."""
    cfg = OptimizerConfig(lr=1e-2, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.3)
    params, buckets = make(F64, F64, values(0))
    optimizer = Optimizer([buckets], cfg)
    assert len(buckets.buckets) == 2 and len({run.group for run in optimizer.runs}) == 2
    theirs = [x.requires_grad_() for x in values(0).values()]
    groups = [
        {"params": [x for x in theirs if x.dim() == 2], "weight_decay": 0.3},
        {"params": [x for x in theirs if x.dim() == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6, foreach=False)
    for step in range(1, 11):
        for p, x, grad in zip(params, theirs, values(step).values(), strict=True):
            assert p.main_grad is not None
            p.main_grad.copy_(grad)
            x.grad = grad.clone()
        for group in reference.param_groups:
            group["lr"] = cfg.lr / step
        optimizer.step(cfg.lr / step)
        reference.step()
    assert optimizer.steps == 10
    for p, x in zip(params, theirs, strict=True):
        assert torch.allclose(p, x, rtol=1e-13, atol=1e-14), p.name
        assert not torch.allclose(p, values(0)[p.name], rtol=1e-3)
    found = {(shard.kind, shard.param.name): shard.flat.view(shard.param.shape) for shard in optimizer.states()}
    assert len(found) == 3 * len(params)
    for x, name in zip(theirs, values(0), strict=True):
        for kind in RULES["adamw"].states:
            assert torch.allclose(found[kind, name], reference.state[x][kind], rtol=1e-13)
        assert torch.equal(found["model", name], params[list(values(0)).index(name)])
    for bucket in buckets.buckets:
        used = torch.zeros_like(bucket.values, dtype=torch.bool)
        for index in range(len(bucket.params)):
            bucket.view(used, index).fill_(True)
        assert not bucket.values[~used].any(), "padding between parameters was changed"


def test_wide_precisions_have_no_second_copy() -> None:
    _, buckets = make(F32, F32, values(0))
    optimizer = Optimizer([buckets], OptimizerConfig())
    for run in optimizer.runs:
        assert run.master.data_ptr() == run.bucket.values[run.span.start :].data_ptr()


def test_bf16_does_not_lose_tiny_updates() -> None:
    """A hundred updates of 1e-4 near 1, where bf16 has steps of 4e-3: the master weights keep them."""
    params, buckets = make(BF16, F32, {"w": torch.ones(4, 3)})
    optimizer = Optimizer([buckets], OptimizerConfig(weight_decay=0.0))
    (p,) = params
    assert p.dtype == BF16 and p.main_grad is not None and p.main_grad.dtype == F32
    assert all(x.dtype == F32 for x in (optimizer.runs[0].master, *optimizer.runs[0].states.values()))
    for step in range(100):
        p.main_grad.fill_(1.0)
        optimizer.step(1e-4)
        if step == 0:
            assert (p == 1).all(), "one update is too small for bf16"
    master = next(shard.flat.view(4, 3) for shard in optimizer.states() if shard.kind == "model")
    assert torch.allclose(master, torch.full((4, 3), 0.99), rtol=1e-5)
    assert torch.equal(p, master.to(BF16)) and (p < 1).all()


# -- learning rate -----------------------------------------------------------------------------------------------------

PEAK = OptimizerConfig(lr=2.0)


def rate(step: int, kind: Any, steps: int = 110, **options: Any) -> float:
    values = {"warmup_steps": 10, "min_lr_ratio": 0.1, **options}
    return learning_rate(step, steps, PEAK, LrScheduleConfig(kind=kind, **values))


@pytest.mark.parametrize(
    ("kind", "options", "points"),
    [
        ("cosine", {}, {10: 2.0, 60: 1.1, 35: 0.2 + 1.8 * (0.5 + 2**0.5 / 4), 110: 0.2}),
        ("linear", {}, {10: 2.0, 11: 2.0 - 0.018, 60: 1.1, 110: 0.2}),
        ("cosine", {"horizon_steps": 60}, {10: 2.0, 35: 1.1, 60: 0.2, 61: 0.2, 110: 0.2}),
        ("linear", {"horizon_steps": 210}, {10: 2.0, 110: 1.1}),
        ("wsd", {"decay_steps": 20, "horizon_steps": 60}, {40: 2.0, 50: 1.1, 60: 0.2, 110: 0.2}),
        ("wsd", {"decay_steps": 20}, {10: 2.0, 50: 2.0, 90: 2.0, 100: 1.1, 105: 0.65, 110: 0.2}),
        ("constant", {}, {10: 2.0, 11: 2.0, 110: 2.0}),
        ("cosine", {"min_lr_ratio": 0.0}, {60: 1.0, 110: 0.0}),
        ("linear", {"min_lr_ratio": 1.0}, {60: 2.0, 110: 2.0}),
        ("cosine", {"warmup_steps": 0}, {55: 1.1, 110: 0.2}),
        ("linear", {"warmup_steps": 110}, {55: 1.0, 110: 2.0}),
        ("wsd", {"warmup_steps": 100, "decay_steps": 10}, {100: 2.0, 105: 1.1, 110: 0.2}),
    ],
)
def test_learning_rate_at_hand_computed_points(kind: str, options: dict[str, Any], points: dict[int, float]) -> None:
    for step, expected in points.items():
        assert rate(step, kind, **options) == pytest.approx(expected, rel=1e-12, abs=1e-12), step


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    steps=st.integers(1, 300),
    warmup=st.integers(0, 300),
    decay=st.integers(1, 300),
    floor=st.floats(0, 1),
)
def test_learning_rate_has_the_right_shape(kind: str, steps: int, warmup: int, decay: int, floor: float) -> None:
    """Linear warm-up, then never rising, no jump, at the floor at the end, and never 0 if there is a floor."""
    warmup = min(warmup, steps)
    decay = min(decay, steps - warmup)
    if kind == "wsd" and decay == 0:
        return  # the config rejects it
    options = {"decay_steps": decay if kind == "wsd" else 0, "warmup_steps": warmup, "min_lr_ratio": floor}
    rates = [rate(step, kind, steps, **options) for step in range(1, steps + 1)]
    assert rates[:warmup] == pytest.approx([2.0 * (i + 1) / warmup for i in range(warmup)])
    after = [2.0, *rates[warmup:]]
    assert all(0 <= b <= a + 1e-12 for a, b in pairwise(after))
    assert all(r >= 2.0 * floor - 1e-12 for r in after)
    length = decay if kind == "wsd" else max(1, steps - warmup)
    assert all(a - b <= 2.0 * math.pi / 2 / length + 1e-12 for a, b in pairwise(after)), "a jump"
    if warmup < steps and kind != "constant":
        assert rates[-1] == pytest.approx(2.0 * floor)


# -- gradient norm and clipping ----------------------------------------------------------------------------------------


def canonical_gradient(cfg: Config) -> dict[str, Tensor]:
    return {name: named(shape, 3, name) for name, shape in tensor_shapes(cfg.model).items()}


def with_gradient(cfg: Config, ctx: ParallelContext, whole: dict[str, Tensor]) -> tuple[list[Parameter], GradBuckets]:
    """This rank's stage with its part of a gradient; the padding has values that must not be counted."""
    model = Transformer(cfg.model, Build(ctx), stage_shapes(derive(cfg).layers)[ctx.pipeline.rank])
    params = parameters(model)
    buckets = make_buckets(units(model), ctx, grad_dtype=F64, bucket_bytes=1 << 14, overlap=False)
    for p in params:
        assert p.main_grad is not None
        p.main_grad.fill_(1e6)
        for piece in p.spec.pieces(ctx):
            piece_of(piece, p.main_grad).copy_(cut_piece(piece, whole[piece.name]))
    return params, buckets


def layout_config(degrees: tuple[int, int, int], **model: Any) -> Config:
    tensor, pipeline, data = degrees
    return config(
        tensor * pipeline * data, parallel_tensor=tensor, parallel_pipeline=pipeline, parallel_data=data, **model
    )


def norm_of(whole: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(x.square().sum()) for x in whole.values()))


MODELS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "tied": {"model_tie_embeddings": True},
    "tied qk-norm": {"model_tie_embeddings": True, "model_qk_norm": True, "model_vocab_size": 5},
}


@pytest.mark.parametrize("degrees", [(1, 1, 1), (2, 1, 1), (4, 1, 1), (8, 1, 1), (1, 4, 1), (4, 2, 1)], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_the_norm_equals_that_of_the_unsharded_gradient(model: str, degrees: tuple[int, int, int]) -> None:
    """Replicas and tied embeddings are counted once, padding is not. Summed over ranks here, without processes."""
    cfg = layout_config(degrees, **MODELS[model])
    layout, whole = layout_of(cfg), canonical_gradient(cfg)
    total = torch.zeros(len(whole), dtype=F64)
    for rank in range(layout.world):
        ctx = make_context(layout, rank, dtype=F64)
        total += NormCounter([with_gradient(cfg, ctx, whole)[1]], ctx, list(whole), F64).local()
    for name, squared in zip(whole, total.tolist(), strict=True):
        assert squared == pytest.approx(float(whole[name].square().sum()), rel=1e-12), name


@pytest.mark.parametrize("degrees", [(2, 2, 1), (1, 2, 2), (4, 1, 1)], ids=str)
def test_all_ranks_know_the_same_norm(degrees: tuple[int, int, int]) -> None:
    cfg = layout_config(degrees, **MODELS["tied qk-norm"])
    whole = canonical_gradient(cfg)

    def job(ctx: ParallelContext) -> tuple[float, dict[str, float]]:
        _, buckets = with_gradient(cfg, ctx, whole)
        count = NormCounter([buckets], ctx, list(whole), F64)
        found = count()
        assert found.non_finite() == [] and count(scale=4.0).norm == found.norm / 4
        return found.norm, found.squared

    results = run_ranks(layout_of(cfg), job)
    assert all(r == results[0] for r in results)
    norm, squared = results[0]
    assert norm == pytest.approx(norm_of(whole), rel=1e-12)
    assert list(squared) == list(whole)


def test_a_pipeline_rank_without_parameters_takes_the_same_branch() -> None:
    """The middle stage has no block. A norm beyond float32 is the same number (or infinity) on all ranks."""
    cfg = config(3, parallel_pipeline=3, parallel_layers="2,0,2")

    def job(ctx: ParallelContext) -> tuple[float, int, int]:
        state = setup(cfg, ctx)
        grown = state.buckets[0].wait if state.params else None
        if grown is not None:

            def wait() -> None:
                grown()
                state.params[0].main_grad.mul_(1e45)  # type: ignore[union-attr]

            state.buckets[0].wait = wait  # type: ignore[method-assign]
        result = train_step(state, random_batches(cfg, ctx, 0))
        return result.norms.norm, state.optimizer.steps, len(state.params)

    ranks = run_ranks(layout_of(cfg), job)
    assert [count > 0 for *_, count in ranks] == [True, False, True]
    assert len({(norm, steps) for norm, steps, _ in ranks}) == 1 and 1e40 < ranks[0][0] < math.inf


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_non_finite_gradient_is_reported_by_name(bad: float) -> None:
    cfg = config(1)
    whole = canonical_gradient(cfg)
    for name in ("layers.1.mlp.up.weight", "layers.3.attention.k.weight", "norm.weight"):
        broken = {**whole, name: whole[name].clone()}
        broken[name].view(-1)[-1] = bad
        ctx = context(F64)
        found = NormCounter([with_gradient(cfg, ctx, broken)[1]], ctx, list(whole), F64)()
        assert found.non_finite() == [name]
        assert not math.isfinite(found.norm)


@pytest.mark.parametrize(
    ("norm", "limit", "factor"), [(4.0, 0.0, 1.0), (4.0, 1e9, 1.0), (4.0, 4.0, 1.0), (4.0, 0.5, 0.125)]
)
def test_clipping(norm: float, limit: float, factor: float) -> None:
    assert clip_factor(norm, limit) == factor


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("dtype", "main"), [(F64, F64), (F32, F32), (BF16, F32), (torch.float16, F32)], ids=str)
def test_grad_scale_scales_the_update(dtype: torch.dtype, main: torch.dtype, own: bool) -> None:
    """step(lr, c) with gradients g equals step(lr) with c g, without modifying g; the model has the rounded masters."""
    found = []
    for scale in (1.0, 0.3):
        params, buckets = make(dtype, main, values(0))
        optimizer = Optimizer(
            [buckets], OptimizerConfig(eps=1e-3)
        )  # a large eps, so that the scale affects every update
        with native.forced(kernels=own):
            for step in range(1, 4):
                for p, grad in zip(params, values(step).values(), strict=True):
                    assert p.main_grad is not None
                    p.main_grad.copy_(grad * (0.3 / scale))
                before = [b.grads.clone() for b in buckets.buckets]
                optimizer.step(1e-2, scale)
                assert all(torch.equal(b.grads, old) for b, old in zip(buckets.buckets, before, strict=True))
        for run in optimizer.runs:
            assert torch.equal(run.bucket.view_range(run.bucket.values, run.span), run.master.to(dtype))
        assert sum(len(run.master) for run in optimizer.runs) == sum(len(b.values) for b in buckets.buckets)
        found.append(torch.cat([run.master.double() for run in optimizer.runs]))
    assert torch.allclose(*found, rtol=1e-14 if main == F64 else 2e-6, atol=1e-14 if main == F64 else 1e-7)


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.skipif(native.load()[0] is None, reason=native.load()[1])
def test_sums_of_squares(dtype: torch.dtype) -> None:
    """Ranges of every size, empty and overlapping ones too; no bit depends on threads or on the place of a range."""
    flat = named((70_001,), 1, "squares").to(dtype)
    ranges = [(0, 0), (0, 1), (3, 70_001), (70_001, 70_001), (5, 8197), (5, 8198), (60_000, 60_007)]
    exact = [float(flat[a:b].double().square().sum()) for a, b in ranges]
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(torch.ops.trident.sum_squares(flat, torch.tensor(ranges)))
    torch.set_num_threads(before)
    assert found[0].dtype == F64 and all(torch.equal(x, found[0]) for x in found)
    assert found[0].tolist() == pytest.approx(exact, rel=1e-14)
    assert sum_squares(flat, ranges).tolist() == pytest.approx(exact, rel=1e-14)
    moved = torch.cat((torch.full((13,), torch.nan, dtype=dtype), flat))
    assert torch.equal(torch.ops.trident.sum_squares(moved, torch.tensor(ranges) + 13), found[0])


# -- FLOPs -------------------------------------------------------------------------------------------------------------


def test_flops_of_a_small_model_by_hand() -> None:
    cfg = ModelConfig(vocab_size=10, hidden_size=8, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4, ffn_size=6)
    projections = 8 * 8 + 2 * 8 * 4 + 8 * 8  # q, k and v, out
    assert 3 * (projections + 3 * 8 * 6) + 10 * 8 == 1088
    causal = (
        3 * 2 * (2 * 5 * 8) // 2
    )  # forward and twice that backward; scores and values; causal half of 5 positions, width 8
    assert flops_per_token(cfg, 5) == 6 * 1088 + 3 * causal == 7248


def test_flops_equal_torch_flop_counter() -> None:
    """The matmul FLOPs equal those that torch's counter finds in a real forward and backward."""
    cfg = config(1, model_qk_norm=True)
    ctx = context(F64)
    model = Transformer(cfg.model, Build(ctx), StageShape(range(cfg.model.num_layers), True, True))
    make_buckets(units(model), ctx, grad_dtype=F64, bucket_bytes=1 << 20, overlap=False)
    tokens = torch.zeros(3, 12, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model((), micro_batch(tokens, tokens)).losses.sum().backward()
    counted = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    matmuls = sum(n for op, n in counted.items() if "attention" not in op)
    attention = 12 * 12 * cfg.model.num_heads * cfg.model.head_dim // 2  # per layer and token; not a matmul here
    assert matmuls == 36 * (flops_per_token(cfg.model, 12) - cfg.model.num_layers * attention)


@pytest.mark.parametrize("preset", ["llama-2-7b", "llama-3-8b", "mistral-7b", "qwen3-8b"])
def test_flops_of_a_7b_are_6n(preset: str) -> None:
    """6 FLOPs per parameter, without embedding and norms, which have no matmul; attention adds a few percent."""
    cfg = load([], {"model.preset": preset}).config.model
    per_layer = 2 * cfg.hidden_size + (2 * cfg.head_dim if cfg.qk_norm else 0)
    norms = cfg.num_layers * per_layer + cfg.hidden_size
    matmuls = num_parameters(cfg) - cfg.vocab_size * cfg.hidden_size - norms
    attention = 12 * 2 * cfg.num_layers * cfg.num_heads * cfg.head_dim // 2
    assert flops_per_token(cfg, 2) == 6 * matmuls + attention
    assert 0.9 < flops_per_token(cfg, 2048) / (6 * num_parameters(cfg)) < 1.1


def test_an_unused_state_is_freed() -> None:
    """Parameters and buckets refer to each other, and no reference that gc cannot see keeps them alive."""
    params, buckets = make(F64, F64, values(0))
    x = params[0].sum()
    x.backward()
    bucket = weakref.ref(buckets.buckets[0])
    del params, buckets, x
    gc.collect()
    assert bucket() is None
