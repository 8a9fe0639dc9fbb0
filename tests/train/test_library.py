"""The public names of `import engine`, and the examples that use them."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine
from tests.support.checkpoints import complete_steps
from tests.support.harness import run_ranks
from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples/library"


def test_importing_the_engine_loads_neither_torch_nor_the_rest() -> None:
    program = (
        "import sys, engine; loaded = [m for m in sys.modules if m == 'torch' or m.startswith('engine.')]\n"
        "assert not loaded, loaded\n"
        "assert isinstance(engine.load_config([], {}).config, engine.Config) and 'torch' not in sys.modules\n"
        "from engine import *; import torch; assert steps and isinstance(make_context, object)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr


def test_every_name_is_there_for_type_checkers_and_on_the_page() -> None:
    tree, page = ast.parse((ROOT / "engine/__init__.py").read_text()), (ROOT / "docs/library.md").read_text()
    seen = {
        (alias.asname or alias.name, f"{node.module}.{alias.name}")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("engine.")
        for alias in node.names
    }
    names = set(engine.__all__) - {"__version__"}
    assert {name for name, _ in seen} == names <= set(dir(engine))
    for name, home in seen:
        module, _, attribute = home.rpartition(".")
        assert getattr(engine, str(name)) is getattr(importlib.import_module(module), attribute), name
        assert re.search(rf"`{name}\b", page), f"docs/library.md does not say what {name} is"
    with pytest.raises(AttributeError, match="no_such_name"):
        engine.no_such_name  # noqa: B018


# -- the examples ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix, draws = tmp_path_factory.mktemp("corpus") / "c", np.random.default_rng(0)
    with engine.IndexedWriter(prefix, vocab_size=512) as writer:
        for length in draws.integers(20, 200, 100):
            writer.add(draws.integers(0, 100, length))
        writer.finish({})
    return str(prefix)


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines_of(module: Any, folder: Path, world: int, options: dict[str, str], capfd: Any) -> list[str]:
    """The lines that an example prints on `world` ranks."""
    small = {"model.num_layers": "2", "train.seq_len": "16", "train.precision": "fp64", "train.device": "cpu"}
    resolved = engine.load_config([], module.OPTIONS | small | {"run.dir": str(folder)} | options, world=world)
    codes = run_ranks(resolved.derived.layout, lambda ctx: module.main(resolved, ctx))
    assert codes == [0] * world
    return [line for line in capfd.readouterr().out.splitlines() if line.startswith("step ")]


def test_a_custom_loop_in_sixty_lines(corpus: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It trains, validates, saves checkpoints that improve and stops early, with equal output on one and two ranks."""
    assert len((EXAMPLES / "custom_loop.py").read_text().splitlines()) <= 60
    module, options = example("custom_loop"), {"data.train": corpus, "data.valid": corpus, "optimizer.lr": "0.1"}
    options |= {"eval.every": "2", "train.steps": "30", "eval.batches": "1"}
    one = lines_of(module, tmp_path / "one", 1, options, capfd)
    assert lines_of(module, tmp_path / "two", 2, options, capfd) == one
    scores = {int(line.split()[1][:-1]): float(line.split()[4]) for line in one if "validation" in line}
    better = [at for at, score in scores.items() if score <= min(s for step, s in scores.items() if step <= at)]
    assert complete_steps(tmp_path / "two/checkpoints") == better and len(better) < len(scores)
    assert list(scores)[-1] < 30, "it has stopped early"


def test_resuming_in_another_layout_changes_nothing(
    corpus: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    module = example("resume_in_another_layout")

    def losses(folder: str, world: int, steps: int) -> dict[str, float]:
        options = {"data.train": corpus, "train.steps": str(steps), "parallel.tensor": str(world)}
        lines = lines_of(module, tmp_path / folder, world, options, capfd)
        return {line.split()[1]: float(line.split()[-1]) for line in lines}

    assert losses("run", 1, 2) | losses("run", 2, 4) == losses("undisturbed", 1, 4)
    assert complete_steps(tmp_path / "run/checkpoints") == [2, 4]
