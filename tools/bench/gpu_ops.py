"""Sections of gpu.py: each operation against its bytes or FLOPs, and every attention that can run here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_measure import Session
from torch import Tensor
from torch.nn import functional as F

from engine.batch import Documents, MicroBatch, Sequence
from engine.config.schema import ModelConfig
from engine.distributed.context import make_context
from engine.distributed.layout import Layout
from engine.model.build import StageShape
from engine.model.layers import Build
from engine.model.transformer import Transformer
from engine.ops.activation import activation
from engine.ops.attention import attention_case, missing_packages, select_implementation, why_unavailable
from engine.ops.attention_cores import CORES
from engine.ops.fp8 import Fp8
from engine.ops.matmul import PLAIN_MATMUL, MatmulBackend
from engine.ops.norm import add_rms_norm, rms_norm
from engine.ops.rope import rope_table, split_and_rope


def both_ways(op: Callable[..., Any], *inputs: Tensor) -> Callable[[], Any]:
    """A forward and backward of op with gradients of ones like its outputs."""
    outs = op(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = [torch.randn_like(out) for out in outs]

    def run() -> Any:
        found = op(*inputs)
        return torch.autograd.grad(found if isinstance(found, tuple) else (found,), inputs, grads)

    return run


def by_bytes(session: Session, name: str, num_bytes: float, ours: Callable[[], Any], peer: Callable[[], Any]) -> None:
    """Record a memory-bound op and torch's version of it."""
    seconds, theirs = session.time_s(ours), session.time_s(peer)
    floor = num_bytes / session.limit("copy")
    session.record(name, us=seconds * 1e6, floor_us=floor * 1e6, share=floor / seconds, torch_ratio=theirs / seconds)


