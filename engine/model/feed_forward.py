"""Gated or plain MLP with its inner width sharded across the tensor axis (shape legend in layers.py)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from engine.batch import Sequence
from engine.config.schema import LayerConfig
from engine.model.dropout import Dropout
from engine.model.layer_specs import MLPSpecs
from engine.model.layers import Build, ColumnLinear, RowLinear
from engine.ops.activation import activation
from engine.ops.linear import RecomputeRecipe


class MLP(nn.Module):
    """Fused gate|up projection (plain MLP: up only), activation, down projection: [s, b, h] -> [s, b, h]."""

    def __init__(self, layer: LayerConfig, build: Build, name: str):
        super().__init__()
        cfg, specs = layer.model, MLPSpecs.of(layer, build.tensor, name)
        self.up, self.down = ColumnLinear(specs.up, build), RowLinear(specs.down, build)
        self.activation = build.backends.fuse(activation(cfg.activation, cfg.gated_mlp))
        self.dropout = Dropout(build.dropout, f"{name}.inner", build.ctx.self_axis, build.ctx.tensor)

    def forward(self, x: Tensor, sequence: Sequence, recipe: RecomputeRecipe | None = None) -> Tensor:
        """recipe: recompute x in the backward instead of saving it; the activation is then recomputed too."""
        fused, activate = self.up(x, recipe), partial(self._activate, sequence=sequence)
        return self.down(activate(fused), RecomputeRecipe(activate, (fused,)) if recipe else None)

    def _activate(self, fused: Tensor, sequence: Sequence) -> Tensor:
        return self.dropout(self.activation(fused), sequence)
