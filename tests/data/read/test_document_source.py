"""Documents from every kind of input: the same texts in the same order, and everything skipped is reported."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import engine.data.read.document_source as module
from engine.data.read import jsontext
from engine.data.read.document_batch import START, Cursor, DroppedItem
from engine.data.read.document_source import DocumentSource
from engine.data.read.inputs import list_inputs
from engine.errors import DataError
from tests.support.errors import raises

TEXTS = [f"document {i}\n\n" + 'ünïcode 今天, "quoted"\t' * (i % 9) for i in range(700)]


def read(*inputs: str | Path, start: Cursor = START, **how: Any) -> tuple[list[str], list[DroppedItem]]:
    batches = list(DocumentSource.of(list(inputs), **how).batches(start))
    return [text for batch in batches for text in batch.texts], [drop for batch in batches for drop in batch.drops]


def zstd_frames(data: bytes) -> bytes:
    pack = zstandard.ZstdCompressor().compress
    return pack(data[:1000]) + pack(data[1000:])


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data[:77]) + gzip.compress(data[77:]),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd_frames,
}


def lines(texts: list[str] = TEXTS) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def as_csv(separator: str) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=separator).writerows([("id", "text"), *((i, text) for i, text in enumerate(TEXTS))])
    return out.getvalue().encode()


def write(folder: Path, name: str) -> Path:
    """A file with TEXTS, in the format and compression of its name."""
    path, table = folder / name, pa.table({"text": TEXTS, "id": range(len(TEXTS))})
    if name.endswith(".parquet"):
        pq.write_table(table, path, row_group_size=300)
    elif name.endswith(".arrow"):
        kind = pa.ipc.new_file if "file" in name else pa.ipc.new_stream
        with kind(str(path), table.schema) as out:
            out.write_table(table, max_chunksize=300)
    else:
        suffix = "." + name.split(".")[1]
        data = {
            ".jsonl": lines,
            ".ndjson": lambda: lines().replace(b"\n", b"\r\n").rstrip(),
            ".json": lambda: json.dumps([{"text": text} for text in TEXTS], indent=1, ensure_ascii=False).encode(),
            ".csv": lambda: as_csv(","),
            ".tsv": lambda: as_csv("\t"),
        }[suffix]()
        path.write_bytes(PACKERS[path.suffix if path.suffix in PACKERS else ""](data))
    return path


@pytest.mark.parametrize(
    "name",
    [f"a.jsonl{packing}" for packing in PACKERS]
    + ["a.ndjson", "a.json", "a.json.zst", "a.csv", "a.csv.gz", "a.tsv", "a.parquet", "file.arrow", "stream.arrow"],
)
def test_every_format_gives_the_same_documents_from_any_point(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, name)
    assert read(path) == (TEXTS, [])
    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", 100)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4000)
    batches = list(DocumentSource.of([path]).batches())
    assert len(batches) > 2 and [text for batch in batches for text in batch.texts] == TEXTS
    assert batches[-1].consumed == path.stat().st_size
    for number, batch in enumerate(batches):
        rest, _ = read(path, start=batch.cursor)
        assert [text for done in batches[: number + 1] for text in done.texts] + rest == TEXTS


def test_json_of_all_shapes(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for content, texts in {
        lines(["a", "b"]): ["a", "b"],  # JSON lines in .json, as is usual with Megatron
        b'\xef\xbb\xbf{\n "text": "a"\n}\n{"text":\n"b"}': ["a", "b"],
        b' [ {"text": "a"} , {"text": "b"} ] \n': ["a", "b"],
        b"[]": [],
        b"": [],
    }.items():
        file.write_bytes(content)
        assert read(file) == (texts, []), content
    for content, words in {
        b'[{"text": "a"}, {"text": "b"}': "the array has no end",
        b'[{"text": "a"}, {"text": "b"': "malformed JSON",
        b'[{"text": "a"}] x': "after the end of the array",
        b'{\n"text": "a"} 5': "found int",
        b'[{"text": "\\ud800"}]': "surrogate",
        b'[{"text": "\xff"}]': "not UTF-8",
    }.items():
        file.write_bytes(content)
        assert words in str(read(file)[1][-1]), content


def test_a_number_at_the_end_of_a_block_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.data.read.jsontext._BLOCK_BYTES", 3)
    (tmp_path / "a.json").write_bytes(b'[12345, -1.5e+300, {"text": "a"}, 1e5, true]')
    texts, drops = read(tmp_path / "a.json")
    assert texts == ["a"] and len(drops) == 4 and all("wrong type" in str(drop) for drop in drops)


def test_folders_globs_urls_and_their_order(tmp_path: Path) -> None:
    for name in ("b/two.py", "b/one.txt", "a.md", "c.jsonl", ".git/x.py", "skip.log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines([name]) if name.endswith("jsonl") else name.encode())
    how = {"include": ("*.py", "*.txt", "*.md", "*.jsonl"), "exclude": (".git",)}
    wanted = ["a.md", "c.jsonl", "b/one.txt", "b/two.py"]
    assert read(tmp_path, **how)[0] == wanted
    assert sorted(read(f"file://{tmp_path}", **how)[0]) == sorted(wanted)
    assert read(tmp_path / "skip.log", f"{tmp_path}/**/*.py")[0] == ["skip.log", "b/two.py"]
    memory = fsspec.filesystem("memory")
    for name in ("2.txt", "1.jsonl.gz"):
        memory.pipe(f"/corpus/{name}", gzip.compress(lines([name])) if name.endswith("gz") else name.encode())
    assert read("memory://corpus")[0] == read("memory://corpus/*")[0] == ["1.jsonl.gz", "2.txt"]
    assert read("memory://corpus/2.txt", "memory://corpus/1.jsonl.gz")[0] == ["2.txt", "1.jsonl.gz"]
    for missing, code in (
        (tmp_path / "none", "read.not-found"),
        (f"{tmp_path}/*.none", "read.no-match"),
        ("memory://none", "read.not-found"),
        ("memory://corpus/*.none", "read.not-found"),
        ("nosuch://x", "read.url-not-listed"),
    ):
        with raises(DataError, code, missing):
            list_inputs([missing])
    with raises(DataError, "read.given-twice", "(-)"):
        list_inputs(["-", "-"])


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def feed(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", 100)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4000)
    feed(lines())
    batches = list(DocumentSource.of(["-"]).batches())
    assert [text for batch in batches for text in batch.texts] == TEXTS
    feed(lines())
    assert read("-", start=batches[1].cursor)[0] == [text for batch in batches[2:] for text in batch.texts]
    feed(lines().replace(b"document 3", b"document 4"))
    texts, drops = read("-", start=batches[1].cursor)
    assert texts == [] and "is not the input that this command started with" in str(drops[0])
    feed(b"one document")
    assert read("-", format="text")[0] == ["one document"]


def test_keys_lists_and_messages(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    records = [{"t": "title", "b": ["one", "two"]}, {"t": "", "b": chat}, {"t": "x", "b": [{"role": "user"}]}]
    file.write_text("\n".join(map(json.dumps, records)))
    texts, drops = read(file, keys=("t", "b"))
    assert texts == ["title\none\ntwo", "\nuser: hi\nassistant: hello"]
    assert "a.jsonl:3: wrong type: 'b'[0] is an object with the keys role, expected a string or" in str(drops[0])
    pq.write_table(pa.table({"b": [chat, [*chat, *chat]]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", keys=("b",))[0][0] == "user: hi\nassistant: hello"


@pytest.mark.parametrize(
    "line,words",
    [
        (b'{"text": "torn', "malformed JSON"),
        (b'{"text": "\\ud800"}', "not UTF-8: character 0 is a lone surrogate"),
        (b'{"body": "x", "id": 1}', "missing key: no key 'text'. The keys here are: body, id"),
        (b'{"text": 5}', "wrong type: 'text' is int"),
        (b'{"text": null}', "wrong type: 'text' is NoneType"),
        (b'["x"]', "wrong type: expected a JSON object"),
        (b'{"text": "\xff"}', "not UTF-8: byte 10 of the line is 0xff"),
        (b'{"text": "' + b"x" * 3000 + b'"}', "too large: a line of 3,013 bytes"),
        (b'{"text": "' + b"x" * 30000 + b'"}', "too large: a line of 30,013 bytes"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(
    tmp_path: Path, line: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1000)
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines(["fine"]) + line + b"\n" + lines(["also", "fine"]))
    texts, drops = read(file, max_document_bytes=2000)
    assert texts == ["fine", "also", "fine"] and len(drops) == 1 and drops[0].stops
    assert f"{file}:2: {words}" in str(drops[0])
    file.write_bytes(lines(["fine"]) + line)
    texts, drops = read(file, max_document_bytes=2000)
    assert texts == ["fine"] and f"{file}:2: " in str(drops[0])


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst"])
def test_damaged_archives(tmp_path: Path, packing: str) -> None:
    whole = write(tmp_path, f"a.jsonl{packing}").read_bytes()
    torn, damaged, none = (tmp_path / f"{name}.jsonl{packing}" for name in ("torn", "bad", "none"))
    torn.write_bytes(whole[: len(whole) * 2 // 3])
    texts, drops = read(torn)
    assert texts == TEXTS[: len(texts)] and len(texts) < len(TEXTS)
    assert len(drops) == 1 and drops[0].reason == "cannot be read" and "ends too early" in drops[0].detail
    damaged.write_bytes(whole[:60] + bytes(b ^ 0x55 for b in whole[60:120]) + whole[120:])
    texts, drops = read(damaged)
    assert texts == TEXTS[: len(texts)] and drops and all(drop.stops for drop in drops)
    none.write_bytes(b"this is no archive at all")
    assert read(none)[0] == [] and read(none)[1][0].reason == "cannot be read"


def test_rows_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'id,text\n1,a\n2\n3,"b\nc"\n4,\xff\n5,' + b"x" * 99 + b"\n6,e\n")
    texts, drops = read(file, max_document_bytes=50)
    assert texts == ["a", "b\nc", "e"]
    assert [drop.reason for drop in drops] == ["malformed CSV", "not UTF-8", "too large"]
    assert "line 3: 1 fields, expected 2" in drops[0].detail and drops[0].record == 2
    column = pa.array([b"good", b"\xff", b"too"], pa.binary())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    texts, drops = read(tmp_path / "a.parquet")
    assert texts == ["good", "too"] and [(d.record, d.reason) for d in drops] == [(2, "not UTF-8")]
    assert "no column 'body'. The columns here are: text" in str(read(tmp_path / "a.parquet", keys=("body",))[1][0])
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-5])
    (tmp_path / "b.arrow").write_bytes(b"nothing")
    for name in ("b.parquet", "b.arrow"):
        assert "not readable as" in str(read(tmp_path / name)[1][0])


def test_files_that_are_no_text(tmp_path: Path) -> None:
    for name, content in {"bad.py": b"\xff\xfe", "big.py": b"x" * 50, "good.py": b"\xef\xbb\xbf\xc3\xa4"}.items():
        (tmp_path / name).write_bytes(content)
    texts, drops = read(tmp_path, max_document_bytes=40)
    assert texts == ["ä"] and not any(drop.stops for drop in drops)  # the folder was given, not these files
    assert Counter(drop.reason for drop in drops) == {"not UTF-8": 1, "too large": 1}
    for name, words in {"bad.py": "Byte 0 is 0xff", "big.py": "more than max_document_bytes = 40"}.items():
        (drop,) = read(tmp_path / name, max_document_bytes=40)[1]
        assert drop.stops and words in str(drop)


def test_memory_is_bounded_by_the_limit_not_by_the_line_or_the_archive(tmp_path: Path) -> None:
    bomb = zstandard.ZstdCompressor().compress(b"x" * (300 << 20))
    line = zstandard.ZstdCompressor().compress(b'\n{"text": "after"}\n')
    (tmp_path / "bomb.jsonl.zst").write_bytes(bomb + line)
    tracemalloc.start()
    texts, drops = read(tmp_path / "bomb.jsonl.zst", max_document_bytes=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["after"] and "a line of 314,572,801 bytes" in str(drops[0])
    assert peak < 160 << 20


@pytest.mark.parametrize("name", ["torn.json", "torn.arrow"])
def test_rows_before_a_damage_are_not_lost(name: str, tmp_path: Path) -> None:
    rows = [{"text": f"document {i}"} for i in range(40)]
    if name.endswith("json"):
        data = json.dumps(rows).encode()
    else:
        import pyarrow

        table, sink = pyarrow.Table.from_pylist(rows), pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table, 10)
        data = sink.getvalue().to_pybytes()
    (tmp_path / name).write_bytes(data[: len(data) * 3 // 4])
    batches = list(DocumentSource.of([tmp_path / name]).batches())
    texts, drops = [t for b in batches for t in b.texts], [d for b in batches for d in b.drops]
    assert texts == [row["text"] for row in rows[: len(texts)]] and len(texts) >= 20
    assert [(d.reason, d.record) for d in drops] == [("cannot be read", len(texts) + 1)]


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_what_follows_a_stream_of_an_archive_is_a_stream_or_damage(suffix: str, tmp_path: Path) -> None:
    line = b'{"text": "one"}\n'
    pack: dict[str, Any] = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": zstandard.ZstdCompressor().compress,
    }
    good, torn = pack[suffix](line), bytearray(pack[suffix](line))
    torn[0] ^= 1
    path = tmp_path / f"a.jsonl.{suffix}"
    for data, documents, damage in (
        (good * 3, 3, False),
        (good + bytes(torn), 1, True),
        (good + b"garbage", 1, True),
        (b"", 0, True),
    ):
        path.write_bytes(data)
        batches = list(DocumentSource.of([path]).batches())
        assert sum(len(b.texts) for b in batches) == documents
        assert any(d.reason == "cannot be read" for b in batches for d in b.drops) is damage, data


def test_a_table_in_an_archive(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "t.parquet", write_page_checksum=True)
    data = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet.zst").write_bytes(zstandard.ZstdCompressor().compress(data))
    for name in ("t.parquet", "t.parquet.zst"):
        assert [t for b in DocumentSource.of([tmp_path / name]).batches() for t in b.texts] == ["a", "b"]


# Values of a field that is not read: json.loads accepts all of them except the depth.
ODD_FIELDS = {
    "nan": "NaN",
    "infinity": "[Infinity, -Infinity, 1e999]",
    "half a surrogate": '"bad \\ud800 half"',
    "digits": "9" * 5000,
    "depth": '{"a":' * 3000 + "[" * 3000 + "]" * 3000 + "}" * 3000,
    "twice": '1, "odd": 2',
}


@pytest.mark.parametrize("odd", ODD_FIELDS.values(), ids=ODD_FIELDS)
def test_an_odd_field_beside_it_loses_no_text(tmp_path: Path, odd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = '{"text": "before", "odd": ' + odd + ', "meta": {"text": "after"}}'
    for name, content in {
        "a.jsonl": record + "\n" + '{"text": "z"}\n',
        "lines.json": record + "\n" + '{"text": "z"}\n',
        "array.json": f'[{record}, {{"text": "z"}}]',
        "stream.json": f'{record} {{"text":\n"z"}}',
    }.items():
        (tmp_path / name).write_text(content)
        assert read(tmp_path / name) == (["before", "z"], []), name
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(record.encode())))
    assert read("-", keys=("text", "meta.text")) == (["before\nafter"], [])


def test_json_that_is_made_to_break_readers_is_rejected(tmp_path: Path) -> None:
    too_deep = '{"odd": ' + "[" * 100_001 + "]" * 100_001 + ', "text": "a"}'
    (tmp_path / "a.jsonl").write_text(too_deep + '\n{"text": "z"}')
    texts, drops = read(tmp_path / "a.jsonl")
    assert texts == ["z"] and "nested more than 100,000 deep" in str(drops[0])


def test_deep_json_is_read_and_rejected_as_shallow_json_is() -> None:
    random, plain = Random(5), json.JSONDecoder()

    def value(depth: int) -> Any:
        if depth == 5 or random.random() < 0.4:
            return random.choice([1, -2.5, 'a"\\é\U0001f600', None, True, "", 10**40, {}, []])
        if random.random() < 0.5:
            return [value(depth + 1) for _ in range(random.randrange(4))]
        return {random.choice("abc") * random.randrange(3): value(depth + 1) for _ in range(random.randrange(4))}

    def outcome(read: Callable[[str], Any], text: str) -> Any:
        try:
            return repr(read(text))
        except json.JSONDecodeError:
            return "refused"

    refused = 0
    for _ in range(2000):
        text = json.dumps([value(0)], indent=random.choice([None, 1]))
        at = random.randrange(len(text))
        text = random.choice([text, text[:at] + random.choice('",]}[{: 1') + text[at + random.randrange(2) :]]).lstrip()
        expected = outcome(plain.raw_decode, text)
        refused += expected == "refused"
        assert outcome(lambda text: jsontext._DECODER._decode_iteratively(text, 0), text) == expected, text
    assert 300 < refused < 1500


def test_keys_inside_of_objects_and_structs(tmp_path: Path) -> None:
    rows = [
        {"meta": {"body": "one", "more": {"x": "1"}}, "id": 1},
        {"meta.body": "literal", "meta": {"body": "no", "more": {"x": "2"}}},
        {"meta": {"more.x": "3", "body": "three"}},
        {"meta": {"bodies": "?"}, "id": 4},
        {"meta": None},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    texts, drops = read(file, keys=("meta.body",))
    assert texts == ["one", "literal", "three"] and [drop.record for drop in drops] == [4, 5]
    assert "no key 'meta.body'. The keys here are: id, meta.bodies;" in str(drops[0])
    assert read(file, keys=("meta.more.x", "meta.body"))[0] == ["1\none", "2\nliteral", "3\nthree"]
    table = pa.table({"meta": [{"body": b"one", "n": {"x": "1"}}, None, {"body": b"\xff", "n": None}], "id": [1, 2, 3]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as out:
        out.write_table(table)
    literal = table.append_column("meta.body", [["a", "b", "c"]])
    pq.write_table(literal, tmp_path / "literal.parquet")
    for name in ("a.parquet", "a.arrow"):
        texts, drops = read(tmp_path / name, keys=("meta.body",))
        assert texts == ["one"] and [(d.record, d.reason) for d in drops] == [(2, "wrong type"), (3, "not UTF-8")]
        assert read(tmp_path / name, keys=("meta.n.x", "meta.body"))[0] == ["1\none"]
        (drop,) = read(tmp_path / name, keys=("meta.text",))[1]
        assert "no column 'meta.text'. The columns here are: meta.body, meta.n.x, id" in str(drop)
    assert read(tmp_path / "literal.parquet", keys=("meta.body",))[0] == ["a", "b", "c"]


def test_a_column_that_is_there_twice_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,id,id,text\na,1,2,b\n")
    (tmp_path / "b.csv").write_text("text,id,id\na,1,2\n")
    table = pa.table([["a"], ["b"], ["c"], ["d"]], names=["text", "id", "text", "id"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as out:
        out.write_table(table)
    for name in ("a.csv", "a.parquet", "a.arrow"):
        texts, drops = read(tmp_path / name)
        assert texts == [] and drops[0].stops and "2 columns have the name 'text'" in str(drops[0]), name
    assert read(tmp_path / "b.csv") == (["a"], [])  # the other columns do not matter
    assert "no column 'body'. The columns here are: text, id, id;" in str(
        read(tmp_path / "b.csv", keys=("body",))[1][0]
    )


def test_a_zstd_stream_that_refers_far_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", 100)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 4000)
    pack = zstandard.ZstdCompressor().compressobj()  # without content size: the header has a byte for the window
    frame = bytearray(pack.compress(lines()) + pack.flush())
    for log in (28, 31):  # above the library's default limit; as written by `zstd --ultra --long=31`
        frame[5] = (log - 10) << 3
        assert zstandard.get_frame_parameters(bytes(frame)).window_size == 1 << log
        (tmp_path / "a.jsonl.zst").write_bytes(bytes(frame))
        assert read(tmp_path / "a.jsonl.zst") == (TEXTS, [])
        begun = next(DocumentSource.of([tmp_path / "a.jsonl.zst"]).batches())
        assert read(tmp_path / "a.jsonl.zst", start=begun.cursor) == (TEXTS[len(begun.texts) :], [])
        for start, expected in ((START, TEXTS), (begun.cursor, TEXTS[len(begun.texts) :])):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes(frame))))
            assert read("-", start=start) == (expected, [])
