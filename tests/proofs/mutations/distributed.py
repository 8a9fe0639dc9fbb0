"""Faults of collectives, shards, counted pieces and random draws."""

from __future__ import annotations

from .catchers import norms, small
from .patch import Mutation

MUTATIONS = [
    Mutation(
        "tied_gradient_counted_twice",
        "the norm counts the tied weight on both the first and last stage: 40 instead of 28.28",
        "engine.distributed.specs:ShardSpec._counts",
        'return first and ("tied_stages" not in chunk.sum_over or grid.axis("tied_stages").rank == 0)',
        "return first",
        norms("tied-(1, 4, 1)"),
        threads=("NVIDIA/Megatron-LM#7227",),
    ),
    Mutation(
        "norm_counts_replicas",
        "weights replicated across tensor ranks are counted by each of them",
        "engine.distributed.specs:ShardSpec._counts",
        'return first and ("tied_stages" not in chunk.sum_over or grid.axis("tied_stages").rank == 0)',
        'return "tied_stages" not in chunk.sum_over or grid.axis("tied_stages").rank == 0',
        norms("gqa-(2, 1, 1)"),
        threads=("ROCm/TransformerEngine#715",),
    ),
    Mutation(
        "norm_misses_tensor_shards",
        "only the first tensor rank's shards are counted",
        "engine.distributed.specs:ShardSpec._counts",
        'return first and ("tied_stages" not in chunk.sum_over or grid.axis("tied_stages").rank == 0)',
        'return first and grid.axis("tensor").rank == 0'
        ' and ("tied_stages" not in chunk.sum_over or grid.axis("tied_stages").rank == 0)',
        norms("gqa-(2, 1, 1)"),
        threads=("NVIDIA/Megatron-LM#5916",),
    ),
    Mutation(
        "only_the_first_tensor_rank_counts",
        "tensor ranks that divide the work on a weight each own a part of it; only the first rank's part is counted",
        "engine.distributed.specs:ShardSpec._counts",
        "axis.ranks[axis.rank // same * same] in replicas",
        '(axis.ranks[axis.rank // same * same] in replicas if name != "tensor" else axis.rank % same == 0)',
        ("test_norm_and_checkpoint_count_every_value_once[world-cuts4-True]",),
        threads=(
            "NVIDIA/Megatron-LM#6470",
            "NVIDIA/Megatron-LM#6099",
        ),
    ),
    Mutation(
        "sequence_gradient_not_gathered",
        "the backward of the reduce-scatter repeats the local part instead of all-gathering",
        "engine.distributed.collectives:_ReducePartialSums.backward",
        "return all_gather(grad, ctx.sequence), None, None",
        "return torch.cat([grad] * ctx.sequence.size), None, None",
        small("sequence"),
    ),
    Mutation(
        "reduce_scatter_takes_its_own_part",
        "partial sums are scattered but not summed",
        "engine.distributed.collectives:reduce_partial_sums_start",
        "reduce_scatter_start(all_reduce_(x, replicated), sequence)",
        "Pending(all_reduce_(x, replicated).chunk(sequence.size)[sequence.rank].clone())",
        small("sequence"),
    ),
    Mutation(
        "gather_along_the_wrong_dim",
        "the dim that was gathered first is not moved back: logits of the wrong tokens",
        "engine.distributed.collectives:all_gather",
        "return all_gather_start(x.movedim(dim, 0), axis).wait().movedim(0, dim)",
        "return all_gather_start(x.movedim(dim, 0), axis).wait().reshape(*x.shape[:dim], -1, *x.shape[dim:][1:])",
        ("test_logits_do_not_depend_on_the_layout",),
    ),
    Mutation(
        "zero_gather_sends_the_wrong_range",
        "a rank sends a range that it has not updated",
        "engine.distributed.collectives:all_gather_into_start",
        "part = x.view(axis.size, -1)[axis.rank]",
        "part = x.view(axis.size, -1)[0]",
        small("zero"),
    ),
    Mutation(
        "initial_values_by_rank",
        "each rank draws from a different generator",
        "engine.distributed.sharding:initialise_",
        'Key.of(seed, "init", name=piece.name)',
        'Key.of(seed + ctx.rank, "init", name=piece.name)',
        small("replicated"),
        threads=("NVIDIA-NeMo/Megatron-Bridge#5396",),
    ),
    Mutation(
        "layers_initialised_identically",
        "layers of interleaved chunks have equal initial values",
        "engine.distributed.sharding:initialise_",
        'Key.of(seed, "init", name=piece.name)',
        'Key.of(seed, "init", name=piece.name.partition("layers.")[2].lstrip("0123456789") or piece.name)',
        ("test_initial_values_are_what_the_config_says",),
        threads=("allenai/OLMo-core#679",),
    ),
]
