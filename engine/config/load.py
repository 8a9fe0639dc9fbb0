"""Load a checked config from TOML files, presets and dotted overrides; all errors are reported together.

Precedence, later wins: default < preset < initial weights (checkpoint.init) < config files < command line.
`Resolved.sources` records the origin of each value.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from engine.config.checks import config_errors
from engine.config.derived import (
    BALANCED,
    NOT_BUILT,
    Derived,
    chunks_of,
    data_degree,
    derive,
    head_shape,
    model_ranks,
    read_plan,
)
from engine.config.idle import idle
from engine.config.mixture import read_mixture
from engine.config.phase_checks import length_errors, weight_errors
from engine.config.phases import original_seq_len, phases_of
from engine.config.presets import PRESETS
from engine.config.schema import Config, ModelConfig, fields, tables
from engine.config.tree import ConfigTree, given_rows, rows_of, unknown_setting, value_at
from engine.distributed.layout import AXES
from engine.errors import CheckpointError, ConfigError, FieldError, PlanError
from engine.interop.huggingface.config_json import read_model_fields
from engine.pipeline.actions import Plan
from engine.planner.flops import balanced_layers


@dataclass(frozen=True)
class Resolved:
    """A checked config, the source of each value by dotted path, and the derived values."""

    config: Config
    sources: dict[str, str]
    derived: Derived

    def with_absolute_paths(self) -> Resolved:
        """Copy with absolute paths of validation data and tokenizer, so that `engine evaluate` works in any folder."""
        data = self.config.data
        paths = {
            name: str(Path(getattr(data, name)).absolute()) for name in ("valid", "tokenizer") if getattr(data, name)
        }
        return replace(self, config=self.config.model_copy(update={"data": data.model_copy(update=paths)}))

    def toml(self) -> str:
        """The whole config as TOML that loads back to itself, each value with its source as a comment."""
        lines = []
        for section in Config.model_fields:
            if section not in tables():
                lines.append(f"[{section}]")
                lines += [self._line(f"{section}.{name}") for part, name, _ in fields() if part == section] + [""]
            for table in (table for table in tables() if table.partition(".")[0] == section):
                for number in range(1, len(rows_of(self.config, table)) + 1):
                    lines.append(f"[[{table}]]")
                    lines += [self._line(path) for path in self.sources if path.startswith(f"{table}.{number}.")] + [""]
        return "\n".join(lines)

    def _line(self, path: str) -> str:
        name, value = path.rpartition(".")[2], _toml_value(value_at(self.config, path))
        return f"{name} = {value}  # {self.sources[path]}"


def load(
    files: Sequence[Path],
    overrides: Mapping[str, str],
    *,
    unknown: Sequence[str] = (),
    world: int | None = 1,
    reject_idle: bool = False,
) -> Resolved:
    """Merge and check a config. world: number of ranks it must fit; None: as many as it needs.

    overrides: dotted path -> text from the command line. unknown: words of the command line that are not options.
    reject_idle: given settings without effect are errors too (engine.config.idle). Raises ConfigError with all errors.
    """
    tree = ConfigTree()
    for file in files:
        tree.read_file(file)
    for path, text in overrides.items():
        tree.put(path, text, "command line")
    for word in unknown:
        option = word.startswith("--")
        tree.errors.append(unknown_setting(word[2:], "", "command line") if option else _stray(word))
    errors, sources, model = tree.errors, tree.sources, tree.sections["model"]
    _apply_preset(model, sources, errors)
    given = set(model)
    start = _apply_init(model, tree.sections["checkpoint"].get("init"), sources, errors)
    config, wrong = tree.parse()
    errors += _contradictions(config.model, start, given - {path.removeprefix("model.") for path in wrong}, sources)
    p = config.parallel
    world = world or model_ranks(p) * max(1, p.data)
    plan = read_plan(p)
    # errors about an invalid value, or about values derived from it, would mislead: drop them
    if wrong & {f"parallel.{axis}" for axis in AXES if axis not in NOT_BUILT}:
        wrong |= {"parallel = ", "train.global_batch_size", "phase."}
    if any(error.path == "model.preset" for error in errors):
        wrong.add("model.")
    errors += [error for error in config_errors(config, world, plan) if not any(path in str(error) for path in wrong)]
    errors += _data_errors(config)
    if reject_idle and not wrong:
        reported = {error.path for error in errors}
        given_by = {"command line", *(f"file {file}" for file in files)}
        errors += [error for error in idle(config, sources, given_by=given_by) if error.path not in reported]
    if errors:
        raise ConfigError(errors)
    assert not isinstance(plan, PlanError)  # already raised as an error
    config = _fill_in(config, world, plan, sources)
    sources = {
        path: sources.get(path, "default") for path in (*(f"{s}.{n}" for s, n, _ in fields()), *given_rows(tree))
    }
    return Resolved(config, sources, derive(config, plan))


def _data_errors(config: Config) -> Sequence[FieldError]:
    """Errors of the data section. Not part of config_errors: a checkpoint's data.train may name a deleted file."""
    data = config.data
    needs = {"data.fim_rate": data.fim_rate, "data.mask_tokens": data.mask_tokens}
    fix = "Set data.tokenizer to the folder of the corpus' tokenizer."
    errors = [
        FieldError("config.setting-missing", k, v, "needs data.tokenizer", fix)
        for k, v in needs.items()
        if v and not data.tokenizer
    ]
    if data.fim_tokens and not data.fim_rate:
        errors.append(
            FieldError(
                "config.without-effect",
                "data.fim_tokens",
                data.fim_tokens,
                "has no effect without data.fim_rate",
                "Leave it out.",
            )
        )
    if data.fim_tokens and len(set(data.fim_tokens.split())) != 3:
        problem, fix = "is not three different tokens", "Give the prefix, suffix and middle token, separated by spaces."
        errors.append(FieldError("config.fim-tokens-not-three", "data.fim_tokens", data.fim_tokens, problem, fix))
    try:
        mixture = read_mixture(data.train) if data.train else None
    except ConfigError as error:
        return [*errors, *error.errors]
    wanted = mixture.fim if mixture is not None else (None,)
    errors += [*weight_errors(config, mixture), *length_errors(config, mixture)]
    if data.fim_rate and all(fim is False for fim in wanted):
        errors.append(
            FieldError(
                "config.settings-contradict",
                "data.fim_rate",
                data.fim_rate,
                "applies to no source: all have fim = false",
                "Set it to 0.",
            )
        )
    if not data.fim_rate and any(wanted):
        errors.append(
            FieldError(
                "config.settings-contradict",
                "data.train",
                data.train,
                "has fim = true, but data.fim_rate is 0",
                "Set data.fim_rate, for example to 0.5.",
            )
        )
    return errors


