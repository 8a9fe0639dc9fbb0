"""A loss spike is reported, recorded, and keeps the last checkpoint before it, also over a restart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.checkpoint.retention import delete_old
from engine.checkpoint.storage import DISK
from engine.config.phases import Phase, Phases
from engine.distributed.context import ParallelContext
from engine.errors import TrainingError
from engine.monitor.metrics import read_metrics
from engine.monitor.spikes import CALM, SpikeWatch
from engine.train import loop
from engine.train.state import TrainState
from engine.train.step import StepResult, train_step
from tests.support.cases import layout_of, resolve
from tests.support.checkpoints import as_step, complete_steps, save_one
from tests.support.corpora import rows_of_61
from tests.support.harness import run_ranks

PLAIN = Phases((Phase(1, 8, 1, 32),))


def feed(watch: SpikeWatch, losses: list[float], first: int = 1) -> list[int]:
    """The steps that it reports as spikes."""
    return [first + i for i, loss in enumerate(losses) if watch.observe(first + i, loss, 1.0, "0-7")[0]]


def test_what_stands_out(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    rng = np.random.default_rng(0)
    falling = (2 + 9 * np.exp(-np.arange(400) / 60) + rng.normal(0, 0.05, 400)).tolist()
    assert feed(SpikeWatch(tmp_path / "b", 0, PLAIN), falling) == []
    assert feed(SpikeWatch(tmp_path / "a", 0, PLAIN), [6.2, 2e7, 1e5]) == [2, 3]  # from the second step on
    spiked = [*falling]
    spiked[300] += 1.0
    assert feed(SpikeWatch(tmp_path / "c", 0, PLAIN), spiked) == [301]
    ragged = rng.uniform(1.0, 3.0, 300).tolist()  # short, different texts
    assert feed(SpikeWatch(tmp_path / "b", 0, PLAIN), ragged) == []
    watch = SpikeWatch(tmp_path / "b", 0, PLAIN)
    assert feed(watch, falling) == []
    high, note = watch.observe(401, 2.0, 30.0, "3200-3207")
    assert high and "step 401: gradient norm 30 where 1 is normal; its samples are 3200-3207" in note
    assert watch.observe(402, 2.0, math.inf, "")[0] is False  # fp16 is searching for its loss scale


def test_a_spike_lasts_until_the_run_has_recovered_and_survives_a_restart(tmp_path: Path) -> None:
    def again(step: int, first: SpikeWatch) -> SpikeWatch:
        watch = SpikeWatch(tmp_path, step, PLAIN)
        watch._normal = first._normal  # as from metrics.jsonl, which the test below reads
        return watch

    watch = SpikeWatch(tmp_path, 0, PLAIN)
    assert feed(watch, [2.0] * 30) == [] and watch.since == 0
    assert feed(watch, [5.0] * 100, 31) == list(range(31, 131))  # a loss that stays high does not become normal
    assert watch.since == 31 and json.loads((tmp_path / "spike.json").read_text())["step"] == 31
    watch = again(130, watch)
    assert watch.since == 31
    assert feed(watch, [2.0] * (CALM - 1), 131) == [] and watch.since == 31
    watch = again(28, watch)  # resumed from a checkpoint before the spike
    assert feed(watch, [2.0] * (CALM + 2), 29) == [] and watch.since == 31
    assert feed(watch, [2.0], 31 + CALM) == [] and watch.since == 0 and not (tmp_path / "spike.json").exists()


def test_keep_spares_the_last_before_a_spike(tmp_path: Path) -> None:
    saved = save_one(tmp_path / "saved")

    def left(keep: int, spike: int, steps: tuple[int, ...]) -> list[int]:
        root = tmp_path / f"{keep}-{spike}-{len(steps)}"
        for step in steps:
            as_step(saved, root, step)
        delete_old(DISK, root, steps[-1], keep, 0, spike)
        return complete_steps(root)

    assert left(1, 0, (2, 4, 6, 8)) == [8]
    assert left(1, 6, (2, 4, 6, 8)) == [4, 8]  # the weights of step 4 gave the loss of step 5, which is normal
    assert left(1, 5, (2, 4, 6, 8)) == [2, 8]  # the weights of step 4 gave the loss of step 5, a spike
    assert left(2, 20, (2, 4, 6, 8)) == [6, 8]
    assert left(1, 3, (4, 6)) == [6] and left(1, 3, (2, 4, 6)) == [2, 6]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return rows_of_61(tmp_path_factory.mktemp("corpus") / "c")


@pytest.mark.parametrize("background", [True, False])
def test_of_a_run(corpus: str, tmp_path: Path, background: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are corrupted at step 8, the run fails, is restarted, and still has the checkpoint of step 6."""

    def cfg(steps: int) -> Any:
        return resolve(
            2,
            parallel_data=2,
            data_train=corpus,
            run_dir=tmp_path / "run",
            train_steps=steps,
            checkpoint_every=1,
            checkpoint_keep=1,
            checkpoint_async_save=background,
            lr_schedule_kind="constant",
        )

    def job(ctx: ParallelContext) -> list[str]:
        def breaking(state: TrainState, *args: Any, **options: Any) -> StepResult:
            if state.step == 13:
                raise TrainingError("train.killed", "killed")
            result = train_step(state, *args, **options)
            if state.step == 7:
                for stage in state.buckets:
                    stage.wait_for_weights()
                for p in state.params:
                    p.data.mul_(30)
            return result

        loop.train_step = breaking
        errors = []
        for steps in (20, 16):
            try:
                loop.train(cfg(steps), ctx, False)  # type: ignore[arg-type]
            except TrainingError as error:
                errors.append(str(error))
            loop.train_step = train_step
        return errors

    assert run_ranks(layout_of(cfg(20).config), job) == [["killed"]] * 2
    records, _, _ = read_metrics(tmp_path / "run")
    spikes = [step for step, record in records.items() if record.get("spike")]
    assert spikes[0] == 8 and json.loads((tmp_path / "run/spike.json").read_text())["step"] == 8
    assert complete_steps(tmp_path / "run/checkpoints") == [6, 16]


