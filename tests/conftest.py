import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def no_kept_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers are converted anew: tests plant faults in conversions, which must neither be hidden nor stay."""
    monkeypatch.setattr("engine.data.tokenize.conversion_cache.folder", lambda: Path("/dev/null/none"))


@pytest.fixture
def for_all() -> Iterator[Path]:
    """A folder that other users reach too: pytest's own are shut to them whenever another pytest begins."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Why tests did not run, each reason once; docs/testing.md says what makes them run."""
    reasons: dict[str, Counter[str]] = {}
    for report in terminalreporter.stats.get("skipped", ()):
        file, _, reason = report.longrepr if isinstance(report.longrepr, tuple) else (report.nodeid, 0, "")
        where = Path(report.nodeid.partition("::")[0] or file).stem
        reasons.setdefault(reason.removeprefix("Skipped: "), Counter())[where] += 1
    if reasons:
        terminalreporter.write_sep("-", "not run here, and why (docs/testing.md; `make test-extras`)")
    for reason, places in sorted(reasons.items(), key=lambda item: -item[1].total()):
        terminalreporter.write_line(f"{places.total():>4}  {reason}  [{', '.join(sorted(places))}]")
