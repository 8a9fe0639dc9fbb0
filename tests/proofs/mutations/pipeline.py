"""Faults of the pipeline executor and of stages."""

from __future__ import annotations

from .catchers import PLAIN_MATMUL, small
from .patch import Mutation

MUTATIONS = [
    Mutation(
        "loss_is_a_mean_of_microbatch_means",
        "accumulated micro-batches have equal weight despite different token counts (transformers#24725, #34191)",
        "engine.pipeline.executor:_forward",
        "run.token_weight",
        "1 / len(run.batches) / max(1, int(run.batches[action.microbatch].weights.sum()))",
        PLAIN_MATMUL,
    ),
    Mutation(
        "weights_aliased",
        "a forward modifies the weights of its batch (Megatron#1298: it shrinks in every iteration)",
        "engine.pipeline.stage:Stage.forward",
        "weights = batch.weights * token_weight",
        "weights = batch.weights * token_weight\nbatch.weights[:, -1] = 0",
        ("test_a_step_does_not_modify_its_batches",),
    ),
    Mutation(
        "reduce_before_the_last_microbatch",
        "buckets are reduced after the first micro-batch, later gradients stay local (DeepSpeed#7188)",
        "engine.pipeline.executor:execute",
        "{step[0].stage: step[0] for step in program if step[0].op in (Op.B, Op.W)}",
        "{step[0].stage: step[0] for step in reversed(program) if step[0].op in (Op.B, Op.W)}",
        small("zero"),
    ),
    Mutation(
        "weight_gradient_twice",
        "W of a split backward is run twice",
        "engine.pipeline.stage:Stage.weight_backward",
        "queue.pop().run()",
        "(queue[-1].run(), queue.pop().run())",
        small("split"),
    ),
    Mutation(
        "weight_gradient_dropped",
        "the oldest entry of a split backward is never run",
        "engine.pipeline.stage:Stage.weight_backward",
        "queue.reverse()",
        "queue.reverse(), queue.pop()",
        small("split"),
    ),
    Mutation(
        "receive_buffer_reused",
        "the next activation overwrites one whose backward has not run yet (gpt-neox#1004)",
        "engine.pipeline.executor:_communicate",
        "torch.empty(shape, dtype=run.ctx.dtype, device=run.ctx.device), peer",
        "run.__dict__.setdefault('buffer', torch.empty(shape, dtype=run.ctx.dtype)).detach(), peer",
        ("test_options_that_change_no_bit[pipeline-fp32]",),  # gpipe: all are received before any backward
    ),
]
