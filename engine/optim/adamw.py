"""AdamW (Loshchilov & Hutter 2019): one fused kernel per range of a bucket."""

from __future__ import annotations

from torch import Tensor, tensor
from torch.optim.adamw import adamw

from engine.config.schema import OptimizerConfig
from engine.ops.native import kernels
from engine.optim.optimizer import View


class AdamW:
    """The rule "adamw": decoupled weight decay, both moments corrected for their start at zero."""

    rounds = True

    def __init__(self, cfg: OptimizerConfig):
        self.beta1, self.beta2, self.eps = cfg.beta1, cfg.beta2, cfg.eps

    def update(self, view: View, lr: float, weight_decay: float, grad_scale: float, step: int) -> None:
        """Update master weights and moments in place, and the rounded weights if there are any."""
        master, grad, first, second = view.master, view.grad, view.states["exp_avg"], view.states["exp_avg_sq"]
        if custom := kernels(master, grad):
            betas = (self.beta1, self.beta2)
            custom.adamw_(master, grad, first, second, view.low, lr, *betas, self.eps, weight_decay, grad_scale, step)
            return
        if grad_scale != 1.0:
            grad = grad * grad_scale
        self._reference(master, grad, first, second, lr, weight_decay, step)
        if view.low is not None:
            view.low.copy_(master)

    def _reference(
        self, master: Tensor, grad: Tensor, first: Tensor, second: Tensor, lr: float, weight_decay: float, step: int
    ) -> None:
        adamw(
            [master],
            [grad],
            [first],
            [second],
            [],
            [tensor(float(step - 1), device=master.device)],
            fused=True,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )
