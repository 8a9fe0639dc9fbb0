"""Dropout of a whole model: which activations are dropped, by which masks, and when none is.

That masks do not depend on the layout, and that recomputation and resuming draw them again, is in tests/proofs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.batch import MicroBatch
from engine.data.samples.indexed import IndexedDataset
from engine.data.samples.indexed_writer import IndexedWriter
from engine.distributed.context import make_context
from engine.distributed.layout import Layout
from engine.model.transformer import Transformer
from engine.ops.draws import Key, Places, keep
from engine.train.evaluate import Evaluator
from engine.train.state import TrainState, setup
from engine.train.step import train_step
from tests.support.cases import config, random_batches
from tests.support.plain_model import plain_loss
from tests.support.runs import TINY

P = 0.3


def new_state(**options: Any) -> TrainState:
    cfg = config(1, **TINY | options)
    return setup(cfg, make_context(Layout(), 0, dtype=torch.float64))


def weights_of(state: TrainState) -> dict[str, Tensor]:
    """Canonical name -> a copy of the tensor; of one process, so a piece is a whole tensor."""
    found = {}
    for p in state.params:
        for piece in p.spec.pieces(state.ctx):
            found[piece.name] = p.detach().view(-1)[piece.begin : piece.end].view(piece.shape).clone()
    return found


def masked(x: Tensor, key: Key, samples: Tensor) -> Tensor:
    """x [s, b, f] with the elements of whole samples dropped, each drawn as a tensor [position, feature]."""
    s, _, f = x.shape
    masks = [keep(key, Places(torch.tensor([int(n) * s * f]), s * f), P).view(s, f) for n in samples]
    return x * torch.stack(masks, 1) / (1 - P)


@pytest.mark.parametrize("form", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("parallel", [False, True])
def test_dropout_equals_plain_torch(form: str, parallel: bool) -> None:
    """Embeddings, inner activations and the outputs of both branches; the masks of two steps."""
    options = {"model_norm_position": form, "model_parallel_residual": parallel, "train_dropout": P}
    state = new_state(**options)
    cfg, places = state.cfg, set()

    def drop(name: str, x: Tensor, batch: MicroBatch, step: int) -> Tensor:
        places.add(name)
        return masked(x, Key.of(cfg.train.seed, "dropout", step, name), batch.samples)

    for step in (1, 2):
        batches, weights = random_batches(cfg, state.ctx, step - 1), weights_of(state)
        total = sum(float(plain_loss(cfg.model, weights, b, None, partial(drop, batch=b, step=step))) for b in batches)
        tokens = sum(int(b.weights.sum()) for b in batches)
        assert train_step(state, batches).loss == pytest.approx(total / tokens, rel=1e-12)
    assert len(places) == 1 + 3 * cfg.model.num_layers


def forward(state: TrainState, step: int = 0) -> Tensor:
    """The losses of one batch; step 0: without draws."""
    batch = random_batches(state.cfg, state.ctx, 0)[3]  # all of its labels count
    batch = batch.drawing(state.cfg.train.seed, step) if step else batch
    losses = state.stages[0].part((), batch).losses
    assert losses is not None
    return losses


def test_nothing_is_dropped_without_draws() -> None:
    """Validation and generation: the same values as a model without dropout, in all bits."""
    plain, dropped = new_state(), new_state(train_dropout=P)
    assert torch.equal(forward(plain), forward(dropped)) and torch.equal(forward(plain), forward(plain, step=1))
    values = [forward(dropped, step).item() for step in range(4)]
    assert len(set(values)) == 4 and forward(dropped, 2).item() == values[2]
    models = [state.stages[0].part for state in (plain, dropped)]
    tokens = torch.arange(8)[None]
    a, b = (model.logits(tokens) for model in models if isinstance(model, Transformer))
    assert torch.equal(a, b)


def test_validation_drops_nothing(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "noise", vocab_size=61) as writer:
        writer.add(np.arange(60))
        writer.finish({})
    scores = []
    for p in (0.0, P):
        state = new_state(train_dropout=p, train_attention_dropout=p)
        dataset = IndexedDataset(tmp_path / "noise")
        scores.append(Evaluator(state.plan, state.stages, state.ctx, dataset, state.cfg, {}).run(0))
    assert scores[0] == scores[1]


def saved_bytes(**options: Any) -> int:
    """Bytes that one forward saves for its backward, each tensor once."""
    state, kept = new_state(model_hidden_size=64, model_ffn_size=96, **options), dict[int, Tensor]()

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = forward(state, step=1)
    assert loss.requires_grad
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_no_mask_is_saved(recompute: str) -> None:
    """With dropout only places are saved, 8 bytes a token: for the embedding, the hidden and the inner width."""
    more = saved_bytes(train_recompute=recompute, train_dropout=P) - saved_bytes(train_recompute=recompute)
    assert more <= 3 * 8 * TINY["train_seq_len"]
