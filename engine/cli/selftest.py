"""Compare each operation of a training step, in float32 and bf16, with torch's code in float64.

Random draws and dropout must have the bits of the reference on the CPU: ranks on different machines rely on them.
Small and quick: it finds a kernel that is miscompiled or wrong on this machine; rare shapes are left to the tests.
Which implementation ran is observed at the dispatcher, so the selection logic exists only once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.batch import Documents, Sequence
from engine.config.schema import OptimizerConfig
from engine.distributed.context import make_context
from engine.distributed.layout import Layout
from engine.distributed.sharding import Parameter
from engine.distributed.specs import Chunk, ShardSpec
from engine.ops import draws, native
from engine.ops.activation import activation
from engine.ops.attention import attention_case, select_core
from engine.ops.embedding import embedding
from engine.ops.loss import VocabSlice, linear_cross_entropy
from engine.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from engine.ops.rope import rope_table, split_and_rope
from engine.optim.clip import NormCounter
from engine.optim.optimizer import Optimizer
from engine.parallel.gradients import make_buckets

# relative to the largest reference value, at least 1; roundoff is 6e-8 (float32), 4e-3 (bf16), and sums are short
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

_SELF = make_context(Layout(), 0, dtype=torch.float64).self_axis
_S, _B, _N, _M, _D = 40, 2, 4, 2, 16  # sequence, batch, heads, KV heads, head width


@dataclass(frozen=True)
class OpCheck:
    """Max error of an op's outputs and gradients, relative as TOLERANCE is.

    custom: whether a custom kernel ran. error: text of the exception that the op raised, else empty.
    """

    name: str
    custom: bool
    difference: float
    error: str = ""
    tolerance: float = TOLERANCE[torch.float32]

    @property
    def broken(self) -> bool:
        """Whether it raised or exceeds the tolerance."""
        return bool(self.error) or not self.difference <= self.tolerance


class _OpObserver(TorchDispatchMode):
    """Records whether a custom operator was called."""

    custom = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.custom |= func.namespace == "trident"
        return func(*args, **(kwargs or {}))


def _rope(fused: Tensor) -> tuple[Tensor, ...]:
    return split_and_rope(fused, rope_table(_S, _D, 1e4, fused.device, fused.dtype), _N, _M)


def _attention(q: Tensor, k: Tensor, v: Tensor, documents: bool = False, window: int = 0) -> Tensor:
    begin = torch.arange(_S, device=q.device) // 15 * 15
    sequence = Sequence.of_rows(_S, Documents.from_starts(begin.expand(_B, _S)) if documents else None, device=q.device)
    case = attention_case(q.device, q.dtype, _D, documents=documents, window=window)
    return select_core("auto", case)(q, k, v, sequence.with_window(window))


def _loss(x: Tensor, weight: Tensor, z_loss: float = 0.0) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    head = Parameter(weight.detach(), ShardSpec((Chunk("head", tuple(weight.shape)),)))
    targets = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(x.shape[:2]) * 7
    part, weights = VocabSlice(0, len(weight) - 3, _SELF), torch.linspace(0, 1, targets.numel(), device=x.device)
    weights = weights.view(targets.shape)
    z_weights = z_loss * weights.flip(0) if z_loss else None
    found = linear_cross_entropy(x, head, targets, weights, part, _SELF, _SELF, z_weights)
    losses = [loss for loss in found if loss is not None]
    torch.stack(losses).sum().backward()
    assert x.grad is not None and head.grad is not None
    return *(loss.detach() for loss in losses), x.grad, head.grad


def _matmul(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        out = native.matmul(a, b.t())
        total = torch.ones(a.shape[1], b.shape[0], dtype=a.dtype, device=a.device)
        native.add_matmul_(total, a.t(), out)
    return out, total


def _embedding(weight: Tensor) -> tuple[Tensor, ...]:
    table = Parameter(weight.detach(), ShardSpec((Chunk("table", tuple(weight.shape)),)))
    out = embedding(table, torch.arange(12, device=weight.device) % 5, 2)
    out.backward(0.3 * out.detach())
    assert table.grad is not None
    return table.grad, out.detach()


def _places(x: Tensor) -> draws.Places:
    """Rows of any alignment, the last beyond 2^32 elements."""
    starts = torch.arange(len(x), device=x.device) * (x.shape[1] + 3) + 61
    starts[-1] += 2**40
    return draws.Places(starts, x.shape[1])


def _draws(x: Tensor) -> tuple[Tensor, ...]:
    key, places = draws.Key.of(1, "selftest"), _places(x)
    real = [draw(key, places).to(x.dtype) for draw in (draws.uniform, draws.normal)]
    return draws.bits(key, places), *real, draws.keep(key, places, 0.3)


def _dropout(x: Tensor) -> Tensor:
    return draws.dropout(x, draws.Key.of(1, "selftest"), _places(x), 0.3)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return add_rms_norm(x, residual, weight, 1e-5, 1.0)


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return add_layer_norm(x, residual, weight, bias, 1e-5)


def _gradient_norm(values: Tensor) -> Tensor:
    weight = Parameter(values.detach().clone(), ShardSpec((Chunk("weight", tuple(values.shape)),)))
    ctx = make_context(Layout(), 0, dtype=values.dtype, device=values.device)
    main = torch.promote_types(values.dtype, torch.float32)
    buckets = make_buckets([[weight]], ctx, grad_dtype=main, bucket_bytes=1 << 20, overlap=False)
    assert weight.main_grad is not None
    weight.main_grad.copy_(values.detach())
    return NormCounter([buckets], ctx, ["weight"], main).local()


def _adamw(values: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
    ctx = make_context(Layout(), 0, dtype=values.dtype, device=values.device)
    weight = Parameter(values.detach().clone(), ShardSpec((Chunk("weight", tuple(values.shape)),)))
    main = torch.promote_types(values.dtype, torch.float32)
    buckets = make_buckets([[weight]], ctx, grad_dtype=main, bucket_bytes=1 << 20, overlap=False)
    optimizer = Optimizer([buckets], OptimizerConfig(lr=1e-2), overlap=False)
    for gradient in gradients:
        assert weight.main_grad is not None
        weight.main_grad.copy_(gradient.detach())
        optimizer.step(1e-2, 0.5)
    return weight.detach(), *(held.flat for held in optimizer.states())


Shapes = list[tuple[int, ...]]
_HEADS: Shapes = [(_B, _N, _S, _D), (_B, _M, _S, _D), (_B, _M, _S, _D)]
Op = Callable[..., Tensor | tuple[Tensor, ...]]
OPS: dict[str, tuple[Op, Shapes]] = {
    "RMSNorm": (lambda x, w: rms_norm(x, w, 1e-5), [(_S, _B, 70), (70,)]),
    "LayerNorm": (lambda x, w, b: layer_norm(x, w, b, 1e-5), [(_S, _B, 70), (70,), (70,)]),
    "residual sum with RMSNorm": (_add_rms_norm, [(_S, _B, 70), (_S, _B, 70), (70,)]),
    "residual sum with LayerNorm": (_add_layer_norm, [(_S, _B, 70), (_S, _B, 70), (70,), (70,)]),
    "RoPE": (_rope, [(_S, _B, (_N + 2 * _M) * _D)]),
    "attention": (_attention, _HEADS),
    "attention with document masking": (partial(_attention, documents=True), _HEADS),
    "attention with a sliding window": (partial(_attention, documents=True, window=7), _HEADS),
    "SwiGLU": (activation("silu", True), [(_S, _B, 130)]),
    "gated GeLU": (activation("gelu_tanh", True), [(_S, _B, 130)]),
    "matmul": (_matmul, [(37, 90), (70, 90)]),
    "embedding": (_embedding, [(8, 33)]),
    "cross entropy": (_loss, [(15, 2, 20), (300, 20)]),
    "cross entropy with z-loss": (partial(_loss, z_loss=0.1), [(15, 2, 20), (300, 20)]),
    "keyed draws": (_draws, [(33, 70)]),
    "dropout": (_dropout, [(33, 70)]),
    "gradient norm": (_gradient_norm, [(33, 65)]),
    "AdamW": (_adamw, [(33, 65)] * 4),
}

BITWISE = ("keyed draws", "dropout")  # of OPS: compared with the reference in the same dtype on the CPU


def check_ops(device: torch.device) -> Iterator[OpCheck]:
    """Check every op of OPS on this device, in float32 and in bf16."""
    for name, (op, shapes) in OPS.items():
        for dtype in TOLERANCE:
            yield _check_op(name, op, shapes, device, dtype)


def _check_op(op_name: str, op: Op, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> OpCheck:
    name, bitwise = op_name if dtype == torch.float32 else f"{op_name} in bf16", op_name in BITWISE
    draw = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=draw, device="cpu").to(device, dtype) for shape in shapes]
    watch, tolerance = _OpObserver(), 0.0 if bitwise else TOLERANCE[dtype]
    try:
        with watch, native.forced(kernels=native.load()[0] is not None):
            found = _run(op, inputs)
        with native.forced(kernels=False):
            exact = _run(op, [x.cpu() if bitwise else x.double() for x in inputs])
        difference = max(_difference(a.to(b.device), b) for a, b in zip(found, exact, strict=True))
        return OpCheck(name, watch.custom, difference, tolerance=tolerance)
    except Exception as error:  # any error: the next op must still be checked
        return OpCheck(
            name, watch.custom, 0.0, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", tolerance
        )


def _run(op: Op, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs of the op, and gradients of its inputs if the outputs require grad."""
    inputs_with_grad = [x.clone().requires_grad_() for x in inputs]
    out = op(*inputs_with_grad)
    outs = [out] if isinstance(out, Tensor) else list(out)
    if not outs[0].requires_grad:
        return outs
    upstream = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).view(x.shape) for x in outs]
    return [x.detach() for x in (*outs, *torch.autograd.grad(outs, inputs_with_grad, upstream))]


def _difference(a: Tensor, exact: Tensor) -> float:
    if a.shape != exact.shape or not a.isfinite().all():
        return float("inf")
    exact = exact.double()
    return float((a.double() - exact).abs().max() / exact.abs().max().clamp_min(1.0))
