"""The registry of model types and of the sublayers of their blocks. Needs no torch.

An entry has the declaration of a thing (engine.model.declarations) and the name of the module that builds it, as
"package.module:Class". Planner, dry run and config checks read declarations; only `load_class` imports the module. So a
new model type, mixer or feed-forward is a file and an entry here.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config.schema import LayerConfig, ModelConfig
from engine.distributed.specs import ShardSpec
from engine.model import declarations
from engine.model.declarations import Declaration, ModelDeclaration, Workload

UNSHARDED = Workload()


@dataclass(frozen=True)
class SublayerType:
    """A mixer or feed-forward. declare(layer, workload, name) -> its declaration. module: of [s, b, h] -> [s, b, h].

    module(layer, build, name) makes it; engine.model.layers has Build. Its forward is called as (x, sequence,
    recipe=recipe), a mixer's as (x, rope_table, sequence, recipe=recipe).
    """

    declare: Callable[[LayerConfig, Workload, str], Declaration]
    module: str


MIXERS: dict[str, SublayerType] = {
    "attention": SublayerType(declarations.attention, "engine.model.attention:Attention"),
}
FEED_FORWARDS: dict[str, SublayerType] = {
    "mlp": SublayerType(declarations.mlp, "engine.model.feed_forward:MLP"),
}


@dataclass(frozen=True)
class StageShape:
    """The part of the model in one stage: `layers`; if first, the embedding; if last, the final norm and the head."""

    layers: range
    first: bool
    last: bool

    def parts(self, declared: ModelDeclaration) -> list[Declaration]:
        """The declared parts of the stage, in order."""
        first, last = [declared.embedding] * self.first, [declared.head] * self.last
        return [*first, *(declared.layers[n] for n in self.layers), *last]


def stage_shapes(counts: Sequence[int]) -> list[StageShape]:
    """The stages of a pipeline, in order, given the number of blocks of each."""
    shapes, begin = [], 0
    for stage, count in enumerate(counts):
        shapes.append(StageShape(range(begin, begin + count), stage == 0, stage == len(counts) - 1))
        begin += count
    return shapes


@dataclass(frozen=True)
class ModelType:
    """A type of model. layer: settings of layer i. declare(layers, cfg, workload): from those of its layers.

    module(cfg, build, shape, tied) makes the part of one pipeline stage; tied: the embedding matrix, if another stage
    on this rank already holds it.
    """

    declare: Callable[[Sequence[Declaration], ModelConfig, Workload], ModelDeclaration]
    module: str
    layer: Callable[[ModelConfig, int], LayerConfig] = ModelConfig.layer


MODELS: dict[str, ModelType] = {
    "decoder": ModelType(declarations.decoder, "engine.model.transformer:Transformer"),
}


def load_class(name: str) -> Callable[..., Any]:
    """The class that "package.module:Class" names."""
    module, _, attribute = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


def layers_of(cfg: ModelConfig) -> list[LayerConfig]:
    """The settings of every layer of a model, in order."""
    return [MODELS[cfg.type].layer(cfg, index) for index in range(cfg.num_layers)]


def declare(cfg: ModelConfig, work: Workload = UNSHARDED) -> ModelDeclaration:
    """What a model holds and costs. cfg: of a resolved config. work: for local shapes and saved bytes."""
    blocks = []
    for layer in layers_of(cfg):
        name = f"layers.{layer.index}"
        mixer = MIXERS[layer.mixer].declare(layer, work, f"{name}.attention")
        feed_forward = FEED_FORWARDS[layer.feed_forward].declare(layer, work, f"{name}.mlp")
        blocks.append(declarations.block(layer, work, mixer, feed_forward))
    return MODELS[cfg.type].declare(blocks, cfg, work)


def parameter_specs(cfg: ModelConfig) -> list[ShardSpec]:
    """The specs of all parameters of a model without sharding, in canonical order; a tied matrix is listed once."""
    return list(dict.fromkeys(spec for part in declare(cfg).parts() for spec in part.specs))


def tensor_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> global shape of every tensor of a model, in canonical order."""
    return {chunk.name: chunk.shape for spec in parameter_specs(cfg) for chunk in spec.chunks}


def num_parameters(cfg: ModelConfig) -> int:
    """The number of parameters of the whole model; tied ones count once."""
    return sum(math.prod(shape) for shape in tensor_shapes(cfg).values())
