"""Files of folders, globs and lists of inputs: each is read once, or listed with the reason why not."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

import engine.data.read.document_source as module
from engine.data.read.document_batch import START, Cursor, DocumentBatch
from engine.data.read.document_source import DocumentSource
from engine.data.read.inputs import list_inputs
from engine.data.read.own import OwnFiles
from engine.errors import DataError
from tests.support.errors import raises


def line(**record: Any) -> str:
    return json.dumps(record) + "\n"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(*inputs: str | Path, start: Cursor = START, **how: Any) -> DocumentBatch:
    """Read the inputs as one batch."""
    whole = DocumentBatch()
    for batch in DocumentSource.of(list(inputs), **how).batches(start):
        whole.extend(batch)
    return whole


def left_out(batch: DocumentBatch) -> dict[str, str]:
    """Base name of each drop -> reason."""
    return {os.path.basename(drop.file): drop.reason for drop in batch.drops}


# ---- folders ----


def test_linked_folders_are_read_once_each(tmp_path: Path) -> None:
    write(tmp_path / "real/r.jsonl", line(text="linked"))
    write(tmp_path / "in/a.jsonl", line(text="a"))
    write(tmp_path / "in/sub/s.jsonl", line(text="s"))
    for name, target in {
        "link": "../real",  # outside the input
        "twin": "../real",  # a second link to it
        "loop": ".",  # the folder itself
        "up": "..",  # the parent: its folders were already visited
        "file.jsonl": "a.jsonl",  # a link to a file is a file
        "broken.jsonl": "nowhere",
        "circle": "circle",
    }.items():
        (tmp_path / "in" / name).symlink_to(target)
    batch = read(tmp_path / "in")
    assert sorted(batch.texts) == ["a", "a", "linked", "s"]
    assert left_out(batch) == {
        **{"loop": "linked folder", "twin": "linked folder", "in": "linked folder", "real": "linked folder"},
        **{"broken.jsonl": "broken link", "circle": "broken link"},
    }
    assert not any(drop.stops for drop in batch.drops)
    assert [(note.kind, note.detail) for note in batch.notes] == [
        ("read once more", f"the same file as {tmp_path}/in/a.jsonl")
    ]
    with raises(DataError, "read.broken-link", "in/broken.jsonl", "nowhere"):
        list_inputs([tmp_path / "in/broken.jsonl"])
    assert left_out(read(f"{tmp_path}/in/*")) == {
        **dict.fromkeys(("link", "twin", "loop", "up", "sub"), "no regular file"),
        **{"broken.jsonl": "broken link", "circle": "broken link"},
    }


def test_what_is_no_regular_file_is_counted_or_rejected_by_its_kind(tmp_path: Path) -> None:
    write(tmp_path / "in/a.txt", "text")
    os.mkfifo(tmp_path / "in/pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "in/socket"))
        batch = read(tmp_path / "in")
        assert batch.texts == ["text"] and left_out(batch) == {
            "pipe.jsonl": "no regular file",
            "socket": "no regular file",
        }
        assert "it is a pipe" in str(batch.drops[0]) and "it is a socket" in str(batch.drops[1])
        with raises(DataError, "read.not-a-file", "in/socket", "a socket"):
            list_inputs([tmp_path / "in/socket"])
    with raises(DataError, "read.not-a-file", "/dev/null", "a device"):
        list_inputs(["/dev/null"])
    with raises(DataError, "read.given-twice", "pipe.jsonl"):
        list_inputs([tmp_path / "in/pipe.jsonl"] * 2)
    assert list_inputs([tmp_path / "in"], include=["*.md"], exclude=["socket*"]).excluded == 3


def test_other_input_is_noticed_in_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", 10)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 100)
    texts = [f"document {i}" for i in range(600)]
    rows = [line(text=text).strip() for text in texts[:300] + [""] + texts[300:]]
    forms = {
        "": "[" + ", ".join(rows).replace(', {"text": ""}', ', {"txt": 1}') + "]",
        "csv": "text\n" + "\n".join(texts),
    }
    for form, content in forms.items():

        def batches(content: str, start: Cursor = START, form: str = form) -> list[DocumentBatch]:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
            return list(DocumentSource.of(["-"], format=form).batches(start))

        found = batches(content)
        assert [text for batch in found for text in batch.texts] == texts and len(found) > 2
        assert [note.kind for batch in found for note in batch.notes] == (["read as JSON"] if not form else [])
        for batch in found[:2]:
            rest = batches(content, batch.cursor)
            assert [text for one in rest for text in one.texts] == texts[texts.index(batch.texts[-1]) + 1 :]
        other = batches(content.replace("document 7", "document 8"), found[0].cursor)
        assert not any(batch.texts for batch in other)
        assert "is not the input that this command started with" in str(other[0].drops[0])


@pytest.mark.parametrize("packing", [bytes, gzip.compress, zstandard.ZstdCompressor().compress])
def test_a_pipe_that_is_named_is_read_as_standard_input_is(
    tmp_path: Path, packing: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", 100)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1000)
    texts = [f"document {i}" for i in range(300)]
    data = packing("".join(line(text=text) for text in texts).encode())
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def batches(data: bytes, start: Cursor = START) -> list[DocumentBatch]:
        writer = threading.Thread(target=pipe.write_bytes, args=(data,))
        writer.start()
        found = list(DocumentSource.of([pipe]).batches(start))
        writer.join()
        return found

    found = batches(data)
    assert len(found) > 2 and [text for batch in found for text in batch.texts] == texts
    assert found[-1].consumed == len(data), "the bytes that were read are told"
    assert [text for batch in batches(data, found[0].cursor) for text in batch.texts] == texts[len(found[0].texts) :]
    other = batches(packing(b"".join(line(text=f"other {i}").encode() for i in range(300))), found[0].cursor)
    assert "is not the input that this command started with" in str(other[0].drops[0])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read("-").texts == texts


def test_files_that_may_not_be_read_stop(for_all: Path) -> None:
    """As another user if the tests run as root."""
    write(for_all / "in/a.txt", "text")
    write(for_all / "in/secret.txt", "text").chmod(0)
    write(for_all / "in/shut/b.txt", "text")
    write(for_all / "in/blind/c.txt", "text")  # its names can be listed, but its files not opened
    (for_all / "in/shut").chmod(0)
    (for_all / "in/blind").chmod(0o444)
    script = (
        "import os, sys, engine.data.read.document_source as s\nlist(s.DocumentSource.of([sys.argv[1]]).batches())\n"
    )
    script += "if not os.getuid(): os.setuid(65534)\n"
    script += "b = [b for given in sys.argv[1:] for b in s.DocumentSource.of([given]).batches()]\n"
    script += "print([t for x in b for t in x.texts], *[f'{d}|{d.stops}' for x in b for d in x.drops], sep='\\n')"
    given = [str(for_all / name) for name in ("in", "in/*/*.txt", "in/**/a.txt")]
    done = subprocess.run([sys.executable, "-c", script, *given], capture_output=True, text=True)
    for folder in ("shut", "blind"):
        (for_all / "in" / folder).chmod(0o755)
    unread = ": cannot be read: cannot "
    assert done.stdout.splitlines() == [
        "['text', 'text']",
        f"{for_all}/in/secret.txt: cannot be read: Permission denied; check its permissions|True",
        f"{for_all}/in/blind/c.txt: cannot be read: Permission denied; check its permissions|True",
        f"{for_all}/in/shut{unread}list this folder: Permission denied. Exclude it or fix its permissions.|True",
        f"{for_all}/in/blind{unread}list this folder: Permission denied. Fix its permissions.|True",
        f"{for_all}/in/shut{unread}list this folder: Permission denied. Fix its permissions.|True",
        f"{for_all}/in/blind{unread}list this folder: Permission denied. Fix its permissions.|True",
        f"{for_all}/in/shut{unread}list this folder: Permission denied. Fix its permissions.|True",
    ], done.stderr


def test_a_second_read_of_a_file_is_reported(tmp_path: Path) -> None:
    a = write(tmp_path / "in/a.jsonl", line(text="a"))
    os.link(a, tmp_path / "hard.jsonl")
    (tmp_path / "soft.jsonl").symlink_to(a)
    write(tmp_path / "in/b.jsonl", line(text="b"))
    given = [tmp_path / "in", a, tmp_path / "hard.jsonl", tmp_path / "soft.jsonl", f"{tmp_path}/in/b*", f"file://{a}"]
    batch = read(*given)
    assert batch.texts == ["a", "b", "a", "a", "a", "b", "a"]  # allowed if given explicitly
    assert Counter(note.kind for note in batch.notes) == {"read once more": 5}
    assert [note.detail.split("/")[-1] for note in batch.notes] == ["a.jsonl"] * 3 + ["b.jsonl", "a.jsonl"]


# ---- files of the engine ----


def test_what_the_engine_wrote_is_no_input(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", line(text="a"))
    earlier = ("x-train.bin", "x-train.idx", "x-train.json", "x-report.json", "x-skipped.jsonl")
    for name in (*earlier, "tok/tokenizer.json", "tok/merges.txt", "x-tokenizer/any.txt", "y.parts/settings.json"):
        write(tmp_path / name, "{}\n")
    write(tmp_path / "y.parts/train.lengths", "1")
    batch = read(tmp_path)
    names = {*earlier, "tokenizer.json", "merges.txt", "x-tokenizer", "y.parts"}
    assert batch.texts == ["a"] and left_out(batch) == dict.fromkeys(names, "own file")
    assert not any(drop.stops for drop in batch.drops)
    assert left_out(read(f"{tmp_path}/*.json*")) == dict.fromkeys([n for n in earlier if ".js" in n], "own file")
    # Files that only look like outputs are read.
    write(tmp_path / "other/x.json", line(text="b"))
    write(tmp_path / "other/y-report.json", line(text="c"))
    assert read(tmp_path / "other").texts == ["b", "c"]
    # Outputs of this command; the work folder of a killed run is skipped without a message.
    own_files = OwnFiles(
        [tmp_path / "other/x.json", tmp_path / "none"], tmp_path / "other/z.model", tmp_path / "other/o.parts"
    )
    write(tmp_path / "other/z.model", "text")
    write(tmp_path / "other/o.parts/settings.json", "{}")
    batch = read(tmp_path / "other", own_files=own_files)
    assert batch.texts == ["c"] and left_out(batch) == dict.fromkeys(["x.json", "z.model"], "own file")
    with raises(DataError, "read.input-is-output", "x.json"):
        read(tmp_path / "other/x.json", own_files=own_files)


def test_a_cleaned_copy_beside_its_source_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", line(text="a"))
    write(tmp_path / "clean.jsonl", line(text="a", file="a.jsonl", record=1))
    write(tmp_path / "clean-dropped.jsonl", line(file="a.jsonl", record=2, reason="x"))
    write(tmp_path / "clean-report.json", json.dumps({"inputs": [str(tmp_path)]}))
    batch = read(tmp_path)
    assert batch.texts == ["a"] and set(left_out(batch)) == {"clean.jsonl", "clean-dropped.jsonl", "clean-report.json"}
    assert f"the cleaned text of {tmp_path}/a.jsonl, which is read" in "".join(map(str, batch.drops))
    (tmp_path / "a.jsonl").unlink()
    batch = read(tmp_path)
    assert batch.texts == ["a"] and set(left_out(batch)) == {"clean-dropped.jsonl", "clean-report.json"}


# ---- format detection ----


@pytest.mark.parametrize("name", ["a.txt", "a.json.1", "a.data", "a", "a.log.gz", "a.JSONL.bak.zst"])
def test_json_lines_under_another_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(Path(name).suffix, bytes)
    texts = [f"text {i}" for i in range(40)]
    lines = [line(id=float("nan"), text=text) for text in texts]
    file = write(tmp_path / name, pack(("\n" + "".join(lines)).encode()))
    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", 10)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 300)
    batches = list(DocumentSource.of([file]).batches())
    assert [text for batch in batches for text in batch.texts] == texts
    assert [note.kind for batch in batches for note in batch.notes] == ["read as JSON lines"]
    for number, batch in enumerate(batches):  # detected again, but reported once
        rest = read(file, start=batch.cursor)
        assert [*(text for done in batches[: number + 1] for text in done.texts), *rest.texts] == texts
        assert not rest.notes
    assert len(read(file, format="text").texts) == 1
    # One truncated line is an error, not another format.
    file.write_bytes(pack("".join([lines[0][:9] + "\n", *lines[1:3]]).encode()))
    batch = read(file)
    assert batch.texts == texts[1:3] and [drop.reason for drop in batch.drops] == ["malformed JSON"]
    # Without the key it is read as one text, and a note says so.
    batch = read(file, keys=("body",))
    assert len(batch.texts) == 1
    assert "read as one text: its lines are JSON objects without the key 'body'. The keys here are: id, text" in str(
        batch.notes[0]
    )


def test_json_under_another_name_and_text_that_looks_like_it(tmp_path: Path) -> None:
    long = "x" * (3 << 20)
    for content, texts, notes in (
        (f' [{line(text="a")}, {{"text": "b"}}]', ["a", "b"], ["read as JSON"]),
        (line(text=long) + line(text="b"), [long, "b"], ["read as JSON lines"]),
        (line(text="a").strip(), ["a"], ["read as JSON lines"]),
        ("[1, 2]\n", None, []),
        ("[link](x)\n{text}\n", None, []),
        ('{"text": "an example"}\nprose\nmore of it\n', None, []),
        ("{\n", None, []),
        ('{"text": "one of"}\n{three\n{lines}\n', None, []),
        ("", [""], []),
    ):
        batch = read(write(tmp_path / "a.md", content))
        assert batch.texts == ([content] if texts is None else texts), content[:40]
        assert [note.kind for note in batch.notes] == notes, content[:40]
    # .json in which only the first line is truncated is still JSON lines
    batch = read(write(tmp_path / "a.json", '{"text": "a\n' + line(text="b") + line(text="c")))
    assert batch.texts == ["b", "c"] and [drop.record for drop in batch.drops] == [1]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstandard.ZstdCompressor().compress])
def test_an_archive_under_another_name_is_unpacked(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    for name, content, text in (("a.jsonl", line(text="a"), "a"), ("b.zstd", "BZh is text", "BZh is text")):
        batch = read(write(tmp_path / name, pack(content.encode())))
        assert batch.texts == [text] and [note.kind for note in batch.notes] == ["unpacked"]
    assert read(write(tmp_path / "c.txt", "BZhang is a name")).texts == ["BZhang is a name"]


def test_zero_bytes_are_no_text(tmp_path: Path) -> None:
    for name, content, texts, record in (
        ("a.txt", b"text\n" + b"\0" * 5000, [], 0),
        ("b.txt", b"\0" * 300_000, [], 0),  # longer than the limit
        ("c.txt", b"x" * 500 + b"\0\0" + b"x" * 500, [], 0),
        ("utf16.txt", "a text".encode("utf-16-le"), [], 0),
        ("one.txt", b"one \0 in a text " + b"x" * 100, ["one \0 in a text " + "x" * 100], None),
        ("a.jsonl", b'{"text": "a"}\n{"text": "to' + b"\0" * 5000, ["a"], 2),
        ("b.jsonl", b'{"text": "a"}\n' + b"\0" * 300_000, ["a"], 2),
        ("c.jsonl", b'{"text": "a"}\n' + b"\0" * 300 + b'{"text": "b"}\n{"text": "c"}', ["a", "c"], 2),
        ("a.csv", b"text\na\n" + b"\0" * 50, ["a"], 2),
    ):
        batch = read(write(tmp_path / name, content), max_document_bytes=100_000)
        assert batch.texts == texts, name
        drops = [(drop.reason, drop.record, drop.stops) for drop in batch.drops]
        assert drops == ([] if record is None else [("zero bytes", record, True)]), name
    batch = read(write(tmp_path / "a.json", b'[{"text": "a"}]\n' + b"\0" * 300))
    assert batch.texts == ["a"] and "zero bytes after the end" in str(batch.drops[0])
    assert not read(tmp_path, include=["b.txt"]).drops[0].stops  # found in a folder


def test_a_file_that_changes_while_it_is_read_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", 10)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1000)
    for grows in (True, False):
        file = write(tmp_path / "a.jsonl", "".join(line(text=f"text {i}") for i in range(3000)))
        batches = DocumentSource.of([file]).batches()
        whole = next(batches)
        if grows:
            with open(file, "a") as more:
                more.write(line(text="more"))
        else:
            os.truncate(file, file.stat().st_size - 1000)
        for batch in batches:
            whole.extend(batch)
        reported = [*whole.notes, *(drop for drop in whole.drops if drop.record == 0)]
        assert len(reported) == 1 and "changed while it was read: it had" in str(reported[0])
        assert (whole.texts[-1] == "more") is grows
        assert bool(whole.notes) is grows  # lost content is an error, appended content is not
        assert grows or (whole.drops[0].stops and whole.drops[0] in reported)  # reported before the truncated line


# ---- globs ----


def test_globs_find_what_pythons_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b/a.txt", "b/c/x.txt", "b/c/.h/x.txt", ".h/a.txt", "b/.x.txt", "a[1]/x.txt", "b-/x.txt"):
        write(tmp_path / name, name)
    for pattern in (
        "*.txt",
        "**/*.txt",
        "b/**/*",
        "**",
        "*/*.txt",
        "**/c/*",
        "b/.*",
        "*/**/x.txt",
        "a[[]1]/*",
        "./b*/*",
    ):
        for given in (pattern, f"{tmp_path}/{pattern}"):
            expected = sorted(path for path in glob.glob(given, recursive=True) if os.path.isfile(path))
            found = [file.name for file in list_inputs([given]).files if file.drop is None]
            assert found == expected != [], given


def test_a_glob_reads_linked_folders_once_each(tmp_path: Path) -> None:
    write(tmp_path / "in/a.txt", "a")
    write(tmp_path / "in/b/b.txt", "b")
    (tmp_path / "in/b/up").symlink_to("..")
    (tmp_path / "in/c").symlink_to("b")
    batch = read(f"{tmp_path}/in/**/*.txt")
    assert batch.texts == ["a", "b"] and not batch.notes
    assert left_out(batch) == {"up": "linked folder", "c": "linked folder"}


# ---- counts for tables and arrays ----


def test_blank_lines_of_a_table_are_counted_and_hide_nothing(tmp_path: Path) -> None:
    batch = read(write(tmp_path / "a.csv", '\n\ntext,id\na,1\n\n"",2\n'))
    assert batch.texts == ["a", ""] and [record for _, record in batch.where] == [3, 5]
    assert [(drop.record, drop.reason, drop.stops) for drop in batch.drops] == [
        (record, "blank line", False) for record in (1, 2, 4)
    ]
    (drop,) = read(write(tmp_path / "b.csv", '"text,id\na,1\n')).drops
    assert drop.reason == "cannot be read" and "the first row" in drop.detail


def test_a_byte_that_is_no_text_costs_one_row_or_element(tmp_path: Path) -> None:
    table = write(tmp_path / "a.csv", b"text,id\ncaf\xe9,1\nb,2\xe9\nc,3\n\0\0\0\0\0")
    batch = read(table, keep_other_columns=True)
    assert batch.texts == ["b", "c"] and batch.other_columns == [{"id": "2\\xe9"}, {"id": "3"}]
    assert [(d.record, d.reason) for d in batch.drops] == [(1, "not UTF-8"), (4, "zero bytes")]
    assert "line 2: byte 0xe9" in batch.drops[0].detail
    array = write(tmp_path / "a.json", b'[{"text": "a"}, {"text": "\xe9"}, {"text": "c", "x": "\\udce9"}]')
    batch = read(array)
    assert batch.texts == ["a", "c"] and [(d.record, d.reason) for d in batch.drops] == [(2, "not UTF-8")]
    assert "byte 0xe9" in batch.drops[0].detail


@pytest.mark.parametrize("before", ["\n" * 40, '{"version": 1}\n', '{"version": 1}\n\n{"by": "me"}\n', "\ufeff\n  \n"])
def test_json_lines_behind_something_else(tmp_path: Path, before: str) -> None:
    batch = read(write(tmp_path / "a.log", before + line(text="a")))
    assert batch.texts == ["a"] and [note.kind for note in batch.notes] == ["read as JSON lines"]
    assert len(batch.drops) == before.count("\n")
