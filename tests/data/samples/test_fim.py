"""Fill-in-the-middle: it can be undone exactly, depends only on the sample number, and reports every error."""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.batch import Documents
from engine.cli.main import main
from engine.config.load import load
from engine.data.samples.corpora import TrainingData, open_training
from engine.data.samples.fim import FillInTheMiddle, Sentinels
from engine.data.samples.indexed_writer import IndexedWriter
from engine.data.samples.loader import Loader
from engine.data.samples.special import FAMILIES, check, fill_in_the_middle, sentinels
from engine.data.samples.transforms import LossMask, SeparateDocuments
from engine.data.tokenize.tokenizer import END_OF_TEXT, Tokenizer
from engine.distributed.context import ParallelContext
from engine.errors import ConfigError
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import config, layout_of
from tests.support.command import finish, train
from tests.support.errors import raises
from tests.support.harness import run_ranks
from tests.support.shares import share_of

SPECIAL = (END_OF_TEXT, *FAMILIES[0])
CODE = [f"def f{i}(x):\n    return x + {i}  # naïve\n\n\nclass A{i}:\n\tpass" for i in range(40)]
TEXTS = [*CODE, "今天天气很好。我们去公园吧！", "👩‍👩‍👧‍👦 🇨🇭 ☕️ end", "a literal <|fim_middle|> and <|endoftext|>"]
KINDS = ("bpe", "unigram", "llama")


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    """A tokenizer over bytes, or like Llama 2's: sentencepiece, which puts a space before every text."""
    if kind != "llama":
        return Tokenizer.train(iter(CODE), 330, kind=kind, special_tokens=SPECIAL)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text").write_text("\n".join(CODE))
        sentencepiece.SentencePieceTrainer.train(
            input=f"{folder}/text",
            model_prefix=f"{folder}/m",
            model_type="bpe",
            vocab_size=340,
            byte_fallback=True,
            control_symbols=list(SPECIAL),
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        return Tokenizer.load(f"{folder}/m.model")


def eod_of(tokenizer: Tokenizer) -> int:
    number = tokenizer.token_id(END_OF_TEXT)
    assert number is not None
    return number


def fim_of(
    tokenizer: Tokenizer, rate: float = 1.0, spm_rate: float = 0.5, seed: int = 1, **more: Any
) -> FillInTheMiddle:
    ids = [tokenizer.token_id(token) or 0 for token in FAMILIES[0]]
    return FillInTheMiddle(
        tokenizer, Sentinels(*ids), eod_of(tokenizer), rate=rate, spm_rate=spm_rate, seed=seed, **more
    )


def change(fim: FillInTheMiddle, rows: Any, first: int = 0) -> Any:
    rows = np.array(rows, np.int64)
    return fim.transform(np.array(rows), np.arange(first, first + len(rows)), np.zeros(len(rows), np.int64))


def segments(ids: list[int], eod: int) -> list[list[int]]:
    """Segments between end-of-document tokens."""
    cut = [-1, *(i for i, number in enumerate(ids) if number == eod), len(ids)]
    return [ids[a + 1 : b] for a, b in itertools.pairwise(cut)]


def undo(ids: list[int], t: Sentinels) -> list[int]:
    """The tokens of a segment in the order of the text. PSM with an empty prefix and SPM are identical."""
    if t.middle not in ids:
        return ids
    assert ids[0] == t.prefix and sorted(x for x in ids if x in vars(t).values()) == sorted(vars(t).values())
    suffix, middle = ids.index(t.suffix), ids.index(t.middle)
    return ids[1:suffix] + ids[middle + 1 :] + ids[suffix + 1 : middle]


@functools.cache
def bytes_of(kind: str) -> list[bytes]:
    """Bytes of each token, from the spellings of the vocabulary."""
    tokenizer = tokenizer_of(kind)
    library = tokenizers.Tokenizer.from_str(tokenizer._definition)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
    spellings = [library.id_to_token(i) for i in range(tokenizer.vocab_size)]
    if kind == "llama":
        raw = [bytes([int(s[3:5], 16)]) if s.startswith("<0x") else s.replace("▁", " ").encode() for s in spellings]
    else:
        raw = [bytes(alphabet.get(c, 63) for c in s) for s in spellings]
    for number in tokenizer.special_ids:
        raw[number] = f"<{number}>".encode()
    return raw


documents = st.lists(
    st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("a\n\t 天👩‍🇨�<|>")), max_size=30), max_size=4
)


