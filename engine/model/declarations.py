"""What the parts of a model hold, cost and save, computed from its config. Needs no torch.

A part is an embedding, a sublayer with its norms, or a head. Its declaration has the ShardSpecs of its parameters, from
which the modules make them, the FLOPs per token, the bytes of activations that a micro-batch saves for backward, and
the bytes that it needs for a moment. Planner, dry run and parameter counts read declarations; tests compare them with
what the modules really hold and save.

Saved bytes count each tensor once, with the part that saves it first. Legend: engine/model/layers.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from engine.config.schema import Config, LayerConfig, ModelConfig
from engine.distributed.specs import Role, ShardSpec
from engine.model.layer_specs import (
    FINAL_NORM,
    AttentionSpecs,
    MLPSpecs,
    WeightSpecs,
    branch_norms,
    norm,
    position_matrix,
    vocab_matrix,
)
from engine.ops.chunks import chunk_rows

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
    attention_dropout: with dropout of attention weights. cpu: on a CPU, not a GPU.
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
    cpu: bool = False

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

    def whole(self, cfg: ModelConfig) -> int:
        """Bytes of the hidden states of all tokens: of a matmul's input and of partial sums."""
        return self.tokens * cfg.hidden_size * self.element_bytes

    def gathered(self, cfg: ModelConfig) -> int:
        """Bytes of a copy that a matmul's input needs while it is gathered: under sequence parallelism."""
        return self.whole(cfg) if self.sequence else 0

    def reduced(self, cfg: ModelConfig) -> int:
        """Bytes of the copy of partial sums that their reduction makes in the forward."""
        return self.hidden(cfg) if self.tensor > 1 else 0

    def gradient(self, specs: WeightSpecs) -> int:
        """Bytes of a weight gradient before it is added to the main gradient: on a CPU, if that has more precision."""
        low = self.cpu and self.element_bytes < self.stat_bytes
        return math.prod(specs.weight.local_shape()) * self.element_bytes if low else 0

    def norm_stats(self, cfg: ModelConfig, rows: int) -> int:
        """Bytes that a norm saves in addition to its input, for this number of rows."""
        return rows * self.stat_bytes * (2 if cfg.norm == "layernorm" else 1)


@dataclass(frozen=True)
class WorkingMemory:
    """Bytes that a part needs while it runs on a micro-batch, at the most: temporary tensors and what it saves.

    forward: more than before it, with its input, which the part before may have saved. backward: more than before it,
    when all that it saved is alive, without the gradient of its output. Where the schedule splits the backward, split:
    the same for I, and deferred: what it keeps between I and W.
    """

    forward: int = 0
    backward: int = 0
    split: int = 0
    deferred: int = 0


def peak_of(*changes: int) -> int:
    """The most bytes alive at once while they change by these, one after the other."""
    return max(0, *itertools.accumulate(changes))


@dataclass(frozen=True)
class Declaration:
    """What one part of a model holds and costs.

    specs: of its parameters, in the order of the module. flops: of forward and backward, per token; recomputation is
    not counted. saved: bytes saved for the backward of a micro-batch, by recompute mode. Of a sublayer, "none" contains
    its input, "selective" does not, because a recipe recomputes it; "full" does not exist. work: by recompute mode.
    """

    specs: tuple[ShardSpec, ...] = ()
    flops: int = 0
    saved: Mapping[str, int] = field(default_factory=dict)
    work: Mapping[str, WorkingMemory] = field(default_factory=dict)

    def work_in(self, mode: str) -> WorkingMemory:
        """What it needs while it runs in a recompute mode; nothing, if it does not say."""
        return self.work.get(mode, WorkingMemory())


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


def matmul_flops(specs: Iterable[ShardSpec]) -> int:
    """FLOPs of forward and backward per token of the matrices among these specs: 6 per weight."""
    return 6 * sum(math.prod(c.shape) for spec in specs if spec.role is not Role.VECTOR for c in spec.chunks)


def attention(layer: LayerConfig, work: Workload, name: str) -> Declaration:
    """Declaration of attention.

    FLOPs of scores and values: 2 matmuls of 2 * seq_len * width in the forward and twice that in the backward, 12 *
    seq_len * width in all; half of it, because attention is causal (Megatron-LM counts the same way since 2024). With a
    window w, the part of the square that is attended to: w - w^2 / (2 seq_len) keys per query, not seq_len / 2.
    """
    cfg, rows, e = layer.model, work.tokens, work.element_bytes
    of = AttentionSpecs.of(layer, work.tensor, name)
    specs = tuple(of)
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
    saved = {"none": work.matmul_input(cfg) + norms + core, "selective": fused + out}
    return Declaration(specs, flops, saved, _attention_work(work, cfg, of, core + norms, (fused, out, kept * head)))


