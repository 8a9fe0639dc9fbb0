"""Faults of the optimizer and of the gradient norm."""

from __future__ import annotations

from .catchers import PLAIN_MATMUL, RESUME, norms, small
from .patch import Mutation

MUTATIONS = [
    Mutation(
        "norm_counts_padding",
        "values in the vocabulary padding are included in the norm",
        "engine.optim.clip:_counted_ranges",
        "begin, end = max(piece.begin, low), min(piece.end, high)",
        "begin, end = max(piece.begin, low), min(piece.end if len(p.spec.chunks) > 1 else p.numel(), high)",
        norms("gqa-(2, 1, 1)"),
    ),
    Mutation(
        "norm_of_one_stage",
        "each pipeline stage clips by its own norm (Megatron#7227, torchtitan#771)",
        "engine.optim.clip:NormCounter.__call__",
        "all_reduce_(self.local(), self.ctx.world)",
        "all_reduce_(self.local(), self.ctx.tensor)",
        small("pipeline"),
    ),
    Mutation(
        "tied_copies_diverge",
        "the optimizer treats the two replicas differently (Megatron#4641, Megatron-Bridge#5380)",
        "engine.optim.optimizer:Optimizer.step",
        "group.weight_decay",
        "group.weight_decay * (not run.ctx.tied_stages.rank)",
        small("pipeline"),
    ),
    Mutation(
        "bias_correction_one_step_late",
        "AdamW's correction uses the count of the wrong step (NVRx#376: step 2 with the weights of step 1)",
        "engine.optim.adamw:AdamW.update",
        "custom.adamw_(master, grad, first, second, view.low, lr, *betas, self.eps, weight_decay, grad_scale, step)",
        "custom.adamw_(master, grad, first, second, view.low, lr, *betas, self.eps, weight_decay, grad_scale, step+1)",
        PLAIN_MATMUL,
        path="kernels",
    ),
    Mutation(
        "bias_correction_one_step_late_in_torch",
        "the same in the path of torch's AdamW",
        "engine.optim.adamw:AdamW._reference",
        "float(step - 1)",
        "float(step)",
        PLAIN_MATMUL,
        path="torch",
    ),
    Mutation(
        "bf16_without_masters",
        "updates are rounded to bf16 each time, small ones are lost (DeepSpeed#7786)",
        "engine.optim.optimizer:_Run.views",
        "self.low()",
        "(self.master.copy_(self.bucket.view_range(self.bucket.values, self.span)), self.low())[1]",
        ("test_bf16_does_not_lose_tiny_updates",),
    ),
    Mutation(
        "moments_of_the_wrong_range",
        "ZeRO's moments are saved from and loaded into the start of the range (Megatron-Bridge#5637)",
        "engine.optim.optimizer:Optimizer.states",
        "flat[at : at + end - begin]",
        'flat[at : at + end - begin] if kind == "model" else flat[: end - begin]',
        RESUME,
    ),
    Mutation(
        "gradient_scale_ignored",
        "AdamW ignores grad_scale: no clipping, and moments with the wrong scale",
        "engine.optim.adamw:AdamW.update",
        "custom.adamw_(master, grad, first, second, view.low, lr, *betas, self.eps, weight_decay, grad_scale, step)",
        "custom.adamw_(master, grad, first, second, view.low, lr, *betas, self.eps, weight_decay, 1.0, step)",
        ("test_grad_scale_scales_the_update",),
        path="kernels",
    ),
    Mutation(
        "gradient_scale_ignored_in_torch",
        "the same in the path of torch's AdamW",
        "engine.optim.adamw:AdamW.update",
        "grad = grad * grad_scale",
        "grad = grad * 1.0",
        ("test_grad_scale_scales_the_update",),
        path="torch",
    ),
    Mutation(
        "rounded_weights_not_written",
        "only the master weights are updated; the model keeps its initial weights",
        "engine.optim.adamw:AdamW.update",
        "custom.adamw_(master, grad, first, second, view.low, lr, *betas, self.eps, weight_decay, grad_scale, step)",
        "custom.adamw_(master, grad, first, second, None, lr, *betas, self.eps, weight_decay, grad_scale, step)",
        ("test_grad_scale_scales_the_update",),
        path="kernels",
    ),
    Mutation(
        "rounded_weights_not_written_in_torch",
        "the same in the path of torch's AdamW",
        "engine.optim.adamw:AdamW.update",
        "view.low is not None",
        "False",
        ("test_grad_scale_scales_the_update",),
        path="torch",
    ),
]
