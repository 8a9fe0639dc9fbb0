"""What a new thing touches: a minimal model type, mixer, feed-forward, op, family and schedule, all in this file.

Each is registered from here, by the entries that docs/architecture.md counts, without a change in engine/. Then it runs
in a layout of tensor and pipeline ranks and equals one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.config.schema import LayerConfig, ModelConfig
from engine.distributed.context import ParallelContext
from engine.distributed.specs import Chunk, Cut
from engine.interop.huggingface.config_json import write_config
from engine.interop.huggingface.families import FAMILIES
from engine.interop.huggingface.weights import locate_tensors
from engine.model.build import FEED_FORWARDS, MIXERS, MODELS, SublayerType, num_parameters, tensor_shapes
from engine.model.declarations import Declaration, Workload, matmul_flops
from engine.model.layer_specs import WeightSpecs, column_linear, row_linear
from engine.model.layers import Build, ColumnLinear, RowLinear
from engine.ops.linear import RecomputeRecipe
from engine.pipeline.actions import Action, Op, Plan
from engine.pipeline.schedules import SCHEDULES, Schedule, looped
from engine.planner.flops import flops_per_token
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import assemble, config, gradients_of, layout_of, max_relative_error, random_batches
from tests.support.harness import run_ranks

# -- the op: one function ----------------------------------------------------------------------------------------------


class SquaredRelu(torch.autograd.Function):
    """relu(x)^2; saves its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp_min(0).square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0].clamp_min(0) * grad


# -- a mixer and a feed-forward: a declaration and a module, and an entry each -----------------------------------------


def toy_specs(layer: LayerConfig, tensor: int, name: str) -> tuple[WeightSpecs, WeightSpecs]:
    """Into and out of an inner width of ffn_size."""
    cfg = layer.model
    into = Chunk(f"{name}.into.weight", (cfg.ffn_size, cfg.hidden_size), (Cut(0, tensor),))
    out = row_linear(f"{name}.out.weight", (cfg.hidden_size, cfg.ffn_size), cfg.init_std, tensor, bias=True)
    return column_linear((into,), cfg.init_std, bias=True), out


def declare_toy(layer: LayerConfig, work: Workload, name: str) -> Declaration:
    into, out = toy_specs(layer, work.tensor, name)
    inner = work.tokens * layer.model.ffn_size // work.tensor * work.element_bytes
    saved = {"none": work.matmul_input(layer.model) + 2 * inner, "selective": inner}
    return Declaration((*into, *out), matmul_flops((*into, *out)), saved)


class RunningMean(nn.Module):
    """A mixer without attention: every token gets the mean of what it and the tokens before it project to."""

    def __init__(self, layer: LayerConfig, build: Build, name: str):
        super().__init__()
        into, out = toy_specs(layer, build.tensor, name)
        self.into, self.out = ColumnLinear(into, build), RowLinear(out, build)

    def forward(self, x: Tensor, rope_table: Tensor, sequence: Any, recipe: RecomputeRecipe | None = None) -> Tensor:
        total = self.into(x, recipe).cumsum(0)
        return self.out(total / torch.arange(1, len(total) + 1)[:, None, None])


class SquaredMLP(nn.Module):
    """A feed-forward with squared ReLU (Primer)."""

    def __init__(self, layer: LayerConfig, build: Build, name: str):
        super().__init__()
        into, out = toy_specs(layer, build.tensor, name)
        self.into, self.out = ColumnLinear(into, build), RowLinear(out, build)

    def forward(self, x: Tensor, sequence: Any, recipe: RecomputeRecipe | None = None) -> Tensor:
        fused = self.into(x, recipe)
        return self.out(SquaredRelu.apply(fused), RecomputeRecipe(SquaredRelu.apply, (fused,)) if recipe else None)


# -- a model type: its layers, and an entry ----------------------------------------------------------------------------


def toy_layer(cfg: ModelConfig, index: int) -> LayerConfig:
    """Attention and MLP, and the toys in every second layer."""
    layer = cfg.layer(index)
    return replace(layer, mixer="running_mean", feed_forward="squared") if index % 2 else layer


# -- a schedule: one function, and an entry ----------------------------------------------------------------------------


