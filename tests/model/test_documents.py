"""Document masking: packed documents give the same losses and gradients as separate sequences, in any layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.batch import Documents, MicroBatch, Rows, Sequence, micro_batches
from engine.config.derived import derive
from engine.config.schema import Config
from engine.data.samples.corpora import open_training
from engine.data.samples.indexed import IndexedDataset
from engine.data.samples.indexed_writer import IndexedWriter
from engine.data.samples.loader import Loader
from engine.data.samples.transforms import SeparateDocuments
from engine.distributed.context import ParallelContext, make_context
from engine.model.stages import build_stages
from engine.train.evaluate import Evaluator
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import assemble, config, gradients_of, layout_of, max_relative_error, micro_batch
from tests.support.harness import run_ranks
from tests.support.shares import share_of

S, EOD = 16, 60
LENGTHS = [[5, 11], [16], [1, 1, 14], [7, 8, 1]]  # of the documents of each row, each with its EOD token


def rows() -> torch.Tensor:
    """int64 [4, S + 1]; EOD occurs only at the end of documents."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, EOD, (len(LENGTHS), S + 1), generator=generator)
    for row, lengths in zip(tokens, LENGTHS):
        row[torch.tensor(lengths).cumsum(0) - 1] = EOD
    return tokens


def packed_batches(cfg: Config, ctx: ParallelContext) -> list[MicroBatch]:
    """The rows as packed sequences with document boundaries; the loss mask excludes labels in the next document."""
    local = len(LENGTHS) // ctx.data.size
    tokens = rows()[ctx.data.rank * local : (ctx.data.rank + 1) * local]
    numbers = torch.arange(local)
    whole = Rows(tokens, (tokens[:, :-1] != EOD).double(), numbers, torch.zeros_like(numbers))
    masking = SeparateDocuments(EOD, restart=cfg.model.positions == "learned")
    return micro_batches(whole, cfg.train.micro_batch_size, [masking])


def separate_batches(cfg: Config, ctx: ParallelContext) -> list[MicroBatch]:
    """Every document in a separate row, padded with tokens outside the loss mask."""
    batches = []
    for row, lengths in zip(rows(), LENGTHS):
        begin = 0
        for length in lengths:
            tokens = torch.full((1, S + 1), 3)
            tokens[0, :length] = row[begin : begin + length]
            mask = (torch.arange(S) < length - 1)[None]
            batches.append(micro_batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask))
            begin += length
    return batches


def result(cfg: Config, batches: Any) -> tuple[float, dict[str, Any]]:
    def job(ctx: ParallelContext) -> Any:
        state = setup(cfg, ctx)
        found = train_step(state, batches(cfg, ctx))
        return found.loss, gradients_of(state)

    ranks = run_ranks(layout_of(cfg), job)
    return ranks[0][0], assemble([r[1] for r in ranks])


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"parallel_tensor": 2, "train_micro_batch_size": 2, "train_recompute": "selective"},
        {"parallel_pipeline": 2, "train_recompute": "full", "parallel_schedule": "zb-h1"},
        {"parallel_tensor": 2, "parallel_data": 2, "train_micro_batch_size": 2, "model_qk_norm": True},
        {"model_positions": "learned"},
        {"parallel_tensor": 2, "train_micro_batch_size": 2, "model_positions": "learned"},
        {"parallel_pipeline": 2, "parallel_tensor": 2, "parallel_sequence": False, "model_positions": "learned"},
    ],
    ids=str,
)
def test_packed_documents_train_like_separate_rows(layout: dict[str, Any]) -> None:
    world = layout.get("parallel_tensor", 1) * layout.get("parallel_pipeline", 1) * layout.get("parallel_data", 1)
    model = {name: value for name, value in layout.items() if name.startswith("model")}
    count = sum(map(len, LENGTHS))
    alone, grads_alone = result(config(1, train_global_batch_size=count, **model), separate_batches)
    loss, grads = result(config(world, **layout), packed_batches)
    assert loss == pytest.approx(alone, rel=1e-12)
    assert max_relative_error(grads, grads_alone) < 1e-11


def test_without_masking_tokens_attend_across_documents() -> None:
    """The check above can fail."""

    def crossing(cfg: Config, ctx: ParallelContext) -> list[MicroBatch]:
        return [replace(b, sequence=Sequence.of_rows(S)) for b in packed_batches(cfg, ctx)]

    loss, _ = result(config(1), crossing)
    assert abs(loss / result(config(1), packed_batches)[0] - 1) > 1e-6


