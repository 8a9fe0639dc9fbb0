"""Parts of a training step on the CPU compared with the earlier implementation, in turns, in CPU seconds.

    python tools/bench/ops_cpu.py

update: gradient norm, clipping, AdamW and zeroing over the 58 M parameters of train_cpu.py, fp32, in the engine's
buckets. Before: a norm by torch in blocks, a pass that scales the gradients, AdamW. Now: `sum_squares`, AdamW scales.
documents: attention over 8 documents per sequence, forward and backward, against SDPA with a mask and one document.
lengths: attention over whole sequences of 512 to 8,192 tokens, against SDPA.
dropout: attention with dropout of its weights, against the same without and against the torch reference.
draws: 16 M keyed normals, and dropout of 16 M values, against torch's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.batch import AttentionDropout, Draws, Sequence
from engine.config.schema import OptimizerConfig
from engine.distributed.context import make_context
from engine.distributed.layout import Layout
from engine.distributed.sharding import Parameter
from engine.distributed.specs import Chunk, Role, ShardSpec
from engine.ops import native
from engine.ops.attention_cores import CORES
from engine.ops.draws import Key, dropout, normal, rectangle
from engine.optim.clip import NormCounter, sum_squares
from engine.optim.optimizer import Optimizer
from engine.parallel.gradients import GradBuckets, make_buckets


def in_turns(ways: dict[str, Callable[[], object]], repeats: int) -> None:
    """Median and range of the processor milliseconds of each way."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            begin = time.process_time()
            way()
            if turn:
                found[name].append(1000 * (time.process_time() - begin))
    for name, times in found.items():
        print(f"  {name:34} {statistics.median(times):8.1f} ({min(times):.1f}-{max(times):.1f}) ms")


def model_buckets() -> tuple[GradBuckets, NormCounter, Optimizer]:
    """Matrices and norms of the 58 M model; gradients are random numbers."""
    layer = {"qkv": (1536, 512), "out": (512, 512), "up": (2752, 512), "down": (512, 1376), "a": (512,), "b": (512,)}
    shapes: dict[str, tuple[int, ...]] = {f"{i}.{name}": x for i in range(8) for name, x in layer.items()}
    shapes |= {"embed": (32000, 512), "head": (32000, 512)}
    params = []
    for name, (rows, *columns) in shapes.items():
        spec = ShardSpec((Chunk(name, (rows, *columns)),), role=Role.MATRIX if columns else Role.VECTOR)
        params.append(Parameter(torch.randn(rows, *columns) / 50, spec))
    ctx = make_context(Layout(), 0, dtype=torch.float32)
    buckets = make_buckets([params], ctx, grad_dtype=torch.float32, bucket_bytes=64 << 20, overlap=False)
    for bucket in buckets.buckets:
        bucket.grads.normal_()
    return buckets, NormCounter([buckets], ctx, list(shapes), torch.float32), Optimizer([buckets], OptimizerConfig())


def update(repeats: int) -> None:
    buckets, norms, optimizer = model_buckets()

    def before() -> None:
        for counted in norms.counted:
            sum_squares(counted.grads, counted.ranges)
        for bucket in buckets.buckets:
            bucket.grads.mul_(0.999)
        optimizer.step(1e-4)

    print("update of 58 M parameters")
    ways: dict[str, Callable[[], object]] = {"before": before, "now": lambda: (norms(), optimizer.step(1e-4, 0.999))}
    ways |= {"norm alone": norms, "AdamW alone": lambda: optimizer.step(1e-4, 0.999)}
    in_turns(ways | {"zeroing alone": lambda: [b.grads.fill_(0.001) for b in buckets.buckets]}, repeats)


