"""Declarations compared with modules: parameters, local shapes, and the bytes that autograd really saves."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch

from engine.batch import Documents, Sequence
from engine.config.derived import derive
from engine.config.load import load
from engine.config.presets import PRESETS
from engine.distributed.context import ParallelContext, make_context
from engine.distributed.layout import Layout
from engine.model import transformer
from engine.model.build import declare, num_parameters, stage_shapes, tensor_shapes
from engine.model.declarations import Workload
from engine.model.layers import Build
from engine.model.stages import build_part, build_stages
from engine.ops import native
from engine.ops.rope import rope_at
from engine.pipeline.executor import connect
from engine.planner.memory import rank_states, saved_bytes
from engine.train.state import setup
from tests.support.cases import config, layout_of, micro_batch
from tests.support.harness import run_ranks
from tests.support.model_shapes import SHAPES

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "t4": {"parallel_tensor": 4},
    "t4-replicated": {"parallel_tensor": 4, "parallel_sequence": False},
    "p2": {"parallel_pipeline": 2},
    "p2-v": {"parallel_pipeline": 2, "parallel_schedule": "zb-v"},
    "t2-uneven": {"parallel_tensor": 2, "parallel_pipeline": 2, "parallel_layers": "3,1"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_modules_have_the_declared_parameters(shape: str, layout: str) -> None:
    """Each stage on each rank: the same specs in the same order, and modules of the declared local shapes."""
    options = LAYOUTS[layout]
    world = options.get("parallel_tensor", 1) * options.get("parallel_pipeline", 1)
    cfg = config(world, **SHAPES[shape], **options)
    derived = derive(cfg)
    declared = declare(cfg.model, Workload(derived.layout.tensor))
    shapes = stage_shapes(derived.layers)
    for rank in range(world):
        ctx = make_context(derived.layout, rank, dtype=torch.float64, device="meta")
        held = 0
        for number, part, params in build_stages(cfg, ctx, derived):
            specs = [spec for piece in shapes[number].parts(declared) for spec in piece.specs]
            missing = [spec for spec in specs if spec not in [p.spec for p in params]]
            assert [p.spec for p in params] == list(dict.fromkeys(spec for spec in specs if spec not in missing))
            assert all("tied_stages" in spec.chunks[0].sum_over for spec in missing)
            assert all(tuple(p.shape) == p.spec.local_shape() for p in params)
            assert {id(p) for p in params} <= {id(p) for p in part.parameters()}
            held += sum(p.numel() for p in params)
        expected = rank_states(cfg, derived)[ctx.pipeline.rank].specs
        assert held == sum(math.prod(spec.local_shape()) for spec in expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_declared_tensors(preset: str) -> None:
    cfg = load([], {"model.preset": preset}).config.model
    ctx = make_context(Layout(), 0, dtype=torch.float32, device="meta")
    part = build_part(cfg, Build(ctx), stage_shapes([cfg.num_layers])[0])
    found = {piece.name: piece.global_shape for p in part.parameters() for piece in p.spec.pieces(ctx)}  # type: ignore
    assert list(found.items()) == list(tensor_shapes(cfg).items())
    assert num_parameters(cfg) == sum(math.prod(shape) for shape in found.values())


# -- saved activations -------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "model_hidden_size": 64,
    "model_num_heads": 8,
    "model_num_kv_heads": 4,
    "model_ffn_size": 96,
    "model_num_layers": 4,
    "model_vocab_size": 64,
    "train_seq_len": 64,
}
SAVED: dict[str, dict[str, Any]] = {
    "plain": {},
    "micro-batch of 2": {"train_micro_batch_size": 2},
    "sequence": {"parallel_tensor": 2},
    "sequence, layernorm": {"parallel_tensor": 2, "model_norm": "layernorm", "train_micro_batch_size": 2},
    "gathered": {"parallel_tensor": 2, "parallel_keep_gathered": True},
    "replicated": {"parallel_tensor": 2, "parallel_sequence": False},
    "plain MLP": {"model_gated_mlp": False, "model_activation": "gelu", "model_mlp_bias": True},
    "learned": {"model_positions": "learned"},
    "qk_norm": {"model_qk_norm": True, "train_micro_batch_size": 2},
    "qk_norm over projections": {"model_qk_norm": True, "model_qk_norm_span": "projection"},
    "mha": {"model_num_kv_heads": 8},
    **{
        f"{position}{' parallel' * parallel}{' gathered' * gathered}": {
            "model_norm_position": position,
            "model_parallel_residual": parallel,
            **({"parallel_tensor": 2, "parallel_keep_gathered": True} if gathered else {}),
        }
        for position in ("pre", "post", "sandwich")
        for parallel in (False, True)
        for gathered in (False, True)
    },
    "attention dropout": {"train_attention_dropout": 0.5, "train_micro_batch_size": 2},
    "attention dropout, bfloat16": {"train_attention_dropout": 0.5, "train_precision": "bf16"},
    "attention dropout, float32": {"train_attention_dropout": 0.5, "train_precision": "fp32"},
    "window": {"model_window": 8, "model_window_layers": "wf", "train_micro_batch_size": 2},
    "documents": {"data_separate_documents": True, "train_micro_batch_size": 2},
    "window, float32": {"model_window": 8, "train_precision": "fp32"},
    "stages": {"parallel_pipeline": 2, "parallel_layers": "3,1"},
    "float32": {"train_precision": "fp32", "model_num_kv_heads": 2},
    "bfloat16": {"train_precision": "bf16", "train_attention": "sdpa", "train_micro_batch_size": 2},
}
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"train_recompute": "selective"},
    "full": {"train_recompute": "full"},
    "some": {"train_recompute": "full", "train_recompute_layers": 1},
}


def measured(cfg: Any) -> list[int]:
    """For each pipeline stage, the bytes of the storages that autograd saves, and of the output that it keeps."""

    def job(ctx: ParallelContext) -> dict[int, int]:
        state = setup(cfg, ctx)
        ((number, stage),) = state.stages.items()
        constants = {p.untyped_storage().data_ptr() for p in state.params}
        b, s = cfg.train.micro_batch_size, cfg.train.seq_len
        tokens = torch.zeros(b, s, dtype=torch.int64)
        documents = Documents.from_starts(torch.zeros(b, s, dtype=torch.int64)) if cfg.data.separate_documents else None
        batch = micro_batch(tokens, tokens, sequence=Sequence.of_rows(s, documents)).drawing(1, 1)
        width = s // ctx.sequence.size
        connect(state.plan, state.stages, ctx, [batch])
        x = None if number == 0 else torch.zeros(width, b, cfg.model.hidden_size, dtype=ctx.dtype)
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(saved: torch.Tensor) -> torch.Tensor:
            storage = saved.untyped_storage()
            if storage.data_ptr() not in constants:
                storages[storage.data_ptr()] = storage  # keep it alive, so that no address is reused
            return saved

        def recorded(*arguments: torch.Tensor) -> torch.Tensor:
            return pack(rope_at(*arguments))  # held by RoPE for its backward, but not as a saved tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved)
        with hooks, patch.object(transformer, "rope_at", recorded):
            out = stage.forward(0, () if x is None else (x,), batch)
        for kept in (tensor.untyped_storage() for tensor in out.tensors):
            storages[kept.data_ptr()] = kept
        return {number: sum(storage.nbytes() for storage in storages.values())}

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(cfg.train.precision, torch.float64)
    found = run_ranks(layout_of(cfg), job, dtype=dtype)
    by_stage = {number: size for rank in found for number, size in rank.items()}
    return [by_stage[number] for number in sorted(by_stage)]


@pytest.mark.skipif(native.load()[0] is None, reason="without kernels q and k share a storage, which is kept for both")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", SAVED)
def test_declared_activations_are_those_that_autograd_saves(case: str, mode: str) -> None:
    options = {**SIZES, **SAVED[case], **MODES[mode]}
    if options.get("parallel_keep_gathered") and mode == "selective":
        pytest.skip("keep_gathered has no effect with selective recomputation: a config error")
    world = options.get("parallel_tensor", 1) * options.get("parallel_pipeline", 1)
    cfg = config(world, **options)
    derived = derive(cfg)
    declared, found = saved_bytes(cfg, derived, derived.phases.at(1)), measured(cfg)
    assert declared == pytest.approx(found, rel=0.02), [a - b for a, b in zip(declared, found)]
