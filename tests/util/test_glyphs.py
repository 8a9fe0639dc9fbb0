"""Plots: every character is drawn, by a font that has it or in other letters; every run is in the legend; marks."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.ft2font import FT2Font

from engine.data.samples.contents import count, histogram
from engine.data.samples.indexed import IndexedDataset
from engine.data.samples.indexed_writer import IndexedWriter
from engine.data.tokenize.tokenizer import Tokenizer
from engine.monitor.plot import plot_lengths, plot_loss
from engine.pipeline.draw import draw
from engine.pipeline.schedules import build
from engine.pipeline.simulate import simulate
from engine.util.glyphs import drawable
from tests.support.command import exit_code
from tests.support.corpora import corpus

# matplotlib ships a font with characters that its default lacks: it plays the role of a CJK font for Chinese.
OTHER = Path(matplotlib.get_data_path()) / "fonts/ttf/STIXGeneral.ttf"
CHINESE = "训练"


def lacking(path: Path) -> str:
    """A printable character that this font has and DejaVu Sans lacks."""
    usual = FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap()
    return next(chr(code) for code in FT2Font(str(path)).get_charmap() if code not in usual and chr(code).isprintable())


def run_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2)]
    (path / "metrics.jsonl").write_text("".join(lines))
    return path


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the axes of the last figure."""
    monkeypatch.setattr(plt, "close", lambda figure: None)
    yield lambda: plt.gcf().axes[0]
    monkeypatch.undo()
    plt.close("all")


def test_a_font_that_has_the_characters_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not OTHER.is_file():
        pytest.skip("this matplotlib ships no other font")
    name = f"run {lacking(OTHER)}"
    (tmp_path / "torn.ttf").write_bytes(b"is no font")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(tmp_path / "torn.ttf"), str(OTHER)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of each character that is drawn as a box
        with drawable([name]) as label:
            assert label(name) == name
        plot_loss([run_folder(tmp_path / name)], tmp_path / "loss.png")
        draw([(name, simulate(build("1f1b", 2, 1, 2)))], tmp_path / "plan.svg")


def test_without_a_font_other_letters_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shown: Any
) -> None:
    monkeypatch.setitem(sys.modules, "anyascii", SimpleNamespace(anyascii={"训": "Xun", "练": "Lian"}.__getitem__))
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plot_loss([run_folder(tmp_path / f"{CHINESE}-1")], tmp_path / "loss.png")
        assert [text.get_text() for text in shown().get_legend().get_texts()] == ["XunLian-1: training"]
        plot_lengths(*histogram(corpus(tmp_path / "c", [1, 2, 3])), {}, CHINESE, tmp_path / "lengths.png")
        assert shown().get_title().endswith(": XunLian")
        draw([(CHINESE, simulate(build("1f1b", 2, 1, 2)))], tmp_path / "plan.svg")
        monkeypatch.setitem(sys.modules, "anyascii", None)  # as if it were not installed
        with drawable([CHINESE]) as label:
            assert label(CHINESE) == r"\u8bad\u7ec3"
    assert len(caught) == 4 and all("no installed font has 训练" in str(one.message) for one in caught)
    assert ["[chinese]" in str(one.message) for one in caught] == [False, False, False, True]


def test_names_are_text_and_every_run_is_in_the_legend(tmp_path: Path, shown: Any) -> None:
    names = ["_hidden", "a$b$c", "x\ty", "$"]
    plot_loss([run_folder(tmp_path / name) for name in names], tmp_path / "loss.png")
    drawn = [text.get_text() for text in shown().get_legend().get_texts()]
    assert drawn == [" _hidden: training", r"a\$b\$c: training", r"x\ty: training", r"\$: training"]


def test_marks_and_empty_classes(tmp_path: Path, shown: Any) -> None:
    data = corpus(tmp_path / "c", [4] * 10 + [5] * 5 + [40] * 4 + [1000])
    c = count(data)
    assert (c.median, c.p95, c.mean) == (4, 40, 1225 / 20)
    marks = {"median": c.median, "mean": c.mean, "95 %": c.p95}
    plot_lengths(*histogram(data), marks, "c", tmp_path / "lengths.png")
    axes = shown()
    ticks = [text.get_text() for text in axes.get_xticklabels()]
    assert (
        ticks[0] == "4-7" and ticks[-1] == "512-1,023" and len(ticks) == 8
    )  # no empty class before the first or after the last
    assert sum(text.get_text() == "none" for text in axes.texts) == 5
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend[:3] == ["median: 4 tokens", "mean: 61.2 tokens", "95 %: 40 tokens"]
    # class 3 is 4-7, from 2.5 to 3.5, and the place of 4 the middle of its first quarter; class 6 is 32-63
    assert [line.get_xdata()[0] for line in axes.lines] == [2.625, 5.5 + 29.75 / 32, 5.5 + 8.5 / 32]


def test_a_tokenizer_other_than_the_datas_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, other = (Tokenizer.train(iter([text] * 9), 270) for text in ("some words", "quite different"))
    made.save(tmp_path / "made")
    other.save(tmp_path / "other")
    with IndexedWriter(tmp_path / "c", made.vocab_size) as writer:
        writer.add(np.array(made.encode("some words")))
        writer.finish({"tokenizer_digest": made.digest})
    for folder, differs in (("made", False), ("other", True)):
        how = ["--tokenizer", tmp_path / folder, "--samples", 0, "--output", tmp_path / "l.png", "--json"]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert exit_code("inspect", tmp_path / "c", *how) == 0
        assert [f"{made.digest}: decoded samples are wrong" in str(one.message) for one in caught] == [True] * differs
        assert json.loads(capsys.readouterr().out)["tokenizer_is_the_datas"] is not differs
    assert len(IndexedDataset(tmp_path / "c")) == 1
