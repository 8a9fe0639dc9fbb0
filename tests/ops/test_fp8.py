"""FP8 matmuls: against float64, against torch's _scaled_mm on the CPU, in every layout; rejected configs and GPUs."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.config.checks import config_errors
from engine.config.schema import Config
from engine.distributed.context import ParallelContext
from engine.errors import ConfigError
from engine.inference import load as inference
from engine.ops import fp8
from engine.ops.fp8 import E4M3, E5M2, Fp8, Scaled, _multiply, _quantize, _quantize_t
from engine.ops.matmul import PLAIN_MATMUL
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import MODEL, assemble, config, gradients_of, layout_of, max_relative_error, random_batches
from tests.support.errors import raises
from tests.support.harness import run_ranks

BF16 = torch.bfloat16
ROUNDING = {E4M3: 2.0**-4, E5M2: 2.0**-3}  # half a unit in the last place, relative


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_quantizing_keeps_the_largest_value_and_rounds_the_rest(dtype: torch.dtype, by_row: bool) -> None:
    x = randn(5, 48) * torch.tensor([1e-6, 1.0, 1e4, 0.0, 3.0])[:, None]
    values, scale = _quantize(x, dtype, by_row)
    assert values.dtype == dtype and scale.dtype == torch.float32 and scale.shape == ((5, 1) if by_row else ())
    back = values.float() * scale
    top = x.abs().amax(1, keepdim=True) if by_row else x.abs().amax()
    assert values[1 if by_row else 2].float().abs().max() == torch.finfo(dtype).max
    # the rounding error is relative for normal numbers, absolute below the smallest normal number
    floor = top * torch.finfo(dtype).smallest_normal / torch.finfo(dtype).max
    assert ((back - x).abs() <= torch.maximum(x.abs(), floor) * ROUNDING[dtype] * 1.001).all()
    turned, scale_t = _quantize_t(x, dtype, by_row)
    assert turned.is_contiguous() and turned.shape == (48, 5) and scale_t.shape == ((48, 1) if by_row else ())


def test_infinities_and_nans_stay_visible() -> None:
    """An overflowed gradient must not become finite."""
    for bad in (math.inf, math.nan):
        x = randn(16, 16)
        x[3, 5] = bad
        product = _multiply(
            Scaled(*_quantize(x, E4M3, False)), Scaled(*_quantize(randn(16, 16), E4M3, False)).t(), BF16, fast=True
        )
        assert not product[3].isfinite().all()


@pytest.mark.parametrize("rowwise", [False, True])
def test_each_matmul_is_near_the_exact_one(rowwise: bool) -> None:
    """Error relative to the norm: with two randomly rounded operands sqrt(2) 2^-4 / sqrt(3) = 5 %, with e5m2 8 %."""
    matmul = Fp8(rowwise=rowwise, compile=False)
    x, w, g = randn(6, 8, 64).to(BF16), randn(32, 64, seed=2).to(BF16), randn(6, 8, 32, seed=3).to(BF16)
    main = torch.ones(32, 64)
    exact = {
        "y": x.double() @ w.double().t(),
        "x": g.double() @ w.double(),
        "w": g.double().view(-1, 32).t() @ x.double().view(-1, 64),
    }
    assert matmul.weight_grad(g.view(-1, 32), x.view(-1, 64), main) is None
    returned = matmul.weight_grad(g.view(-1, 32), x.view(-1, 64), None)
    found = {"y": matmul.forward(x, w), "x": matmul.input_grad(g, w), "w": main - 1}
    assert returned is not None and returned.dtype == BF16
    assert (returned.float() - found["w"]).norm() / found["w"].norm() < 4e-3
    for name, value in found.items():
        assert value.shape == exact[name].shape and value.dtype == (torch.float32 if name == "w" else BF16)
        error = float((value.double() - exact[name]).norm() / exact[name].norm())
        assert 1e-3 < error < (0.05 if rowwise and name != "w" else 0.08), (name, error)


@pytest.mark.parametrize("rowwise", [False, True])
def test_the_cpu_emulation_equals_torch(rowwise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU path multiplies the rounded operands in float32; torch._scaled_mm accepts the same memory layouts."""
    seen = []

    def both(a: Scaled, b: Scaled, out_dtype: torch.dtype, *, fast: bool) -> torch.Tensor:
        mine = _multiply(a, b, out_dtype, fast=fast)
        assert a.values.is_contiguous() and b.values.t().is_contiguous()
        try:
            theirs = torch._scaled_mm(
                a.values, b.values, a.scale.contiguous(), b.scale.contiguous(), out_dtype=out_dtype
            )
        except (NotImplementedError, RuntimeError) as error:
            pytest.skip(f"this torch has no _scaled_mm on CPUs: {error}")
        seen.append(float((mine.float() - theirs.float()).abs().max() / mine.float().abs().max()))
        return mine

    monkeypatch.setattr(fp8, "_multiply", both)
    matmul = Fp8(rowwise=rowwise, compile=False)
    x, w, g = randn(64, 96).to(BF16), randn(32, 96, seed=2).to(BF16), randn(64, 32, seed=3).to(BF16)
    matmul.forward(x, w), matmul.input_grad(g, w), matmul.weight_grad(g, x, torch.zeros(32, 96))
    assert len(seen) == 3 and max(seen) < 8e-3  # one rounding to bf16


