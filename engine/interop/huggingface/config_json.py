"""Reads and writes config.json of Hugging Face folders, using the tables in `families`. Does not import torch.

See `families` for the keys that are rejected, and for why a written model reads back as the same model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config.derived import head_shape
from engine.config.phases import saved_model
from engine.errors import CheckpointError, ConfigError, FieldError, format_value, truncate
from engine.interop.huggingface import families
from engine.interop.huggingface.families import FAMILIES, ConfigKey, Family
from engine.interop.huggingface.windows import (
    Fields,
    letters_of,
    read_window,
    shortest_pattern,
    unsupported_layer_types,
    window_keys,
)
from engine.util.files import SEALED, read_json

_CANNOT_COMPUTE = "The engine cannot compute this model."
_IGNORE = "If the key has no effect in this model: engine import --ignore-key"
_MAX_JSON_BYTES = 64 << 20  # of a JSON file; the index of a model with 10^5 tensors has about 10 MB
_MAX_INT, _MAX_LAYERS = 2**31 - 1, 10_000  # far above any model; larger values would be slow to reject


@dataclass(frozen=True)
class ParsedConfig:
    """A parsed config.json. model_fields: model.* values. notes: messages about ignored settings that change no output.

    extras: keys that are not part of the model, which an export writes again.
    """

    family: Family
    model_fields: Fields
    notes: tuple[str, ...]
    extras: Fields


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises CheckpointError."""
    try:
        value = read_json(path, _MAX_JSON_BYTES)
    except FileNotFoundError:
        raise CheckpointError("interop.json-missing", f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError("interop.json-unreadable", f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise CheckpointError("interop.json-malformed", f"{path}: is not JSON ({truncate(str(error))})") from None
    if not isinstance(value, dict):
        raise CheckpointError("interop.json-not-an-object", f"{path}: is not a JSON object")
    return value


def read_config(path: Path, max_seq_len: int | None = None, ignore: Sequence[str] = ()) -> ParsedConfig:
    """Read the model that a config.json describes. Raises ConfigError with every setting that is not supported.

    max_seq_len: of the model, if shorter than the folder's; a sliding window may then have no effect and is omitted.
    ignore: keys to treat as absent (sliding_window: as null), because the caller knows that they have no effect.
    """
    raw = _drop_ignored(read_json_object(path), ignore, path)
    family = _family(raw, path)
    fields: Fields = dict(family.model_fields)
    wrong = list(_resolve_aliases(raw, family))
    for key, entry in family.config_keys.items():
        try:
            fields |= _read_field(raw, key, entry, fields)
        except ConfigError as error:
            wrong += error.errors
    if not wrong:
        fields |= head_shape(fields)
    rope_fields, rope_wrong, notes = _read_rope(raw, family)
    fields |= rope_fields
    if fields.get("rope_scaling") in ("llama3", "yarn"):
        fields.setdefault("rope_original_seq_len", fields.get("max_seq_len", 0))
    fields["max_seq_len"] = max_seq_len or fields.get("max_seq_len", 0)
    wrong += rope_wrong + list(_key_errors(raw, family))
    window_fields, window_errors = read_window(raw, family, fields, path)
    fields |= window_fields
    errors = [replace(e, path=f"{path}: {e.path}", value=raw.get(e.path), fix=_fix(e.path, family)) for e in wrong]
    if errors := errors + window_errors:
        raise ConfigError(errors)
    notes += [f"{key} {raw[key]}: not taken over; set {_our_dropout(key)}" for key in family.dropouts if raw.get(key)]
    if "auto_map" in raw:
        notes.append("auto_map: ignored, no code of the folder is run")
    if unread := [truncate(key, 60) for key in raw if key not in known_keys(family) and not _is_unsupported(raw, key)]:
        more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        notes.append(f"{family.architecture} does not read {', '.join(unread[:5])}{more}: kept for exports")
    return ParsedConfig(family, fields, tuple(notes), extras(raw, family))


def _our_dropout(key: str) -> str:
    return "train.attention_dropout" if key.startswith("att") else "train.dropout"


def _family(raw: dict[str, Any], path: Path) -> Family:
    family = FAMILIES.get(str(raw.get("model_type")))
    known = f"Supported: {', '.join(f.architecture for f in FAMILIES.values())}."
    if family is None:
        key, kind = f"{path}: model_type", raw.get("model_type")
        raise ConfigError(
            [FieldError("interop.model-type-unknown", key, kind, "is not a family that the engine supports", known)]
        )
    named = raw.get("architectures")
    if named is not None and named != [family.architecture]:
        key, problem = f"{path}: architectures", f"is not {family.architecture}"
        raise ConfigError([FieldError("interop.architecture-unknown", key, named, problem, known)])
    return family


def _drop_ignored(raw: dict[str, Any], ignore: Sequence[str], path: Path) -> dict[str, Any]:
    problem, fix = f"is not a key of {path}", "Give keys of config.json."
    if unknown := [key for key in ignore if key not in raw]:
        raise ConfigError(
            [FieldError("interop.ignore-key-unknown", "--ignore-key", key, problem, fix) for key in unknown]
        )
    return {key: value for key, value in raw.items() if key not in ignore} | (
        {"sliding_window": None} if "sliding_window" in ignore else {}
    )


def _resolve_aliases(raw: dict[str, Any], family: Family) -> Iterator[FieldError]:
    """Copy values of aliases to the keys that they name. Yields an error if both are given and differ."""
    for alias, key in family.aliases.items():
        if alias in raw and raw.setdefault(key, raw[alias]) != raw[alias]:
            problem = f"is an alias of {key}, which is {format_value(raw[key])} here"
            yield FieldError("interop.key-names-differ", alias, raw[alias], problem, "")


def fixed_keys(family: Family) -> dict[str, tuple[Any, ...]]:
    """Keys that transformers reads -> the values that the engine supports."""
    partial = "rope_theta" in family.rope_keys and "partial_rotary_factor" not in family.rope_keys
    return {**families.FIXED, **family.fixed, **({"partial_rotary_factor": (None, 1)} if partial else {})}


def known_keys(family: Family) -> set[str]:
    """All keys of a family with a known meaning or known to have no effect; transformers reads no others."""
    rope = ("rope_scaling", "rope_parameters", "original_max_position_embeddings") if family.rope_keys else ()
    window = ("sliding_window", "layer_types", family.window_switch)
    named = {*family.config_keys, *family.aliases, *fixed_keys(family), *family.rope_keys, *rope, *window}
    return named | {*families.HARMLESS, *family.harmless, *family.dropouts}


def extras(raw: Mapping[str, Any], family: Family) -> Fields:
    """Keys of a config.json that are not part of the model, which an export writes again."""
    model = known_keys(family) - {*families.HARMLESS, *family.harmless, *family.dropouts}
    return {k: v for k, v in raw.items() if k not in model and k != "auto_map" and not _is_unsupported(raw, k)}


def _is_unsupported(raw: Mapping[str, Any], key: str) -> bool:
    return key in families.UNSUPPORTED and bool(raw[key])


def _fix(key: str, family: Family) -> str:
    if key in family.config_keys or key in family.aliases:
        return _CANNOT_COMPUTE
    return f"{_CANNOT_COMPUTE} {_IGNORE} {key}"


def _key_errors(raw: Mapping[str, Any], family: Family) -> Iterator[FieldError]:
    """Errors for keys that change the model and are not among the family's config_keys."""
    fixed, known = fixed_keys(family), known_keys(family)
    for key, value in raw.items():
        if key == "layer_types" and isinstance(value, list):
            if kinds := unsupported_layer_types(raw, family):
                problem = f"{family.architecture} has no {truncate(', '.join(kinds))} here"
                yield FieldError("interop.attention-not-supported", key, value, problem, "")
        elif key in fixed:
            if value not in fixed[key]:
                problem = f"the engine supports only {fixed[key][0]!r}"
                yield FieldError("interop.key-value-fixed", key, value, problem, "")
        elif key not in known and _is_unsupported(raw, key):
            problem = f"asks for {families.UNSUPPORTED[key]}, which the engine does not have"
            yield FieldError("interop.key-not-supported", key, value, problem, "")


def _read_field(raw: Mapping[str, Any], key: str, entry: ConfigKey, fields: Fields) -> Fields:
    value = raw.get(key)
    if value is None:
        value = entry.default(fields) if callable(entry.default) else entry.default
        if key in raw and entry.null is not None:
            value = entry.null
        if value is families.REJECT_NULL:
            raise ConfigError([FieldError("interop.key-null", key, value, "is null, which is not allowed here", "")])
        if value is None:
            raise ConfigError([FieldError("interop.key-missing", key, value, "is missing", "")])
    elif entry.values:
        if not isinstance(value, str) or value not in entry.values:
            problem = f"is not one of {', '.join(entry.values)}"
            raise ConfigError([FieldError("interop.key-value-unknown", key, value, problem, "")])
        value = entry.values[value]
    elif isinstance(value, bool) or isinstance(entry.default, bool):
        if not (isinstance(value, bool) and isinstance(entry.default, bool)):
            raise ConfigError([FieldError("interop.key-type", key, value, "is of the wrong type", "")])
    elif isinstance(entry.default, float):
        if not is_number(value) or value < 0:
            raise ConfigError([FieldError("interop.key-range", key, value, "is not a finite number of at least 0", "")])
    elif not isinstance(value, int):
        raise ConfigError([FieldError("interop.key-type", key, value, "is of the wrong type", "")])
    else:
        limit = _MAX_LAYERS if "num_layers" in entry.model_fields else _MAX_INT
        if not 1 <= value <= limit:
            raise ConfigError([FieldError("interop.key-range", key, value, f"is not between 1 and {limit:,}", "")])
    return dict.fromkeys(entry.model_fields, value)


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a finite number that a double can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _has_no_effect(name: str, value: Any, kind: str) -> bool:
    """Whether transformers ignores this entry of rope_scaling. (A dict is per layer type: not ignored.)"""
    fixed = families.ROPE_FIXED.get(kind, {}) | {"partial_rotary_factor": (1,)}
    return value is None or (not isinstance(value, dict) and value in fixed.get(name, (value,)))


def _read_rope(raw: Mapping[str, Any], family: Family) -> tuple[Fields, list[FieldError], list[str]]:
    """(model fields, errors, notes) of rotary positions, in the forms of transformers 4 and of 5.

    As in transformers 5: if both forms are present, rope_scaling is used and rope_parameters is ignored entirely, and
    their entries take precedence over keys outside them.
    """
    if not family.rope_keys:
        return {}, [], []
    fields: Fields = {"rope_theta": 10000.0, **family.rope_defaults}
    fields |= {field: raw[key] for key, field in family.rope_keys.items() if raw.get(key) is not None}
    outside, notes, wrong = dict(fields), list[str](), list[FieldError]()
    given = [key for key in ("rope_scaling", "rope_parameters") if raw.get(key)]
    invalid = [key for key in given if not isinstance(raw[key], dict)]
    if invalid or not given:
        wrong = [FieldError("interop.rope-not-an-object", key, raw[key], "is not a JSON object", "") for key in invalid]
        return fields, wrong + _number_errors(fields), []
    key, inner = given[0], raw[given[0]]
    if len(given) > 1 and any(inner.get(name) != value for name, value in raw["rope_parameters"].items()):
        notes.append("rope_parameters is not read: rope_scaling differs from it and takes precedence")
    names = {str(inner[name]) for name in ("rope_type", "type") if inner.get(name) is not None} or {"default"}
    kind = names.pop() if len(names) == 1 else " and ".join(sorted(names))
    kind = "none" if kind == "default" else kind
    if kind not in family.rope_types:
        known = ", ".join(family.rope_types).replace("none", "default")
        problem = f"rope_type {kind} is not supported for {family.model_type}, only: {known}"
        return fields, [FieldError("interop.rope-type-unknown", key, inner, problem, "")], notes
    fields["rope_scaling"] = kind
    table = families.ROPE_SCALING[kind] | {"rope_theta": "rope_theta"}
    if "rotary_fraction" in family.rope_keys.values():
        table["partial_rotary_factor"] = "rotary_fraction"
    for name, value in inner.items():
        if name in table and value is not None:
            fields[table[name]] = value
        elif not _has_no_effect(name, value, kind):
            problem = f"{truncate(name)} {format_value(value)} is not supported for rope_type {kind}"
            wrong.append(FieldError("interop.rope-entry-unknown", key, inner, problem, ""))
    if "factor" in table and inner.get("factor") is None:
        wrong.append(FieldError("interop.rope-factor-missing", key, inner, "factor is missing", ""))
    if "original_max_position_embeddings" in table and raw.get("original_max_position_embeddings") is not None:
        fields["rope_original_seq_len"] = raw["original_max_position_embeddings"]  # takes precedence in transformers
    for name, field in family.rope_keys.items():
        if raw.get(name) is not None and outside[field] != fields[field]:
            notes.append(
                f"{name} {format_value(raw[name])} is not read: {format_value(fields[field])} in {key} takes precedence"
            )
    return fields, wrong + _number_errors(fields), notes


def _number_errors(fields: Fields) -> list[FieldError]:
    return [
        FieldError(
            "interop.rope-number-malformed", "rope_parameters", v, f"{name} {format_value(v)} is not a number", ""
        )
        for name, v in fields.items()
        if name != "rope_scaling" and not is_number(v)
    ]


def write_config(fields: Fields, defaults: Fields, prefer: Sequence[str] = ()) -> tuple[Family, dict[str, Any]]:
    """(family, config.json) that describe exactly the model with `fields`, all of ModelConfig's except the preset.

    defaults: of ModelConfig. prefer: model types to try first. Raises CheckpointError if no family fits.
    """
    order = [FAMILIES[name] for name in dict.fromkeys((*prefer, *FAMILIES)) if name in FAMILIES]
    if fields["window"]:
        fields = fields | {"window_layers": shortest_pattern(letters_of(fields))}
    lacking: list[tuple[list[str], Family]] = []
    for family in order:
        config = _build_config(fields, family)
        read_back = {**defaults, **family.model_fields, **_read_rope(config, family)[0]}
        for key, entry in family.config_keys.items():
            read_back |= _read_field(config, key, entry, read_back)
        read_back |= head_shape(read_back)
        read_back |= read_window(config, family, read_back, Path("config.json"))[0]
        differing = [name for name, value in fields.items() if read_back[name] != value]
        if not differing:
            return family, config
        lacking.append((differing, family))
    differing, family = min(lacking, key=lambda pair: len(pair[0]))
    values = ", ".join(f"model.{name} = {fields[name]!r}" for name in differing)
    raise CheckpointError(
        "interop.no-architecture-fits",
        f"none of the supported Hugging Face architectures can express this model; {family.architecture} is "
        f"nearest, but cannot have {values}. To export a model, start it from a preset or from a Hugging Face folder.",
    )


def _build_config(fields: Fields, family: Family) -> dict[str, Any]:
    """The family's config.json for `fields`. Fields that it cannot express differ when it is read back."""
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for key, entry in family.config_keys.items():
        value = fields[entry.model_fields[0]]
        names = [name for name, ours in entry.values.items() if ours == value]
        config[key] = names[0] if names else next(iter(entry.values), value)
    config |= {key: values[0] for key, values in family.fixed.items() if values[0] is not None}
    config |= dict.fromkeys(family.dropouts, 0.0)
    if family.rope_keys:
        kind = fields["rope_scaling"]
        named = {"rope_type": "default" if kind == "none" else kind}
        scaling = {key: fields[field] for key, field in families.ROPE_SCALING.get(kind, {}).items() if fields[field]}
        inner = {"rope_theta": fields["rope_theta"]}
        if "rotary_fraction" in family.rope_keys.values():
            inner["partial_rotary_factor"] = fields["rotary_fraction"]
        config |= {key: fields[field] for key, field in family.rope_keys.items()}
        config["rope_parameters"] = named | inner | scaling
        if kind != "none":
            config["rope_scaling"] = named | inner | scaling
    return config | window_keys(fields, family)


def rope_forms(fields: Fields, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of rotary positions in the forms of both transformers 4 and 5, completing those in `config`."""
    if not family.rope_keys:
        return {}
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = "default" if fields["rope_scaling"] == "none" else fields["rope_scaling"]
    inner = {"rope_type": kind} | given | {"rope_theta": fields["rope_theta"]}
    usual = {"rotary_fraction": 1.0, **family.rope_defaults}
    outside = {
        key: fields[name] for key, name in family.rope_keys.items() if key in config or fields[name] != usual.get(name)
    }
    return outside | {"rope_parameters": inner} | ({"rope_scaling": inner} if kind != "default" else {})


def read_model_fields(path: Path, max_seq_len: int | None = None) -> tuple[Fields, str]:
    """(model.* values, the file they are from) of a Hugging Face folder, or of one of our checkpoints or run folders.

    Raises ConfigError or CheckpointError.
    """
    if (path / "config.json").exists():
        return read_config(path / "config.json", max_seq_len).model_fields, str(path / "config.json")
    manifests = [path / "manifest.json"]
    for root in (path / "checkpoints", path):
        manifests += sorted(root.glob("step_*/manifest.json"), reverse=True)
    for manifest in manifests:
        if manifest.exists():
            with manifest.open("rb") as file:
                if file.read(len(SEALED)) == SEALED:
                    raise CheckpointError(
                        "interop.model-encrypted",
                        f"{manifest}: is encrypted, but the model must be known before the secret is read. Run "
                        "`engine export CHECKPOINT FOLDER --secret ...` and start from that folder",
                    )
            found = read_json_object(manifest)
            if isinstance((found.get("config") or {}).get("model"), dict):
                model = saved_model(found["config"], int(found.get("step") or 0))
                return {name: value for name, value in model.items() if name != "preset"}, str(manifest)
    raise CheckpointError(
        "interop.no-model-here", f"{path}: is neither a Hugging Face folder (config.json) nor a checkpoint"
    )
