"""Training a tokenizer: seconds, memory and compression, compared with the libraries alone.

`engine tokenizer train`, a plain loop over `tokenizers` (bpe) and sentencepiece's trainer (bpe and unigram),
each in a fresh process, on the same JSON lines. Compression: characters per token on the last tenth of
the documents, which was not trained on; encoding and decoding must not change any of them.

    python tools/bench/tokenizer.py --megabytes 100 --vocab-size 32000
    python tools/bench/tokenizer.py --text chinese.jsonl --vocab-size 8000
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
import sentencepiece
import tyro
from corpus import documents
from prepare import Case, Run, measure
from report import Row, finish, show

from engine.data.tokenize.tokenizer import Tokenizer

LOOP = """
import sys, orjson
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
source, target, size, kind = sys.argv[1:]
tokenizer = Tokenizer(models.BPE() if kind == "bpe" else models.Unigram())
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
options = {"vocab_size": int(size), "special_tokens": ["<|endoftext|>"], "show_progress": False}
options["initial_alphabet"] = sorted(pre_tokenizers.ByteLevel.alphabet())
trainer = trainers.BpeTrainer(min_frequency=2, **options) if kind == "bpe" else trainers.UnigramTrainer(**options)
tokenizer.train_from_iterator((orjson.loads(line)["text"] for line in open(source, "rb")), trainer)
tokenizer.save(target)
"""
PIECES = """
import sys, orjson, sentencepiece
source, target, size, kind = sys.argv[1:]
lines = (line for row in open(source, "rb") for line in orjson.loads(row)["text"].split("\\n") if line)
with open(target, "wb") as model:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=int(size), model_type=kind, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        allow_whitespace_only_pieces=True, max_sentence_length=1 << 30, num_threads=16, minloglevel=3)
"""


@dataclass(frozen=True)
class Options:
    """What to train on, and how large a vocabulary."""

    text: Path | None = None
    """JSON lines with "text"; default: text from this machine"""
    megabytes: int = 100
    """of text at most"""
    vocab_size: int = 32_000
    """tokens"""
    kinds: tuple[str, ...] = ("bpe", "unigram")
    """to train"""
    slow: bool = False
    """also unigram by `tokenizers` on bytes, which takes minutes on Chinese"""
    json: Path | None = None
    """write every number here"""


def texts_of(o: Options) -> list[str]:
    """The documents, as many as asked for."""
    lines = documents() if o.text is None else (orjson.loads(line)["text"] for line in o.text.open("rb"))
    texts, size = [], 0
    for text in lines:
        size += len(text.encode())
        if size > o.megabytes * 1_000_000:
            break
        texts.append(text)
    return texts


def worth(path: Path, unseen: list[str]) -> tuple[float, int]:
    """Characters a token, and how many texts come back changed."""
    if path.suffix == ".model":
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        ids, back = [pieces.encode(text) for text in unseen], pieces.decode
    else:
        tokenizer = Tokenizer.load(path)
        ids, back = [each.tolist() for each in tokenizer.encode_batch(unseen)], tokenizer.decode
    changed = sum(back(each) != text for each, text in zip(ids, unseen))
    return sum(map(len, unseen)) / sum(map(len, ids)), changed


def main() -> None:
    o = tyro.cli(Options, description=__doc__)
    texts = texts_of(o)
    cut = len(texts) * 9 // 10
    trained_on, unseen = texts[:cut], texts[cut:]
    rows, lines, runs = [], [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "in.jsonl"
        source.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in trained_on))
        size = str(o.vocab_size)
        for kind in o.kinds:
            ours = [sys.executable, "-m", "engine", "tokenizer", "train", "--input", str(source), "--vocab-size", size]
            ours += ["--kind", kind, "--output", str(folder / f"ours-{kind}")]
            found = {f"engine tokenizer train, {kind}": Case(ours, folder / f"ours-{kind}")}
            peers = {"sentencepiece": (PIECES, f"{kind}.model")}
            if kind == "bpe" or o.slow:
                peers = {"tokenizers, plain loop": (LOOP, f"{kind}.json"), **peers}
            for peer, (script, target) in peers.items():
                command = [sys.executable, "-c", script, str(source), str(folder / target), size, kind]
                found[f"{peer}, {kind}"] = Case(command, folder / target)
            seconds: dict[str, Run] = {}
            for what, case in found.items():
                seconds[what] = measure(case)
                rate, changed = worth(case.tokens, unseen)
                run = seconds[what]
                lines.append([what, f"{run.seconds:.1f}", f"{run.cpu_s:.1f}", f"{run.others:.2f}"])
                lines[-1] += [f"{run.peak_mb:,.0f}", f"{rate:.3f}", f"{changed} of {len(unseen)}"]
                runs[what] = asdict(run) | {"characters_a_token": rate, "changed": changed}
            mine, *others = seconds.values()
            best = min(others, key=lambda run: run.seconds)
            peer = next(what for what, run in seconds.items() if run is best)
            rows.append(Row(f"tokenizer train, {kind}", "s", [mine.seconds], peer, [best.seconds], more=False))
    total = sum(len(text.encode()) for text in trained_on) / 1e6
    title = f"{o.vocab_size:,} tokens from {total:.1f} MB in {len(trained_on):,} documents"
    show(title, ["", "s", "CPU s", "others' share of the machine", "peak MB", "characters a token", "changed"], lines)
    finish(rows, runs, o.json)


if __name__ == "__main__":
    main()