SMALL: dict[str, Any] = {"train_precision": "bf16", "model_head_dim": 16, "model_ffn_size": 64}


def step(cfg: Config) -> tuple[float, dict[str, Any]]:
    def job(ctx: ParallelContext) -> Any:
        state = setup(cfg, ctx)
        found = train_step(state, random_batches(cfg, ctx, 1))
        return found.loss, gradients_of(state)

    ranks = run_ranks(layout_of(cfg), job, dtype=BF16)
    return ranks[0][0], assemble([r[1] for r in ranks])


@pytest.mark.parametrize("mode", ["tensorwise", "rowwise"])
def test_every_layout_computes_the_same(mode: str) -> None:
    """If the tensors of a micro-batch are not sharded, scales are equal and only the order of sums differs."""
    loss, grads = step(config(1, train_fp8=mode, **SMALL))
    plain_loss, plain = step(config(1, **SMALL))
    error = max_relative_error(grads, plain)
    assert loss == pytest.approx(plain_loss, rel=1e-2) and 1e-3 < error < 0.5
    for layout in (
        {"parallel_data": 2, "train_recompute": "full"},
        {"parallel_pipeline": 2, "parallel_schedule": "zb-h1", "train_recompute": "selective"},
    ):
        other_loss, other = step(config(2, train_fp8=mode, **SMALL, **layout))
        assert other_loss == pytest.approx(loss, rel=1e-6) and max_relative_error(other, grads) < 1e-5, layout
    sharded_loss, sharded = step(config(2, train_fp8=mode, parallel_tensor=2, **SMALL))
    assert sharded_loss == pytest.approx(loss, rel=1e-2) and max_relative_error(sharded, plain) < 2 * error + 0.1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train_precision": "fp32"}, "train.fp8 = 'tensorwise': needs train.precision bf16, not fp32"),
        ({"model_hidden_size": 40}, "model.hidden_size = 40: gives 40 columns of matrices, not a multiple of 16"),
        ({"model_ffn_size": 40}, "model.ffn_size = 40: gives 40 columns of down on a rank"),
        ({"model_head_dim": 6}, "model.head_dim = 6: gives 72 rows of q, k and v on a rank"),
        ({"train_seq_len": 15}, "train.seq_len = 15: gives 15 tokens of a micro-batch"),
    ],
    ids=str,
)
def test_invalid_configs_are_rejected(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(1, train_fp8="tensorwise", **(SMALL | changes))
    assert expected in str(error.value)


def test_a_checkpoint_is_evaluated_in_bf16_and_in_layouts_that_fp8_rejects(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(1, train_fp8="tensorwise", **SMALL)
    monkeypatch.setattr(inference, "find_checkpoint", lambda *_: Path())
    monkeypatch.setattr(inference, "read_manifest", lambda *_: SimpleNamespace(config=cfg.model_dump(), step=1))
    found = inference.config_of(Path(), tensor=8, world=8)  # 8 columns of down on a rank
    assert found.train.fp8 == "none" and config_errors(found, 8) == []


def test_an_older_gpu_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with raises(ConfigError, "ops.fp8-not-available", "train.fp8 = 'rowwise'", "8.9", "8.0"):
        fp8.check_device("rowwise", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fp8.check_device("rowwise", torch.device("cuda", 0))


def test_head_and_embedding_stay_in_bf16() -> None:
    cfg = config(1, train_fp8="tensorwise", **SMALL)

    def job(ctx: ParallelContext) -> list[str]:
        (stage,) = setup(cfg, ctx).stages.values()
        return sorted(
            name.split(".", 2)[-1]
            for name, module in stage.part.named_modules()  # type: ignore[attr-defined]
            if isinstance(getattr(module, "matmul", PLAIN_MATMUL), Fp8)
        )

    ((*found,),) = run_ranks(layout_of(cfg), job, dtype=BF16)
    names = ("attention.sublayer.qkv", "attention.sublayer.out", "mlp.sublayer.up", "mlp.sublayer.down")
    assert found == sorted(names * MODEL["num_layers"])
