"""`engine clean` keeps the other columns of its input: every JSON value unchanged, from every format, none lost."""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cli.main import main
from engine.data.read.columns import merge_columns, other_columns
from engine.data.read.jsontext import dumps, loads, loads_exact_ints
from engine.data.tokenize.tokenizer import Tokenizer
from engine.errors import DataError
from tests.support.errors import raises
from tests.support.verbs import clean, prepare

VALUES: list[Any] = [
    *(
        None,
        True,
        0,
        -1,
        3,
        1.5,
        1e-300,
        2**63,
        2**64,
        10**30,
        -(10**19),
        "",
        "ünï 今天 👩‍👩‍👧‍👦",
        'a"b\\c\n\t\x01\x7f\u2028',
    ),
    *(
        [],
        {},
        [1, [2, [None, {}]]],
        {"a": {"b.c": [1, {"d": ""}]}, "": 0},
        math.inf,
        -math.inf,
        "half \ud83d of a pair",
    ),
]
DEEP = '{"a":[' * 3000 + "1" + "]}" * 3000


def cleaned(folder: Path, given: Path | list[Path], **how: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    inputs = given if isinstance(given, list) else [given]
    report = clean(inputs, str(folder / "out.jsonl"), overwrite=True, **how)
    assert report is not None
    lines = (folder / "out.jsonl").read_bytes().splitlines()
    return [json.loads(line) if len(line) < 10_000 else loads(line) for line in lines], report


@pytest.mark.parametrize("kind", ["in.jsonl", "in.json"])
def test_any_json_value_stays(tmp_path: Path, kind: str) -> None:
    records = [{"id": i, "text": f"text {i}", "any": value} for i, value in enumerate(VALUES)]
    lines = [json.dumps(record) for record in records] + [f'{{"text":"deep","any":{DEEP}}}']
    path = tmp_path / kind
    path.write_text("\n".join(lines) if kind == "in.jsonl" else f"[{','.join(lines)}]")
    rows, report = cleaned(tmp_path, path)
    for number, (row, record) in enumerate(zip(rows, records), 1):
        assert row == {"text": record["text"], "file": str(path), "record": number} | record
        assert type(row["any"]) is type(record["any"])
    assert rows[-1]["text"] == "deep" and DEEP.encode() in (tmp_path / "out.jsonl").read_bytes()
    assert report["other_columns"] == "kept" and not report["renamed_columns"]
    Tokenizer.train(iter(["some text"]), 257).save(tmp_path / "tok")
    again = prepare([tmp_path / "out.jsonl"], str(tmp_path / "data"), tokenizer=tmp_path / "tok")
    assert again.documents_in == len(lines) and not again.dropped


def test_rows_of_tables(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    when = datetime.datetime(2026, 12, 1, 1, 2, 3, tzinfo=datetime.UTC)
    columns = {
        "id": arrow.array([1, None]),
        "text": arrow.array(["first", "second"]),
        "meta": arrow.array([{"url": "http://a", "tags": ["x"]}, None]),
        "date": arrow.array([when.date(), None]),
        "at": arrow.array([when, when]),
        "fine": arrow.array([1, 2], arrow.timestamp("ns")),
        "far": arrow.array([253402300800, None], arrow.timestamp("s")),
        "nested": arrow.array([[{"t": 1000}], []], arrow.list_(arrow.struct([("t", arrow.timestamp("ns", "UTC"))]))),
        "price": arrow.array([decimal.Decimal("1.10"), None]),
        "raw": arrow.array([b"\xff\x00", b"plain"]),
        "wrong": arrow.Array.from_buffers(
            arrow.string(),
            2,
            arrow.array([b"\xff\xfe", b"x"]).buffers(),  # declared as string, but not UTF-8
        ),
    }
    table = arrow.table(columns)
    parquet.write_table(table, tmp_path / "in.parquet")
    with ipc.new_file(tmp_path / "in.arrow", table.schema) as out:
        out.write_table(table)
    rows, report = cleaned(tmp_path, [tmp_path / "in.parquet", tmp_path / "in.arrow"], json_key=("text",))
    assert report["dropped"] == {"exact duplicate": 2}
    first, second = ({k: v for k, v in row.items() if k not in ("file", "record", "text")} for row in rows)
    assert first == {
        **{"id": 1, "meta": {"url": "http://a", "tags": ["x"]}, "date": "2026-12-01", "raw": "/wA="},
        **{
            "at": "2026-12-01T01:02:03+00:00",
            "fine": "1970-01-01 00:00:00.000000001",
            "price": "1.10",
            "wrong": "//4=",
            "far": "10000-01-01 00:00:00.000",
            "nested": [{"t": "1970-01-01 00:00:00.000001000Z"}],
        },
    }
    assert (second["raw"], second["meta"], second["id"]) == ("plain", None, None)
    only, _ = cleaned(tmp_path, tmp_path / "in.arrow")
    assert [row["raw"] for row in only] == ["/wA=", "plain"]
    with open(tmp_path / "in.csv", "w", newline="") as out_csv:
        csv.writer(out_csv).writerows([["url", "body", "n"], ["http://a", "a, b", "1"], ["", "c", "x\ny"]])
    rows, _ = cleaned(tmp_path, tmp_path / "in.csv", json_key=("body",))
    assert [(row["text"], row["url"], row["n"]) for row in rows] == [("a, b", "http://a", "1"), ("c", "", "x\ny")]
    (tmp_path / "twice.csv").write_text("text,n,n\na,1,2\n")
    with raises(DataError, "read.document-refused", 2, "'n'"):
        cleaned(tmp_path, tmp_path / "twice.csv")
    assert len(cleaned(tmp_path, tmp_path / "twice.csv", keep_columns=False)[0]) == 1


def test_no_column_beside_it_costs_a_text(tmp_path: Path) -> None:
    """Times without a Python equivalent, unknown time zones and bytes that are not UTF-8, at any depth."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    ns, us = arrow.timestamp("ns"), arrow.timestamp("us")
    wrong = arrow.Array.from_buffers(arrow.string(), 1, arrow.array([b"\xff\xfe"]).buffers())
    columns = {
        "pairs": (arrow.array([[("k", 1)]], arrow.map_(arrow.string(), ns)), [["k", "1970-01-01 00:00:00.000000001"]]),
        "two": (arrow.array([[1000, None]], arrow.list_(ns, 2)), ["1970-01-01 00:00:00.000001000", None]),
        "coded": (arrow.array([1], ns).dictionary_encode(), "1970-01-01 00:00:00.000000001"),
        "far": (
            arrow.array([[{"t": 10**17 * 5}]], arrow.list_(arrow.struct([("t", us)]))),
            [{"t": "17814-05-16 00:53:20.000000"}],
        ),
        "days": (arrow.array([[10**7]], arrow.list_(arrow.date32())), ["29349-01-26"]),
        "zone": (arrow.array([1], arrow.timestamp("us", "Mars/Olympus")), "1970-01-01T00:00:00.000001+00:00"),
        "wrong": (arrow.ListArray.from_arrays(arrow.array([0, 1], arrow.int32()), wrong), ["//4="]),
        "long": (arrow.array([2**62], arrow.duration("s")), str(2**62)),
    }
    body = arrow.array([b"a text"])
    doc = arrow.StructArray.from_arrays([body, *(array for array, _ in columns.values())], ["body", *columns])
    kind = arrow.list_(arrow.struct([("role", arrow.string()), ("content", arrow.string()), ("at", ns)]))
    talk = arrow.array([[{"role": "user", "content": "hi", "at": 1}]], kind)
    table = arrow.table({"doc": doc, "talk": talk, **{name: array for name, (array, _) in columns.items()}})
    parquet.write_table(table, tmp_path / "in.parquet")
    expected = {name: value for name, (_, value) in columns.items()}
    ((row,), _) = cleaned(tmp_path, tmp_path / "in.parquet", json_key=("doc.body",))
    assert row["text"] == "a text" and row["doc"] == expected
    assert {name: row[name] for name in columns} == expected
    ((row,), _) = cleaned(tmp_path, tmp_path / "in.parquet", json_key=("talk",))
    assert row["text"] == "user: hi" and row["doc"] == {"body": "a text", **expected}


def test_columns_of_our_names_are_renamed_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"content": "one", "text": 5, "file": "x", "input_file": "y"}, {"content": "two", "record": 1}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(SystemExit) as end:
        given = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "a.jsonl"), "--json-key", "content"]
        main(["clean", *given])
    assert not end.value.code
    assert "because clean writes a column of that name: file -> input_input_file" in capsys.readouterr().out
    one, two = (json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines())
    place = {"file": str(tmp_path / "in.jsonl")}
    assert one == {"text": "one", **place, "record": 1, "input_text": 5, "input_input_file": "x", "input_file": "y"}
    assert two == {"text": "two", **place, "record": 2, "input_record": 1}
    rows, report = cleaned(tmp_path, tmp_path / "a.jsonl")  # cleaned again: the earlier location is kept too
    assert rows[1]["input_file"] == str(tmp_path / "in.jsonl")
    assert (rows[1]["input_record"], rows[1]["input_input_record"]) == (1, 2)
    assert set(report["renamed_columns"]) >= {"file -> input_file", "record -> input_record"}
    rows, report = cleaned(tmp_path, tmp_path / "a.jsonl", keep_columns=False)
    assert [sorted(row) for row in rows] == [["file", "record", "text"]] * 2 and report["other_columns"] == "omitted"


def test_of_nested_keys_the_others_stay() -> None:
    record = {"doc": {"text": "t", "id": 1}, "a.b": 2, "a": {"b": 3}, "only": {"text": "x"}}
    before = json.dumps(record)
    assert other_columns(record, ("doc.text", "a.b", "only.text")) == {"doc": {"id": 1}, "a": {"b": 3}}
    assert json.dumps(record) == before


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(json_values)
def test_what_is_written_is_read_again(value: Any) -> None:
    assert loads_exact_ints(dumps(value)) == value
    deep = value
    for _ in range(1500):
        deep = [deep]
    assert dumps(deep) == b"[" * 1500 + dumps(value) + b"]" * 1500


@given(st.dictionaries(st.sampled_from(["text", "input_text", "input_input_text", "x"]), st.integers()))
def test_no_column_is_lost_by_renaming(rest: dict[str, int]) -> None:
    row, renamed = merge_columns({"text": "t"}, rest)
    assert row["text"] == "t" and len(row) == len(rest) + 1
    assert {name: row[renamed.get(name, name)] for name in rest} == rest
