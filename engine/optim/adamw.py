"""AdamW (Loshchilov & Hutter 2019) over flat buckets: one fused kernel per bucket.

Master weights: with fp32 and fp64 they are the bucket's values; with bf16 and fp16 they are a float32 copy, which each
update rounds into the values. Moments have the dtype of the master weights. Under ZeRO-1 a rank holds master weights
and moments only of its range of each bucket, and the weights are all-gathered after the update.
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
    """This rank's contiguous row-major slice [begin, begin + len(flat)) of one state of one parameter.

    kind: "model" (master weights), "exp_avg" or "exp_avg_sq" (first and second moment).
    """

    kind: str
    param: Parameter
    begin: int
    flat: Tensor


class FlatAdamW:
    """AdamW for the buckets of all pipeline stages on this rank.

    overlap: `step` returns while the all-gathers of ZeRO-1 are in flight. steps: number of updates done.
    """

    def __init__(self, stages: Sequence[GradBuckets], cfg: OptimizerConfig, *, overlap: bool = True):
        self.stages, self.cfg, self.overlap = stages, cfg, overlap
        self.steps = 0
        self.buckets: list[Bucket] = [b for stage in stages for b in stage.buckets]
        self.masters = [self._master(b) for b in self.buckets]
        self.moments = {name: [torch.zeros_like(m) for m in self.masters] for name in STATES}

    @staticmethod
    def _master(bucket: Bucket) -> Tensor:
        values = bucket.view_range(bucket.values, bucket.update_range)
        return values if values.dtype == bucket.grads.dtype else values.to(bucket.grads.dtype)

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Update all parameters from the buckets' gradients times grad_scale (clipping and the fp16 loss scale).

        The gradients are not modified: the kernels apply the factor as they read them.
        """
        self.steps += 1
        for i, (bucket, master) in enumerate(zip(self.buckets, self.masters)):
            grads, low = bucket.view_range(bucket.grads, bucket.update_range), self._compute_weights(bucket, master)
            decay = self.cfg.weight_decay if bucket.decay else 0.0
            first, second = (self.moments[name][i] for name in STATES)
            if custom := kernels(master, grads):
                betas, eps = (self.cfg.beta1, self.cfg.beta2), self.cfg.eps
                custom.adamw_(master, grads, first, second, low, lr, *betas, eps, decay, grad_scale, self.steps)
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
    def _compute_weights(bucket: Bucket, master: Tensor) -> Tensor | None:
        """The low-precision weights of the model, or None if the master weights are the model's weights."""
        values = bucket.view_range(bucket.values, bucket.update_range)
        return None if values.dtype == master.dtype else values

    def masters_to_weights(self) -> None:
        """Round the master weights into the model's weights and all-gather them; call after loading master weights."""
        for bucket, master in zip(self.buckets, self.masters):
            low = self._compute_weights(bucket, master)
            if low is not None:
                low.copy_(master)
        self._gather()

    def _gather(self) -> None:
        for stage in self.stages:
            stage.gather(overlap=self.overlap)

    def states(self, *, owned: bool = False) -> Iterator[StateShard]:
        """The state shards of this rank; owned: only those that it, and no other data rank, writes to a checkpoint."""
        for i, bucket in enumerate(self.buckets):
            span = bucket.owned_range if owned else bucket.update_range
            for j, p in enumerate(bucket.params):
                begin, end = bucket.intersection(j, span)
                if begin >= end:
                    continue
                at = bucket.starts[j] + begin - bucket.update_range.start
                for kind, flats in (("model", self.masters), *self.moments.items()):
                    yield StateShard(kind, p, begin, flats[i][at : at + end - begin])
