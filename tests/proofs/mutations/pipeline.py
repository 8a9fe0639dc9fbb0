"""Faults of the pipeline executor and of stages."""

from __future__ import annotations

from .catchers import PLAIN_MATMUL, small
from .patch import Mutation

MUTATIONS = [
    Mutation(
        "loss_is_a_mean_of_microbatch_means",
        "accumulated micro-batches have equal weight despite different token counts",
        "engine.train.objective:LanguageModel.__call__",
        "b.weights / batch.counted.weight",
        "b.weights / len(batch.batches) / max(1, float(b.weights.sum()))",
        PLAIN_MATMUL,
        threads=(
            "huggingface/transformers#24725",
            "huggingface/transformers#34191",
        ),
    ),
    Mutation(
        "labels_aliased",
        "a forward modifies its batch: the mask shrinks in every iteration",
        "engine.pipeline.stage:Stage.forward",
        "out = self.part(inputs, batch)",
        "out = self.part(inputs, batch)\nbatch.labels[:, -1] = 0",
        ("test_a_step_does_not_modify_its_batches",),
        threads=("NVIDIA/Megatron-LM#1298",),
    ),
    Mutation(
        "reduce_before_the_last_microbatch",
        "buckets are reduced after the first micro-batch, later gradients stay local",
        "engine.pipeline.executor:execute",
        "{step[0].stage: step[0] for step in program if step[0].op in (Op.B, Op.W)}",
        "{step[0].stage: step[0] for step in reversed(program) if step[0].op in (Op.B, Op.W)}",
        small("zero"),
        threads=("pytorch/pytorch#134052",),
    ),
    Mutation(
        "weight_gradient_twice",
        "W of a split backward is run twice",
        "engine.pipeline.stage:Stage.weight_backward",
        "queue.pop().run()",
        "(queue[-1].run(), queue.pop().run())",
        small("split"),
        threads=("pytorch/pytorch#180952",),
    ),
    Mutation(
        "weight_gradient_dropped",
        "the oldest entry of a split backward is never run",
        "engine.pipeline.stage:Stage.weight_backward",
        "queue.reverse()",
        "queue.reverse(), queue.pop()",
        small("split"),
        threads=("deepspeedai/Megatron-DeepSpeed#442",),
    ),
    Mutation(
        "receive_buffer_reused",
        "the next activation overwrites one whose backward has not run yet",
        "engine.pipeline.executor:_communicate",
        "torch.empty(x.shape, dtype=x.dtype, device=run.ctx.device), peer",
        "run.__dict__.setdefault('buffer', torch.empty(x.shape, dtype=x.dtype)).detach(), peer",
        ("test_options_that_change_no_bit[pipeline-fp32]",),  # gpipe: all are received before any backward
        threads=("deepspeedai/DeepSpeed#2800",),
    ),
    Mutation(
        "boundary_tensors_swapped",
        "two tensors of one shape at a boundary arrive in each other's place",
        "engine.pipeline.executor:_communicate",
        "[(x.contiguous(), peer) for x in run.outbox.pop(consumer)]",
        "[(x.contiguous(), peer) for x in (lambda x: (*x[1:2], *x[:1], *x[2:]))(run.outbox.pop(consumer))]",
        ("test_any_tuple_of_tensors_crosses_stages[1f1b-1]",),
    ),
    Mutation(
        "gradient_of_a_passed_tensor_dropped",
        "a tensor that passes through a stage gets only the gradient of its use there, not of later stages",
        "engine.pipeline.stage:Stage._propagate",
        "[(x, grad) for x, grad in roots if x.requires_grad]",
        "[(x, grad) for x, grad in roots if x.requires_grad and x.grad_fn is not None]",
        ("test_any_tuple_of_tensors_crosses_stages[zb-v-2]",),
    ),
    Mutation(
        "unused_input_without_gradient",
        "a part that does not use an input returns the gradient of the next input in its place",
        "engine.pipeline.stage:Stage._propagate",
        "tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in live.inputs)",
        "tuple(x if x.grad is None else x.grad for x in live.inputs)",
        ("test_unused_inputs_and_frozen_stages[{'ignore': True}]",),
    ),
    Mutation(
        "named_sum_on_every_tensor_rank",
        "a named sum is added once per tensor rank, the loss once",
        "engine.pipeline.executor:local_totals",
        "mine * float(ctx.same_tokens.rank == 0)",
        "torch.cat((mine[:1] * float(ctx.same_tokens.rank == 0), mine[1:]))",
        small("replicated"),
        threads=("NVIDIA/Megatron-LM#1585",),
    ),
    Mutation(
        "named_sum_of_the_last_microbatch",
        "a named sum of the last micro-batch replaces those of the others",
        "engine.pipeline.executor:local_totals",
        "values.sum()",
        "values[-1]",
        ("test_one_process_equals_plain_torch[True-ramp]",),
    ),
    Mutation(
        "only_the_newest_message_kept",
        "a stage keeps only what it produced last: waiting micro-batches get the gradients of another",
        "engine.pipeline.executor:_deliver",
        "run.inbox[op, stage, index] = tuple(map(Pending, tensors))",
        "waiting = [key for key in run.inbox if key[:2] == (op, stage)] + [(op, stage, index)]\n"
        "run.inbox |= {key: tuple(map(Pending, tensors)) for key in waiting}",
        ("test_four_stages_and_tensor_ranks_count_once",),
        threads=("pytorch/pytorch#139404",),
    ),
]