def _fill_in(config: Config, world: int, plan: Plan | None, sources: dict[str, str]) -> Config:
    """Replace zeros that mean "derive it" by the derived values, so that no later code derives them again."""
    model, parallel = config.model, config.parallel
    derived = {
        **{("model", name): value for name, value in head_shape(model.model_dump()).items()},
        ("model", "rope_original_seq_len"): original_seq_len(model.model_dump()),
        ("parallel", "data"): data_degree(parallel, world),
        ("parallel", "chunks"): chunks_of(parallel, plan),
    }
    for (section, name), value in derived.items():
        part = getattr(config, section)
        if getattr(part, name) != value:
            config = _with(config, section, name, value, sources)
    if parallel.layers == BALANCED:
        stages = config.parallel.pipeline * config.parallel.chunks
        counts = balanced_layers(config.model, phases_of(config).longest(config.train.steps), stages)
        config = _with(config, "parallel", "layers", ",".join(map(str, counts)), sources)
    return config


def _with(config: Config, section: str, name: str, value: object, sources: dict[str, str]) -> Config:
    sources[f"{section}.{name}"] = "derived"
    return config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})


def _stray(word: str) -> FieldError:
    fix = "Options start with two dashes." if word.startswith("-") else f"Give a config file as --config {word}."
    return FieldError("config.unknown-word", "command line", word, "belongs to no option", fix)


def _apply_preset(model: dict[str, Any], sources: dict[str, str], errors: list[FieldError]) -> None:
    name = model.get("preset", "")
    if not name or not isinstance(name, str):  # reported by the type check
        return
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        known = ", ".join(PRESETS)
        errors.append(
            FieldError("config.unknown-choice", "model.preset", name, f"is not one of {known}", f"Did you mean {near}?")
        )
        return
    for key, value in PRESETS[name].items():
        if key not in model:
            model[key] = value
            sources[f"model.{key}"] = f"preset {name}"


def model_config(path: Path, fields: Mapping[str, Any]) -> ModelConfig:
    """Build the ModelConfig from model fields read from the file `path`. Raises ConfigError for invalid values."""
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        fix = "The folder is damaged, or its model is not supported."
        raise ConfigError(
            [
                FieldError(
                    "config.weights-not-a-model", f"{path}: model.{item['loc'][0]}", item["input"], item["msg"], fix
                )
                for item in error.errors()
            ]
        ) from None


def _apply_init(
    model: dict[str, Any], path: object, sources: dict[str, str], errors: list[FieldError]
) -> dict[str, Any]:
    """Fill in unset model.* from the folder checkpoint.init (`path`); returns the folder's model fields."""
    if not path or not isinstance(path, str):
        return {}
    wanted = str(model.get("max_seq_len", ""))
    try:
        values, file = read_model_fields(Path(path), int(wanted) if wanted.isdecimal() else None)
        values = model_config(Path(file), values).model_dump(exclude={"preset"})
    except ConfigError as error:
        errors += error.errors
        return {}
    except CheckpointError as error:
        errors.append(
            FieldError("config.init-not-readable", "checkpoint.init", path, str(error), "Give a folder with weights.")
        )
        return {}
    for key, value in values.items():
        if key not in model:
            model[key] = value
            sources[f"model.{key}"] = f"file {file}"
    return values


def _contradictions(
    model: ModelConfig, start: Mapping[str, Any], given: set[str], sources: Mapping[str, str]
) -> Iterator[FieldError]:
    """Errors of given model.* values that differ from the model of checkpoint.init."""
    free = {"preset", "init_std", *(("max_seq_len",) if model.positions == "rope" else ())}
    for name in sorted(given & start.keys() - free):
        value = getattr(model, name)
        derived = name in ("num_kv_heads", "head_dim") and value == 0
        if value != start[name] and not derived:
            problem = f"({sources[f'model.{name}']}), but the weights of checkpoint.init have {start[name]!r}"
            yield FieldError("config.init-contradicts", f"model.{name}", value, problem, "Leave it out.")


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{_toml_value(key)} = {_toml_value(part)}' for key, part in value.items())} }}"
    return repr(value)