def test_loader_and_validation_mask_documents(tmp_path: Path) -> None:
    """data.separate_documents reaches both; the score equals that of the same rows with boundaries set by hand."""
    with IndexedWriter(tmp_path / "packed", vocab_size=61) as writer:
        for row, lengths in zip(rows(), LENGTHS):
            for part in row[:S].split(lengths):
                writer.add(part.numpy())
        writer.finish({"eod": EOD})
    cfg = config(1, data_train=str(tmp_path / "packed"), data_separate_documents=True)
    data = open_training(cfg, None)
    assert data.transforms == (SeparateDocuments(EOD),) and data.metadata["separate_documents"] == EOD
    sizes = {"global_batch_size": 2, "micro_batch_size": 2, "data_rank": 0, "data_size": 1}
    with Loader(share_of(data.order, **sizes, transforms=data.transforms)) as loader:
        (batch,) = next(loader)
    assert batch.sequence.documents is not None
    assert torch.equal(batch.sequence.documents.starts, Documents.from_eod(batch.tokens, EOD).starts)

    def job(ctx: ParallelContext) -> tuple[float, float]:
        state = setup(cfg, ctx)
        dataset = IndexedDataset(tmp_path / "packed")
        score = Evaluator(state.plan, state.stages, ctx, dataset, cfg, data.metadata).run(0)
        count = data.order.samples_per_epoch
        whole, tail = data.order.gather(np.arange(count)), data.order.gather_tail()[None]
        assert tail.shape == (1, data.order.tail + 1) and data.order.tail > 0
        (stage,) = state.stages.values()
        total, number = 0.0, 0
        for part in (torch.from_numpy(whole), torch.from_numpy(tail)):
            tokens, labels = part[:, :-1].contiguous(), part[:, 1:].contiguous()
            with torch.no_grad():
                sequence = Sequence.of_rows(tokens.shape[1], Documents.from_eod(tokens, EOD))
                losses = stage.part((), micro_batch(tokens, labels, sequence=sequence)).losses
            total, number = total + float(losses.sum()), number + tokens.numel()
        return score.loss, total / number

    ((score, by_hand),) = run_ranks(layout_of(cfg), job)
    assert score == pytest.approx(by_hand, rel=1e-12)


def test_rope_reads_the_positions_of_the_sequence() -> None:
    """With document masking, positions that restart change no score; without it they do, in each sample by itself."""
    cfg = config(1, model_num_layers=1)
    tokens = rows()[:, :-1]
    documents = Documents.from_eod(tokens, EOD)
    restarted = torch.arange(S) - documents.starts

    def job(ctx: ParallelContext) -> list[torch.Tensor]:
        (stage,) = setup(cfg, ctx).stages.values()
        found = []
        for boundaries in (documents, None):
            for positions in (torch.arange(S)[None], restarted):
                with torch.no_grad():
                    batch = micro_batch(tokens, tokens, sequence=Sequence(positions, boundaries))
                    losses = stage.part((), batch).losses
                found.append(losses)
        return found

    ((masked, masked_again, whole, whole_again),) = run_ranks(layout_of(cfg), job)
    assert torch.allclose(masked, masked_again, rtol=1e-12)
    apart = (whole - whole_again).abs() > 1e-6
    assert apart.tolist() == [len(lengths) > 1 for lengths in LENGTHS]


def test_a_stage_keeps_the_windows_of_its_layers() -> None:
    """The pattern of windows counts layers of the whole model, not of a stage."""
    cfg = config(2, parallel_pipeline=2, model_num_layers=4, model_window=5, model_window_layers="wff")
    windows = {}
    for rank in range(2):
        ctx = make_context(layout_of(cfg), rank, dtype=torch.float64, device="meta")
        for _, model, _ in build_stages(cfg, ctx, derive(cfg)):
            windows |= {name: block.attention.sublayer.window for name, block in model.layers.items()}
    assert windows == {"0": 5, "1": 0, "2": 0, "3": 5}


def test_documents_start_after_an_eod() -> None:
    tokens = torch.tensor([[1, EOD, 2, 3, EOD, EOD, 4], [5, 5, 5, 5, 5, 5, 5]])
    documents = Documents.from_eod(tokens, EOD)
    assert documents.starts.tolist() == [[0, 0, 2, 2, 2, 5, 6], [0] * 7]
    assert documents.cu_seqlens.tolist() == [0, 2, 5, 6, 7, 14] and documents.cu_seqlens.dtype == torch.int32
    found = Rows.from_tokens(torch.cat((tokens, tokens[:, :1]), 1), *[torch.arange(2)] * 2)
    for restart, expected in ((True, [[0, 1, 0, 1, 2, 0, 0], list(range(7))]), (False, [list(range(7))])):
        (batch,) = micro_batches(found, 2, [SeparateDocuments(EOD, restart)])
        assert batch.sequence.positions.tolist() == expected
    seen = batch.sequence.mask(7, 7)[0, 0].long()
    assert seen.sum(1).tolist() == [1, 2, 1, 2, 3, 1, 1]
    assert torch.equal(seen, seen.tril()) and seen[4].tolist() == [0, 0, 1, 1, 1, 0, 0]
