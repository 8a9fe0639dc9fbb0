"""What the parts of a model hold, cost and save, computed from its config. Needs no torch.

A part is an embedding, a sublayer with its norms, or a head. Its declaration has the ShardSpecs of its parameters, from
which the modules make them, the FLOPs per token, and the bytes of activations that a micro-batch saves for backward.
Planner, dry run and parameter counts read declarations; tests compare them with what the modules really hold and save.

Saved bytes count each tensor once, with the part that saves it first. Legend: engine/model/layers.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from engine.config.schema import Config, LayerConfig, ModelConfig
from engine.distributed.specs import Chunk, Cut, Role, ShardSpec

EMBED = "embed.weight"
HEAD = "head.weight"
POSITIONS = "positions.weight"
FINAL_NORM = "norm"
MODES = ("none", "selective", "full")


@dataclass(frozen=True)
class RecomputePolicy:
    """Activation recomputation: which activations a block saves for the backward (docs/training.md has the bytes).

    recompute: "none"; "selective" recomputes norms, activation functions and the attention core; "full" recomputes the
    whole block from its input. layers: recompute in this many blocks of a stage, the first ones; 0: in all.
    keep_gathered: under sequence parallelism, save the gathered input of column-parallel matmuls, not the local shard.
    """

    recompute: str = "none"
    layers: int = 0
    keep_gathered: bool = False

    @staticmethod
    def of(cfg: Config) -> RecomputePolicy:
        """The policy that a config selects."""
        return RecomputePolicy(cfg.train.recompute, cfg.train.recompute_layers, cfg.parallel.keep_gathered)

    def mode_of(self, index: int) -> str:
        """The recompute mode of the block at position `index` of its stage: "none", "selective" or "full"."""
        return self.recompute if not self.layers or index < self.layers else "none"


NO_RECOMPUTE = RecomputePolicy()


@dataclass(frozen=True)
class Workload:
    """The values of a layout and a micro-batch from which local shapes and saved bytes follow.

    tensor: tensor ranks. sequence: whether sequence parallelism is on. element_bytes: of the compute dtype.
    attention: implementation of the attention core (engine.ops.attention). documents: with document masking.
    attention_dropout: with dropout of attention weights.
    """

    tensor: int = 1
    sequence: bool = False
    keep_gathered: bool = False
    seq_len: int = 1
    micro_batch_size: int = 1
    element_bytes: int = 4
    attention: str = "flash"
    documents: bool = False
    attention_dropout: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.seq_len * self.micro_batch_size

    @property
    def local_tokens(self) -> int:
        """Tokens of a micro-batch that a rank holds outside the matmuls."""
        return self.tokens // self.tensor if self.sequence else self.tokens

    @property
    def stat_bytes(self) -> int:
        """Bytes of a number per row that norms and attention save: float32, float64 for float64 models."""
        return max(4, self.element_bytes)

    def hidden(self, cfg: ModelConfig) -> int:
        """Bytes of hidden states between the matmuls."""
        return self.local_tokens * cfg.hidden_size * self.element_bytes

    def matmul_input(self, cfg: ModelConfig) -> int:
        """Bytes that a column-parallel matmul saves of hidden states."""
        gathered = self.sequence and self.keep_gathered
        return self.hidden(cfg) * (self.tensor if gathered else 1)

    def norm_stats(self, cfg: ModelConfig, rows: int) -> int:
        """Bytes that a norm saves in addition to its input, for this number of rows."""
        return rows * self.stat_bytes * (2 if cfg.norm == "layernorm" else 1)


@dataclass(frozen=True)
class Declaration:
    """What one part of a model holds and costs.

    specs: of its parameters, in the order of the module. flops: of forward and backward, per token; recomputation is
    not counted. saved: bytes saved for the backward of a micro-batch, by recompute mode. Of a sublayer, "none" contains
    its input, "selective" does not, because a recipe recomputes it; "full" does not exist.
    """

    specs: tuple[ShardSpec, ...] = ()
    flops: int = 0
    saved: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelDeclaration:
    """The parts of a model: embedding, layers, and head (with the final norm). A pipeline stage has some of them.

    shared: bytes that all layers of a stage save together for the backward of a micro-batch, such as the RoPE table.
    """

    embedding: Declaration
    layers: tuple[Declaration, ...]
    head: Declaration
    shared: int = 0

    def parts(self) -> tuple[Declaration, ...]:
        """All parts, in order."""
        return (self.embedding, *self.layers, self.head)


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


def matmul_flops(specs: Iterable[ShardSpec]) -> int:
    """FLOPs of forward and backward per token of the matrices among these specs: 6 per weight."""
    return 6 * sum(math.prod(c.shape) for spec in specs if spec.role is not Role.VECTOR for c in spec.chunks)


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


def attention(layer: LayerConfig, work: Workload, name: str) -> Declaration:
    """Declaration of attention.

    FLOPs of scores and values: 2 matmuls of 2 * seq_len * width in the forward and twice that in the backward, 12 *
    seq_len * width in all; half of it, because attention is causal (Megatron-LM counts the same way since 2024). With a
    window w, the part of the square that is attended to: w - w^2 / (2 seq_len) keys per query, not seq_len / 2.
    """
    cfg, rows, e = layer.model, work.tokens, work.element_bytes
    specs = tuple(AttentionSpecs.of(layer, work.tensor, name))
    window = min(layer.window or work.seq_len, work.seq_len)
    pairs = window * (2 * work.seq_len - window)  # twice the pairs of a query and a key in a sequence
    flops = matmul_flops(specs) + 12 * pairs * cfg.num_heads * cfg.head_dim // (2 * work.seq_len)
    n, m = cfg.num_heads // work.tensor, max(1, cfg.num_kv_heads // work.tensor)
    head = rows * cfg.head_dim * e  # bytes of one local head of q, k, v or the output
    fused, out = (n + 2 * m) * head, n * head
    kept = n + 2 * m if work.attention != "sdpa" else 3 * n  # sdpa repeats the KV heads
    core = kept * head + out + n * rows * work.stat_bytes
    if work.attention == "sdpa" or (work.attention != "own" and work.micro_batch_size > 1):
        core += out  # the heads are merged into a copy
    if work.attention == "sdpa" and (work.documents or layer.window):
        core += (work.micro_batch_size if work.documents else 1) * work.seq_len**2 * e  # a mask, added to the scores
    if (
        work.attention_dropout and work.attention == "sdpa"
    ):  # weights after the softmax and after dropout, and a mask; no output, no log-sum-exp
        core = n * rows * cfg.head_dim * (2 * work.stat_bytes + e) + out  # q and k are as wide as the scores
        core += n * rows * work.seq_len * (work.stat_bytes + e)
        core += (work.micro_batch_size if work.documents else 1) * work.seq_len**2
    norms = 0
    if cfg.qk_norm and cfg.qk_norm_span == "head":
        copies = 1 if work.attention == "sdpa" else 2  # of q and k; if v is not copied, it is a view of q|k|v
        norms = copies * (n + m) * head + work.norm_stats(cfg, rows * (n + m))
    elif cfg.qk_norm:
        norms = fused + 2 * rows * work.stat_bytes
    return Declaration(specs, flops, {"none": work.matmul_input(cfg) + norms + core, "selective": fused + out})


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


def mlp(layer: LayerConfig, work: Workload, name: str) -> Declaration:
    """Declaration of an MLP."""
    cfg = layer.model
    specs = tuple(MLPSpecs.of(layer, work.tensor, name))
    inner = work.tokens * cfg.ffn_size // work.tensor * work.element_bytes
    fused = inner * (2 if cfg.gated_mlp else 1)
    return Declaration(specs, matmul_flops(specs), {"none": work.matmul_input(cfg) + fused + inner, "selective": fused})


# norm_position -> the norms of a branch: the first is read by the sublayer or, with post-norm, reads its output
BRANCH_NORMS = {"pre": ("norm",), "post": ("norm",), "sandwich": ("norm", "post_norm")}


def branch_norms(layer: LayerConfig, name: str) -> tuple[WeightSpecs, ...]:
    """Specs of the norms of the sublayer `name`, such as `layers.3.mlp`: `layers.3.mlp_norm`, ..."""
    cfg = layer.model
    return tuple(norm(f"{name}_{which}", cfg.hidden_size, cfg) for which in BRANCH_NORMS[cfg.norm_position])


def block(layer: LayerConfig, work: Workload, mixer: Declaration, feed_forward: Declaration) -> Declaration:
    """Declaration of a block from those of its sublayers."""
    cfg, specs = layer.model, []
    for declared, name in ((mixer, "attention"), (feed_forward, "mlp")):
        first, *others = branch_norms(layer, f"layers.{layer.index}.{name}")
        specs += [*first, *declared.specs, *(spec for other in others for spec in other)]
    hidden, stats = work.hidden(cfg), work.norm_stats(cfg, work.local_tokens)
    norms = 2 * {"pre": stats, "post": hidden + stats, "sandwich": hidden + 2 * stats}[cfg.norm_position]
    stream = hidden if cfg.parallel_residual else 2 * hidden  # inputs of the branches; parallel ones share it
    none = norms + mixer.saved["none"] + feed_forward.saved["none"]
    if cfg.norm_position != "post":
        none += stream
    elif cfg.parallel_residual and work.matmul_input(cfg) == hidden:
        none -= hidden  # both sublayers save the same input
    selective = stream + norms + mixer.saved["selective"] + feed_forward.saved["selective"]
    saved = {"none": none, "selective": selective, "full": hidden}
    return Declaration(tuple(specs), mixer.flops + feed_forward.flops, saved)


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


def decoder(layers: Sequence[Declaration], cfg: ModelConfig, work: Workload) -> ModelDeclaration:
    """Declaration of a decoder with these layers."""
    ids = 9 * work.tokens  # int64 ids, and a bool each: outside this rank's slice
    learned = (position_matrix(cfg),) if cfg.positions == "learned" else ()
    embedding = Declaration((vocab_matrix(cfg, work.tensor, head=False), *learned), 0, dict.fromkeys(MODES, ids))
    matrix = vocab_matrix(cfg, work.tensor, head=True)
    # the input of the final norm, and the gradient of its output, which the fused loss computes in the forward
    saved = 2 * work.hidden(cfg) + work.norm_stats(cfg, work.local_tokens)
    specs = (*norm(FINAL_NORM, cfg.hidden_size, cfg), matrix)
    head = Declaration(specs, matmul_flops([matrix]), dict.fromkeys(MODES, saved))
    return ModelDeclaration(embedding, tuple(layers), head, work.seq_len * cfg.rotary_dim * work.element_bytes)
