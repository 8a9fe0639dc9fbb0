"""Trident: a 3D-parallel (tensor x pipeline x data) training engine for language models.

The names below are the library's public interface. Each is imported on first access, so `import engine` loads neither
torch nor any other module of the engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the names of _HOMES for type checkers and editors
    from engine.batch import MicroBatch, Rows, micro_batches
    from engine.config.load import Resolved
    from engine.config.load import load as load_config
    from engine.config.schema import Config
    from engine.data.samples.indexed import IndexedDataset
    from engine.data.samples.indexed_writer import IndexedWriter
    from engine.data.samples.transforms import LossMask
    from engine.data.tokenize.tokenizer import Tokenizer
    from engine.distributed.context import ParallelContext, make_context
    from engine.distributed.env import Env, read_env
    from engine.distributed.launch import Mesh, leave
    from engine.distributed.launch import run as launch
    from engine.errors import ConfigError, EngineError
    from engine.inference.generate import sample
    from engine.inference.load import load_model, load_tokenizer
    from engine.model.transformer import Transformer
    from engine.train.evaluate import Evaluator, Score
    from engine.train.loop import StepReport, steps
    from engine.train.resume import find_resume, resume, save_state, start_from
    from engine.train.run import Run, open_run
    from engine.train.state import TrainState, mesh_of, setup
    from engine.train.step import StepResult, train_step

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ConfigError",
    "EngineError",
    "Env",
    "Evaluator",
    "IndexedDataset",
    "IndexedWriter",
    "LossMask",
    "Mesh",
    "MicroBatch",
    "ParallelContext",
    "Resolved",
    "Rows",
    "Run",
    "Score",
    "StepReport",
    "StepResult",
    "Tokenizer",
    "TrainState",
    "Transformer",
    "__version__",
    "find_resume",
    "launch",
    "leave",
    "load_config",
    "load_model",
    "load_tokenizer",
    "make_context",
    "mesh_of",
    "micro_batches",
    "open_run",
    "read_env",
    "resume",
    "sample",
    "save_state",
    "setup",
    "start_from",
    "steps",
    "train_step",
]

_HOMES = {
    "batch": ("MicroBatch", "Rows", "micro_batches"),
    "config.load": ("Resolved", "load_config"),
    "config.schema": ("Config",),
    "data.samples.indexed": ("IndexedDataset",),
    "data.samples.indexed_writer": ("IndexedWriter",),
    "data.samples.transforms": ("LossMask",),
    "data.tokenize.tokenizer": ("Tokenizer",),
    "distributed.context": ("ParallelContext", "make_context"),
    "distributed.env": ("Env", "read_env"),
    "distributed.launch": ("Mesh", "launch", "leave"),
    "errors": ("ConfigError", "EngineError"),
    "inference.generate": ("sample",),
    "inference.load": ("load_model", "load_tokenizer"),
    "model.transformer": ("Transformer",),
    "train.evaluate": ("Evaluator", "Score"),
    "train.loop": ("StepReport", "steps"),
    "train.resume": ("find_resume", "resume", "save_state", "start_from"),
    "train.run": ("Run", "open_run"),
    "train.state": ("TrainState", "mesh_of", "setup"),
    "train.step": ("StepResult", "train_step"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_NAME_AT_HOME = {"load_config": "load", "launch": "run"}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), _NAME_AT_HOME.get(name, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
