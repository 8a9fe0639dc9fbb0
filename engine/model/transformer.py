"""The Transformer: a range of blocks, with the embedding before the first and the head after the last.

A pipeline stage is this same class with fewer blocks, keyed by absolute layer number, so canonical names never depend
on the layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.context import ParallelContext, make_context
from engine.layout import Layout
from engine.model.attention import Attention
from engine.model.layers import RMSNorm, VocabEmbedding, VocabHead, vocab_weight
from engine.model.mlp import MLP
from engine.ops.rope import rope_table
from engine.sharding import parameters

EMBED = "embed.weight"
HEAD = "head.weight"
FINAL_NORM = "norm.weight"


@dataclass(frozen=True)
class StageShape:
    """Which part of the model a stage is: its blocks; first: the embedding too; last: the final norm and head too."""

    layers: range
    first: bool
    last: bool

    @classmethod
    def of(cls, num_layers: int, stage: int, num_stages: int) -> StageShape:
        """Stage number `stage` of `num_stages` equal ones (the config has checked that they are equal)."""
        each = num_layers // num_stages
        return cls(range(stage * each, (stage + 1) * each), stage == 0, stage == num_stages - 1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): [s, b, h] -> [s, b, h]."""

    def __init__(self, cfg: ModelConfig, ctx: ParallelContext, layer: int):
        super().__init__()
        name = f"layers.{layer}"
        out_std = cfg.init_std / (2 * cfg.num_layers) ** 0.5  # GPT-2: residual sums keep their variance with depth
        self.attention_norm = RMSNorm(f"{name}.attention_norm.weight", cfg.hidden_size, cfg.norm_eps, ctx)
        self.attention = Attention(cfg, ctx, f"{name}.attention", out_std)
        self.mlp_norm = RMSNorm(f"{name}.mlp_norm.weight", cfg.hidden_size, cfg.norm_eps, ctx)
        self.mlp = MLP(cfg, ctx, f"{name}.mlp", out_std)

    def forward(self, x: Tensor, rope_table: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope_table)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """The blocks of one stage; on the first stage tokens come in, on the last a loss (or logits) comes out."""

    def __init__(self, cfg: ModelConfig, ctx: ParallelContext, shape: StageShape):
        super().__init__()
        self.cfg, self.ctx, self.shape = cfg, ctx, shape
        matrix = (cfg.vocab_size, cfg.hidden_size, cfg.init_std, cfg.tie_embeddings, ctx)
        weight = None
        if shape.first:
            weight = vocab_weight(EMBED, *matrix)
            self.embed = VocabEmbedding(weight, ctx)
        self.layers = nn.ModuleDict({str(i): Block(cfg, ctx, i) for i in shape.layers})
        if shape.last:
            self.norm = RMSNorm(FINAL_NORM, cfg.hidden_size, cfg.norm_eps, ctx)
            if not cfg.tie_embeddings:
                weight = vocab_weight(HEAD, *matrix)
            elif weight is None:  # the embedding lives on another stage: hold a copy under its name
                weight = vocab_weight(EMBED, *matrix)
            self.head = VocabHead(weight, ctx)
        self.rope: Tensor = torch.empty(2, 0, cfg.head_dim // 2)

    def _rope_for(self, seq_len: int) -> Tensor:
        if self.rope.shape[1] < seq_len:
            self.rope = rope_table(seq_len, self.cfg.head_dim, self.cfg.rope_theta, self.ctx.device, self.ctx.dtype)
        return self.rope[:, :seq_len]

    def hidden(self, x: Tensor) -> Tensor:
        """tokens [b, s] on the first stage, [s, b, h] on others -> [s, b, h] (normed on the last stage)."""
        if self.shape.first:
            x = self.embed(x)
        table = self._rope_for(x.shape[0])
        for block in self.layers.values():
            x = block(x, table)
        return self.norm(x) if self.shape.last else x

    def forward(self, x: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """`hidden`, and on the last stage the summed loss of the counted tokens (labels, mask [b, s])."""
        x = self.hidden(x)
        return self.head.loss(x, labels, mask) if self.shape.last else x

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [b, s] -> [b, s, vocab_size]; needs the whole model on this pipeline rank."""
        return self.head.logits(self.hidden(tokens)).transpose(0, 1)


def tensor_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> global shape of every tensor of a model, in canonical order. Costs no memory."""
    ctx = make_context(Layout(), 0, num_kv_heads=cfg.num_kv_heads, dtype=torch.float32, device="meta")
    whole = Transformer(cfg, ctx, StageShape.of(cfg.num_layers, 0, 1))
    return {piece.name: piece.global_shape for p in parameters(whole) for piece in p.spec.pieces(ctx)}


def num_parameters(cfg: ModelConfig) -> int:
    """Parameters of the whole model, each counted once (tied ones too)."""
    return sum(math.prod(shape) for shape in tensor_shapes(cfg).values())
