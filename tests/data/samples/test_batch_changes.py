"""Blends with changes at given steps, in runs that resume with other batch sizes: every sample at its position."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config.load import load
from engine.config.phases import Position, phases_of
from engine.data.samples.blend import BlendedOrder
from engine.data.samples.corpora import TrainingData, open_training, resume_data
from engine.data.samples.indexed_writer import IndexedWriter
from tests.support.command import finish, train

NAMES = ("web", "code", "math")
Plan = dict[int, tuple[int, int, int]]  # step -> weights from that step on


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    for k, name in enumerate(NAMES):
        rng = np.random.default_rng(k)
        with IndexedWriter(folder / name, vocab_size=97) as writer:
            for length in rng.integers(5, 90, 60):
                writer.add(rng.integers(0, 97, length))
            writer.finish({})
    return folder


def mix(corpora: Path, folder: Path, plan: Plan) -> Path:
    """A config file with the blend in data.train, and a phase for each change."""
    (first, *later), path = plan.items(), folder / "run.toml"
    text = "".join(f'[[source]]\nprefix = "{corpora / n}"\nweight = {w}\n' for n, w in zip(NAMES, first[1]) if w >= 0)
    (folder / "mix.toml").write_text(text)
    text = f'[data]\ntrain = "{folder / "mix.toml"}"\n'
    for step, weights in later:
        shares = ", ".join(f"{n} = {w}" for n, w in zip(NAMES, weights) if w >= 0)
        text += f"[[phase]]\nfrom_step = {step + 1}\nweights = {{ {shares} }}\n"
    path.write_text(text)
    return path


class Run:
    """The data side of a run: opens and resumes it, and records the samples of each step."""

    def __init__(self) -> None:
        self.step = self.consumed = 0
        self.metadata: dict[str, Any] = {}
        self.read: list[list[tuple[str, int]]] = []  # per step: (source, sample number in it)

    def go(self, path: Path, batch: int, until: int) -> TrainingData:
        values = {"model.vocab_size": "97", "train.seq_len": "32", "train.steps": "50"}
        cfg = load([path], values | {"train.global_batch_size": str(batch)}).config
        data = open_training(cfg, None)
        if self.step:
            position = Position(self.step, self.consumed, self.consumed * 32)
            data = resume_data(data, cfg, phases_of(cfg).resumed(position), self.metadata)
        assert isinstance(data.order, BlendedOrder)
        while self.step < until:
            sources, numbers = data.order.locate(np.arange(self.consumed, self.consumed + batch))
            self.read.append([(data.names[k], int(n)) for k, n in zip(sources, numbers)])
            self.step, self.consumed = self.step + 1, self.consumed + batch
        self.metadata = json.loads(json.dumps(data.metadata))
        return data

    def check(self, plan: Plan) -> None:
        """Check by counting: no sample of a source is skipped or read twice; each range of steps has its weights."""
        seen = dict.fromkeys(NAMES, 0)
        for step, batch in enumerate(self.read):
            if step in plan:
                weights = dict(zip(NAMES, plan[step]))
                drawn, since = dict.fromkeys(NAMES, 0), 0
            for name, number in batch:
                assert number == seen[name], (step, name)
                seen[name], drawn[name], since = seen[name] + 1, drawn[name] + 1, since + 1
                for k, w in weights.items():
                    assert abs(drawn[k] - since * w / sum(weights.values())) < 1, (step, k)


def test_every_sample_by_brute_force(corpora: Path, tmp_path: Path) -> None:
    """Runs of 50 steps with some changes of the blend, resumed up to 6 times with batch sizes of 1 to 16."""
    draw = random.Random(0)
    for _ in range(40):
        plan: Plan = {0: (3, 1, 0)}
        for at in sorted(draw.sample(range(1, 50), draw.randint(1, 4))):
            plan[at] = draw.choice([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (5, 2, 1), (0, 3, 4)])
        path, run = mix(corpora, tmp_path, plan), Run()
        stops = [*sorted(draw.sample(range(1, 50), draw.randint(0, 6))), 50]
        for until in stops:
            run.go(path, draw.choice([1, 2, 3, 8, 16]), until)
        run.check(plan)


def test_a_resume_at_the_same_batch_size_changes_nothing(corpora: Path, tmp_path: Path) -> None:
    plan: Plan = {0: (3, 2, 0), 7: (3, 2, 0), 20: (5, 2, 1), 33: (0, 1, 0)}
    path, whole = mix(corpora, tmp_path, plan), Run()
    data = whole.go(path, 8, 50)
    assert [n for n in data.metadata if n.startswith("mixture from s")] == [
        *(f"mixture from step {n}" for n in plan),
        *(f"mixture from sample {8 * n}" for n in plan),
    ]
    parts = Run()
    for until in (1, 7, 8, 20, 21, 32, 50):
        parts.go(path, 8, until)
    assert parts.read == whole.read
    assert "of 400 samples" in "".join(data.shares)


def test_a_resume_tells_the_shares_once(corpora: Path, tmp_path: Path) -> None:
    """The shares are those of the whole run, including samples read with another batch size."""
    run, path = Run(), mix(corpora, tmp_path, {0: (3, 1, 0)})
    run.go(path, 8, 10)
    data = run.go(path, 4, 20)
    assert [note.split(" samples")[0] for note in (*data.shares, *data.notes)] == [
        "source web: 180 of 240",
        "source code: 60 of 240",
        "source math: 0 of 240",
    ]


def test_what_may_be_allowed_repeats_and_skips_nothing(corpora: Path, tmp_path: Path) -> None:
    """Past weights are changed in the config, or a source is added: samples already read are not read again."""
    run = Run()
    run.go(mix(corpora, tmp_path, {0: (3, 1, -1), 10: (1, 1, -1)}), 8, 20)
    run.go(mix(corpora, tmp_path, {0: (1, 7, 0), 30: (1, 1, 1)}), 4, 25)
    run.go(mix(corpora, tmp_path, {0: (1, 7, 0), 30: (1, 1, 1)}), 2, 50)  # from then on it is the blend of the run
    run.check({0: (3, 1, 0), 10: (1, 1, 0), 20: (1, 7, 0), 30: (1, 1, 1)})


def test_the_command_keeps_the_step_of_a_change(corpora: Path, tmp_path: Path, warm: Path) -> None:
    """Batches of 8, then 4 over two data ranks, then 16: the change stays at its step, and nothing is rejected."""
    path, run = mix(corpora, tmp_path, {0: (1, 0, 0), 3: (0, 1, 0), 5: (0, 0, 1)}), tmp_path / "run"
    for ranks, batch, steps in ((1, 8, 2), (2, 4, 4), (1, 16, 6)):
        options = ("--train.steps", str(steps), "--train.global-batch-size", str(batch))
        options += ("--lr-schedule.kind", "constant", "--config", str(path))
        code, _, err = finish(train(tmp_path / "mix.toml", run, ranks, *options, commands=warm))
        assert code == 0, err
    losses = [
        {name for name in json.loads(line) if name.startswith("loss_") and name != "loss_scale"}
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert losses == [{f"loss_{name}"} for name in ("web", "web", "web", "code", "code", "math")]
