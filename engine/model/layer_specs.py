"""The ShardSpecs of the weights of layers, from which modules make their parameters. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from engine.config.schema import LayerConfig, ModelConfig
from engine.distributed.specs import Chunk, Cut, Role, ShardSpec

EMBED = "embed.weight"
HEAD = "head.weight"
POSITIONS = "positions.weight"
FINAL_NORM = "norm"


@dataclass(frozen=True)
class WeightSpecs:
    """The specs of a linear layer or a norm: its weight, and its bias if it has one."""

    weight: ShardSpec
    bias: ShardSpec | None = None

    def __iter__(self) -> Iterator[ShardSpec]:
        yield self.weight
        if self.bias is not None:
            yield self.bias


def _bias_of(chunk: Chunk) -> Chunk:
    """The bias chunk of a weight chunk: named `...bias`, sharded and summed the same way as its rows."""
    return replace(chunk, name=chunk.name.removesuffix("weight") + "bias", shape=chunk.shape[:1])


def _bias(chunks: Iterable[Chunk]) -> ShardSpec:
    return ShardSpec(tuple(map(_bias_of, chunks)), init_value=0.0, role=Role.VECTOR)


def column_linear(chunks: tuple[Chunk, ...], init_std: float, bias: bool) -> WeightSpecs:
    """Specs of a column-parallel linear layer. chunks: the canonical tensors fused into the weight, such as q, k, v."""
    return WeightSpecs(ShardSpec(chunks, init_std), _bias(chunks) if bias else None)


def row_linear(name: str, shape: tuple[int, int], init_std: float, tensor: int, bias: bool) -> WeightSpecs:
    """Specs of a row-parallel linear layer, weight [out, in]. Its bias is replicated and added once, after the sum."""
    whole = Chunk(name, shape[:1], sum_over=("sequence",))
    weight = ShardSpec((Chunk(name, shape, (Cut(1, tensor),)),), init_std)
    return WeightSpecs(weight, _bias((whole,)) if bias else None)


def norm(name: str, size: int, cfg: ModelConfig, sum_over: str = "sequence") -> WeightSpecs:
    """Specs of a norm, replicated across tensor ranks.

    sum_over: the axis whose ranks each compute only a part of the weight's gradient. "sequence" where a rank normalises
    its part of the sequence, "tensor" where it normalises its local heads (QK-norms).
    """
    chunk = Chunk(f"{name}.weight", (size,), sum_over=(sum_over,))
    weight = ShardSpec((chunk,), init_value=1.0 - float(cfg.norm_offset), role=Role.VECTOR)
    return WeightSpecs(weight, _bias((chunk,)) if cfg.norm == "layernorm" else None)


def residual_std(cfg: ModelConfig) -> float:
    """Standard deviation of projections into the residual stream: its sums keep their variance with depth (GPT-2)."""
    return cfg.init_std / (2 * cfg.num_layers) ** 0.5


@dataclass(frozen=True)
class AttentionSpecs:
    """Specs of attention. q_norm, k_norm: QK-norms, over heads or over projections."""

    qkv: WeightSpecs
    out: WeightSpecs
    qk_norms: tuple[WeightSpecs, ...]

    @staticmethod
    def of(layer: LayerConfig, tensor: int, name: str) -> AttentionSpecs:
        """The specs of a layer's attention on this number of tensor ranks.

        With fewer KV heads than tensor ranks, the ranks that share a KV head hold replicas of its weights. Each replica
        gets only the gradient of its local query heads, so the k and v chunks are summed over these ranks.
        """
        cfg = layer.model
        d, h, kv_parts = cfg.head_dim, cfg.hidden_size, min(cfg.num_kv_heads, tensor)
        kv = (cfg.num_kv_heads * d, h), (Cut(0, kv_parts),), (f"tensor/{kv_parts}",)
        q = Chunk(f"{name}.q.weight", (cfg.num_heads * d, h), (Cut(0, tensor),))
        chunks = (q, Chunk(f"{name}.k.weight", *kv), Chunk(f"{name}.v.weight", *kv))
        qkv = column_linear(chunks, cfg.init_std, cfg.qkv_bias)
        out_shape = (h, cfg.num_heads * d)
        out = row_linear(f"{name}.out.weight", out_shape, residual_std(cfg), tensor, cfg.attention_out_bias)
        norms: tuple[WeightSpecs, ...] = ()
        if cfg.qk_norm and cfg.qk_norm_span == "head":
            norms = tuple(norm(f"{name}.{part}_norm", d, cfg, sum_over="tensor") for part in "qk")
        elif cfg.qk_norm:
            whole = (replace(c, name=f"{name}.{part}_norm.weight", shape=c.shape[:1]) for part, c in zip("qk", chunks))
            norms = tuple(WeightSpecs(ShardSpec((chunk,), role=Role.VECTOR)) for chunk in whole)
        return AttentionSpecs(qkv, out, norms)

    def __iter__(self) -> Iterator[ShardSpec]:
        for specs in (self.qkv, self.out, *self.qk_norms):
            yield from specs


@dataclass(frozen=True)
class MLPSpecs:
    """Specs of an MLP: gate|up (plain MLP: up only) and down."""

    up: WeightSpecs
    down: WeightSpecs

    @staticmethod
    def of(layer: LayerConfig, tensor: int, name: str) -> MLPSpecs:
        """The specs of a layer's MLP on this number of tensor ranks."""
        cfg = layer.model
        shape, rows = (cfg.ffn_size, cfg.hidden_size), (Cut(0, tensor),)
        parts = ("gate", "up") if cfg.gated_mlp else ("up",)
        up = column_linear(tuple(Chunk(f"{name}.{p}.weight", shape, rows) for p in parts), cfg.init_std, cfg.mlp_bias)
        down_shape = (cfg.hidden_size, cfg.ffn_size)
        return MLPSpecs(up, row_linear(f"{name}.down.weight", down_shape, residual_std(cfg), tensor, cfg.mlp_bias))

    def __iter__(self) -> Iterator[ShardSpec]:
        yield from (*self.up, *self.down)