class Heads:
    """q, k, v of one shape, and ours and torch's attention over them, forward and backward."""

    def __init__(self, b: int, n: int, s: int, d: int) -> None:
        self.q, self.k, self.v = (torch.randn(b, n, s, d) for _ in range(3))
        self.grad, self.scale = torch.randn(s, b, n * d), d**-0.5
        self.heads_grad = self.grad.view(s, b, n, d).permute(1, 2, 0, 3).contiguous()

    def own(self, begin: Tensor | None = None) -> None:
        ops, heads = torch.ops.trident, (self.q, self.k, self.v)
        out, lse = ops.attention(*heads, begin, self.scale)
        ops.attention_backward(self.grad, *heads, out, lse, begin, self.scale)

    def sdpa(self, mask: Tensor | None = None) -> None:
        leaves = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]
        out = scaled_dot_product_attention(*leaves, attn_mask=mask, is_causal=mask is None)
        torch.autograd.grad(out, leaves, self.heads_grad)


def documents(repeats: int) -> None:
    b, n, s, d = 4, 8, 512, 64
    heads = Heads(b, n, s, d)
    begin = torch.arange(s).div(s // 8, rounding_mode="floor").mul(s // 8).expand(b, s).contiguous()
    column = torch.arange(s)
    mask = ((column >= begin[:, None, :, None]) & (column <= column[:, None])).contiguous()
    print(f"attention, {b} sequences of 8 documents, {n} heads, {s} x {d}, forward and backward")
    ways = {
        "own, documents apart": lambda: heads.own(begin),
        "own, one document": heads.own,
        "SDPA with a mask": lambda: heads.sdpa(mask),
    }
    in_turns(ways, repeats)


def lengths(repeats: int) -> None:
    for b, n, s, d in [(2, 8, 512, 64), (1, 8, 1024, 64), (1, 4, 2048, 128), (1, 2, 4096, 128), (1, 1, 8192, 128)]:
        print(f"attention, {b} sequences, {n} heads, {s} x {d}, forward and backward")
        heads = Heads(b, n, s, d)
        in_turns({"own": heads.own, "SDPA": heads.sdpa}, repeats)


def attention_dropout(repeats: int) -> None:
    b, n, s, d = 1, 4, 2048, 64
    leaves, grad = [torch.randn(b, n, s, d, requires_grad=True) for _ in range(3)], torch.randn(s, b, n * d)
    plain = replace(Sequence.of_rows(s), draws=Draws(1, 1, torch.arange(b)))
    dropped = plain.with_dropout(AttentionDropout(0.1, "bench", n, 0))

    def both_ways(name: str, sequence: Sequence) -> None:
        torch.autograd.grad(CORES[name](*leaves, sequence), leaves, grad)

    print(f"attention, {b} sequences, {n} heads, {s} x {d}, forward and backward")
    ways: dict[str, Callable[[], object]] = {
        "own": lambda: both_ways("own", plain),
        "own, dropout": lambda: both_ways("own", dropped),
        "reference, dropout": lambda: both_ways("sdpa", dropped),
    }
    in_turns(ways, repeats)


def draws(repeats: int) -> None:
    n = 1 << 24
    x, key, places = (
        torch.randn(4096, n // 4096),
        Key.of(1, "bench"),
        rectangle((4096, n // 4096), (0, 0), (4096, n // 4096), torch.device("cpu")),
    )
    print("16 M random values")
    ways: dict[str, Callable[[], object]] = {
        "normals": lambda: normal(key, places),
        "torch's normal_": lambda: torch.empty_like(x).normal_(),
        "dropout": lambda: dropout(x, key, places, 0.1),
        "torch's dropout": lambda: torch.nn.functional.dropout(x, 0.1),
    }
    in_turns(ways, repeats)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--threads", type=int, default=1)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    kernels = native.describe_kernels(torch.device("cpu"), torch.float32)
    print(f"torch {torch.__version__}, {args.threads} threads; {kernels}")
    update(args.repeats)
    documents(args.repeats)
    lengths(args.repeats)
    attention_dropout(args.repeats)
    draws(args.repeats)


if __name__ == "__main__":
    main()
