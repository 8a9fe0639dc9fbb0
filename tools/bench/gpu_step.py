"""Sections of gpu.py: whole training steps through the engine, their variants, a profile, fp8's loss curve, peers."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from gpu_measure import Session
from torch import Tensor

from engine.batch import MicroBatch, Rows, micro_batches
from engine.config.derived import derive
from engine.config.load import load
from engine.config.schema import Config
from engine.distributed.context import make_context
from engine.optim.precision import PRECISIONS
from engine.planner.flops import flops_per_token
from engine.train.state import TrainState, setup
from engine.train.step import train_step

STATE_BYTES = 18  # a parameter: bf16 weight, fp32 master, gradient and two moments


def make(session: Session, layers: int, seq: int, **changes: Any) -> TrainState:
    """A training state of Llama-2-7B's shape with so many layers; random weights made on the device."""
    z = session.sizes
    mbs = max(1, z.tokens // seq)
    values: dict[str, Any] = {
        "model.hidden_size": z.hidden,
        "model.ffn_size": z.ffn,
        "model.num_heads": z.heads,
        "model.head_dim": z.head_dim,
        "model.vocab_size": z.vocab,
        "model.num_layers": layers,
        "model.max_seq_len": max(seq, 2048),
        "train.seq_len": seq,
        "train.micro_batch_size": mbs,
        "train.global_batch_size": mbs * max(1, z.step_tokens // (mbs * seq)),
        "train.precision": "bf16",
        "train.device": session.device.type,
        "train.steps": 1000,
        **{f"train.{name}": value for name, value in changes.items()},
    }
    cfg = load([], {name: str(value) for name, value in values.items()}, world=1).config
    checkpoint = cfg.checkpoint.model_copy(update={"init": "made below"})  # else billions are drawn on the host
    cfg = cfg.model_copy(update={"checkpoint": checkpoint})
    dtype = PRECISIONS[cfg.train.precision].compute
    ctx = make_context(derive(cfg).layout, 0, dtype=dtype, device=session.device)
    state = setup(cfg, ctx)
    with torch.no_grad():
        for p in state.params:
            p.fill_(1.0) if p.dim() == 1 else p.normal_(0.0, cfg.model.init_std)
        for run in state.optimizer.runs:
            run.master.copy_(run.bucket.view_range(run.bucket.values, run.span))
    return state


def random_batches(cfg: Config, step: int) -> list[MicroBatch]:
    """On the host, as the loader gives them."""
    t = cfg.train
    draw = torch.Generator().manual_seed(step)
    rows = torch.randint(cfg.model.vocab_size, (t.global_batch_size, t.seq_len + 1), generator=draw)
    numbers = torch.arange(len(rows))
    return micro_batches(Rows.from_tokens(rows, numbers, torch.zeros_like(numbers)), t.micro_batch_size)


def timed_steps(session: Session, state: TrainState, steps: int) -> list[float]:
    """Seconds of each of `steps` steps, after two that warm up (the first compiles and fills caches)."""
    seconds = []
    for i in range(steps + 2):
        batches = random_batches(state.cfg, i)
        session.synchronize()
        began = time.perf_counter()
        train_step(state, batches)
        session.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[2:]


def report(session: Session, what: str, state: TrainState, seconds: list[float], **more: Any) -> None:
    """Record tokens/s, model FLOP/s by the causal formula, its share of the limit, and the whole model's tokens/s."""
    cfg = state.cfg
    tokens = cfg.train.global_batch_size * cfg.train.seq_len
    rate = tokens / statistics.median(seconds)
    flops = flops_per_token(cfg.model, cfg.train.seq_len)
    whole = cfg.model.model_copy(update={"num_layers": session.sizes.layers})
    session.record(
        what,
        tokens_per_s=rate,
        tflops=rate * flops / 1e12,
        share=rate * flops / session.limit("gemm"),
        whole_model_tokens_per_s=rate * flops / flops_per_token(whole, cfg.train.seq_len),
        step_s=[round(x, 4) for x in seconds],
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if session.cuda else 0.0,
        **more,
    )


def run(session: Session, what: str, layers: int, seq: int, steps: int = 3, **changes: Any) -> None:
    """Make a state, time its steps, record, and free it."""
    if session.cuda:
        torch.cuda.reset_peak_memory_stats()
    state = make(session, layers, seq, **changes)
    report(session, what, state, timed_steps(session, state, steps), layers=layers, sequence=seq, **changes)


def most_layers(session: Session, recompute: str) -> int:
    """Estimated number of layers that fit: states, activations of a micro-batch, and temporaries of matmuls."""
    z = session.sizes
    if not session.cuda:
        return z.layers
    width = z.heads * z.head_dim
    layer = 4 * z.hidden * width + 3 * z.hidden * z.ffn
    kept = 2 * z.hidden if recompute == "full" else 2 * (3 * z.hidden + 7 * width + 3 * z.ffn)
    available = torch.cuda.get_device_properties(session.device).total_memory * 0.95 - 10 * 2**30
    available -= STATE_BYTES * 2 * z.vocab * z.hidden
    return max(2, min(z.layers, int(available / (STATE_BYTES * layer + kept * z.tokens))))


def step(session: Session) -> None:
    """As many true layers as memory allows, with and without recompute, at both lengths."""
    for recompute in ("none", "full"):
        for seq in session.sizes.seqs:
            session.attempt(f"sequence {seq}, recompute {recompute}", _fitting, session, seq, recompute)
            session.forget()


def _fitting(session: Session, seq: int, recompute: str) -> None:
    layers = most_layers(session, recompute)
    while True:
        try:
            return run(session, f"step, sequence {seq}, recompute {recompute}", layers, seq, recompute=recompute)
        except torch.cuda.OutOfMemoryError:
            if layers <= 4:
                raise
        layers -= 3
        session.forget()


def variants(session: Session) -> None:
    """A few layers with torch.compile, fp8 and each attention."""
    z = session.sizes
    compiled = {"compile": "true"}
    cases: dict[str, dict[str, Any]] = {
        "as it is": {},
        "fp8 tensorwise, compile": {"fp8": "tensorwise"} | compiled,
        "fp8 tensorwise": {"fp8": "tensorwise"},
        "fp8 rowwise, compile": {"fp8": "rowwise"} | compiled,
        "compile": compiled,
        "attention flash": {"attention": "flash"},
        "attention sdpa": {"attention": "sdpa"},
        "recompute selective": {"recompute": "selective"},
    }
    for name, changes in cases.items():
        session.attempt(name, run, session, f"{z.few_layers} layers, {name}", z.few_layers, z.seqs[0], **changes)
        session.forget()


KINDS = {
    "attention": ("flash", "fmha", "cudnn", "attention", "sdpa"),
    "matmuls": ("gemm", "cutlass", "nvjet", "cublas", "xmma", "mm", "trident::mm"),
    "loss": ("softmax", "cross_entropy", "nll", "scatter"),
    "norm, RoPE, gated": ("norm", "rope", "gated", "silu", "gelu"),
    "optimizer": ("adam", "sum_squares"),
    "copies and fills": ("memcpy", "memset", "copy", "fill", "catarray", "aten::cat", "zero"),
}


def kind_of(kernel: str) -> str:
    """The kind of a kernel (or, on a CPU, an operator), by its name."""
    low = kernel.lower()
    return next((kind for kind, words in KINDS.items() if any(word in low for word in words)), "other")


def profile(session: Session) -> None:
    """Time of one step by kind of kernel, and the most expensive kernels."""

    def measure() -> None:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiler

        state = make(session, session.sizes.few_layers, session.sizes.seqs[0])
        timed_steps(session, state, 1)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if session.cuda else [])]
        began = time.perf_counter()
        with profiler(activities=activities) as found:
            train_step(state, random_batches(state.cfg, 9))
            session.synchronize()
        wall = time.perf_counter() - began
        totals: dict[str, float] = {}
        events = []
        for event in found.key_averages():
            spent = (event.self_device_time_total if session.cuda else event.self_cpu_time_total) / 1e6
            if session.cuda and event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            totals[kind_of(event.key)] = totals.get(kind_of(event.key), 0.0) + spent
            events.append((spent, event.count, event.key))
        session.record("seconds of a step by kind", **totals, busy=sum(totals.values()), wall_while_profiled=wall)
        for spent, count, name in sorted(events, reverse=True)[:15]:
            session.record(name[:90], ms=spent * 1e3, calls=count)

    session.attempt("profile", measure)
    session.forget()


