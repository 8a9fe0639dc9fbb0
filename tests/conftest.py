"""Fixtures of all tests, and the summary of skipped tests."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("tests.support")


@pytest.fixture(autouse=True)
def no_kept_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the conversion cache: tests plant errors in conversions, which must be neither hidden nor kept."""
    monkeypatch.setattr("engine.data.tokenize.conversion_cache.folder", lambda: Path("/dev/null/none"))


@pytest.fixture
def for_all() -> Iterator[Path]:
    """A folder that other users can reach: pytest restricts access to its temporary folders at each start."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="session")
def warm() -> Iterator[Path]:
    """A folder with the commands `engine`, `torchrun` and `python` that start fast (tests/support/warm.py)."""
    from tests.support.warm import Warm

    with Warm() as server:
        yield server.folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config that makes the scripts of examples/ train a tiny model."""
    from tests.support.examples import tiny_config  # not at the top: it imports the engine

    return tiny_config(tmp_path_factory.mktemp("tiny"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print why tests were skipped, each reason once; docs/testing.md says how to run them."""
    reasons: dict[str, Counter[str]] = {}
    for report in terminalreporter.stats.get("skipped", ()):
        file, _, reason = report.longrepr if isinstance(report.longrepr, tuple) else (report.nodeid, 0, "")
        where = Path(report.nodeid.partition("::")[0] or file).stem
        reasons.setdefault(reason.removeprefix("Skipped: "), Counter())[where] += 1
    if reasons:
        terminalreporter.write_sep("-", "not run here, and why (docs/testing.md; `make test-extras`)")
    for reason, places in sorted(reasons.items(), key=lambda item: -item[1].total()):
        terminalreporter.write_line(f"{places.total():>4}  {reason}  [{', '.join(sorted(places))}]")