def element_wise(session: Session) -> None:
    """Norms, gated activations and RoPE at one layer's shapes, forward, and forward plus backward."""
    z = session.sizes
    t, h, f, d, n = z.tokens, z.hidden, z.ffn, z.head_dim, z.heads
    row = 2.0 * t * h
    x, residual, w = session.randn(t, h, grad=True), session.randn(t, h, grad=True), session.randn(h, grad=True)
    fused = session.randn(t, 2 * f, grad=True)
    heads = session.randn(t, 1, 3 * n * d, grad=True)
    table = rope_table(t, d, 1e4, session.device, session.dtype)
    silu = activation("silu", True)

    def torch_norm(a: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(a, (h,), weight, 1e-5)

    def torch_gated(a: Tensor) -> Tensor:
        gate, up = a.chunk(2, dim=-1)
        return F.silu(gate) * up

    def torch_add_norm(a: Tensor, b: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = a + b
        return total, F.rms_norm(total, (h,), weight, 1e-5)

    def torch_rope(a: Tensor) -> tuple[Tensor, ...]:
        q, k, v = a.view(t, 1, 3 * n, d).permute(1, 2, 0, 3).split(n, dim=1)
        cos, sin = (torch.cat((part, part), -1) for part in table)

        def turn(part: Tensor) -> Tensor:
            low, high = part.chunk(2, dim=-1)
            return part * cos + torch.cat((-high, low), -1) * sin

        return turn(q), turn(k), v.contiguous()

    Op = Callable[..., Any]
    cases: dict[str, tuple[Op, Op, list[Tensor], float, float]] = {
        "RMSNorm": (partial(rms_norm, eps=1e-5), torch_norm, [x, w], 2 * row, 5 * row),
        "sum and RMSNorm": (partial(add_rms_norm, eps=1e-5), torch_add_norm, [x, residual, w], 4 * row, 8 * row),
        "SwiGLU": (silu, torch_gated, [fused], 6.0 * t * f, 16.0 * t * f),
        "RoPE": (partial(split_and_rope, table=table, n=n, m=n), torch_rope, [heads], 6 * row, 12 * row),
    }
    for name, (ours, peer, inputs, forward, whole) in cases.items():
        session.attempt(f"{name}, forward", _one_way, session, name, forward, ours, peer, inputs)
        session.attempt(f"{name}, both ways", _two_ways, session, name, whole, ours, peer, inputs)


def _one_way(
    session: Session, name: str, num_bytes: float, ours: Callable[..., Any], peer: Callable[..., Any], x: list[Tensor]
) -> None:
    with torch.no_grad():
        by_bytes(session, f"{name}, forward", num_bytes, lambda: ours(*x), lambda: peer(*x))


def _two_ways(
    session: Session, name: str, num_bytes: float, ours: Callable[..., Any], peer: Callable[..., Any], x: list[Tensor]
) -> None:
    by_bytes(session, f"{name}, both ways", num_bytes, both_ways(ours, *x), both_ways(peer, *x))


def matmuls(session: Session) -> None:
    """Matmuls of a block and the head (forward and both gradients) in bf16 and fp8 (rounding included)."""
    z = session.sizes
    width = z.heads * z.head_dim
    shapes = {"q,k,v": (z.hidden, 3 * width), "out": (width, z.hidden), "gate,up": (z.hidden, 2 * z.ffn)}
    shapes |= {"down": (z.ffn, z.hidden), "head": (z.hidden, z.vocab)}
    kinds: dict[str, MatmulBackend] = {"bf16": PLAIN_MATMUL, "fp8 tensorwise": Fp8(rowwise=False, compile=False)}
    kinds |= {"fp8 rowwise": Fp8(rowwise=True, compile=False)}
    if session.cuda:
        kinds["fp8 tensorwise, compiled"] = Fp8(rowwise=False, compile=True)
        kinds["fp8 rowwise, compiled"] = Fp8(rowwise=True, compile=True)
    for name, (i, o) in shapes.items():
        x, w, g = session.randn(z.tokens, i), session.randn(o, i), session.randn(z.tokens, o)
        main = torch.zeros(o, i, device=session.device)
        for kind, how in kinds.items():
            session.attempt(f"{name}, {kind}", _three_ways, session, f"{name}, {kind}", how, x, w, g, main)


def _three_ways(session: Session, name: str, how: MatmulBackend, x: Tensor, w: Tensor, g: Tensor, main: Tensor) -> None:
    runs = {
        "forward": lambda: how.forward(x, w),
        "input": lambda: how.input_grad(g, w),
        "weight": lambda: how.weight_grad(g, x, main),
    }
    flops = 2.0 * len(x) * w.numel()
    shares = {way: flops / session.time_s(run) / session.limit("gemm") for way, run in runs.items()}
    session.record(f"{name}, {len(x)} x {x.shape[1]} x {len(w)}", **shares)


def head(session: Session) -> None:
    """Final norm, output projection and loss, both ways, against the projection's FLOPs."""
    session.attempt("head and loss", _head, session)


def _head(session: Session) -> None:
    z = session.sizes
    shape = {"vocab_size": z.vocab, "hidden_size": z.hidden, "num_heads": z.heads, "num_kv_heads": z.heads}
    cfg = ModelConfig(**shape, head_dim=z.head_dim, num_layers=1)
    ctx = make_context(Layout(), 0, dtype=session.dtype, device=session.device)
    model = Transformer(cfg, Build(ctx), StageShape(range(0), False, True))
    weight, gain = model.head.weight, model.norm.weight
    weight.data.normal_(0, 0.02)
    gain.data.fill_(1)
    x = session.randn(z.tokens, 1, z.hidden, grad=True)
    labels = torch.randint(z.vocab, (1, z.tokens), device=session.device)
    weights = torch.full_like(labels, 1e-4, dtype=torch.float64)
    sequence = Sequence.of_rows(z.tokens, device=session.device)
    batch = MicroBatch(labels, labels, weights, torch.zeros_like(labels[:, 0]), sequence)

    def forget() -> None:
        x.grad = weight.grad = gain.grad = None

    def ours() -> None:
        model((x,), batch).losses.sum().backward()
        forget()

    def peer() -> None:
        normed = F.rms_norm(x.view(-1, z.hidden), (z.hidden,), gain, 1e-5)
        F.cross_entropy((normed @ weight.t()).float(), labels.view(-1)).backward()
        forget()

    seconds, theirs = session.time_s(ours), session.time_s(peer)
    floor = 6.0 * z.tokens * z.hidden * z.vocab / session.limit("gemm")
    found = {"us": seconds * 1e6, "share": floor / seconds, "torch_ratio": theirs / seconds}
    session.record("final norm, head and loss, both ways", **found)


def ops(session: Session) -> None:
    """All of the above."""
    element_wise(session)
    matmuls(session)
    head(session)
    session.forget()


def attention(session: Session) -> None:
    """Forward, and backward with its 2.5 times as many FLOPs, of every implementation that runs here."""
    z = session.sizes
    for documents in (False, True):
        case = attention_case(session.device, session.dtype, z.head_dim, documents=documents)
        picked = select_implementation("auto", case)
        for seq in z.seqs:
            for name in CORES:
                what = f"{name}, sequence {seq}" + ", 8 documents" * documents + " (auto)" * (name == picked)
                if why := why_unavailable(name, case, missing_packages() if session.cuda else {}):
                    session.record(what, refused=why)
                    continue
                if name == "sdpa" and documents and session.cuda and seq > 4096:
                    continue  # its mask and scores are of the size s x s
                session.attempt(what, _attention, session, what, name, seq, documents)
    session.forget()


def _attention(session: Session, what: str, name: str, seq: int, documents: bool) -> None:
    z = session.sizes
    b, length = max(1, z.tokens // seq), seq // 8 if documents else seq
    q, k, v = (session.randn(b, z.heads, seq, z.head_dim, grad=True) for _ in range(3))
    apart = None
    if documents:
        begin = torch.arange(seq, device=session.device) // length * length
        apart = Documents.from_starts(begin.expand(b, seq))
    sequence, run = Sequence.of_rows(seq, apart, device=session.device), CORES[name]
    with torch.no_grad():
        forward = session.time_s(lambda: run(q, k, v, sequence))
    whole = session.time_s(both_ways(lambda *heads: run(*heads, sequence), q, k, v))
    flops = 2.0 * b * z.heads * seq * length * z.head_dim  # two matmuls, half of the square
    reached = flops / forward / 1e12, 2.5 * flops / max(whole - forward, 1e-9) / 1e12
    session.record(what, forward_tflops=reached[0], backward_tflops=reached[1], both_ms=whole * 1e3)
