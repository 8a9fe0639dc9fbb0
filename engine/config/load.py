"""Load a checked config from TOML files, presets and dotted overrides; all errors are reported together.

Precedence, later wins: default < preset < initial weights (checkpoint.init) < config files < command line.
`Resolved.sources` records the origin of each value.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from engine.config import hints, renames
from engine.config.checks import config_errors
from engine.config.derived import (
    BALANCED,
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
from engine.config.model_checks import ROPE_SCALES
from engine.config.presets import PRESETS
from engine.config.schema import Config, ModelConfig, fields, type_name
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
        for section, values in self.config.model_dump().items():
            lines.append(f"[{section}]")
            for key, value in values.items():
                lines.append(f"{key} = {_toml_value(value)}  # {self.sources[f'{section}.{key}']}")
            lines.append("")
        return "\n".join(lines)


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
    errors: list[FieldError] = []
    tree: dict[str, dict[str, Any]] = {section: {} for section in Config.model_fields}
    sources: dict[str, str] = {}
    for file in files:
        for path, value in _read_toml(file, errors):
            _put(tree, sources, path, value, f"file {file}", errors)
    for path, text in overrides.items():
        _put(tree, sources, path, text, "command line", errors)
    errors += [_unknown(word[2:], "", "command line") if word.startswith("--") else _stray(word) for word in unknown]
    _apply_preset(tree, sources, errors)
    given = set(tree["model"])
    start = _apply_init(tree, sources, errors)
    config, wrong = _parse(tree, errors)
    errors += _contradictions(config.model, start, given - {path.removeprefix("model.") for path in wrong}, sources)
    p = config.parallel
    world = world or model_ranks(p.model_copy(update={"context": 1})) * max(
        1, p.data
    )  # a context degree above 1 is an error
    plan = read_plan(p)
    # errors about an invalid value, or about values derived from it, would mislead: drop them
    if wrong & {"parallel.tensor", "parallel.pipeline", "parallel.data"}:
        wrong |= {"parallel = ", "train.global_batch_size"}
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
    sources = {f"{s}.{n}": sources.get(f"{s}.{n}", "default") for s, n, _ in fields()}
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
        wanted = read_mixture(data.train).fim if data.train else (None,)
    except ConfigError as error:
        return [*errors, *error.errors]
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
        ("model", "rope_original_seq_len"): model.rope_original_seq_len
        or (model.max_seq_len if model.rope_scaling in ROPE_SCALES["rope_original_seq_len"] else 0),
        ("parallel", "data"): data_degree(parallel, world),
        ("parallel", "chunks"): chunks_of(parallel, plan),
    }
    for (section, name), value in derived.items():
        part = getattr(config, section)
        if getattr(part, name) != value:
            config = _with(config, section, name, value, sources)
    if parallel.layers == BALANCED:
        stages = config.parallel.pipeline * config.parallel.chunks
        counts = balanced_layers(config.model, config.train.seq_len, stages)
        config = _with(config, "parallel", "layers", ",".join(map(str, counts)), sources)
    return config


def _with(config: Config, section: str, name: str, value: object, sources: dict[str, str]) -> Config:
    sources[f"{section}.{name}"] = "derived"
    return config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})


def _known_paths() -> list[str]:
    return [f"{s}.{n}" for s, n, _ in fields()]


def _unknown(path: str, value: object, source: str) -> FieldError:
    path = path.replace("-", "_")
    if new := renames.SETTINGS.get(path):
        return FieldError("config.renamed", path, value, f"was renamed ({source})", f"Use {new}.")
    problem, fix = f"no such setting ({source})", "`engine train --help` lists all settings."
    if hint := hints.suggest(path, _known_paths()):
        problem += f"; an option of {hint.engine}" if hint.engine else ""
        problem += f": {hint.remark}" if hint.remark else ""
        fix = f"Did you mean {hint.ours}?" if hint.ours else "It has no counterpart here; see docs/coming_from.md."
    return FieldError("config.unknown-setting", path, value, problem, fix)


def _stray(word: str) -> FieldError:
    fix = "Options start with two dashes." if word.startswith("-") else f"Give a config file as --config {word}."
    return FieldError("config.unknown-word", "command line", word, "belongs to no option", fix)


def _read_toml(file: Path, errors: list[FieldError]) -> Iterator[tuple[str, Any]]:
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        errors.append(
            FieldError(
                "config.file-not-readable",
                "--config",
                str(file),
                f"cannot be read ({error})",
                "Give the path of a TOML file.",
            )
        )
        return
    except tomllib.TOMLDecodeError as error:
        errors.append(
            FieldError("config.file-not-toml", "--config", str(file), f"is not valid TOML: {error}", "Fix that line.")
        )
        return
    for section, values in (renames.to_current_names(tree) if renames.is_run_folder_config(file) else tree).items():
        if isinstance(values, dict):
            yield from ((f"{section}.{name}", value) for name, value in values.items())
        else:
            errors.append(_unknown(section, values, f"file {file}"))


def _put(
    tree: dict[str, Any], sources: dict[str, str], path: str, value: Any, source: str, errors: list[FieldError]
) -> None:
    if path not in _known_paths():
        errors.append(_unknown(path, value, source))
        return
    section, name = path.split(".")
    tree[section][name] = value
    sources[path] = source


def _apply_preset(tree: dict[str, dict[str, Any]], sources: dict[str, str], errors: list[FieldError]) -> None:
    name = tree["model"].get("preset", "")
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
        if key not in tree["model"]:
            tree["model"][key] = value
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


def _apply_init(tree: dict[str, dict[str, Any]], sources: dict[str, str], errors: list[FieldError]) -> dict[str, Any]:
    """Fill in unset model.* from the folder checkpoint.init; returns the folder's model fields."""
    path = tree["checkpoint"].get("init")
    if not path or not isinstance(path, str):
        return {}
    wanted = str(tree["model"].get("max_seq_len", ""))
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
        if key not in tree["model"]:
            tree["model"][key] = value
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


def _parse(tree: dict[str, dict[str, Any]], errors: list[FieldError]) -> tuple[Config, set[str]]:
    """(config, paths of invalid values): invalid values get their defaults, so that the others can be checked."""
    try:
        return Config.model_validate(tree), set()
    except ValidationError as error:
        by_path = {f"{s}.{n}": f for s, n, f in fields()}
        good = {section: dict(values) for section, values in tree.items()}
        wrong = set()
        for item in error.errors():
            section, name = map(str, item["loc"])
            field = by_path[f"{section}.{name}"]
            problem = item["msg"][0].lower() + item["msg"][1:]
            fix = f"Give {type_name(field.annotation)}; the default is {field.default!r}."
            errors.append(FieldError("config.value-not-valid", f"{section}.{name}", item["input"], problem, fix))
            wrong.add(f"{section}.{name}")
            good[section].pop(name, None)
        return Config.model_validate(good), wrong


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's
    return repr(value)
