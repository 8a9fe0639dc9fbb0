"""data.train: weights, budgets, epochs, changes; every error completely; runs that resume, or must not."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config.load import load
from engine.config.mixture import read_mixture
from engine.data.samples.corpora import TrainingData, open_training
from engine.data.samples.indexed import IndexedDataset
from engine.data.samples.indexed_writer import IndexedWriter
from engine.data.samples.loader import Loader
from engine.data.samples.transforms import LossMask
from engine.errors import ConfigError, DataError, FieldError
from tests.support.command import finish, train
from tests.support.errors import raises
from tests.support.shares import share_of


def faults_of(text: str) -> tuple[FieldError, ...]:
    with pytest.raises(ConfigError) as caught:
        read_mixture(text)
    assert all(fault.path == "data.train" for fault in caught.value.errors)
    return caught.value.errors


def write(folder: Path, text: str) -> str:
    (folder / "mix.toml").write_text(text)
    return str(folder / "mix.toml")


def test_one_corpus_and_weights_in_a_line(tmp_path: Path) -> None:
    assert read_mixture("corpus/web").prefixes == ("corpus/web",)
    mixture = read_mixture("0.7 corpus/web 3e-1 other/code")
    assert (mixture.names, mixture.prefixes) == (("web", "code"), ("corpus/web", "other/code"))
    assert mixture.amounts == (Fraction(7, 10), Fraction(3, 10))
    assert mixture.with_weights({"code": 0.1}) == (Fraction(7, 10), Fraction(1, 10))
    assert read_mixture("1 a/web 1 b/web").names == ("a/web", "b/web")
    (tmp_path / "2 of 3.idx").touch()
    assert read_mixture(str(tmp_path / "2 of 3")).prefixes == (str(tmp_path / "2 of 3"),)


def test_a_file_with_names(tmp_path: Path) -> None:
    text = """
    [[source]]
    prefix = "a b/web"
    weight = 3
    [[source]]
    prefix = "code"
    name = "source code"
    weight = 0
    """
    mixture = read_mixture(write(tmp_path, text))
    assert mixture.names == ("web", "source code") and mixture.prefixes == ("a b/web", "code")
    assert mixture.amounts == (3, 0)
    for kind in ("tokens", "epochs"):
        mixture = read_mixture(write(tmp_path, f'[[source]]\nprefix = "a"\n{kind} = 2_000_000_000\n'))
        assert (mixture.kind, mixture.amounts) == (kind, (2_000_000_000,))


@pytest.mark.parametrize(
    ("text", "value", "problem", "fix"),
    [
        ("0.7 a 0.3", "0.7 a 0.3", "is not a list of weights", "Write WEIGHT PREFIX"),
        ("a 0.7 b 0.3", "a", "is not a weight above 0", "Write WEIGHT PREFIX"),
        ("0 a 1 b", "0", "is not a weight above 0", "Write WEIGHT PREFIX"),
        ("1e999999999 a 1 b", "1e999999999", "is not a weight above 0", "Write WEIGHT PREFIX"),
        ("1e19 a 1 b", "1e19", "is not a weight above 0", "Write WEIGHT PREFIX"),
        ("-1 a 1 b", "-1", "is not a weight above 0", "Write WEIGHT PREFIX"),
        ("nan a 1 b", "nan", "is not a weight above 0", "Write WEIGHT PREFIX"),
        ("1 a 2 a", "a", "is given twice", "Add up its weights."),
        ("none.toml", "none.toml", "cannot be read", "Give the path of a TOML file."),
    ],
)
def test_faults_of_a_line(text: str, value: str, problem: str, fix: str) -> None:
    fault = faults_of(text)[0]
    assert fault.value == value and problem in fault.problem and fix in fault.fix


A, B = '[[source]]\nprefix = "a"\nweight = 1\n', '[[source]]\nprefix = "b"\nweight = 1\n'


@pytest.mark.parametrize(
    ("text", "problem", "fix"),
    [
        ("[[source]\n", "is not valid TOML", "Fix that line."),
        ("[run]\n" + A, "has 'run', which is not known", "Known: [[source]]."),
        ("", "names no source", "Write [[source]]"),
        ('[source]\nprefix = "a"\n', "has [source] in single brackets", "Write [[source]]."),
        ("source = [1]\n", "has [source] in single brackets", "Write [[source]]."),
        (A + "wait = 1\n", "has 'wait', which is not known", "Known: prefix, name, weight, tokens, epochs, fim."),
        ("[[source]]\nweight = 1\n", "has no prefix, or one that is not a string", 'Write prefix = "..."'),
        ("[[source]]\nprefix = 3\nweight = 1\n", "has no prefix, or one that is not a string", 'Write prefix = "..."'),
        (A + 'name = ""\n', "has no name, or one that is not a string", 'Write name = "..."'),
        ('[[source]]\nprefix = "a"\n', "has no amount", "Give one of weight, tokens, epochs."),
        (A + "tokens = 5\n", "has weight and tokens", "Give one of weight, tokens, epochs."),
        ('[[source]]\nprefix = "a"\nepochs = 0\n', "has epochs = 0, not a number above 0", "Use a number such as 0.5."),
        (
            '[[source]]\nprefix = "a"\nweight = "x"\n',
            "has weight = 'x', not a number above 0",
            "Use a number such as 0.5.",
        ),
        (
            '[[source]]\nprefix = "a"\nweight = true\n',
            "has weight = True, not a number above 0",
            "Use a number such as 0.5.",
        ),
        (
            '[[source]]\nprefix = "a"\nweight = inf\n',
            "has weight = inf, not a number above 0",
            "Use a number such as 0.5.",
        ),
        (A + '[[source]]\nprefix = "b"\ntokens = 5\n', "mixes weight and tokens", "Use one kind for all sources."),
        (A + A, "is given twice", "Give it once."),
        (A + B + 'name = "a"\n', "is the name of two sources", 'Give each source a separate name = "...".'),
        (
            A + "[[change]]\nstep = 5\nweights = { a = 0.5 }\n[[change]]\nstep = 7\nweights = { a = 2 }\n",
            "has [[change]]",
            "[[phase]] from_step = 6, weights = { a = 0.5 }; [[phase]] from_step = 8, weights = { a = 2 }.",
        ),
        (A + "[change]\n", "has [[change]]", "[[phase]] from_step, weights."),
        ('[[source]]\nprefix = "a"\nweight = 0\n', "has no source with a weight above 0", "a weight above 0."),
    ],
)
def test_faults_of_a_file(text: str, problem: str, fix: str, tmp_path: Path) -> None:
    (fault,) = faults_of(write(tmp_path, text))
    assert problem in fault.problem and fix in fault.fix


def test_all_faults_come_at_once_with_those_of_the_config(tmp_path: Path) -> None:
    assert len(faults_of("a b c d -1")) == 4
    with pytest.raises(ConfigError) as caught:
        load([], {"data.train": "x a y b", "train.steps": "0"})
    assert [f.path for f in caught.value.errors] == ["train.steps", "data.train", "data.train"]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """web (counts upwards), code (counts downwards), small (a few tokens), other (made with another tokenizer)."""
    folder = tmp_path_factory.mktemp("corpora")
    rng = np.random.default_rng(0)
    for name, count, sign, digest in (
        ("web", 150, 1, "t1"),
        ("code", 60, -1, "t1"),
        ("small", 2, 1, None),
        ("other", 9, 1, "t2"),
    ):
        with IndexedWriter(folder / name, vocab_size=97) as writer:
            for _ in range(count):
                writer.add((rng.integers(97) + sign * np.arange(rng.integers(40, 200))) % 97)
            writer.finish({"tokenizer_digest": digest} if digest else {})
    return folder


def opened(text: str, **options: Any) -> TrainingData:
    values = {"data.train": text, "model.vocab_size": "97", "train.seq_len": "32", "train.steps": "10"}
    return open_training(load([], {**values, **options}).config, None)


def test_tokens_and_epochs_become_shares(corpora: Path, tmp_path: Path) -> None:
    def mix(kind: str, web: float, code: float) -> str:
        lines = [f'[[source]]\nprefix = "{corpora / n}"\n{kind} = {a}\n' for n, a in (("web", web), ("code", code))]
        return write(tmp_path, "".join(lines))

    data = opened(mix("tokens", 96_000, 32_000), **{"train.steps": "500"})  # 4,000 samples of 32
    assert data.order.counts(4000).tolist() == [3000, 1000] and data.names == ("web", "code")  # type: ignore[union-attr]
    assert data.shares[0].startswith("source web: 3,000 of 4,000 samples (75.00%), ") and len(data.shares) == 2
    data = opened(mix("epochs", 1, 4))
    web, code = (one.samples_per_epoch for one in data.order.orders)  # type: ignore[union-attr]
    assert data.order.counts(web + 4 * code).tolist() == [web, 4 * code]  # type: ignore[union-attr]
    assert f"need {round((web + 4 * code) / 8):,} steps, the run has 10: each source gets" in data.shares[2]


def test_one_corpus_stays_as_it_was(corpora: Path) -> None:
    data = opened(str(corpora / "web"))
    dataset = IndexedDataset(corpora / "web")
    assert (data.names, data.notes) == ((), ())
    assert data.metadata == {
        "order": 2,
        "prefix": str(corpora / "web"),
        "num_documents": 150,
        "num_tokens": dataset.num_tokens,
        "fingerprint": data.metadata["fingerprint"],  # tests/checkpoint/test_lineage.py
        "tokenizer_digest": "t1",
        "seq_len from sample 0": 32,
    }


def test_what_does_not_fit_together_is_refused(corpora: Path) -> None:
    with raises(DataError, "samples.tokenizer-differs", "t1", "other with t2"):
        opened(f"1 {corpora}/web 1 {corpora}/other")
    with raises(ConfigError, "samples.blend-weights", "data.train = 'small'", "1.0e-07", "2^21"):
        opened(f"1 {corpora}/web 1e-7 {corpora}/small")
    with raises(DataError, "samples.corpus-not-found", "none.idx"):
        opened(f"1 {corpora}/web 1 {corpora}/none")


def test_the_end_of_document_is_left_out_of_the_loss_if_asked(corpora: Path, tmp_path: Path) -> None:
    for name, eod in (("a", 5), ("b", 6)):
        with IndexedWriter(tmp_path / name, vocab_size=97) as writer:
            for length in range(1, 60):
                writer.add(np.append(np.arange(7, 7 + length), eod))
            writer.finish({"eod": eod})
    data = opened(str(tmp_path / "a"), **{"data.mask_eod": "true"})
    assert (data.transforms, data.metadata["mask_eod"]) == ((LossMask(after=(5,)),), 5)
    assert opened(str(tmp_path / "a")).transforms == ()
    sizes = {"global_batch_size": 20, "micro_batch_size": 20, "data_rank": 0, "data_size": 1}
    share, plain_share = share_of(data.order, **sizes, transforms=data.transforms), share_of(data.order, **sizes)
    with Loader(share) as loader, Loader(plain_share) as plain:
        (masked,), (whole,) = next(loader), next(plain)
    assert torch.equal(masked.tokens, whole.tokens) and torch.equal(masked.labels, whole.labels) and whole.weights.all()
    assert torch.equal(masked.weights, (masked.tokens != 5).double()) and not masked.weights.all()
    assert masked.weights[masked.labels == 5].all()  # the end itself is learned, what follows it is not
    with pytest.raises(
        ConfigError, match=r"data.mask_eod = True: needs the end-of-document token, and .*web\.json names"
    ):
        opened(str(corpora / "web"), **{"data.mask_eod": "true"})
    with raises(ConfigError, "samples.end-token-ambiguous", "data.mask_eod"):
        opened(f"1 {tmp_path}/a 1 {tmp_path}/b", **{"data.mask_eod": "true"})


LATER = ("--phase.1.from_step", "7", "--phase.1.weights", "9 code")


def run(commands: Path, folder: Path, mix: str, steps: int, phase: tuple[str, ...] = ()) -> tuple[int, str, str]:
    options = ("--train.steps", str(steps), "--lr-schedule.kind", "constant", *phase)
    return finish(train(Path(mix), folder, 1, *options, commands=commands))


def records(folder: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines}


def test_a_blend_trains_resumes_bit_by_bit_and_refuses_another(corpora: Path, tmp_path: Path, warm: Path) -> None:
    text = "".join(f'[[source]]\nprefix = "{corpora / n}"\nweight = {w}\n' for n, w in (("web", 3), ("code", 1)))
    mix = write(tmp_path, text)
    code, out, err = run(warm, tmp_path / "whole", mix, 8, LATER)
    assert code == 0 and "source web: 40 of 64 samples" in out, err  # 36 of 48, then 4 of 16
    whole = records(tmp_path / "whole")
    assert all({"loss_web", "loss_code"} <= set(record) for record in whole.values())
    assert all(
        min(r["loss_web"], r["loss_code"]) <= r["loss"] <= max(r["loss_web"], r["loss_code"]) for r in whole.values()
    )
    assert run(warm, tmp_path / "parts", mix, 5)[0] == 0
    assert run(warm, tmp_path / "parts", mix, 8, LATER)[0] == 0  # the change is still to come
    parts = records(tmp_path / "parts")
    for step in range(6, 9):
        assert all(whole[step][k] == parts[step][k] for k in ("loss", "loss_web", "loss_code", "grad_norm"))

    def refused(folder: str, mix: str, *lines: str, phase: tuple[str, ...] = ()) -> None:
        code, _, err = run(warm, tmp_path / folder, mix, 12, phase)
        assert code == 1 and all(line in err for line in lines), err

    other = write(tmp_path, text.replace("weight = 3", "weight = 2"))
    changed = "data.mixture from step 0: checkpoint 'web 3, code 1', now 'web 2, code 1'"
    refused("whole", other, changed, phase=LATER)
    refused("whole", write(tmp_path, text), "data.mixture from step 6: checkpoint 'web 1, code 3', now None")
    refused("whole", str(corpora / "web"), "data.source 1, code: checkpoint '60 documents, ", "now None")
    assert run(warm, tmp_path / "one", str(corpora / "web"), 2)[0] == 0
    refused("one", write(tmp_path, text), "data.source 0, web: checkpoint None, now '150 documents")


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mix.toml"
    path.write_text(
        '[[source]]\nprefix = "a"\nweight = -1\nwieght = 2\n[[source]]\nprefix = "a"\nname = "b"\ntokens = 5\n'
        "[[source]]\nweight = 1\n[[change]]\nstep = 0\nweights = { nosuch = 1 }\n[[sourec]]\n"
    )
    with pytest.raises(ConfigError) as error:
        read_mixture(str(path))
    text = str(error.value)
    for part in ("sourec", "wieght", "weight = -1", "no prefix", "mixes weight and tokens", "is given twice"):
        assert part in text
    assert "nosuch = 1" in text and len(error.value.errors) == 7
