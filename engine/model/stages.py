"""The pipeline stages of a rank, for any model type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from engine.config.derived import Derived
from engine.config.schema import Config, ModelConfig
from engine.distributed.context import ParallelContext
from engine.distributed.sharding import Parameter, parameters
from engine.model.build import MODELS, StageShape, load_class, stage_shapes
from engine.model.declarations import RecomputePolicy
from engine.model.layers import Build, ComputeBackends, ModelPart
from engine.ops.compile import compiled
from engine.ops.fp8 import Fp8
from engine.ops.matmul import PLAIN_MATMUL


def build_part(cfg: ModelConfig, build: Build, shape: StageShape, tied: Parameter | None = None) -> ModelPart:
    """The part of a model in one stage, by its model type, with uninitialised weights.

    tied: the embedding matrix, if another stage on this rank already holds it.
    """
    part: ModelPart = load_class(MODELS[cfg.type].module)(cfg, build, shape, tied)
    return part


def build_stages(
    cfg: Config, ctx: ParallelContext, derived: Derived
) -> Iterator[tuple[int, ModelPart, list[Parameter]]]:
    """Build the pipeline stages of this rank, in ascending order: (stage number, part, its parameters).

    derived: derived from cfg. A parameter is listed only with the first stage that uses it, so a tied embedding is held
    once if the first and the last stage are both on this rank.
    """
    train = cfg.train
    build = Build(ctx, RecomputePolicy.of(cfg), compute_backends(cfg), z_loss=train.z_loss)
    build = replace(build, dropout=train.dropout, attention_dropout=train.attention_dropout)
    shapes, tied, listed = stage_shapes(derived.layers), None, set()
    for number in derived.first_plan.stages_of(ctx.pipeline.rank):
        part = build_part(cfg.model, build, shapes[number], tied)
        params = [p for p in parameters(part) if id(p) not in listed]
        listed |= {id(p) for p in params}
        tied = next((p for p in params if "tied_stages" in p.spec.chunks[0].sum_over), tied)
        yield number, part, params


def compute_backends(cfg: Config) -> ComputeBackends:
    """The backends selected by train.attention, fp8 and compile, and data.separate_documents."""
    train = cfg.train
    matmul = PLAIN_MATMUL if train.fp8 == "none" else Fp8(rowwise=train.fp8 == "rowwise", compile=train.compile)
    backends = ComputeBackends(train.attention, cfg.data.separate_documents, matmul)
    return replace(backends, fuse=compiled) if train.compile else backends
