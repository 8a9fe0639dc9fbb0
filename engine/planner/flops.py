"""FLOPs of a training step, computed from the config."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from engine.config.derived import Derived
from engine.config.schema import Config, ModelConfig
from engine.pipeline.actions import Plan


def _matmul_parameters_of_layer(cfg: ModelConfig) -> int:
    heads = cfg.num_heads + 2 * cfg.num_kv_heads
    attention = cfg.hidden_size * cfg.head_dim * (heads + cfg.num_heads)
    return attention + (3 if cfg.gated_mlp else 2) * cfg.hidden_size * cfg.ffn_size


def matmul_parameters(cfg: ModelConfig) -> int:
    """The number of weights that take part in matmuls for each token: all matrices and the head, not the embedding."""
    return cfg.num_layers * _matmul_parameters_of_layer(cfg) + cfg.vocab_size * cfg.hidden_size


def _attention_of_layer(cfg: ModelConfig, seq_len: int, layer: int) -> int:
    window = min(cfg.layer(layer).window or seq_len, seq_len)
    pairs = window * (2 * seq_len - window)  # twice the pairs of a query and a key in a sequence
    return 12 * pairs * cfg.num_heads * cfg.head_dim // (2 * seq_len)


def flops_per_token(cfg: ModelConfig, seq_len: int) -> int:
    """Model FLOPs of forward and backward for one token: 6 per matmul weight, plus causal attention.

    Attention (scores and values): 2 matmuls of 2 * seq_len * width FLOPs in the forward and twice that in the backward,
    12 * seq_len * width in all; half of it, because attention is causal (Megatron-LM counts the same way since 2024).
    With a window w, the part of the square that is attended to: w - w^2 / (2 seq_len) keys per query instead of
    seq_len / 2. Recomputation is not counted.
    """
    attention = sum(_attention_of_layer(cfg, seq_len, layer) for layer in range(cfg.num_layers))
    return 6 * matmul_parameters(cfg) + attention


def stage_flops(cfg: ModelConfig, seq_len: int, layers: Sequence[int]) -> list[int]:
    """`flops_per_token` of each pipeline stage. layers: number of layers per stage; the last stage has the head."""
    attention = [_attention_of_layer(cfg, seq_len, layer) for layer in range(cfg.num_layers)]
    ends = list(accumulate(layers))
    matmuls = 6 * _matmul_parameters_of_layer(cfg)
    flops = [count * matmuls + sum(attention[end - count : end]) for count, end in zip(layers, ends)]
    flops[-1] += 6 * cfg.vocab_size * cfg.hidden_size
    return flops


def balanced_layers(cfg: ModelConfig, seq_len: int, stages: int) -> list[int]:
    """The number of layers of each stage that minimises the FLOPs of the heaviest stage, for a resolved model config.

    Where counts cannot be equal, earlier stages get fewer layers, because they hold activations of more micro-batches.
    """

    def split(last: int) -> list[int]:
        base, more = divmod(cfg.num_layers - last, stages - 1)
        return [base + (i >= stages - 1 - more) for i in range(stages - 1)] + [last]

    if stages == 1:
        return [cfg.num_layers]
    return min(map(split, range(cfg.num_layers, -1, -1)), key=lambda layers: max(stage_flops(cfg, seq_len, layers)))


def uneven_pipeline(cfg: Config, derived: Derived) -> str:
    """A note for the user about an unbalanced pipeline: the load of the heaviest rank, and the layers that reduce it.

    Empty if `--parallel.layers balanced` would gain less than 5%. cfg has to be resolved.
    """
    balanced = balanced_layers(cfg.model, cfg.train.seq_len, derived.first_plan.num_stages)
    now, best = (_heaviest(cfg, derived.first_plan, layers) for layers in (derived.layers, balanced))
    if now < 1.05 * best:
        return ""
    better = f"--parallel.layers balanced ({','.join(map(str, balanced))}) makes it {best:.2f}"
    return f"the heaviest pipeline rank computes {now:.2f} times the mean; {better}"


def _heaviest(cfg: Config, plan: Plan, layers: Sequence[int]) -> float:
    flops = stage_flops(cfg.model, cfg.train.seq_len, layers)
    ranks = [sum(flops[stage] for stage in plan.stages_of(rank)) for rank in range(plan.num_ranks)]
    return max(ranks) * len(ranks) / sum(ranks)
