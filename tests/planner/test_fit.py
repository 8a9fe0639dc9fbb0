"""Changes that make a run fit: each peak is that of the changed run on the same ranks; and the options of a dry run."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from engine.cli.main import main
from engine.config.load import Resolved, load
from engine.errors import EXIT_CONFIG, EXIT_ERROR, EXIT_OK
from engine.planner.fit import changes_that_fit
from engine.planner.sheet import sheets

GIB = 2**30
LLAMA = {
    "model.preset": "llama-2-7b",
    "train.precision": "bf16",
    "train.seq_len": "4096",
    "train.global_batch_size": "64",
    "parallel.data": "8",
}


def resolve(**more: str) -> Resolved:
    return load([], LLAMA | {key.replace("__", "."): value for key, value in more.items()}, world=8)


def peak(resolved: Resolved) -> int:
    return max(sheet.peak.total for sheet in sheets(resolved.config, resolved.derived))


@pytest.mark.parametrize("budget", [57, 30, 17])
def test_each_change_fits_and_its_peak_is_that_of_the_changed_run(budget: int) -> None:
    resolved = resolve()
    found = changes_that_fit(resolved.config, resolved.derived, budget * GIB)
    assert len(found) == 3 and [c.price for c in found] == sorted(c.price for c in found)
    assert len({frozenset(change.settings) for change in found}) == 3
    for change in found:
        values = LLAMA | {path: str(value).lower() for path, value in change.settings.items()}
        del values["parallel.data"]
        changed = load([], values, world=8)
        assert change.peak == pytest.approx(peak(changed), rel=0.001)
        assert change.peak <= budget * GIB < peak(resolved) and change.reasons


def test_what_costs_nothing_comes_first() -> None:
    resolved = resolve(parallel__zero="0")
    first, *_ = changes_that_fit(resolved.config, resolved.derived, 70 * GIB)
    assert dict(first.settings) == {"parallel.zero": 1}


def test_no_change_helps_where_even_all_of_them_do_not_fit() -> None:
    resolved = resolve()
    assert changes_that_fit(resolved.config, resolved.derived, 1 * GIB) == []


def test_sheet_and_changes_take_less_than_a_second() -> None:
    resolved = resolve(parallel__data="8")
    begin = time.process_time()
    sheets(resolved.config, resolved.derived)
    alone = time.process_time()
    changes_that_fit(resolved.config, resolved.derived, 17 * GIB)
    assert alone - begin < 0.3 and time.process_time() - begin < 2.0  # on a busy machine; a quiet one takes a third


WORDS = [word for path, value in LLAMA.items() for word in (f"--{path.replace('_', '-')}", value)]


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--dry-run", *WORDS, *words])
    assert isinstance(caught.value.code, int)
    out, err = capsys.readouterr()
    return caught.value.code, out + err


def test_the_exit_code_says_whether_it_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, text = dry_run(capsys, "--gpu-memory", "80")
    assert code == EXIT_OK and "fits into 80 GiB" in text and "days: " in text
    code, text = dry_run(capsys, "--gpu-memory", "60")
    assert code == EXIT_ERROR and "does not fit into 60 GiB, 6.5" in text and "\n3. --" in text
    assert max(map(len, text.splitlines())) <= 100


def test_json_has_the_bytes_of_the_sheet(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = dry_run(capsys, "--gpu-memory", "60", "--json")
    found: dict[str, Any] = json.loads(text)
    (rank,) = found["pipeline_ranks"]
    assert code == EXIT_ERROR and found["fits"] is False and len(found["changes"]) == 3
    assert rank["peak_bytes"] == sum(rank["peak"].values()) == found["needed_bytes"]
    assert rank["peak_bytes"] == peak(resolve())
    assert found["settings"]["parallel.data"] == {"value": 8, "from": "command line"}


def test_a_term_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = dry_run(capsys, "--explain", "weights")
    assert code == EXIT_OK and "6,738,415,616 x 2" in text and "12.551 GiB" in text


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--gpu-memory", "0"], "cli.not-above-zero"),
        (["--gpu-memory", "nan"], "cli.not-above-zero"),
        (["--gpu-memory", "80", "--train.device", "cpu"], "cli.no-gpu"),
        (["--mfu", "0"], "cli.not-a-percentage"),
        (["--explain", "wieghts"], "cli.unknown-term"),
    ],
)
def test_wrong_options_are_config_errors(capsys: pytest.CaptureFixture[str], words: list[str], error: str) -> None:
    code, text = dry_run(capsys, *words)
    assert code == EXIT_CONFIG and error in text


@pytest.mark.parametrize("words", [["--gpu-memory", "80"], ["--explain", "weights"], ["--json"], ["--full"]])
def test_options_of_the_dry_run_need_it(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", *WORDS, *words])
    assert caught.value.code == EXIT_CONFIG and "cli.only-a-dry-run" in capsys.readouterr().err
