"""Plots and measured timelines of schedules, and the `engine schedule` command."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.cli.main import main
from engine.errors import DataError
from engine.pipeline.actions import Op, parse_plan
from engine.pipeline.draw import draw
from engine.pipeline.passes import compute_only
from engine.pipeline.schedules import build, load_plan
from engine.pipeline.simulate import Costs, Event, Timeline, simulate
from engine.pipeline.timeline import from_json, measured_costs, read_timeline, to_json
from tests.support.errors import raises

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: Path) -> list[str]:
    root = ElementTree.parse(svg).getroot()
    assert root.tag == f"{SVG}svg"
    return ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]


# --- draw ------------------------------------------------------------------------------------------------------------


def test_a_picture_has_a_row_per_rank_and_a_number_in_every_box(tmp_path: Path) -> None:
    plans = [("one", build("1f1b", 4, 1, 6)), ("two", build("zb-v", 4, 2, 6))]
    timelines = [(title, simulate(plan)) for title, plan in plans]
    draw(timelines, tmp_path / "new" / "a.svg", "ms")
    draw(timelines, tmp_path / "a.png", "ms")
    shown = texts(tmp_path / "new" / "a.svg")
    assert [text for text in shown if text.startswith("rank")] == [f"rank {rank}" for rank in range(4)] * 2
    assert {"one", "two", "time (ms)", "F  forward", "B  backward", "I  input gradient", "idle"} <= set(shown)
    boxes = sum(len(lane) for _, timeline in timelines for lane in timeline.lanes)
    assert sum(text in "012345" for text in shown) >= boxes
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and image.width > 1000 and image.height > 300
        colours = {tuple(int(c) for c in pixel[:3]) for _, pixel in image.convert("RGB").getcolors(1 << 24)}
        assert {(0x56, 0xB4, 0xE9), (0xE6, 0x9F, 0x00), (0xF0, 0xE4, 0x42), (0x2B, 0xAF, 0x88)} <= colours


def test_numbers_that_would_be_too_small_are_not_drawn(tmp_path: Path) -> None:
    draw([("many", simulate(build("zb-v", 8, 2, 99)))], tmp_path / "a.svg")
    shown = texts(tmp_path / "a.svg")
    assert "42" not in shown and "rank 7" in shown and "time" in shown


def test_one_rank_and_a_step_that_takes_no_time_can_be_drawn(tmp_path: Path) -> None:
    draw([("none", simulate(build("gpipe", 1, 1, 2), Costs((0.0,), (0.0,), (0.0,))))], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


# --- measured timelines ----------------------------------------------------------------------------------------------


def test_a_timeline_survives_its_file() -> None:
    timeline = simulate(build("zb-v", 2, 2, 3), Costs(comm=0.25))
    assert from_json(json.loads(json.dumps(to_json(timeline, 7)))) == (timeline, 7)


@pytest.mark.parametrize("name, chunks", [("1f1b", 1), ("zb-h1", 1), ("zb-v", 2), ("interleaved", 2)])
def test_measured_costs_are_those_that_made_the_timeline(name: str, chunks: int) -> None:
    stages = 4 * chunks
    i = tuple(1 + stage / 10 for stage in range(stages))
    w = i if name in ("1f1b", "interleaved") else tuple(0.5 + stage / 20 for stage in range(stages))
    costs = Costs(tuple(2 + stage / 10 for stage in range(stages)), i, w, 0.3)
    timeline = simulate(build(name, 4, chunks, 8), costs)
    found = measured_costs(timeline)
    assert found.f == pytest.approx(costs.f) and found.i == pytest.approx(i) and found.w == pytest.approx(w)
    assert found.comm == pytest.approx(0.3)
    assert simulate(timeline.plan, found).time == pytest.approx(timeline.time)


def test_one_slow_action_does_not_change_measured_costs() -> None:
    timeline = simulate(build("1f1b", 2, 1, 8), Costs(comm=0.1))
    last = timeline.lanes[0][-1]
    slow = Timeline(
        timeline.plan, ((*timeline.lanes[0][:-1], Event(last.action, last.start, last.end + 50)), timeline.lanes[1])
    )
    found = measured_costs(slow)
    assert found.f + found.i + found.w == pytest.approx((1.0,) * 6) and found.comm == pytest.approx(0.1)


def damage(data: dict[str, Any], kind: str) -> None:
    lane = data["lanes"][1]
    if kind == "no plan":
        del data["plan"]
    elif kind == "bad plan":
        data["plan"] = "no plan"
    elif kind == "lane missing":
        data["lanes"].pop()
    elif kind == "event missing":
        lane.pop()
    elif kind == "unknown action":
        lane[0][0] = "1G0"
    elif kind == "time is text":
        lane[0][1] = "soon"
    elif kind == "ends before start":
        lane[0][2] = lane[0][1] - 1
    elif kind == "not a number":
        lane[0][2] = float("nan")
    elif kind == "overlap":
        lane[1][1] = lane[0][2] - 0.5
    elif kind == "lanes are no list":
        data["lanes"] = 3


DAMAGES = ("no plan", "bad plan", "lane missing", "event missing", "unknown action", "time is text")
DAMAGES += ("ends before start", "not a number", "overlap", "lanes are no list")


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_timeline_is_rejected_with_its_file(kind: str, tmp_path: Path) -> None:
    data = to_json(simulate(build("1f1b", 2, 1, 2)), 3)
    damage(data, kind)
    (tmp_path / "timeline.json").write_text(json.dumps(data))
    with raises(DataError, "pipeline.timeline-not-valid", "timeline.json"):
        read_timeline(tmp_path)


# --- engine schedule -------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def engine(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main(["schedule", *words])
    out, err = capsys.readouterr()
    return int(exit.value.code or 0), out, err


def row(out: str, name: str) -> list[str]:
    line = next(line for line in out.splitlines() if line.startswith(f"│ {name} "))
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_default_writes_a_table_and_two_pictures(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = engine(capsys)
    assert (code, err) == (0, "")
    assert row(out, "1f1b") == ["1f1b", "4 x 1", "33", "27", "27.3%", "4 3 2 1"]
    assert "wrote schedule.png, schedule.svg" in out
    assert "1f1b: time 33, bubble 27.3%, peak memory 4" in texts(here / "schedule.svg")
    with Image.open(here / "schedule.png") as image:
        assert image.format == "PNG"


def test_schedules_are_compared_on_one_axis(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--compare 1f1b interleaved searched --chunks 2 --ranks 2 --microbatches 4 --memory-cap 2.2 --iterations 50"
    code, out, _ = engine(capsys, *words.split(), "--output", "x/all.svg", "--costs", "f=1,i=1.5,w=0.5,comm=0.1")
    assert code == 0
    assert row(out, "interleaved")[1] == "2 x 2" and row(out, "interleaved")[-1].endswith("(above the cap 2.2)")
    assert float(row(out, "searched")[2]) < float(row(out, "1f1b")[2])
    titles = [text for text in texts(here / "x" / "all.svg") if "bubble" in text]
    assert [title.split(":")[0] for title in titles] == ["1f1b", "interleaved", "searched"]
    assert (here / "x" / "all.png").exists()


def test_a_saved_plan_is_read_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--name", "zb-h1", "--ranks", "2", "--microbatches", "3", "--save", "new/my.plan", "--text"]
    code, out, _ = engine(capsys, *words)
    plan = build("zb-h1", 2, 1, 3)
    assert code == 0 and str(plan) in out and parse_plan((here / "new/my.plan").read_text()) == plan
    (here / "compute.plan").write_text(str(compute_only(plan)))
    assert load_plan(here / "compute.plan") == plan
    code, out, _ = engine(capsys, "--plan", "compute.plan", "--costs", "f=1:2")
    assert code == 0 and row(out, "zb-h1")[1] == "2 x 1"


def test_a_csv_of_torch_is_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "gpipe.csv").write_text("0F0,0F1,,,0B0,0B1\n,1F0,1F1,1B0,1B1\n")
    code, out, _ = engine(capsys, "--plan", "gpipe.csv")
    assert code == 0 and row(out, "gpipe")[1:3] == ["2 x 1", "9"]


def test_a_measured_step_stands_above_its_simulation(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timeline = simulate(build("1f1b", 2, 1, 4), Costs((1.0,), (1.0,), (1.0,), 0.5))
    lanes = tuple(tuple(Event(e.action, 100 + e.start / 1e3, 100 + e.end / 1e3) for e in x) for x in timeline.lanes)
    (here / "run").mkdir()
    (here / "run" / "timeline.json").write_text(json.dumps(to_json(Timeline(timeline.plan, lanes), 3)))
    code, out, _ = engine(capsys, "--from", "run")
    assert code == 0
    measured, simulated = row(out, "1f1b, step 3 measured"), row(out, "1f1b simulated with its costs")
    assert measured[1:] == simulated[1:] and float(measured[2]) == pytest.approx(timeline.time)
    shown = texts(here / "schedule.svg")
    code, more, _ = engine(capsys, *["--from", "run", "--name", "searched", "--save", "best.plan", "--output", "b.png"])
    assert code == 0 and "1f1b, step 3 measured" in more
    assert float(row(more, "searched")[2]) < timeline.time
    assert parse_plan((here / "best.plan").read_text()).microbatches == 4
    assert "time (ms)" in shown and [t.split(":")[0] for t in shown if "bubble" in t] == [measured[0], simulated[0]]


BAD_OPTIONS = [
    ("--name zb-z", r"--name = 'zb-z': is none of .*searched\. Did you mean zb-v\?"),
    ("--compare 1f1b serched", r"--compare = 'serched': .* Did you mean searched\?"),
    ("--name zb-v --chunks 3", r"--chunks = 3: zb-v places 2 stages on each rank"),
    ("--chunks 2 --name 1f1b", r"--chunks = 2: 1f1b places 1 stage on each rank"),
    ("--costs f=x", r"--costs = 'f=x': 'f=x' in costs"),
    ("--costs speed=1", r"--costs = 'speed=1'"),
    ("--costs f=1:2:3", r"--costs = 'f=1:2:3': cost f has 3 numbers for 4 ranks"),
    ("--costs f=-1", r"none below 0"),
    ("--costs f=nan", r"finite"),
    (
        "--ranks 0 --microbatches 0 --chunks -1",
        r"has 3 errors:\n.*--ranks = 0.*\n.*--microbatches = 0.*\n.*--chunks = -1",
    ),
    ("--memory-cap 0", r"--memory-cap = 0\.0: is not above 0"),
    ("--output a.pdf", r"--output = 'a\.pdf': is neither"),
    ("--name 1f1b --compare zb-v", r"--name = '1f1b': excludes --compare"),
    ("--from run --costs f=1", r"--costs = 'f=1': excludes --from"),
    ("--compare 1f1b zb-v --save a.plan", r"--save = 'a\.plan': takes one plan"),
]


@pytest.mark.parametrize("words, message", BAD_OPTIONS)
def test_bad_options_are_reported(words: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = engine(capsys, *words.split())
    assert code == 2 and out == "" and re.search(message, err), err
    assert not list(here.iterdir())


FAULTY_FILES = [
    ("--plan none.plan", r"error: none\.plan: cannot be read .*No such file"),
    ("--plan text.plan", r"error: text\.plan: .* is not the header of a plan"),
    ("--plan bytes.plan", r"error: bytes\.plan: cannot be read"),
    ("--plan cell.csv", r"error: cell\.csv: .*0X0"),
    ("--plan short.csv", r"error: short\.csv: plan 'short' .* 0B1 is missing"),
    ("--plan late.plan", r"error: late\.plan: plan 'late' "),
    ("--plan sends.plan", r"error: sends\.plan: plan 'sends' rank \d step \d+ .*: .*\n"),
    ("--from none", r"error: none: no timeline\.json"),
    ("--from run", r"error: run/timeline\.json: "),
    ("--name searched --memory-cap 0.5", r"the least known is 1\. "),
]


@pytest.mark.parametrize("words, message", FAULTY_FILES)
def test_faulty_files_are_reported(words: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "text.plan").write_text("hello")
    (here / "bytes.plan").write_bytes(b"\xff\xfe\x00")
    (here / "short.csv").write_text("0F0,0F1,0B0\n")
    (here / "cell.csv").write_text("0F0,0X0\n")
    head = "microbatches=1 placement=0,1 backward=yes"
    (here / "late.plan").write_text(f"plan late {head}\nrank 0: 0B0 0F0\nrank 1: 1F0 1B0")
    plan = str(build("1f1b", 2, 1, 2)).replace("plan 1f1b", "plan sends").replace(f"1{Op.SEND_B}1", f"1{Op.SEND_B}0")
    (here / "sends.plan").write_text(plan)
    (here / "run").mkdir()
    (here / "run" / "timeline.json").write_text("{")
    code, out, err = engine(capsys, *words.split())
    assert code == 1 and out == "" and re.search(message, err), err


def test_the_overview_names_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert re.search(r"schedule +check, simulate, draw", capsys.readouterr().out)
