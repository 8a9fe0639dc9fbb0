"""AdamW (Loshchilov & Hutter 2019) over flat buckets: one fused pass a bucket.

Master weights: in fp32 and fp64 they are the bucket's own values; in bf16 a float32 copy that the bf16 values are
rounded from after each update. Moments have the dtype of the masters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from engine.config import OptimizerConfig
from engine.parallel.buckets import Bucket, GradBuckets
from engine.sharding import Parameter

STATES = ("exp_avg", "exp_avg_sq")


class FlatAdamW:
    """Optimizer state of the buckets of all stages on this rank. `steps` counts updates done."""

    def __init__(self, stages: Sequence[GradBuckets], cfg: OptimizerConfig):
        self.cfg = cfg
        self.steps = 0
        self.buckets: list[Bucket] = [b for stage in stages for b in stage.buckets]
        self.masters = [
            b.values if b.values.dtype == b.grads.dtype else b.values.to(b.grads.dtype) for b in self.buckets
        ]
        self.moments = {name: [torch.zeros_like(m) for m in self.masters] for name in STATES}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update all parameters from the buckets' gradients."""
        count = torch.tensor(float(self.steps))
        self.steps += 1
        for i, (bucket, master) in enumerate(zip(self.buckets, self.masters)):
            adamw(
                [master],
                [bucket.grads],
                [self.moments["exp_avg"][i]],
                [self.moments["exp_avg_sq"][i]],
                [],
                [count.clone().to(master.device)],
                fused=True,
                amsgrad=False,
                beta1=self.cfg.beta1,
                beta2=self.cfg.beta2,
                lr=lr,
                weight_decay=self.cfg.weight_decay if bucket.decay else 0.0,
                eps=self.cfg.eps,
                maximize=False,
            )
        self.publish()

    def publish(self) -> None:
        """Round the masters into the model's values (nothing to do where they are the same tensor)."""
        for bucket, master in zip(self.buckets, self.masters):
            if master is not bucket.values:
                bucket.values.copy_(master)

    def states(self) -> Iterator[tuple[str, Parameter, Tensor]]:
        """(kind, parameter, tensor of its shape) for everything a checkpoint holds; kind "model" is the master."""
        for i, bucket in enumerate(self.buckets):
            for j, p in enumerate(bucket.params):
                yield "model", p, bucket.view(self.masters[i], j)
                for name in STATES:
                    yield name, p, bucket.view(self.moments[name][i], j)
