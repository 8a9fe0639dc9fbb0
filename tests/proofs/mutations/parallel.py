"""Faults of gradient buckets: sums over ranks and ZeRO's gathers."""

from __future__ import annotations

from .catchers import small
from .patch import Mutation

LATE = ("test_pending_collectives_are_waited_for[1-0.01]",)

CONTEXT = ("test_context_parallelism_equals_one_process[context 2]",)

MUTATIONS = [
    Mutation(
        "tied_gradient_not_summed_over_the_stages",
        "the first and last stage each train their replica with a partial gradient",
        "engine.parallel.gradients:GradBuckets._sum_replicated",
        "self.ctx.axis(name).size > 1",
        'name != "tied_stages" and self.ctx.axis(name).size > 1',
        small("pipeline"),
        threads=(
            "NVIDIA/Megatron-LM#656",
            "paiml/entrenar#314",
        ),
    ),
    Mutation(
        "kv_replicas_not_summed",
        "ranks that share a KV head each keep the gradient of their local query heads",
        "engine.parallel.gradients:GradBuckets._sum_replicated",
        "self.ctx.axis(name).size > 1",
        'not name.startswith("tensor/") and self.ctx.axis(name).size > 1',
        small("replicated"),
        threads=("bigcode-project/Megatron-LM#35",),
    ),
    Mutation(
        "sum_forgotten_over_replicas",
        "gradients are summed over the data ranks although the spec names other replicas",
        "engine.parallel.gradients:_make_bucket",
        "ctx.axis(plan.replicas)",
        "ctx.data_context",
        ("test_gradients_are_summed_over_the_replicas_of_their_spec",),
    ),
    Mutation(
        "gradient_averaged_over_data_ranks",
        "gradients are divided by the data degree although the loss is already global",
        "engine.parallel.gradients:Bucket.start_reduction",
        "x = self.grads",
        "x = self.grads / self.axis.size",
        small("data"),
        threads=(
            "NVIDIA/Megatron-LM#673",
            "NVIDIA/Megatron-LM#906",
        ),
    ),
    Mutation(
        "zero_gather_forgotten",
        "updated weights are not gathered, so data ranks diverge",
        "engine.parallel.gradients:GradBuckets.gather",
        "b.zero",
        "b.zero and overlap is None",
        small("zero"),
    ),
    Mutation(
        "embedding_stale_under_zero",
        "the tied embedding is not gathered",
        "engine.parallel.gradients:GradBuckets.gather",
        "reversed(self.buckets)",
        "reversed([b for b in self.buckets if not b.late])",
        small("zero"),
    ),
    Mutation(
        "zero_gather_not_waited_for",
        "a forward reads weights before their all-gather is complete",
        "engine.parallel.gradients:wait_before_use",
        "part.register_forward_pre_hook(_wait_hook(holder[id(p)]))",
        "holder[id(p)].gathering.clear()",
        LATE,
        threads=("NVIDIA/Megatron-LM#663",),
    ),
    Mutation(
        "gradient_sum_not_waited_for",
        "the optimizer reads gradients that are still being summed",
        "engine.parallel.gradients:Bucket.wait_for_gradients",
        "self.reducing.wait()",
        "self.reducing.value",
        LATE,
        threads=(
            "deepspeedai/DeepSpeed#5545",
            "EleutherAI/gpt-neox#1004",
        ),
    ),
    Mutation(
        "whole_parameters_not_summed_over_the_replicas",
        "gradients are summed only where replicas own equal ranges",
        "engine.parallel.gradients:Bucket.start_reduction",
        "(reduce_scatter_start if self.zero and self.even else all_reduce_start)(x, self.axis)",
        "all_reduce_start(x, self.axis) if self.even else Pending(x)",
        ("test_a_rule_of_whole_matrices_equals_one_process[data2-zero0]",),
    ),
    Mutation(
        "bucket_reduced_at_its_first_gradient",
        "a bucket with the gradients of several matrices is reduced when the first has arrived",
        "engine.parallel.gradients:GradBuckets.expect_last_gradients",
        "sum(id(p) in wanted for p in b.params)",
        "min(1, sum(id(p) in wanted for p in b.params))",
        small("zero"),
        threads=("deepspeedai/DeepSpeed#8061",),
    ),
    Mutation(
        "buckets_across_blocks",
        "a bucket holds parameters of two blocks",
        "engine.distributed.sharding:units",
        "[unit for unit in found if unit]",
        "[a + b for a, b in zip(found[::2], [*found[1::2], []])]",
        ("test_a_bucket_belongs_to_one_unit",),
    ),
    Mutation(
        "positions_read_from_the_first_rank_only",
        "where ranks split positions, only the first of them counts its labels and losses",
        "engine.pipeline.executor:contributes_loss",
        "ctx.same_tokens.rank == 0",
        "ctx.same_tokens.rank == ctx.positions.rank == 0",
        CONTEXT,
    ),
    Mutation(
        "positions_counted_from_zero_on_each_rank",
        "every rank that splits positions rotates by those of the first",
        "engine.batch:Sequence.part",
        "self.positions[:, first:end]",
        "self.positions[:, : end - first]",
        CONTEXT,
    ),
    Mutation(
        "labels_of_another_part",
        "a rank that splits positions trains on the labels of the first part",
        "engine.batch:MicroBatch.part",
        "(x[:, mine] for x in (self.tokens, self.labels, self.weights))",
        "(x[:, m] for x, m in ((self.tokens, mine), (self.labels, slice(run)), (self.weights, mine)))",
        CONTEXT,
    ),
    Mutation(
        "dropout_of_the_first_part",
        "every rank that splits positions drops the elements of the first",
        "engine.batch:Sequence._places",
        "torch.arange(first, first + count, device=self.draws.samples.device) + self.first",
        "torch.arange(first, first + count, device=self.draws.samples.device)",
        ("test_documents_windows_dropout_and_recomputation_over_a_split_sequence",),
    ),
    Mutation(
        "second_axis_of_samples_reads_the_same",
        "the ranks of a second axis that splits samples read what the first reads, as with data parallelism alone",
        "engine.distributed.layout:Layout.axes",
        "self.block(samples, rank)",
        'self.group("data", rank)',
        ("test_an_axis_of_another_kind_equals_one_process[samples]",),
    ),
    Mutation(
        "second_axis_of_samples_loads_the_same",
        "the loader of a run divides the samples over the data axis alone",
        "engine.train.run:_loader",
        "ctx.samples.rank",
        "ctx.data.rank",
        ("test_a_run_reads_and_validates_over_an_axis[samples]",),
    ),
    Mutation(
        "validation_of_all_positions_on_each_rank",
        "where ranks split positions, validation counts every label on each of them",
        "engine.train.evaluate:Evaluator._chunk",
        "[b.part(self.ctx.positions.rank, self.ctx.positions.size) for b in whole_batches]",
        "whole_batches",
        ("test_a_run_reads_and_validates_over_an_axis[positions]",),
    ),
]
