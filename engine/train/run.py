"""Opens a run on one rank: builds state, data and validation from the config, new or resumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from engine.checkpoint.format import read_manifest
from engine.checkpoint.seal import open_storage
from engine.config.derived import Derived
from engine.config.load import Resolved
from engine.config.phases import saved_phase
from engine.data.samples.corpora import TrainingData, open_data, open_training, resume_data
from engine.data.samples.loader import Loader, RankShare
from engine.data.tokenize.tokenizer import Tokenizer
from engine.distributed.collectives import on_first_rank
from engine.distributed.context import ParallelContext
from engine.interop.huggingface.companions import copy_companions
from engine.train.evaluate import Evaluator
from engine.train.resume import resume_run, start_from
from engine.train.state import TrainState, setup


@dataclass(frozen=True)
class Run:
    """State, data and validation of a run on one rank. A context manager that ends the loader's thread.

    derived: computed from the config. evaluator: None without data.valid. source: the checkpoint that the run resumes
    from, "" for a new run. notes: remarks for the user on the initial weights.
    """

    state: TrainState
    derived: Derived
    data: TrainingData
    loader: Loader
    evaluator: Evaluator | None
    tokenizer: Tokenizer | None
    source: str
    notes: tuple[str, ...]

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.loader.close()


def open_run(resolved: Resolved, ctx: ParallelContext) -> Run:
    """Open the data, build the model, and resume from the checkpoint that checkpoint.resume selects. Collective.

    Raises ConfigError, DataError or CheckpointError if config, data or checkpoint do not fit together.
    """
    cfg = resolved.config
    tokenizer = Tokenizer.load(Path(cfg.data.tokenizer)) if cfg.data.tokenizer else None
    data = open_training(cfg, tokenizer)
    state = setup(cfg, ctx, resolved.derived)
    source = resume_run(state, data.metadata)
    if source:
        past = read_manifest(Path(source), open_storage(cfg.checkpoint.secret))
        data = resume_data(data, cfg, state.phases, past.data, saved_phase(past.config, past.step).seq_len)
    data.order.begin_at(state.order_begin)
    state.enter(state.phases.at(state.step))  # a validation before the first step is of the last step done
    notes: list[str] = []
    if not source and cfg.checkpoint.init:
        begun, notes = start_from(state, Path(cfg.checkpoint.init))
        on_first_rank(lambda: copy_companions(begun, Path(cfg.run.dir)), ctx.world, ctx.device)
    evaluator = None
    if cfg.data.valid:
        valid = open_data(cfg.data.valid, cfg, tokenizer)
        evaluator = Evaluator(state.plan, state.stages, ctx, valid, cfg, data.metadata)
    return Run(state, resolved.derived, data, _loader(state, data), evaluator, tokenizer, source, tuple(notes))


def _loader(state: TrainState, data: TrainingData) -> Loader:
    cfg, ctx = state.cfg, state.ctx
    share = RankShare(
        data.order,
        state.phases,
        data_rank=ctx.samples.rank,
        data_size=ctx.samples.size,
        transforms=data.transforms,
    )
    return Loader(share, prefetch=cfg.data.prefetch)
