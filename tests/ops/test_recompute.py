"""Activation recomputation: the bytes that a micro-batch saves for backward, counted tensor by tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.distributed.context import ParallelContext
from engine.model.transformer import Block
from engine.pipeline.executor import connect
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import config, layout_of, micro_batch, random_batches
from tests.support.harness import run_ranks

S, B, H, F, LAYERS = 32, 2, 64, 192, 4
SIZES: dict[str, Any] = {
    "model_hidden_size": H,
    "model_num_heads": 4,
    "model_num_kv_heads": 4,
    "model_ffn_size": F,
    "model_num_layers": LAYERS,
    "model_vocab_size": 64,
    "train_seq_len": S,
    "train_micro_batch_size": B,
    "train_global_batch_size": B,
}


def saved_bytes(tensor: int = 1, **change: Any) -> int:
    """Bytes of all distinct storages that autograd saves for one micro-batch, without weights and loss."""
    cfg = config(tensor, parallel_tensor=tensor, **SIZES, **change)

    def job(ctx: ParallelContext) -> int:
        state = setup(cfg, ctx)
        (stage,) = state.stages.values()
        weights = {p.untyped_storage().data_ptr() for p in state.params}
        tokens = torch.zeros(B, S, dtype=torch.int64)
        batch = micro_batch(tokens, tokens)
        connect(state.plan, state.stages, ctx, [batch])
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if x.is_floating_point() and storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage  # keep it alive, so that no address is reused
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            stage.forward(0, (), batch)
        return sum(storage.nbytes() for storage in storages.values())

    return run_ranks(layout_of(cfg), job)[0]


def test_each_recompute_mode_saves_less() -> None:
    none, selective, full = (saved_bytes(train_recompute=mode) for mode in ("none", "selective", "full"))
    activation = S * B * H * 8
    assert full < selective < none
    # full recomputation saves only the input of each block
    head = saved_bytes(train_recompute="full") - LAYERS * activation
    assert none - full > 0.85 * (none - head)
    # selective does not save both normalised inputs, the gated MLP activation and the output of the attention core; it
    # saves q|k|v as projected instead of rotated
    gated = S * B * F * 8
    assert none - selective >= LAYERS * (2 * activation + gated + activation)


def test_layers_are_counted() -> None:
    saved = [saved_bytes(train_recompute="full", train_recompute_layers=n) for n in range(1, LAYERS + 1)]
    assert saved[-1] == saved_bytes(train_recompute="full")
    steps = [a - b for a, b in zip([saved_bytes(), *saved], saved)]
    assert min(steps) > 0.98 * max(steps)  # the first one still saves the RoPE table


@pytest.mark.parametrize("mode", ["none", "full"])
def test_sequence_parallelism_divides_saved_activations(mode: str) -> None:
    whole, cut = (saved_bytes(2, parallel_sequence=cut, train_recompute=mode) for cut in (False, True))
    gathered = saved_bytes(2, train_recompute=mode, parallel_keep_gathered=True)
    half = S // 2 * B * H * 8
    per_block = {"none": 4, "full": 1}[mode]  # both residuals and both normalised inputs; the input of the block
    assert whole - cut >= LAYERS * per_block * half
    assert gathered - cut == {"none": 2 * LAYERS * half, "full": 0}[mode]


def test_split_backwards_recompute_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a split backward (I and W), a block is computed twice, in F and in I, and not again for W."""
    change = {"parallel_schedule": "zb-h1", "parallel_pipeline": 2, "train_micro_batch_size": 1}
    cfg = config(2, **{**SIZES, **change}, train_recompute="full")
    calls = []
    compute = Block._compute
    monkeypatch.setattr(Block, "_compute", lambda self, *args, **kw: calls.append(1) or compute(self, *args, **kw))

    def job(ctx: ParallelContext) -> int:
        train_step(setup(cfg, ctx), random_batches(cfg, ctx, 0))
        return len(calls)

    blocks = B * LAYERS // 2  # microbatches times blocks of a stage
    assert run_ranks(layout_of(cfg), job) == [2 * blocks, 2 * blocks]
