"""Validation scores and generated text: correct, and the same in every layout."""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.checks import config_errors
from engine.config.derived import derive
from engine.config.schema import Config
from engine.data.samples.indexed import IndexedDataset
from engine.data.samples.indexed_writer import IndexedWriter
from engine.data.samples.order import SampleOrder
from engine.data.samples.transforms import LossMask
from engine.data.tokenize.tokenizer import Tokenizer
from engine.distributed.context import ParallelContext, make_context
from engine.distributed.layout import Layout
from engine.distributed.sharding import initialise_, parameters
from engine.errors import ConfigError, DataError
from engine.inference.generate import sample
from engine.inference.load import config_of
from engine.model.build import StageShape
from engine.model.layers import Build
from engine.model.transformer import Transformer
from engine.train.evaluate import Evaluator, Score, evaluate
from engine.train.resume import save_state
from engine.train.run import open_run
from engine.train.state import setup
from tests.support.cases import MODEL, config, layout_of, resolve
from tests.support.errors import raises
from tests.support.harness import run_ranks

TEXT_BYTES = 5000
EVERY_LABEL: dict[str, Any] = {}  # data metadata of a run that masks nothing


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("corpus") / "noise"
    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, vocab_size=MODEL["vocab_size"]) as writer:
        lengths = [*rng.integers(1, 40, 25).tolist()]
        for length in [*lengths, 16 * 61 + 3 - sum(lengths)]:  # 61 samples of 16 tokens, and a little more
            writer.add(rng.integers(0, MODEL["vocab_size"], length))
        writer.finish({"text_bytes": TEXT_BYTES})
    return prefix


def score(corpus: Path, degrees: tuple[int, int, int], mbs: int, batches: int, metadata: Any = EVERY_LABEL) -> Score:
    tensor, pipeline, data = degrees
    cfg = config(
        tensor * pipeline * data,
        parallel_tensor=tensor,
        parallel_pipeline=pipeline,
        parallel_data=data,
        train_micro_batch_size=mbs,
    )

    def job(ctx: ParallelContext) -> Score:
        state = setup(cfg, ctx)
        return Evaluator(state.plan, state.stages, ctx, IndexedDataset(corpus), cfg, metadata).run(batches)

    scores = run_ranks(layout_of(cfg), job)
    assert all(s == scores[0] for s in scores), "all ranks report the same"
    return scores[0]


@pytest.mark.parametrize("batches", [0, 2])
def test_the_score_does_not_depend_on_the_layout(corpus: Path, batches: int) -> None:
    """The number of samples is odd: some data ranks have one sample less, and the last microbatch is not full."""
    dataset = IndexedDataset(corpus)
    samples = SampleOrder(dataset, 16, 1234).samples_per_epoch
    assert samples % 2 == 1
    one = score(corpus, (1, 1, 1), 1, batches)
    assert dataset.num_tokens - 1 > 16 * samples, "there is a tail, which belongs to the whole corpus"
    assert one.tokens == (16 * 2 * 4 if batches else dataset.num_tokens - 1)
    assert one.bpb == pytest.approx(one.loss / math.log(2) * dataset.num_tokens / TEXT_BYTES)
    assert one.ppl == pytest.approx(math.exp(one.loss))
    for degrees, mbs in [((2, 1, 1), 2), ((1, 2, 1), 4), ((1, 1, 4), 1), ((2, 2, 1), 2), ((1, 2, 2), 2)]:
        other = score(corpus, degrees, mbs, batches)
        assert other.tokens == one.tokens and other.loss == pytest.approx(one.loss, rel=1e-12)