def one_at_a_time(ranks: int, chunks: int, microbatches: int) -> Plan:
    """Forward and backward of each micro-batch before the next begins."""
    programs = tuple(
        tuple((Action(op, rank, m),) for m in range(microbatches) for op in (Op.F, Op.B)) for rank in range(ranks)
    )
    return Plan("one-at-a-time", microbatches, looped(ranks, chunks), programs)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registers all of the above."""
    here = "tests.house.test_touch_counts"
    monkeypatch.setitem(MIXERS, "running_mean", SublayerType(declare_toy, f"{here}:RunningMean"))
    monkeypatch.setitem(FEED_FORWARDS, "squared", SublayerType(declare_toy, f"{here}:SquaredMLP"))
    monkeypatch.setitem(MODELS, "toy", replace(MODELS["decoder"], layer=toy_layer))
    monkeypatch.setitem(SCHEDULES, "one-at-a-time", Schedule(one_at_a_time, looped, 1))
    yield


def first_steps(world: int, **options: Any) -> tuple[list[float], dict[str, Any]]:
    """Losses of two steps, and the gradients of the first."""
    cfg = config(world, model_num_layers=4, **options)

    def job(ctx: ParallelContext) -> tuple[list[float], list[Any]]:
        state = setup(cfg, ctx)
        losses = [train_step(state, random_batches(cfg, ctx, 0)).loss]
        grads = gradients_of(state)
        return [*losses, train_step(state, random_batches(cfg, ctx, 1)).loss], grads

    ranks = run_ranks(layout_of(cfg), job)
    return ranks[0][0], assemble([grads for _, grads in ranks])


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_a_model_type_a_mixer_a_feed_forward_and_an_op(recompute: str) -> None:
    """Each is one file and one entry (the op: one function). Tensor 2 x pipeline 2 equals one process."""
    losses, grads = first_steps(1, model_type="toy")
    layout = {"parallel_tensor": 2, "parallel_pipeline": 2, "train_recompute": recompute}
    sharded_losses, sharded_grads = first_steps(4, model_type="toy", **layout)
    assert sharded_losses == pytest.approx(losses, rel=1e-11)
    assert max_relative_error(sharded_grads, grads) < 1e-11
    names = {name.removeprefix("grad/") for name in grads}
    assert {"layers.1.attention.into.weight", "layers.3.mlp.out.bias", "layers.2.attention.q.weight"} <= names
    assert "layers.1.attention.q.weight" not in names and "layers.0.mlp.into.weight" not in names


@pytest.mark.usefixtures("toys")
def test_the_planner_knows_a_new_model_type() -> None:
    toy, decoder = (config(1, model_type=name).model for name in ("toy", "decoder"))
    h, f, d = toy.hidden_size, toy.ffn_size, toy.head_dim
    attention, mlp = h * d * (2 * toy.num_heads + 2 * toy.num_kv_heads), 3 * h * f
    difference = 2 * (4 * h * f + 2 * (f + h) - attention - mlp)  # two layers with the toys
    assert num_parameters(toy) - num_parameters(decoder) == difference
    of_scores = 12 * 16 * toy.num_heads * d // 2
    assert flops_per_token(decoder, 16) - flops_per_token(toy, 16) == 2 * (
        6 * (attention + mlp - 4 * h * f) + of_scores
    )


@pytest.mark.usefixtures("toys")
def test_a_schedule_is_one_function_and_one_entry() -> None:
    losses, grads = first_steps(1)
    other_losses, other_grads = first_steps(2, parallel_pipeline=2, parallel_schedule="one-at-a-time")
    assert other_losses == pytest.approx(losses, rel=1e-11) and max_relative_error(other_grads, grads) < 1e-11


def test_a_family_is_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family with sandwich norms, which none of the engine's has: config.json and the places of all tensors."""
    llama = FAMILIES["llama"]
    block = "model.layers.{}"
    norms = {
        "layers.{}.attention_post_norm": f"{block}.post_attention_layernorm",
        "layers.{}.mlp_norm": f"{block}.pre_feedforward_layernorm",
        "layers.{}.mlp_post_norm": f"{block}.post_feedforward_layernorm",
    }
    fields = {"norm_position": "sandwich"}
    family = replace(
        llama, architecture="ToyForCausalLM", model_type="toy", names={**llama.names, **norms}, model_fields=fields
    )
    monkeypatch.setitem(FAMILIES, "toy", family)
    cfg = config(1, model_norm_position="sandwich").model
    found, written = write_config(cfg.model_dump(exclude={"preset"}), ModelConfig().model_dump(exclude={"preset"}))
    assert found is family and written["model_type"] == "toy"
    slices, shapes = locate_tensors(cfg, family)
    assert slices.keys() == tensor_shapes(cfg).keys()
    assert shapes["model.layers.3.post_feedforward_layernorm.weight"] == (cfg.hidden_size,)
