"""Floating-point operations of a training step, from the config alone."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config.derived import Derived
from engine.config.schema import Config, ModelConfig
from engine.pipeline.actions import Plan


def _matmul_parameters_of_layer(cfg: ModelConfig) -> int:
    heads = cfg.num_heads + 2 * cfg.num_kv_heads
    attention = cfg.hidden_size * cfg.head_dim * (heads + cfg.num_heads)
    return attention + (3 if cfg.gated_mlp else 2) * cfg.hidden_size * cfg.ffn_size


def matmul_parameters(cfg: ModelConfig) -> int:
    """Weights that every token is multiplied with: all matrices, the output head included, the embedding not."""
    return cfg.num_layers * _matmul_parameters_of_layer(cfg) + cfg.vocab_size * cfg.hidden_size


def _attention_of_layer(cfg: ModelConfig, seq_len: int) -> int:
    return 12 * seq_len * cfg.num_heads * cfg.head_dim // 2


def flops_per_token(cfg: ModelConfig, seq_len: int) -> int:
    """Model FLOPs of forward and backward for one token: 6 a matmul weight, plus causal attention.

    Attention (scores and values): 2 matmuls of 2 * seq * width FLOPs forward, twice that backward, 12 * seq * width;
    half of it, because a token sees only the tokens before it (Megatron-LM counts the same way since 2024). Nothing
    is added for recomputation.
    """
    return 6 * matmul_parameters(cfg) + cfg.num_layers * _attention_of_layer(cfg, seq_len)


def stage_flops(cfg: ModelConfig, seq_len: int, layers: Sequence[int]) -> list[int]:
    """`flops_per_token` cut into pipeline stages of so many layers each; the head is with the last."""
    layer = 6 * _matmul_parameters_of_layer(cfg) + _attention_of_layer(cfg, seq_len)
    flops = [count * layer for count in layers]
    flops[-1] += 6 * cfg.vocab_size * cfg.hidden_size
    return flops


def balanced_layers(cfg: ModelConfig, seq_len: int, stages: int) -> list[int]:
    """Layers of each stage such that the heaviest computes as little as possible; the earlier ones, which keep
    more microbatches' activations, get the smaller counts of what remains. Of a resolved model."""

    def split(last: int) -> list[int]:
        base, more = divmod(cfg.num_layers - last, stages - 1)
        return [base + (i >= stages - 1 - more) for i in range(stages - 1)] + [last]

    if stages == 1:
        return [cfg.num_layers]
    return min(map(split, range(cfg.num_layers, -1, -1)), key=lambda layers: max(stage_flops(cfg, seq_len, layers)))


def uneven_pipeline(cfg: Config, derived: Derived) -> str:
    """How much the heaviest pipeline rank of a resolved config computes beyond the mean, and what would be better;
    empty where `balanced` would gain less than a twentieth."""
    balanced = balanced_layers(cfg.model, cfg.train.seq_len, derived.plan.num_stages)
    now, then = (_heaviest(cfg, derived.plan, layers) for layers in (derived.layers, balanced))
    if now < 1.05 * then:
        return ""
    better = f"--parallel.layers balanced ({','.join(map(str, balanced))}) makes it {then:.2f}"
    return f"the heaviest pipeline rank computes {now:.2f} times the mean; {better}"


def _heaviest(cfg: Config, plan: Plan, layers: Sequence[int]) -> float:
    flops = stage_flops(cfg.model, cfg.train.seq_len, layers)
    ranks = [sum(flops[stage] for stage in plan.stages_of(rank)) for rank in range(plan.num_ranks)]
    return max(ranks) * len(ranks) / sum(ranks)