def test_a_corpus_shorter_than_a_sample_is_scored(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "short", vocab_size=MODEL["vocab_size"]) as writer:
        for length in (3, 4, 5):
            writer.add(np.arange(length) * 7 % 61)
        writer.finish({})
    one = score(tmp_path / "short", (1, 1, 1), 1, 0)
    assert one.tokens == 11 and 3 < one.loss < 6
    for degrees, mbs in [((1, 1, 2), 2), ((2, 2, 1), 4)]:
        assert score(tmp_path / "short", degrees, mbs, 0).loss == pytest.approx(one.loss, rel=1e-12)


def masked_by_hand(cfg: Config, prefix: Path, mask: LossMask) -> tuple[float, int]:
    """(mean loss of the counted labels, their number) over a whole corpus, row by row with torch's cross-entropy."""
    ctx = make_context(Layout(), 0, dtype=torch.float64)
    model = setup(cfg, ctx).stages[0].part
    order = SampleOrder(IndexedDataset(prefix), 16, cfg.train.seed, short=True)
    losses = []
    for row in [*order.gather(np.arange(order.samples_per_epoch)).tolist(), order.gather_tail().tolist()]:
        with torch.no_grad():
            logits = model.logits(torch.tensor([row[:-1]]))[0, :, :61]  # type: ignore[attr-defined]
        for before, label, at in zip(row, row[1:], logits):
            if before not in mask.after and label not in mask.labels:
                losses.append(float(torch.nn.functional.cross_entropy(at, torch.tensor(label))))
    return sum(losses) / len(losses), len(losses)


def test_validation_counts_the_labels_that_training_counts(corpus: Path, tmp_path: Path) -> None:
    """data.mask_eod and data.mask_tokens apply to validation, in every layout, and to `engine evaluate`."""
    metadata = {"mask_eod": 5, "mask_tokens": [7, 9]}
    expected, count = masked_by_hand(config(1), corpus, LossMask(after=(5,), labels=(7, 9)))
    assert count < IndexedDataset(corpus).num_tokens - 30
    for degrees, mbs in [((1, 1, 1), 1), ((2, 1, 1), 2), ((1, 2, 2), 2)]:
        found = score(corpus, degrees, mbs, 0, metadata)
        assert found.tokens == count and found.loss == pytest.approx(expected, rel=1e-11)
        assert found.bpb == pytest.approx(expected / math.log(2) * IndexedDataset(corpus).num_tokens / TEXT_BYTES)
    cfg = config(1)
    made = run_ranks(layout_of(cfg), lambda ctx: str(save_state(setup(cfg, ctx), tmp_path, metadata)))[0]
    ctx = make_context(Layout(), 0, dtype=torch.float64)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        used = config_of(Path(made))
        evaluate(used, derive(used), ctx, Path(made), str(corpus), 0)
    assert f"loss {expected:.4f} nats/token" in out.getvalue() and f"over {count:,} tokens" in out.getvalue()
    state, nothing = setup(cfg, ctx), {"mask_tokens": list(range(61))}
    with raises(DataError, "train.nothing-to-score", corpus):
        Evaluator(state.plan, state.stages, ctx, IndexedDataset(corpus), cfg, nothing).run(1)


def test_a_run_validates_with_the_mask_it_trains_with(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "c", vocab_size=MODEL["vocab_size"]) as writer:
        for length in range(1, 40):
            writer.add(np.append(np.arange(7, 7 + length), 5))
        writer.finish({"eod": 5})
    corpus = str(tmp_path / "c")
    resolved = resolve(1, data_train=corpus, data_valid=corpus, data_mask_eod="true", run_dir=tmp_path / "run")
    ctx = make_context(Layout(), 0, dtype=torch.float64)
    with open_run(resolved, ctx) as run:
        assert run.evaluator is not None
        assert run.evaluator.transforms == run.data.transforms == (LossMask(after=(5,)),)


