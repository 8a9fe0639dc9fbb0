"""Faults of keyed draws: initial values and dropout that depend on the layout, on recomputation, or on nothing."""

from __future__ import annotations

from .catchers import RESUME, small
from .patch import Mutation

CUSTOM = ("test_custom_float32_kernels_in_a_layout[rmsnorm-0.3]",)
PLAIN = ("test_dropout_equals_plain_torch[False-pre]",)
_KEY = 'sequence.draws.key("dropout", self.name)'

MUTATIONS = [
    Mutation(
        "initial_values_by_local_place",
        "each tensor rank draws the values of the first part of a tensor",
        "engine.distributed.sharding:initialise_",
        "rectangle(piece.global_shape, piece.offset, piece.shape, ctx.device)",
        "rectangle(piece.global_shape, (0,) * len(piece.offset), piece.shape, ctx.device)",
        small("sequence"),
        threads=(
            "pytorch/pytorch#168058",
            "mosaicml/llm-foundry#1820",
        ),
    ),
    Mutation(
        "dropout_mask_by_rank",
        "tensor ranks draw their masks from different keys",
        "engine.model.dropout:Dropout.__call__",
        _KEY,
        'sequence.draws.key("dropout", f"{self.name} {self.positions.rank}")',
        small("dropout"),
        threads=(
            "bigscience-workshop/Megatron-DeepSpeed#276",
            "NVIDIA/Megatron-LM#206",
        ),
    ),
    Mutation(
        "dropout_mask_by_local_position",
        "under sequence parallelism each rank draws the mask of the first part of the sequence",
        "engine.model.dropout:Dropout.__call__",
        "self.positions.rank * s",
        "0",
        small("dropout"),
    ),
    Mutation(
        "dropout_mask_without_the_tensor_offset",
        "each tensor rank draws the mask of the first inner activations of an MLP",
        "engine.model.dropout:Dropout.__call__",
        "self.features.rank * f",
        "0",
        small("dropout"),
    ),
    Mutation(
        "dropout_mask_of_the_first_heads",
        "each tensor rank draws the mask of the first heads' attention weights",
        "engine.model.attention:Attention.__init__",
        "ctx.tensor.rank * self.n",
        "0",
        small("dropout"),
    ),
    Mutation(
        "custom_attention_drops_other_weights_in_its_backward",
        "the custom attention kernel draws another mask in the backward",
        "engine.ops.attention_cores:_CustomAttention.backward",
        "ctx.draw",
        "(ctx.draw[0] + 1, *ctx.draw[1:])",
        CUSTOM,
        path="kernels",
    ),
    Mutation(
        "custom_attention_drops_the_weights_of_the_first_queries",
        "with fewer queries than keys, the last queries are dropped as the first",
        "engine.ops.attention_cores:_custom",
        "sequence.attention_places(n, s, keys)",
        "sequence.attention_places(n, s, s)",
        ("test_attention_with_dropout[1-2-1-3-77-8-one-0]",),
        path="kernels",
    ),
    Mutation(
        "dropout_mask_by_local_sample",
        "all micro-batches and data ranks draw the same masks for their samples",
        "engine.batch:Sequence._places",
        "self.draws.samples * self.length",
        "torch.arange(len(self.draws.samples)) * self.length",
        PLAIN,
        threads=(
            "volcengine/veScale#52",
            "tenstorrent/tt-metal#55947",
        ),
    ),
    Mutation(
        "dropout_mask_redrawn_in_recompute",
        "the recomputation of a block draws another mask than its forward",
        "engine.model.dropout:Dropout.__call__",
        _KEY,
        'sequence.draws.key("dropout", f"{self.name} {x.requires_grad}")',
        small("dropout"),
        threads=("allenai/OLMo-core#828",),
    ),
    Mutation(
        "dropout_mask_redrawn_in_backward",
        "the gradient is masked by another mask than the activation",
        "engine.ops.draws:_Dropout.backward",
        "_dropped(grad, starts, ctx.key, ctx.p)",
        "_dropped(grad, starts, Key(0, 0), ctx.p)",
        ("test_the_gradient_of_dropout[reference]",),
        threads=("pytorch/pytorch#190758",),
    ),
    Mutation(
        "dropout_mask_of_every_step_equal",
        "the step is not part of the key",
        "engine.batch:Draws.key",
        "Key.of(self.seed, purpose, self.step, name)",
        "Key.of(self.seed, purpose, 1, name)",
        PLAIN,
    ),
    Mutation(
        "dropout_without_scale",
        "kept activations are not divided by 1 - p",
        "engine.ops.draws:dropout_arguments",
        "1 / (1 - p)",
        "1.0",
        PLAIN,
    ),
    Mutation(
        "inner_activations_not_dropped",
        "an MLP does not drop its inner activations",
        "engine.model.feed_forward:MLP._activate",
        "self.dropout(self.activation(fused), sequence)",
        "self.activation(fused)",
        PLAIN,
    ),
    Mutation(
        "dropout_in_validation",
        "validation drops activations",
        "engine.train.evaluate:Evaluator._chunk",
        "batch.to(self.ctx.device)",
        "batch.to(self.ctx.device).drawing(1, 1)",
        ("test_validation_drops_nothing",),
    ),
    Mutation(
        "draws_restart_at_resume",
        "after a resume the random numbers are not those of the step",
        "engine.train.step:train_step",
        "state.step + 1",
        'state.step + 1 - state.__dict__.setdefault("begun", state.step)',
        RESUME,
        nth=(1, 4),
        threads=("NVIDIA/Megatron-LM#6858",),
    ),
]