# norm_position -> the norms of a branch: the first is read by the sublayer or, with post-norm, reads its output
BRANCH_NORMS = {"pre": ("norm",), "post": ("norm",), "sandwich": ("norm", "post_norm")}


def branch_norms(layer: LayerConfig, name: str) -> tuple[WeightSpecs, ...]:
    """Specs of the norms of the sublayer `name`, such as `layers.3.mlp`: `layers.3.mlp_norm`, ..."""
    cfg = layer.model
    return tuple(norm(f"{name}_{which}", cfg.hidden_size, cfg) for which in BRANCH_NORMS[cfg.norm_position])


def vocab_matrix(cfg: ModelConfig, tensor: int, *, head: bool) -> ShardSpec:
    """Spec of the embedding, or of the head.

    With cfg.tie_embeddings they are one canonical tensor. The first and the last pipeline stage then hold replicas, and
    their gradients are summed.
    """
    tied = cfg.tie_embeddings
    name, role = (HEAD, Role.HEAD) if head and not tied else (EMBED, Role.EMBEDDING)
    sum_over = ("tied_stages",) if tied else ()
    chunk = Chunk(name, (cfg.vocab_size, cfg.hidden_size), (Cut(0, tensor),), sum_over)
    return ShardSpec((chunk,), cfg.init_std, role=role)


def position_matrix(cfg: ModelConfig) -> ShardSpec:
    """Spec of learned positions."""
    chunk = Chunk(POSITIONS, (cfg.max_seq_len, cfg.hidden_size), sum_over=("sequence",))
    return ShardSpec((chunk,), cfg.init_std, role=Role.EMBEDDING)