def test_logits_do_not_depend_on_the_layout() -> None:
    """The vocabulary shards are gathered in order, without the padding: 61 ids over two ranks."""
    tokens = torch.arange(12).view(2, 6) * 5

    def logits(tensor: int) -> list[Any]:
        cfg = config(tensor, parallel_tensor=tensor, model_num_layers=1)

        def job(ctx: ParallelContext) -> Any:
            with torch.no_grad():
                return setup(cfg, ctx).stages[0].part.logits(tokens).numpy()  # type: ignore[attr-defined]

        return run_ranks(layout_of(cfg), job)

    (one,), two = logits(1), logits(2)
    assert one.shape == (2, 6, 61)
    for rank in two:
        assert np.abs(rank - one).max() < 1e-12


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter(["naïve text, to learn from"] * 3), 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    cfg = config(1, model_vocab_size=tokenizer.vocab_size + 5, model_max_seq_len=24, train_seq_len=16).model
    ctx = make_context(Layout(), 0, dtype=torch.float64)
    made = Transformer(cfg, Build(ctx), StageShape(range(cfg.num_layers), True, True))
    initialise_(parameters(made), ctx, 0)
    return made


def draw(model: Transformer, tokenizer: Tokenizer, prompt: str = "text", **changes: Any) -> str:
    options = {"max_tokens": 10, "temperature": 1.0, "top_k": 0, "seed": 1} | changes
    return "".join(sample(model, tokenizer, prompt, **options))


def test_a_prompt_begins_with_bos_if_asked(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raises(DataError, "tokenize.no-begin-token"):
        draw(model, tokenizer, prepend_bos=True)
    monkeypatch.setattr(Tokenizer, "bos", 7)
    read: list[list[int]] = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda ids: (read.append(ids[0].tolist()), logits(ids))[1])
    for bos in (True, False):
        draw(model, tokenizer, prepend_bos=bos, max_tokens=1)
    assert read == [[7, *tokenizer.encode("text")], tokenizer.encode("text")]


def test_greedy_takes_the_likeliest_token_each_time(model: Transformer, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("text")
    start = len(ids)
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model.logits(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size].argmax()))
    expected = tokenizer.decode(ids)[len(tokenizer.decode(ids[:start])) :]
    assert draw(model, tokenizer, max_tokens=6, temperature=0.0).startswith(expected.rstrip("\ufffd"))
    assert draw(model, tokenizer, max_tokens=6, top_k=1) == draw(model, tokenizer, max_tokens=6, temperature=0.0)


def test_draws_follow_from_the_seed_and_stay_in_the_model(model: Transformer, tokenizer: Tokenizer) -> None:
    assert draw(model, tokenizer) == draw(model, tokenizer) != draw(model, tokenizer, seed=2)
    assert len(tokenizer.encode(draw(model, tokenizer, max_tokens=1000))) <= 24 * 4
    assert draw(model, tokenizer, prompt="") != ""
    with raises(ConfigError, "inference.prompt-too-long", 24):
        draw(model, tokenizer, prompt="text " * 30)


def test_batches_are_those_of_the_run_in_every_layout(corpus: Path, tmp_path: Path) -> None:
    """4 sequences of the run's global batch do not divide over 3 data ranks; the score is still over 2 x 4."""
    cfg = config(1)
    made = run_ranks(layout_of(cfg), lambda ctx: str(save_state(setup(cfg, ctx), tmp_path, {})))[0]

    def printed(tensor: int, pipeline: int, world: int, batches: int) -> str:
        found = config_of(Path(made), tensor=tensor, pipeline=pipeline, world=world)
        assert not config_errors(found, world)

        def job(ctx: ParallelContext) -> str:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                evaluate(found, derive(found), ctx, Path(made), str(corpus), batches)
            return out.getvalue()

        return run_ranks(layout_of(found), job)[0]

    for batches in (2, 0):
        one = printed(1, 1, 1, batches)
        assert f"over {8 * 16 if batches else 61 * 16 + 2:,} tokens" in one
        for layout in ((1, 1, 3), (2, 1, 2), (1, 2, 6), (1, 1, 8)):
            assert printed(*layout, batches) == one, layout
