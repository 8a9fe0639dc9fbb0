"""AdamW (Loshchilov & Hutter 2019) over flat buckets: one fused pass a bucket.

Master weights: in fp32 and fp64 they are the bucket's own values; in bf16 and fp16 a float32 copy that those values are
rounded from in each update. Moments have the dtype of the masters. Under ZeRO-1 a rank has masters and moments of
its own range of each bucket only, and the weights are gathered after the update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from engine.config.schema import OptimizerConfig
from engine.distributed.sharding import Parameter
from engine.ops.native import kernels
from engine.parallel.gradients import Bucket, GradBuckets

STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StateShard:
    """What a rank holds of one state of one parameter: its elements [begin, begin + len(flat)), row by row.

    kind: "model" (the master weights), "exp_avg" or "exp_avg_sq".
    """

    kind: str
    param: Parameter
    begin: int
    flat: Tensor


class FlatAdamW:
    """Optimizer state of the buckets of all stages on this rank. `steps` counts updates done.

    overlap: let the gathers of ZeRO-1 run on after `step`.
    """

    def __init__(self, stages: Sequence[GradBuckets], cfg: OptimizerConfig, *, overlap: bool = True):
        self.stages, self.cfg, self.overlap = stages, cfg, overlap
        self.steps = 0
        self.buckets: list[Bucket] = [b for stage in stages for b in stage.buckets]
        self.masters = [self._master(b) for b in self.buckets]
        self.moments = {name: [torch.zeros_like(m) for m in self.masters] for name in STATES}

    @staticmethod
    def _master(bucket: Bucket) -> Tensor:
        values = bucket.part(bucket.values, bucket.held)
        return values if values.dtype == bucket.grads.dtype else values.to(bucket.grads.dtype)

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Update all parameters from the buckets' gradients times grad_scale (clipping, fp16's loss scale).

        The gradients stay as they are: our kernels multiply as they read.
        """
        self.steps += 1
        for i, (bucket, master) in enumerate(zip(self.buckets, self.masters)):
            grads, low = bucket.part(bucket.grads, bucket.held), self._rounded(bucket, master)
            decay = self.cfg.weight_decay if bucket.decay else 0.0
            first, second = (self.moments[name][i] for name in STATES)
            if own := kernels(master, grads):
                betas, eps = (self.cfg.beta1, self.cfg.beta2), self.cfg.eps
                own.adamw_(master, grads, first, second, low, lr, *betas, eps, decay, grad_scale, self.steps)
                continue
            if grad_scale != 1.0:
                grads = grads * grad_scale
            self._reference(master, grads, first, second, lr, decay)
            if low is not None:
                low.copy_(master)
        self._gather()

    def _reference(self, master: Tensor, grads: Tensor, first: Tensor, second: Tensor, lr: float, decay: float) -> None:
        adamw(
            [master],
            [grads],
            [first],
            [second],
            [],
            [torch.tensor(float(self.steps - 1), device=master.device)],
            fused=True,
            amsgrad=False,
            beta1=self.cfg.beta1,
            beta2=self.cfg.beta2,
            lr=lr,
            weight_decay=decay,
            eps=self.cfg.eps,
            maximize=False,
        )

    @staticmethod
    def _rounded(bucket: Bucket, master: Tensor) -> Tensor | None:
        """What the model computes with, where that is not the masters themselves."""
        values = bucket.part(bucket.values, bucket.held)
        return None if values.dtype == master.dtype else values

    def publish(self) -> None:
        """The masters were written from outside: round them for the model and send them to other ranks."""
        for bucket, master in zip(self.buckets, self.masters):
            low = self._rounded(bucket, master)
            if low is not None:
                low.copy_(master)
        self._gather()

    def _gather(self) -> None:
        for stage in self.stages:
            stage.gather(overlap=self.overlap)

    def states(self, *, owned: bool = False) -> Iterator[StateShard]:
        """All that this rank holds; owned: only what it, and no other data rank, writes to a checkpoint."""
        for i, bucket in enumerate(self.buckets):
            of = bucket.own if owned else bucket.held
            for j, p in enumerate(bucket.params):
                begin, end = bucket.overlap(j, of)
                if begin >= end:
                    continue
                at = bucket.starts[j] + begin - bucket.held.start
                for kind, flats in (("model", self.masters), *self.moments.items()):
                    yield StateShard(kind, p, begin, flats[i][at : at + end - begin])