@pytest.mark.parametrize("kind", KINDS)
@given(texts=documents, seed=st.integers(0, 2**64 - 1), ends=st.tuples(st.integers(0, 9), st.integers(0, 9)))
@example(texts=TEXTS[-3:], seed=0, ends=(1, 1))
@settings(max_examples=150, deadline=None)
def test_undone_it_is_the_same_text(kind: str, texts: list[str], seed: int, ends: tuple[int, int]) -> None:
    """Byte by byte, for any text, and if the sample's boundaries split a character."""
    tokenizer, table = tokenizer_of(kind), bytes_of(kind)
    fim, eod = fim_of(tokenizer, seed=seed), eod_of(tokenizer)
    stream = [number for text in texts for number in (*tokenizer.encode(text), eod)]
    row = stream[ends[0] : max(ends[0], len(stream) - 1 - ends[1])]
    padding = [eod] * (6 * len(row) + 6)  # so that nothing is truncated
    changed = change(fim, [row + padding])
    result = changed.rows[0, : changed.lengths[0]].tolist()
    before, after = segments(row, eod), segments(result, eod)
    assert len(before) <= len(after) and not any(after[len(before) :])
    for old, new in zip(before, after):
        assert b"".join(table[i] for i in undo(new, fim.sentinels)) == b"".join(table[i] for i in old)
    outcomes = changed.outcomes
    assert outcomes["chosen"] == sum(map(bool, before)) == sum(outcomes.values()) - outcomes["chosen"]
    assert outcomes["left: pieces give another text"] == outcomes["left: special token"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_nearly_all_segments_are_changed_torn_ones_too(kind: str) -> None:
    """The test above would also pass if difficult segments were left unchanged."""
    tokenizer = tokenizer_of(kind)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for begin in range(6):
            outcomes = change(fim_of(tokenizer), [ids[begin : len(ids) - begin]]).outcomes
            assert outcomes["PSM"] + outcomes["SPM"] == 1, (text, begin, outcomes)
    outcomes = change(fim_of(tokenizer), [tokenizer.encode("a genuine \ufffd stays")]).outcomes
    assert outcomes["left: not a whole text"] == 1


def test_the_token_that_begins_documents_stays_before_them() -> None:
    tokenizer = tokenizer_of("bpe")
    eod, ids, bos = eod_of(tokenizer), tokenizer.encode(CODE[3]), tokenizer.vocab_size
    row = [bos, *ids, eod, bos, *ids, eod, bos] + [eod] * 20
    changed = change(fim_of(tokenizer, bos=bos), [row])
    assert changed.outcomes["PSM"] + changed.outcomes["SPM"] == 2
    first, second, third, *_ = segments(changed.rows[0].tolist(), eod)
    assert (first[0], second[0], third) == (bos, bos, [bos])
    for segment in (first, second):
        text = b"".join(bytes_of("bpe")[i] for i in undo(segment[1:], fim_of(tokenizer).sentinels))
        assert text == CODE[3].encode()


def test_special_tokens_and_texts_that_do_not_come_back_stay() -> None:
    tokenizer = tokenizer_of("bpe")
    fim, eod = fim_of(tokenizer), eod_of(tokenizer)
    for special in vars(fim.sentinels).values():
        row = [*tokenizer.encode("before"), special, *tokenizer.encode("behind")]
        changed = change(fim, [row])
        assert changed.rows.tolist() == [row] and changed.outcomes["left: special token"] == 1
    library = tokenizers.Tokenizer.from_str(tokenizer._definition)
    tab = tokenizer.encode("\t")
    library.normalizer = tokenizers.normalizers.Replace("\t", "_")
    lossy = Tokenizer(library.to_str(), {})
    row = [*tokenizer.encode("a"), *tab, *tokenizer.encode("b"), eod]
    changed = change(fim_of(lossy), [row])
    assert changed.rows.tolist() == [row] and changed.outcomes["left: pieces give another text"] == 1
    assert change(fim, [row]).rows.tolist() != [row]


def test_rows_keep_their_length_and_the_filling_does_not_count() -> None:
    tokenizer = tokenizer_of("bpe")
    fim, eod = fim_of(tokenizer), eod_of(tokenizer)
    long = tokenizer.encode(CODE[0])
    short = [tokenizer.encode(c)[0] for c in CODE[0]][
        : len(long) + 9
    ]  # one token per character: shorter when encoded again
    rows = [long + [eod] * (len(short) - len(long)), short, (long + [eod] + long)[: len(short)]]

    class Order:
        seq_len = len(short) - 1

        def gather(self, samples: Any) -> Any:
            return np.array([rows[i % 3] for i in samples], np.int64)

        def sources(self, samples: Any) -> Any:
            return np.zeros(len(samples), np.int64)

    changed = change(fim, rows)
    assert changed.rows.shape == (3, len(short)) and changed.lengths[1] < len(short) == changed.lengths[2]
    mask = LossMask(after=(eod,), labels=(fim.sentinels.middle,))
    transforms = fim, SeparateDocuments(eod), mask
    sizes = {"global_batch_size": 3, "micro_batch_size": 3, "data_rank": 0, "data_size": 1}
    with Loader(share_of(Order(), **sizes, transforms=transforms)) as loader:
        (batch,) = next(loader)
    whole = torch.cat((batch.tokens, batch.labels[:, -1:]), 1)
    assert np.array_equal(whole.numpy(), changed.rows)
    assert (whole[1, changed.lengths[1] :] == eod).all()
    expected = (batch.tokens != eod) & (batch.labels != fim.sentinels.middle)
    expected &= torch.arange(1, len(short))[None] < torch.from_numpy(changed.lengths)[:, None]
    assert torch.equal(batch.weights, expected.double()) and not batch.weights[1, changed.lengths[1] - 1 :].any()
    assert batch.sequence.documents is not None
    assert torch.equal(batch.sequence.documents.starts, Documents.from_eod(batch.tokens, eod).starts)
    assert (batch.labels == fim.sentinels.middle).any() and (batch.labels == fim.sentinels.prefix).any()


def test_rates_and_cuts_are_those_asked_for() -> None:
    tokenizer = tokenizer_of("bpe")
    eod, ids = eod_of(tokenizer), tokenizer.encode(CODE[3])
    rows = [[*ids, eod, *ids, eod] + [eod] * 80] * 1500
    changed = change(fim_of(tokenizer, 0.3, 0.25), rows)
    outcomes = changed.outcomes
    assert outcomes["chosen"] + outcomes["plain"] == 3000 and outcomes["PSM"] + outcomes["SPM"] == outcomes["chosen"]
    assert abs(outcomes["chosen"] / 3000 - 0.3) < 0.03 and abs(outcomes["SPM"] / outcomes["chosen"] - 0.25) < 0.05
    two = change(fim_of(tokenizer), rows[:300])
    t, lengths = fim_of(tokenizer).sentinels, []
    assert two.outcomes["chosen"] == 600
    for row in two.rows.tolist():
        first, second, *_ = segments(row, eod)
        assert first != second  # the random numbers of its segments differ
        middle = first[first.index(t.middle) + 1 :]
        if first[1] != t.suffix:
            lengths.append(len(tokenizer.decode(middle)) / len(CODE[3]))
    assert abs(np.mean(lengths) - 1 / 3) < 0.05  # expected for two uniform cuts
    assert len({tuple(row) for row in two.rows.tolist()}) > 290  # and those of samples
    assert change(fim_of(tokenizer, 0.0), rows).rows.tolist() == rows
    seeds = [change(fim_of(tokenizer, seed=seed), rows[:1]).rows.tolist() for seed in (1, 2)]
    assert seeds[0] != seeds[1]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora `code` and `text` with their tokenizer."""
    folder = tmp_path_factory.mktemp("fim")
    tokenizer = tokenizer_of("bpe")
    tokenizer.save(folder / "tokenizer")
    for name, texts in (("code", CODE), ("text", TEXTS[-3:] * 30)):
        with IndexedWriter(folder / name, vocab_size=tokenizer.vocab_size) as writer:
            for text in texts:
                writer.add(np.array([*tokenizer.encode(text), eod_of(tokenizer)]))
            writer.finish({"tokenizer_digest": tokenizer.digest, "eod": eod_of(tokenizer)})
    return folder


def options(corpora: Path, **more: Any) -> dict[str, str]:
    size = tokenizer_of("bpe").vocab_size
    values = {"data.train": corpora / "code", "data.tokenizer": corpora / "tokenizer", "data.fim_rate": 0.7}
    values |= {"model.vocab_size": size, "train.seq_len": 32, "train.seed": 3}
    return {k: str(v) for k, v in (values | {k.replace("__", "."): v for k, v in more.items()}).items()}


def opened(corpora: Path, **more: Any) -> TrainingData:
    cfg = load([], options(corpora, **more)).config
    check(cfg)
    return open_training(cfg, tokenizer_of("bpe"))


def test_layout_and_restarts_do_not_change_it(corpora: Path) -> None:
    data = opened(corpora)

    def rows(micro: int, data_size: int, begin: int, steps: int) -> list[Any]:
        out: list[Any] = [[] for _ in range(steps)]
        for rank in range(data_size):
            sizes = {"global_batch_size": 12, "micro_batch_size": micro, "data_rank": rank, "data_size": data_size}
            with Loader(share_of(data.order, **sizes, transforms=data.transforms, start_sample=begin)) as loader:
                for step in range(steps):
                    out[step] += [row for batch in next(loader) for row in batch.labels.tolist()]
        return out

    expected = rows(12, 1, 0, 4)
    plain = data.order.gather(np.arange(48))[:, 1:].tolist()
    assert sum(a != b for a, b in zip(itertools.chain(*expected), plain)) > 24
    for micro, data_size in ((1, 1), (3, 4), (2, 2), (1, 12)):
        assert rows(micro, data_size, 0, 4) == expected
    assert rows(6, 2, 0, 1) + rows(1, 3, 12, 3) == expected


def test_a_source_of_a_blend_may_stay_plain(corpora: Path, tmp_path: Path) -> None:
    parts = {"code": "", "text": "fim = false\n"}
    text = "".join(f'[[source]]\nprefix = "{corpora / n}"\nweight = 1\n{fim}' for n, fim in parts.items())
    (tmp_path / "mix.toml").write_text(text)
    data = opened(corpora, data__train=tmp_path / "mix.toml")
    assert data.metadata["fim"].endswith(", in code") and data.notes[-1].endswith(", in code")
    (fim,) = data.transforms
    assert isinstance(fim, FillInTheMiddle)
    samples = np.arange(60)
    rows, sources = data.order.gather(samples), data.order.sources(samples)
    differs = (fim.transform(rows, samples, sources).rows != rows).any(1)
    assert differs[sources == 0].sum() > 20 and not differs[sources == 1].any()
    for change_, rate, code, value in (
        ("fim = true", 0, "config.settings-contradict", "data.train"),
        ("fim = 1", 0.5, "config.mixture-value-not-valid", "fim = 1"),
    ):
        (tmp_path / "mix.toml").write_text(text.replace("fim = false", change_))
        with raises(ConfigError, code, value):
            load([], options(corpora, data__train=tmp_path / "mix.toml", data__fim_rate=rate))
    (tmp_path / "mix.toml").write_text(text.replace("weight = 1\n[", "weight = 1\nfim = false\n["))
    with raises(ConfigError, "config.settings-contradict", "data.fim_rate = "):
        load([], options(corpora, data__train=tmp_path / "mix.toml"))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_data_ranks_learn_as_one(corpora: Path, dropout: float) -> None:
    """Step-1 loss in float64, with everything that depends on the permuted tokens."""

    def loss(world: int) -> float:
        cfg = config(
            world,
            parallel_data=world,
            model_vocab_size=tokenizer_of("bpe").vocab_size,
            train_seq_len=32,
            data_train=corpora / "code",
            data_tokenizer=corpora / "tokenizer",
            data_fim_rate=0.7,
            train_dropout=dropout,
            train_attention_dropout=dropout,
            data_mask_eod=True,
            data_mask_tokens="<|fim_prefix|> <|fim_suffix|>",
            data_separate_documents=True,
        )

        def job(ctx: ParallelContext) -> float:
            data = open_training(cfg, tokenizer_of("bpe"))
            sizes = {"global_batch_size": 4, "micro_batch_size": 1, "data_rank": ctx.data.rank, "data_size": world}
            with Loader(share_of(data.order, **sizes, transforms=data.transforms)) as loader:
                return train_step(setup(cfg, ctx), next(loader)).loss

        return float(run_ranks(layout_of(cfg), job)[0])

    assert loss(2) == pytest.approx(loss(1), rel=1e-12)


def test_errors_of_the_config_are_reported_before_anything_starts(corpora: Path, tmp_path: Path, warm: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load([], {"data.fim_rate": "0.5", "data.mask_tokens": "<pad>", "data.fim_tokens": "a b"})
    assert [(f.path, f.problem) for f in caught.value.errors] == [
        ("data.fim_rate", "needs data.tokenizer"),
        ("data.mask_tokens", "needs data.tokenizer"),
        ("data.fim_tokens", "is not three different tokens"),
    ]
    with raises(ConfigError, "config.without-effect", "data.fim_tokens = "):
        load([], {"data.fim_tokens": "a b c"})
    with raises(ConfigError, "config.value-not-valid", "data.fim_rate = '1.5'"):
        load([], {"data.fim_rate": "1.5"})
    with pytest.raises(ConfigError) as caught:
        opened(
            corpora, data__fim_tokens="<|fim_prefix|> <|fim_sufix|> x", data__mask_tokens="<|endoftxt|> <|fim_middle|>"
        )
    assert [(f.path, f.value, f.problem.rpartition(" ")[0], f.fix.split(",")[0]) for f in caught.value.errors] == [
        ("data.mask_tokens", "<|endoftxt|>", "is no token of", "Nearest special tokens: <|endoftext|>"),
        ("data.fim_tokens", "<|fim_sufix|>", "is no token of", "Nearest special tokens: <|fim_suffix|>"),
        (
            "data.fim_tokens",
            "x",
            "is an ordinary token, not a special one, of",
            "Nearest special tokens: <|endoftext|>",
        ),
    ]
    with raises(ConfigError, "samples.fim-token-ends-documents", "data.fim_tokens = "):
        opened(corpora, data__fim_tokens="<|fim_prefix|> <|fim_suffix|> <|endoftext|>")
    with raises(ConfigError, "samples.tokenizer-unusable", "data.tokenizer = ", tmp_path / "none"):
        check(load([], options(corpora, data__tokenizer=tmp_path / "none")).config)
    for kind, fault in (("bpe", "samples.fim-tokens-missing"), ("wordpiece", "samples.fim-tokenizer-loses-text")):
        tokens = (END_OF_TEXT,) if kind == "bpe" else SPECIAL
        Tokenizer.train(iter(CODE), 300, kind=kind, special_tokens=tokens).save(tmp_path / kind)
        with raises(ConfigError, fault, "data.fim_rate = ") as caught:
            check(load([], options(corpora, data__tokenizer=tmp_path / kind)).config)
    words = arguments(corpora, tmp_path / "bpe", 0.5)
    code, _, err = finish(train(corpora / "code", tmp_path / "run", 2, *words, commands=warm))
    assert code != 0 and "engine tokenizer train --special-tokens" in err and err.count("looked for") == 1
    assert not (tmp_path / "run").exists()


def arguments(corpora: Path, tokenizer: Path, rate: float) -> list[str]:
    size = tokenizer_of("bpe").vocab_size
    return f"--model.vocab-size {size} --data.tokenizer {tokenizer} --data.fim-rate {rate}".split()


def test_names_are_found_in_the_tokenizer_or_as_given(corpora: Path) -> None:
    tokenizer = tokenizer_of("bpe")
    data = load([], options(corpora)).config.data
    ids = [tokenizer.token_id(token) for token in FAMILIES[0]]
    assert list(vars(sentinels(data, tokenizer)).values()) == ids
    turned = data.model_copy(update={"fim_tokens": " ".join(reversed(FAMILIES[0]))})
    assert list(vars(fill_in_the_middle(turned, tokenizer, 0, 1).sentinels).values()) == ids[::-1]
    for family in FAMILIES:
        own = Tokenizer.train(iter(CODE), 300, special_tokens=(END_OF_TEXT, *family))
        assert vars(sentinels(data, own)) == {"prefix": 1, "suffix": 2, "middle": 3}


def test_a_run_resumes_bit_by_bit_and_rejects_another_setting(corpora: Path, tmp_path: Path, warm: Path) -> None:
    def run(folder: str, steps: int, rate: float, *more: str) -> tuple[int, str, str]:
        words = [*arguments(corpora, corpora / "tokenizer", rate), "--train.steps", str(steps), *more]
        words += ["--lr-schedule.kind", "constant", "--train.dropout", "0.1", "--train.attention-dropout", "0.1"]
        return finish(train(corpora / "code", tmp_path / folder, 1, *words, commands=warm))

    code, out, err = run("whole", 4, 0.5, "--data.valid", str(corpora / "code"))
    assert code == 0 and "fill-in-the-middle: rate 0.5, of that SPM 0.5, tokens 1 2 3" in out, err
    assert run("parts", 2, 0.5)[0] == 0 and run("parts", 4, 0.5)[0] == 0
    whole, parts = (
        [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()][3]
        for folder in ("whole", "parts")
    )
    assert whole["step"] == parts["step"] == 4
    assert (whole["loss"], whole["grad_norm"]) == (parts["loss"], parts["grad_norm"])
    code, _, err = run("parts", 6, 0.25, "--data.mask-tokens", "<|fim_prefix|>")
    assert code == 1 and "data.fim: checkpoint 'rate 0.5, of that SPM 0.5, tokens 1 2 3', now 'rate 0.25" in err
    assert "data.mask_tokens: checkpoint None, now [1]" in err


def test_inspect_shows_what_training_sees(corpora: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def inspect(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["inspect", str(corpora / "code"), "--output", str(tmp_path / "a.png"), "--seq-len", "32", *words])
        return int(end.value.code or 0), *capsys.readouterr()

    code, out, _ = inspect("--fim-rate", "0.7", "--seed", "3")
    data = opened(corpora)
    sample = np.array([int(out.split("\nsample ")[1].split()[0])])
    (fim,) = data.transforms
    assert code == 0 and isinstance(fim, FillInTheMiddle)
    changed = fim.transform(data.order.gather(sample), sample, np.zeros(1, np.int64))
    shown = tokenizer_of("bpe").decode(changed.rows[0].tolist()).split("\t")[0]  # a terminal has no tabs
    assert shown in out and f"chosen {changed.outcomes['chosen']}" in out
    code, _, err = inspect("--fim-rate", "2")
    assert code == 2 and "--fim-rate" in err
    code, _, err = inspect("--fim-tokens", "a b c")
    assert code == 2 and "has no effect without --fim-rate" in err
