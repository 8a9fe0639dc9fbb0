"""Resharding: equal states and next losses for all pairs of eight layouts; no rank holds the whole model."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.checkpoint.format import MANIFEST, read_manifest, step_dir
from engine.checkpoint.load import Reader, load_into
from engine.config.schema import Config
from engine.distributed.context import ParallelContext
from engine.train.resume import resume, save_state
from engine.train.state import TrainState, setup
from engine.train.step import train_step
from tests.support.cases import assemble, config, layout_of, random_batches, same_bytes, shard_pieces
from tests.support.harness import run_ranks

METADATA: dict[str, Any] = {"prefix": "x", "num_documents": 1, "num_tokens": 1, "tokenizer_digest": None}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tensor 4": (4, {"parallel_tensor": 4}),
    "pipeline 4": (4, {"parallel_pipeline": 4}),
    "data 4, ZeRO-1": (4, {"parallel_data": 4, "parallel_zero": 1}),
    "data 2": (2, {"parallel_data": 2, "parallel_zero": 0}),
    "tensor 2, data 2, ZeRO-1": (4, {"parallel_tensor": 2, "parallel_data": 2, "parallel_zero": 1}),
    "tensor 2, pipeline 2": (4, {"parallel_tensor": 2, "parallel_pipeline": 2, "parallel_sequence": False}),
    "pipeline 2 in chunks, data 2": (
        4,
        {
            "parallel_pipeline": 2,
            "parallel_data": 2,
            "parallel_schedule": "interleaved",
            "parallel_chunks": 2,
            "parallel_zero": 1,
        },
    ),
}
QUICK = ["tensor 2, data 2, ZeRO-1", "pipeline 2 in chunks, data 2"]
STEP, NEXT = 2, 2


def cfg_of(name: str, **overrides: Any) -> Config:
    world, degrees = LAYOUTS[name]
    return config(world, train_global_batch_size=8, model_tie_embeddings=True, **degrees, **overrides)


def snapshot(state: TrainState) -> tuple[list[Any], tuple[Any, ...]]:
    """All tensors of the state that this rank holds, and its positions."""
    numbers = (state.step, state.position.samples, state.position.tokens, state.optimizer.steps)
    return shard_pieces(state.optimizer.states(), state.ctx), (*numbers, state.scale.value, state.scale.good_steps)


def steps(state: TrainState, ctx: ParallelContext, count: int) -> list[float]:
    return [train_step(state, random_batches(state.cfg, ctx, state.step)).loss for _ in range(count)]


Outcome = tuple[dict[str, np.ndarray], tuple[Any, ...], list[float]]


def outcome(ranks: list[Any]) -> Outcome:
    """(canonical tensors, positions, next losses) of what all ranks returned."""
    assert all(r[1:] == ranks[0][1:] for r in ranks)
    return assemble([r[0] for r in ranks]), *ranks[0][1:]


def pairs(tmp_path: Path, names: list[str], dtype: torch.dtype, **overrides: Any) -> int:
    """Save in each layout, load in each; returns how many pairs were compared."""

    def saves(name: str) -> Outcome:
        def job(ctx: ParallelContext) -> Any:
            state = setup(cfg_of(name, **overrides), ctx)
            steps(state, ctx, STEP)
            save_state(state, tmp_path / name, METADATA)
            return *snapshot(state), steps(state, ctx, NEXT)

        return outcome(run_ranks(layout_of(cfg_of(name)), job, dtype=dtype))

    def loads(name: str) -> list[Outcome]:
        def job(ctx: ParallelContext) -> list[Any]:
            results = []
            for source in names:
                state = setup(cfg_of(name, train_seed=1234, **overrides), ctx)
                resume(state, step_dir(tmp_path / source, STEP), METADATA)
                before = snapshot(state)
                if source == name:
                    save_state(state, tmp_path / f"{name} again", METADATA)
                results.append((*before, steps(state, ctx, NEXT)))
            return results

        ranks = run_ranks(layout_of(cfg_of(name)), job, dtype=dtype)
        return [outcome([rank[i] for rank in ranks]) for i in range(len(names))]

    saved, compared = {name: saves(name) for name in names}, 0
    for target in names:
        for source, (tensors, numbers, losses) in zip(names, loads(target)):
            wanted, wanted_numbers, wanted_losses = saved[source]
            assert tensors.keys() == wanted.keys() and numbers == wanted_numbers, (source, target)
            assert all(np.array_equal(tensors[k], wanted[k]) for k in wanted), (source, target)
            if dtype == torch.float64:
                assert losses == pytest.approx(wanted_losses, rel=1e-11), (source, target)
            compared += 1
        a, b = step_dir(tmp_path / target, STEP), step_dir(tmp_path / f"{target} again", STEP)
        for file in set(os.listdir(a)) - {MANIFEST}:  # a state that is loaded and saved again has identical bytes
            same_bytes(a / file, b / file)
        first, again = read_manifest(a), read_manifest(b)
        assert [parent.checkpoint for parent in again.lineage] == [str(a)] and not first.lineage
        assert again.model_copy(update={"lineage": ()}) == first, target
    return compared


def test_two_layouts_in_both_directions(tmp_path: Path) -> None:
    assert pairs(tmp_path, QUICK, torch.float64) == 4


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_all_pairs_of_eight_layouts(tmp_path: Path) -> None:
    compared = pairs(tmp_path, list(LAYOUTS), torch.float64)
    print(f"{compared} of {len(LAYOUTS) ** 2} pairs of layouts: equal states, next losses equal to 1e-11")
    assert compared == 64


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_all_pairs_in_fp16_with_masters_and_scale(tmp_path: Path) -> None:
    assert pairs(tmp_path, list(LAYOUTS), torch.float16, train_precision="fp16", train_loss_scale=2.0**30) == 64


def resident_peak() -> int:
    """Peak resident memory of this process since the last call, in bytes.

    Freed memory that the C library keeps for the engine is returned to the system first, as its reuse would not show.
    """
    ctypes.CDLL(None).malloc_trim(0)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(peak.split()[1]) * 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
def test_no_rank_ever_holds_the_whole_model(tmp_path: Path) -> None:
    """Peak resident memory while saving, and while loading in another layout."""
    model = {"model_hidden_size": 256, "model_ffn_size": 1024, "model_num_layers": 4, "model_max_seq_len": 16}
    saved, loaded = (config(4, **{f"parallel_{axis}": 4}, **model) for axis in ("tensor", "pipeline"))

    def save(ctx: ParallelContext) -> int:
        state = setup(saved, ctx)
        resident_peak()
        before = resident_peak()
        save_state(state, tmp_path, METADATA)
        return resident_peak() - before

    def load(ctx: ParallelContext) -> tuple[int, int, int]:
        state = setup(loaded, ctx)
        for shard in state.optimizer.states():
            shard.flat.fill_(0)  # make this rank's share resident before the measurement
        resident_peak()
        before = resident_peak()
        with Reader(step_dir(tmp_path, 0)) as reader:
            load_into(reader, state.optimizer.states(), ctx)
            grown = resident_peak() - before
            everything = [
                reader.read_whole(kind, name) for kind in reader.manifest.tensors for name in reader.shapes(kind)
            ]
        whole = sum(x.numel() * x.element_size() for x in everything)
        return grown, whole, resident_peak() - before

    most_saving = max(run_ranks(layout_of(saved), save))
    results = run_ranks(layout_of(loaded), load)
    grown, whole = max(r[0] for r in results), results[0][1]
    print(
        f"state of {whole / 1e6:.0f} MB: memory grows by {grown / 1e6:.1f} MB loading, {most_saving / 1e6:.1f} saving"
    )
    assert whole > 80e6 and all(r[2] > 0.9 * whole for r in results), "the measurement would see a whole model"
    assert grown < 0.15 * whole and most_saving < 0.15 * whole