def _attention_work(
    work: Workload, cfg: ModelConfig, specs: AttentionSpecs, core: int, sizes: tuple[int, int, int]
) -> dict[str, WorkingMemory]:
    """What attention needs while it runs. core: saved by the core and QK-norms.

    sizes: of the fused projection, of the output, and of q, k and v as the core takes them.
    """
    hidden, whole, gathered = work.hidden(cfg), work.whole(cfg), work.gathered(cfg)
    (fused, out, heads), again = sizes, 0 if work.keep_gathered else gathered
    forward = peak_of(hidden, gathered, fused, -gathered, core, max(0, heads - fused), whole, work.reduced(cfg))
    output = (gathered, out, work.gradient(specs.out), -work.gradient(specs.out) - gathered)
    inputs = (whole, hidden * work.sequence, work.gradient(specs.qkv))
    none = peak_of(*output, heads, -core - out, fused, -heads, again, *inputs)
    selective = peak_of(*output, -out, core, heads, -core - out, fused, -heads - fused, hidden, gathered, *inputs)
    grad, end = gathered or hidden, (fused, -heads, whole, hidden * work.sequence)
    split = peak_of(gathered, out, heads, -core, *end)
    split_selective = peak_of(gathered, out, core, heads, -core - out, *end)
    return {
        "none": WorkingMemory(forward, none, split, work.matmul_input(cfg) + fused + out + grad),
        "selective": WorkingMemory(forward, selective, split_selective, hidden + fused + out + grad),
    }


def mlp(layer: LayerConfig, work: Workload, name: str) -> Declaration:
    """Declaration of an MLP."""
    cfg, of = layer.model, MLPSpecs.of(layer, work.tensor, name)
    inner = work.tokens * cfg.ffn_size // work.tensor * work.element_bytes
    fused = inner * (2 if cfg.gated_mlp else 1)
    hidden, whole, gathered = work.hidden(cfg), work.whole(cfg), work.gathered(cfg)
    again, down, grad = 0 if work.keep_gathered else gathered, work.gradient(of.down), gathered or hidden
    forward = peak_of(hidden, gathered, fused, -gathered, inner, whole, work.reduced(cfg))
    inputs = (whole, hidden * work.sequence, work.gradient(of.up))
    none = peak_of(gathered, inner, down, -down - gathered - inner, fused, -inner - fused, again, *inputs)
    selective = peak_of(
        gathered, 2 * inner, down, -down - gathered - inner, fused, -inner - fused, hidden + gathered, *inputs
    )
    split = peak_of(gathered, inner, fused, -inner - fused, whole, hidden * work.sequence)
    return Declaration(
        tuple(of),
        matmul_flops(of),
        {"none": work.matmul_input(cfg) + fused + inner, "selective": fused},
        {
            "none": WorkingMemory(forward, none, split, work.matmul_input(cfg) + fused + inner + grad),
            "selective": WorkingMemory(forward, selective, split + fused, hidden + 2 * fused + grad),
        },
    )


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
    needs = {mode: _block_work(mode, saved[mode], hidden, mixer, feed_forward) for mode in ("none", "selective")}
    # runs the forward again, which saves all; its output is alive during the backward
    again = needs["none"]
    backward, split = (max(again.forward, none + most) for most in (again.backward, again.split))
    needs["full"] = WorkingMemory(again.forward, backward, split, again.deferred)
    return Declaration(tuple(specs), mixer.flops + feed_forward.flops, saved, needs)


def _block_work(mode: str, saved: int, hidden: int, mixer: Declaration, feed_forward: Declaration) -> WorkingMemory:
    """What a block needs while it runs in a mode, of which it saves `saved` bytes. hidden: bytes of hidden states."""
    first, second = mixer.work_in(mode), feed_forward.work_in(mode)
    # next to the feed-forward are alive: the input, what the mixer saved, the mixer's output, and their sum
    forward = max(hidden + first.forward, saved - feed_forward.saved[mode] + hidden + second.forward)
    backward = max(second.backward, hidden + first.backward - feed_forward.saved[mode])
    split = max(second.split, hidden + first.split + second.deferred - feed_forward.saved[mode])
    return WorkingMemory(forward, backward, split, first.deferred + second.deferred)


def decoder(layers: Sequence[Declaration], cfg: ModelConfig, work: Workload) -> ModelDeclaration:
    """Declaration of a decoder with these layers."""
    ids = 9 * work.tokens  # int64 ids, and a bool each: outside this rank's slice
    hidden, whole, gathered = work.hidden(cfg), work.whole(cfg), work.gathered(cfg)
    wide = 0 if work.element_bytes == work.stat_bytes else work.tokens * cfg.hidden_size * work.stat_bytes
    look_up = WorkingMemory(ids + whole + work.reduced(cfg), gathered + whole + wide, gathered + whole + wide)
    learned = (position_matrix(cfg),) if cfg.positions == "learned" else ()
    specs = (vocab_matrix(cfg, work.tensor, head=False), *learned)
    embedding = Declaration(specs, 0, dict.fromkeys(MODES, ids), dict.fromkeys(MODES, look_up))
    matrix = vocab_matrix(cfg, work.tensor, head=True)
    # the input of the final norm, and the gradient of its output, which the fused loss computes in the forward
    saved = 2 * hidden + work.norm_stats(cfg, work.local_tokens)
    rows = chunk_rows(work.tokens, cpu=work.cpu)
    logits, product = (
        min(rows, work.tokens) * n * work.element_bytes for n in (matrix.local_shape()[0], cfg.hidden_size)
    )
    chunk = logits + max(product, work.gradient(WeightSpecs(matrix)))
    loss = WorkingMemory(2 * hidden + gathered + whole + chunk, hidden, hidden)
    specs = (*norm(FINAL_NORM, cfg.hidden_size, cfg), matrix)
    head = Declaration(specs, matmul_flops([matrix]), dict.fromkeys(MODES, saved), dict.fromkeys(MODES, loss))
    return ModelDeclaration(embedding, tuple(layers), head, work.seq_len * cfg.rotary_dim * work.element_bytes)
