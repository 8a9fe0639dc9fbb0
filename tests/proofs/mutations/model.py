"""Faults of layers: biases, norms, positions, replicated parameters."""

from __future__ import annotations

from .catchers import PLAIN_MATMUL, hf, shape, small
from .patch import Mutation

MUTATIONS = [
    Mutation(
        "norm_weight_not_summed_under_sequence_parallelism",
        "each tensor rank keeps the gradient of its part of the sequence (Megatron#1446, apex#1686)",
        "engine.model.layers:Norm.__init__",
        '"sequence"',
        '"self_axis"',
        small("sequence"),
    ),
    Mutation(
        "qk_norm_not_summed",
        "each tensor rank keeps only the gradient of its local heads (NeMo-RL#3716)",
        "engine.model.attention:Attention.__init__",
        'Norm(f"{name}.{part}_norm", d, cfg, ctx, backends, sum_over="tensor")',
        'Norm(f"{name}.{part}_norm", d, cfg, ctx, backends, sum_over="self_axis")',
        small("replicated"),
    ),
    Mutation(
        "weight_decay_on_norms",
        "norm weights decay like matrices",
        "engine.model.layers:Norm.__init__",
        "ShardSpec((chunk,), init_value=1.0 - offset, role=Role.VECTOR)",
        "ShardSpec((chunk,), init_value=1.0 - offset)",
        PLAIN_MATMUL,
    ),
    Mutation(
        "row_bias_added_by_every_rank",
        "the bias of a row-parallel layer is added once per tensor rank (gpt-neox#1220)",
        "engine.model.layers:RowLinear.forward",
        "return out if self.bias is None else out + self.bias",
        "return out if self.bias is None else out + self.bias * max(self.replicated.size, self.sequence.size)",
        shape("gpt2-t4-replicated"),
    ),
    Mutation(
        "row_bias_gradient_not_summed",
        "under sequence parallelism each rank keeps the bias gradient of its part (Megatron#1446)",
        "engine.model.layers:RowLinear.__init__",
        'bias_of(Chunk(name, (out_size,), sum_over=("sequence",)))',
        "bias_of(Chunk(name, (out_size,)))",
        shape("gpt2-t4"),
    ),
    Mutation(
        "kv_bias_replicas_not_summed",
        "ranks that share a KV head each keep only the bias gradient of their local query heads",
        "engine.model.layers:bias_of",
        'return replace(chunk, name=chunk.name.removesuffix("weight") + "bias", shape=chunk.shape[:1])',
        'return replace(chunk, name=chunk.name.removesuffix("weight") + "bias", shape=chunk.shape[:1], sum_over=())',
        shape("qwen2-t4-replicated"),
    ),
    Mutation(
        "sandwich_norm_skipped",
        "the second norm of a sublayer exists, but is not applied",
        "engine.model.residual:SandwichNormBranch._apply_sublayer",
        "self.post_norm(super()._apply_sublayer(x, normed, *context))",
        "super()._apply_sublayer(x, normed, *context)",
        ("test_residual_forms_equal_plain_torch[sandwich-False]",),
    ),
    Mutation(
        "parallel_residual_in_sequence",
        "the MLP of a parallel block reads the output of attention",
        "engine.model.residual:in_parallel",
        "return x + mixer(x, *context) + feed_forward(x)",
        "return in_sequence(mixer, feed_forward, x, *context)",
        ("test_residual_forms_equal_plain_torch[pre-True]",),
    ),
    Mutation(
        "fused_norm_does_not_wait_for_its_weights",
        "a norm that is called past its hooks reads weights that the all-gather of ZeRO-1 has not yet written",
        "engine.model.residual:Branch.add",
        "self.norm(x, update)",
        "self.norm.forward(x, update)",
        ("test_pending_collectives_are_waited_for[1-1e-05]",),
    ),
    Mutation(
        "positions_of_the_first_part",
        "under sequence parallelism every rank adds the positions of the first part",
        "engine.model.layers:PositionEmbedding.forward",
        "sequence.positions.t().chunk(self.sequence.size)[self.sequence.rank]",
        "sequence.positions.t().chunk(self.sequence.size)[0]",
        shape("gpt2-t2"),
    ),
    Mutation(
        "positions_run_on_over_documents",
        "learned positions do not restart with each document",
        "engine.data.samples.transforms:SeparateDocuments.__call__",
        "torch.arange(starts.shape[1]) - starts if self.restart else None",
        "None",
        ("test_packed_documents_train_like_separate_rows",),
    ),
    Mutation(
        "rope_scaling_ignored",
        "a Llama 3.1 is loaded with the angles of Llama 3 (a common fault of converters)",
        "engine.model.transformer:Transformer._rope_for",
        "rope_scaling_of(cfg)",
        "RopeScaling()",
        hf("llama3-rope"),
    ),
]
