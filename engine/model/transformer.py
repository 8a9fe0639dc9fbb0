"""The decoder-only Transformer: embedding, blocks, final norm, head.

A pipeline stage is the same class with a range of the blocks. Blocks are keyed by their layer number in the whole
model, so canonical parameter names do not depend on the layout.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from engine.batch import MicroBatch, Sequence
from engine.config.schema import LayerConfig, ModelConfig
from engine.distributed.sharding import Parameter, new_parameter
from engine.model.build import FEED_FORWARDS, MIXERS, StageShape, layers_of, load_class
from engine.model.dropout import Dropout
from engine.model.layer_specs import FINAL_NORM, branch_norms, norm, position_matrix, vocab_matrix
from engine.model.layers import Build, ModelPart, Norm, PositionEmbedding, VocabEmbedding, VocabHead
from engine.model.residual import BRANCHES, Branch, in_parallel, in_sequence
from engine.ops.recompute import recompute
from engine.ops.rope import RopeScaling, rope_at, rope_table
from engine.part import Boundary, BoundaryTensor, Output

Z_LOSS = "z_loss"


def mixer_of(layer: LayerConfig, build: Build, name: str) -> nn.Module:
    """The mixer of a layer, (x [s, b, h], rope_table, sequence, recipe=) -> [s, b, h]. name: of its tensors."""
    module: nn.Module = load_class(MIXERS[layer.mixer].module)(layer, build, name)
    return module


def feed_forward_of(layer: LayerConfig, build: Build, name: str) -> nn.Module:
    """The feed-forward of a layer, (x [s, b, h], sequence, recipe=) -> [s, b, h]. name: of its tensors."""
    module: nn.Module = load_class(FEED_FORWARDS[layer.feed_forward].module)(layer, build, name)
    return module


class Block(nn.Module):
    """One Transformer block, [s, b, h] -> [s, b, h]: x = x + attention(norm(x)), then x = x + mlp(norm(x)).

    cfg.norm_position and cfg.parallel_residual select another residual form (engine.model.residual).
    """

    def __init__(self, layer: LayerConfig, build: Build):
        super().__init__()
        cfg, name = layer.model, f"layers.{layer.index}"
        self.recompute = build.recompute
        self.residual = in_parallel if cfg.parallel_residual else in_sequence

        def branch(name: str, sublayer: nn.Module) -> Branch:
            norms = tuple(Norm(specs, cfg, build) for specs in branch_norms(layer, name))
            dropout = Dropout(build.dropout, name, build.ctx.sequence, build.ctx.self_axis)
            return BRANCHES[cfg.norm_position](norms, sublayer, dropout, build.recompute == "selective")

        self.attention = branch(f"{name}.attention", mixer_of(layer, build, f"{name}.attention"))
        self.mlp = branch(f"{name}.mlp", feed_forward_of(layer, build, f"{name}.mlp"))

    def forward(self, x: Tensor, rope_table: Tensor, sequence: Sequence) -> Tensor:
        """x [s, b, h] -> [s, b, h]. rope_table, sequence: as for Attention."""
        compute = partial(self._compute, sequence=sequence)
        if self.recompute == "full":
            return recompute(compute, x, rope_table, params=self.parameters())
        return compute(x, rope_table)

    def _compute(self, x: Tensor, rope_table: Tensor, sequence: Sequence) -> Tensor:
        return self.residual(self.attention, self.mlp, x, rope_table, sequence)


class Transformer(ModelPart):
    """A decoder's part in one pipeline stage: the first takes tokens, the last returns losses or logits."""

    def __init__(self, cfg: ModelConfig, build: Build, shape: StageShape, tied: Parameter | None = None):
        super().__init__(cfg, build.ctx, shape)
        self.sums = (Z_LOSS,) if shape.last and build.z_loss else ()
        ctx, tensor, weight = build.ctx, build.tensor, tied
        if shape.first:
            weight = new_parameter(vocab_matrix(cfg, tensor, head=False), ctx)
            self.embed = VocabEmbedding(weight, ctx, cfg.hidden_size**0.5 if cfg.scale_embeddings else 1.0)
            self.positions = PositionEmbedding(position_matrix(cfg), ctx) if cfg.positions == "learned" else None
        self.dropout = Dropout(build.dropout, "embed", ctx.sequence, ctx.self_axis)
        layers = layers_of(cfg)
        blocks = (Block(layers[n], build.of_block(i)) for i, n in enumerate(shape.layers))
        self.layers = nn.ModuleDict(dict(zip(map(str, shape.layers), blocks)))
        if shape.last:
            self.norm = Norm(norm(FINAL_NORM, cfg.hidden_size, cfg), cfg, build)
            if not cfg.tie_embeddings or weight is None:  # tied, but on another rank: hold a replica under its name
                weight = new_parameter(vocab_matrix(cfg, tensor, head=True), ctx)
            self.head = VocabHead(weight, ctx, build.z_loss)
        self.rope: Tensor = torch.empty(2, 0, cfg.rotary_dim // 2)

    def use(self, cfg: ModelConfig) -> None:
        """As ModelPart.use; the table of angles is made again where they change."""
        if cfg != self.cfg:
            self.cfg, self.rope = cfg, self.rope[:, :0]

    def _rope_for(self, seq_len: int) -> Tensor:
        if self.rope.shape[1] < seq_len:
            cfg, ctx = self.cfg, self.ctx
            self.rope = rope_table(seq_len, cfg.rotary_dim, cfg.rope_theta, ctx.device, ctx.dtype, rope_scaling_of(cfg))
        return self.rope

    def hidden(self, x: Tensor, sequence: Sequence) -> Tensor:
        """Hidden states: tokens [b, s] on the first stage, else [s, b, h] -> [s, b, h] (normalised on the last stage).

        sequence: the whole one, of all ranks that shard it.
        """
        if self.shape.first:
            x = self.embed(x)
            if self.positions is not None:
                x = self.positions(x, sequence)
            x = self.dropout(x, sequence)
        table = rope_at(self._rope_for(sequence.length), sequence.positions)
        sequence = sequence.for_one_forward()
        for block in self.layers.values():
            x = block(x, table, sequence)
        return self.norm(x) if self.shape.last else x

    def boundary(self, batch: MicroBatch) -> Boundary:
        """The hidden states [s, b, h] of the stage before."""
        b, s = batch.tokens.shape
        shape = (s // self.ctx.sequence.size, b, self.cfg.hidden_size)
        return () if self.shape.first else (BoundaryTensor(shape, self.ctx.dtype),)

    def forward(self, inputs: tuple[Tensor, ...], batch: MicroBatch) -> Output:
        """Hidden states [s, b, h]; on the last stage, for each sample [b], its weighted sum of token losses in nats.

        Every factor of the objective, such as 1 / tokens or a loss scale, has to be in the weights of the batch,
        because gradients are computed in the forward (ops.loss).
        """
        (x,) = (batch.tokens,) if self.shape.first else inputs
        x = self.hidden(x, batch.sequence)
        if not self.shape.last:
            return Output((x,))
        losses, z_loss = self.head(x, batch)
        return Output(losses=losses, sums={} if z_loss is None else {Z_LOSS: z_loss})

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits: tokens [b, s] -> [b, s, vocab_size]. Only for a model whose stages are all on this pipeline rank."""
        sequence = Sequence.of_rows(tokens.shape[1], device=tokens.device)
        return self.head.logits(self.hidden(tokens, sequence)).transpose(0, 1)


def rope_scaling_of(cfg: ModelConfig) -> RopeScaling:
    """The RoPE scaling of a model config."""
    return RopeScaling(
        cfg.rope_scaling,
        cfg.rope_factor,
        cfg.rope_original_seq_len,
        cfg.rope_low_freq_factor,
        cfg.rope_high_freq_factor,
        cfg.rope_beta_fast,
        cfg.rope_beta_slow,
        cfg.rope_attention_factor,
    )