def text_rows(seq: int, count: int) -> Tensor:
    """int64 [count, seq + 1]: bytes of this repository's own documentation and code."""
    root = Path(__file__).resolve().parents[2]
    files = sorted([*root.glob("docs/*.md"), *root.glob("engine/**/*.py")])
    data = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)
    starts = torch.randint(len(data) - seq - 1, (count,), generator=torch.Generator().manual_seed(5))
    return torch.stack([data[i : i + seq + 1] for i in starts.tolist()]).long()


def loss_curve(
    device: torch.device, *, hidden: int, steps: int, fp8: str, layers: int = 4, seq: int = 128, batch: int = 16
) -> list[float]:
    """Losses of a small model over bytes of text, with equal batches and initial weights for every fp8 mode."""
    values = {
        "model.vocab_size": 256,
        "model.hidden_size": hidden,
        "model.ffn_size": 3 * hidden,
        "model.num_layers": layers,
        "model.num_heads": max(1, hidden // 64),
        "train.seq_len": seq,
        "train.micro_batch_size": batch,
        "train.global_batch_size": batch,
        "train.precision": "bf16",
        "train.fp8": fp8,
        "train.steps": steps,
        "train.device": device.type,
        "optimizer.lr": 1e-3,
        "lr_schedule.warmup_steps": max(1, steps // 20),
    }
    cfg = load([], {name: str(value) for name, value in values.items()}, world=1).config
    ctx = make_context(derive(cfg).layout, 0, dtype=torch.bfloat16, device=device)
    state = setup(cfg, ctx)
    numbers = torch.arange(batch * steps)
    rows = Rows.from_tokens(text_rows(seq, batch * steps), numbers, torch.zeros_like(numbers))
    return [train_step(state, [part]).loss for part in micro_batches(rows, batch)]


def curve(session: Session) -> None:
    """Losses in bf16 and in both kinds of fp8, on the same batches."""
    for fp8 in ("none", "tensorwise", "rowwise"):
        session.attempt(f"loss curve, fp8 {fp8}", _curve, session, fp8)


def _curve(session: Session, fp8: str) -> None:
    losses = loss_curve(session.device, hidden=session.sizes.curve_hidden, steps=session.sizes.curve_steps, fp8=fp8)
    tail = losses[-max(1, len(losses) // 10) :]
    session.record(f"loss curve, fp8 {fp8}", last_tenth=sum(tail) / len(tail), losses=losses)


def peers(session: Session) -> None:
    """The same few layers as transformers' Llama with a bare loop: eager and compiled; pure bf16, fused AdamW.

    Its weights and moments are bf16 alone (8 bytes a parameter; ours are 18), so it has the lighter update.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        session.record("transformers", missing=str(error))
        return
    z, seq = session.sizes, session.sizes.seqs[0]
    config = LlamaConfig(
        vocab_size=z.vocab,
        hidden_size=z.hidden,
        intermediate_size=z.ffn,
        num_hidden_layers=z.few_layers,
        num_attention_heads=z.heads,
        num_key_value_heads=z.heads,
        max_position_embeddings=seq,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
    )
    for name in ("eager", "compiled"):
        session.attempt(f"transformers {name}", _peer, session, name, LlamaForCausalLM, config)
        session.forget()


def _peer(session: Session, name: str, kind: Any, config: Any) -> None:
    z, seq = session.sizes, session.sizes.seqs[0]
    with torch.device(session.device):
        model = kind(config).to(session.dtype).train()
    call = torch.compile(model) if name == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    mbs = max(1, z.tokens // seq)
    parts = max(1, z.step_tokens // (mbs * seq))
    seconds = []
    for _ in range(5):
        rows = torch.randint(z.vocab, (parts, mbs, seq), device=session.device)
        session.synchronize()
        began = time.perf_counter()
        for part in rows:
            call(input_ids=part, labels=part).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        session.synchronize()
        seconds.append(time.perf_counter() - began)
    rate = parts * mbs * seq / statistics.median(seconds[2:])
    session.record(f"transformers {name}, {z.few_layers} layers, sequence {seq}", tokens_per_s=rate)