def test_it_is_kept_when_the_next_start_skips_its_first_steps(corpus: str, tmp_path: Path) -> None:
    """No loss has been observed when the first checkpoint of that start deletes older ones."""

    def start(steps: int, skip: str) -> None:
        cfg = resolve(
            1,
            data_train=corpus,
            run_dir=tmp_path,
            train_steps=steps,
            train_skip_steps=skip,
            checkpoint_every=1,
            checkpoint_keep=1 if skip else 0,
            lr_schedule_kind="constant",
        )
        job = lambda ctx: loop.train(cfg, ctx, False)  # type: ignore[arg-type]  # noqa: E731
        assert run_ranks(layout_of(cfg.config), job) == [0]

    start(4, "")
    (tmp_path / "spike.json").write_text('{"step": 3}')
    start(6, "5 6")
    assert complete_steps(tmp_path / "checkpoints") == [1, 6]


def test_other_data_has_other_normal_values(tmp_path: Path) -> None:
    """A phase with other weights may raise the loss; a larger batch may not, and a restart forgets nothing of that."""
    larger = Phase(31, 16, 1, 32, 1, frozenset({"global_batch_size"}))
    other = Phase(31, 8, 1, 32, 1, frozenset({"weights"}))
    assert feed(SpikeWatch(tmp_path, 0, Phases((Phase(1, 8, 1, 32), larger))), [2.0] * 30 + [4.0]) == [31]
    (tmp_path / "spike.json").unlink()
    phases = Phases((Phase(1, 8, 1, 32), other))
    assert feed(SpikeWatch(tmp_path, 0, phases), [2.0] * 30 + [4.0] * 20 + [9.0]) == [51]
    (tmp_path / "spike.json").unlink()
    lines = [{"step": n, "loss": 2.0 if n < 31 else 4.0, "grad_norm": 1.0} for n in range(1, 51)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(SpikeWatch(tmp_path, 50, phases)._normal["loss"]) == [4.0] * 20
    assert list(SpikeWatch(tmp_path, 50, PLAIN)._normal["loss"]) == [2.0] * 30 + [4.0] * 20


def test_other_data_has_other_normal_values_if_its_first_step_is_skipped(tmp_path: Path) -> None:
    other = Phase(31, 8, 1, 32, 1, frozenset({"seq_len"}))
    watch = SpikeWatch(tmp_path, 0, Phases((Phase(1, 8, 1, 32), other)))
    assert feed(watch, [2.0] * 30) == [] and feed(watch, [4.0] * 20 + [9.0], 33) == [53]
