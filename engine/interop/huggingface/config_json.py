"""config.json of Hugging Face folders, read and written by the tables of `families`. No torch.

See there for what is refused, and why a model that is written is read back as the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config.derived import head_shape
from engine.errors import CheckpointError, ConfigError, FieldError, format_value, truncate
from engine.interop.huggingface.families import (
    FAMILIES,
    FIXED,
    HARMLESS,
    LACKING,
    REFUSED,
    ROPE_FIXED,
    SCALING,
    Family,
    Field,
)
from engine.util.files import SEALED, read_json

Facts = dict[str, Any]
_CANNOT = "The engine cannot compute this model."
_MOST_BYTES = 64 << 20  # of a JSON file; the index of a model of 10^5 tensors has some 10 MB
_MOST, _MOST_LAYERS = 2**31 - 1, 10_000  # no model comes near; more would be worked on for long before it is refused


@dataclass(frozen=True)
class ParsedConfig:
    """What a config.json says. facts: model.* values. notes: what was left out that changes no output, in words.

    extras: keys of no consequence for the model, which an export gives back.
    """

    family: Family
    facts: Facts
    notes: tuple[str, ...]
    extras: Facts


def json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        value = read_json(path, _MOST_BYTES)
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
    """What a config.json says of a model. Raises ConfigError with everything in it that the engine does not have.

    max_seq_len: of the model that is made from it, where that is shorter: a sliding window may then be of no effect.
    ignore: keys that are read as if they were not there (sliding_window: as null), because whoever asks knows better.
    """
    raw = _without(json_object(path), ignore, path)
    family = _family(raw, path)
    facts: Facts = dict(family.facts)
    wrong = list(_resolve_aliases(raw, family))
    for key, entry in family.fields.items():
        try:
            facts |= _read_field(raw, key, entry, facts)
        except ConfigError as error:
            wrong += error.errors
    if not wrong:
        facts |= head_shape(facts)
    rope_facts, rope_wrong, notes = _read_rope(raw, family)
    facts |= rope_facts
    if facts.get("rope_scaling") in ("llama3", "yarn"):
        facts.setdefault("rope_original_seq_len", facts.get("max_seq_len", 0))
    facts["max_seq_len"] = max_seq_len or facts.get("max_seq_len", 0)
    wrong += rope_wrong + list(_wrong_keys(raw, family, facts["max_seq_len"]))
    errors = [replace(e, path=f"{path}: {e.path}", value=raw.get(e.path), fix=_fix(e.path, family)) for e in wrong]
    if errors := errors + _window_errors(raw, family, facts, path):
        raise ConfigError(errors)
    notes += [f"{key} {raw[key]}: the engine trains without dropout" for key in family.dropouts if raw.get(key)]
    if "auto_map" in raw:
        notes.append("auto_map: left out, no code of the folder is run")
    if unread := [truncate(key, 60) for key in raw if key not in known_keys(family) and not _is_lacking(raw, key)]:
        more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        notes.append(f"{family.architecture} does not read {', '.join(unread[:5])}{more}: kept for exports")
    return ParsedConfig(family, facts, tuple(notes), extras(raw, family))


def _family(raw: dict[str, Any], path: Path) -> Family:
    family = FAMILIES.get(str(raw.get("model_type")))
    known = f"The engine knows {', '.join(f.architecture for f in FAMILIES.values())}."
    if family is None:
        what, kind = f"{path}: model_type", raw.get("model_type")
        raise ConfigError([FieldError("interop.model-type-unknown", what, kind, "is no family of the engine", known)])
    named = raw.get("architectures")
    if named is not None and named != [family.architecture]:
        what, problem = f"{path}: architectures", f"is not {family.architecture}"
        raise ConfigError([FieldError("interop.architecture-unknown", what, named, problem, known)])
    return family


def _without(raw: dict[str, Any], ignore: Sequence[str], path: Path) -> dict[str, Any]:
    problem, fix = f"is no key of {path}", "It ignores keys of config.json."
    if odd := [key for key in ignore if key not in raw]:
        raise ConfigError([FieldError("interop.ignore-key-unknown", "--ignore-key", key, problem, fix) for key in odd])
    return {key: value for key, value in raw.items() if key not in ignore} | (
        {"sliding_window": None} if "sliding_window" in ignore else {}
    )


def _resolve_aliases(raw: dict[str, Any], family: Family) -> Iterator[FieldError]:
    """Give fields the values that stand under another name; a fault where two names differ."""
    for alias, key in family.aliases.items():
        if alias in raw and raw.setdefault(key, raw[alias]) != raw[alias]:
            problem = f"is another name of {key}, which is {format_value(raw[key])} here"
            yield FieldError("interop.key-names-differ", alias, raw[alias], problem, "")


def fixed_keys(family: Family) -> dict[str, tuple[Any, ...]]:
    """Keys that transformers reads and whose value must be one of these."""
    partial = "rope_theta" in family.rope_keys and "partial_rotary_factor" not in family.rope_keys
    return {**FIXED, **family.fixed, **({"partial_rotary_factor": (None, 1)} if partial else {})}


def known_keys(family: Family) -> set[str]:
    """All keys whose meaning is known, be it that they have none; transformers reads no other key of this family."""
    rope = ("rope_scaling", "rope_parameters", "original_max_position_embeddings") if family.rope_keys else ()
    window = ("sliding_window", "layer_types", family.window_switch)
    named = {*family.fields, *family.aliases, *fixed_keys(family), *family.rope_keys, *rope, *window}
    return named | {*HARMLESS, *family.harmless, *family.dropouts}


def extras(raw: Mapping[str, Any], family: Family) -> Facts:
    """What a config.json says beside the model, which an export gives back."""
    model = known_keys(family) - {*HARMLESS, *family.harmless, *family.dropouts}
    return {k: v for k, v in raw.items() if k not in model and k != "auto_map" and not _is_lacking(raw, k)}


def _is_lacking(raw: Mapping[str, Any], key: str) -> bool:
    return key in LACKING and bool(raw[key])


def _fix(key: str, family: Family) -> str:
    needed = {*family.fields, *family.aliases}
    return _CANNOT if key in needed else f"{_CANNOT} Should it change nothing here: engine import --ignore-key {key}"


def _wrong_keys(raw: Mapping[str, Any], family: Family, longest: int) -> Iterator[FieldError]:
    """What is there beside the family's fields and changes the model."""
    fixed, known = fixed_keys(family), known_keys(family)
    for key, value in raw.items():
        if key == "layer_types" and isinstance(value, list):
            if odd := _odd_layers(raw, family, longest):
                problem = f"the engine has full attention only, no {truncate(', '.join(odd))}"
                yield FieldError("interop.attention-not-supported", key, value, problem, "")
        elif key in fixed:
            if value not in fixed[key]:
                problem = f"the engine computes with {fixed[key][0]!r}"
                yield FieldError("interop.key-value-fixed", key, value, problem, "")
        elif key not in known and _is_lacking(raw, key):
            problem = f"asks for {LACKING[key]}, which the engine does not have"
            yield FieldError("interop.key-not-supported", key, value, problem, "")


def _read_field(raw: Mapping[str, Any], key: str, entry: Field, facts: Facts) -> Facts:
    value = raw.get(key)
    if value is None:
        value = entry.default(facts) if callable(entry.default) else entry.default
        if key in raw and entry.null is not None:
            value = entry.null
        if value is REFUSED:
            raise ConfigError([FieldError("interop.key-null", key, value, "is null, which is no value here", "")])
        if value is None:
            raise ConfigError([FieldError("interop.key-missing", key, value, "is missing", "")])
    elif entry.values:
        if not isinstance(value, str) or value not in entry.values:
            problem = f"is none of {', '.join(entry.values)}"
            raise ConfigError([FieldError("interop.key-value-unknown", key, value, problem, "")])
        value = entry.values[value]
    elif isinstance(value, bool) or isinstance(entry.default, bool):
        if not (isinstance(value, bool) and isinstance(entry.default, bool)):
            raise ConfigError([FieldError("interop.key-type", key, value, "is of the wrong type", "")])
    elif isinstance(entry.default, float):
        if not is_number(value) or value < 0:
            raise ConfigError([FieldError("interop.key-range", key, value, "is no finite number of at least 0", "")])
    elif not isinstance(value, int):
        raise ConfigError([FieldError("interop.key-type", key, value, "is of the wrong type", "")])
    else:
        most = _MOST_LAYERS if "num_layers" in entry.facts else _MOST
        if not 1 <= value <= most:
            raise ConfigError([FieldError("interop.key-range", key, value, f"is not from 1 to {most:,}", "")])
    return dict.fromkeys(entry.facts, value)


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a finite number that a double can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _is_idle(name: str, value: Any, kind: str) -> bool:
    """Whether transformers computes the same without this entry of rope_scaling. One by kinds of layers has dicts."""
    fixed = ROPE_FIXED.get(kind, {}) | {"partial_rotary_factor": (1,)}
    return value is None or (not isinstance(value, dict) and value in fixed.get(name, (value,)))


def _read_rope(raw: Mapping[str, Any], family: Family) -> tuple[Facts, list[FieldError], list[str]]:
    """(facts, faults, notes) of rotary positions, in transformers' forms before and since version 5.

    As transformers 5 has it: where both forms are there, rope_scaling counts and nothing of rope_parameters; what is
    said inside of either counts before the keys beside them.
    """
    if not family.rope_keys:
        return {}, [], []
    facts: Facts = {"rope_theta": 10000.0, **family.rope_defaults}
    facts |= {fact: raw[key] for key, fact in family.rope_keys.items() if raw.get(key) is not None}
    outside, notes, wrong = dict(facts), list[str](), list[FieldError]()
    given = [key for key in ("rope_scaling", "rope_parameters") if raw.get(key)]
    odd = [key for key in given if not isinstance(raw[key], dict)]
    if odd or not given:
        wrong = [FieldError("interop.rope-not-an-object", key, raw[key], "is no JSON object", "") for key in odd]
        return facts, wrong + _odd_numbers(facts), []
    key, inner = given[0], raw[given[0]]
    if len(given) > 1 and any(inner.get(name) != value for name, value in raw["rope_parameters"].items()):
        notes.append("rope_parameters is not read: rope_scaling beside it says something else and counts")
    names = {str(inner[name]) for name in ("rope_type", "type") if inner.get(name) is not None} or {"default"}
    kind = names.pop() if len(names) == 1 else " and ".join(sorted(names))
    kind = "none" if kind == "default" else kind
    if kind not in family.rope_types:
        known = ", ".join(family.rope_types).replace("none", "default")
        problem = f"rope_type {kind} is none that the engine has for {family.model_type}: {known}"
        return facts, [FieldError("interop.rope-type-unknown", key, inner, problem, "")], notes
    facts["rope_scaling"] = kind
    table = SCALING[kind] | {"rope_theta": "rope_theta"}
    if "rotary_fraction" in family.rope_keys.values():
        table["partial_rotary_factor"] = "rotary_fraction"
    for name, value in inner.items():
        if name in table and value is not None:
            facts[table[name]] = value
        elif not _is_idle(name, value, kind):
            problem = f"{truncate(name)} {format_value(value)} is not known for rope_type {kind}"
            wrong.append(FieldError("interop.rope-entry-unknown", key, inner, problem, ""))
    if "factor" in table and inner.get("factor") is None:
        wrong.append(FieldError("interop.rope-factor-missing", key, inner, "factor is missing", ""))
    if "original_max_position_embeddings" in table and raw.get("original_max_position_embeddings") is not None:
        facts["rope_original_seq_len"] = raw["original_max_position_embeddings"]  # comes first in transformers
    for name, fact in family.rope_keys.items():
        if raw.get(name) is not None and outside[fact] != facts[fact]:
            notes.append(f"{name} {format_value(raw[name])} is not read: {format_value(facts[fact])} in {key} counts")
    return facts, wrong + _odd_numbers(facts), notes


def _odd_numbers(facts: Facts) -> list[FieldError]:
    odd = {fact: value for fact, value in facts.items() if fact != "rope_scaling" and not is_number(value)}
    return [
        FieldError(
            "interop.rope-number-malformed", "rope_parameters", value, f"{fact} {format_value(value)} is no number", ""
        )
        for fact, value in odd.items()
    ]


def _window_errors(raw: Mapping[str, Any], family: Family, facts: Facts, path: Path) -> list[FieldError]:
    """A sliding window that would be felt: what transformers reads of it, shorter than the context."""
    window, longest = raw.get("sliding_window", family.window), facts["max_seq_len"]
    if not family.windowed or window is None:
        return []
    if family.window_switch:
        if not raw.get(family.window_switch):
            return []
        layers, first = facts.get("num_layers", 0), raw.get("max_window_layers", 28)
        if raw.get("layer_types") is None and isinstance(first, int) and first >= layers:
            return []  # those layers alone have it
        if isinstance(raw.get("layer_types"), list) and "sliding_attention" not in raw["layer_types"]:
            return []
    if _whole(window) and window >= longest:
        return []  # nothing is ever out of the window
    problem = f"is below the context of {longest}, and the engine attends to all of it"
    fix = f"For sequences of at most {window} tokens the model is the same: take it with max_seq_len {window}."
    fix += " Should it change nothing here: engine import --ignore-key sliding_window"
    return [FieldError("interop.window-not-supported", f"{path}: sliding_window", window, problem, fix)]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _odd_layers(raw: Mapping[str, Any], family: Family, longest: int) -> list[str]:
    """Kinds of layers that the engine does not have. One with a window that is never felt is a full one."""
    window = raw.get("sliding_window", family.window)
    idle = family.windowed and _whole(window) and window >= longest
    if family.window_switch and not raw.get(family.window_switch):
        idle = False  # transformers has no window then, and no such layer without one
    kinds = {str(kind) for kind in raw["layer_types"]} - {"full_attention"}
    return sorted(kinds - ({"sliding_attention"} if idle else set()))


def write_config(facts: Facts, defaults: Facts, prefer: Sequence[str] = ()) -> tuple[Family, dict[str, Any]]:
    """The family and the config.json that say exactly `facts`, all of ModelConfig's but the preset.

    defaults: ModelConfig's own. prefer: model types to try first. Raises CheckpointError when no family can say it.
    """
    order = [FAMILIES[name] for name in dict.fromkeys((*prefer, *FAMILIES)) if name in FAMILIES]
    lacking: list[tuple[list[str], Family]] = []
    for family in order:
        config = _write(facts, family)
        said = {**defaults, **family.facts, **_read_rope(config, family)[0]}
        for key, entry in family.fields.items():
            said |= _read_field(config, key, entry, said)
        said |= head_shape(said)
        differing = [name for name, value in facts.items() if said[name] != value]
        if not differing:
            return family, config
        lacking.append((differing, family))
    differing, family = min(lacking, key=lambda pair: len(pair[0]))
    values = ", ".join(f"model.{name} = {facts[name]!r}" for name in differing)
    raise CheckpointError(
        "interop.no-architecture-fits",
        f"no Hugging Face architecture that the engine knows is this model; {family.architecture} comes nearest, but "
        f"has no {values}. A model that is to be exported starts from a preset or from a Hugging Face folder.",
    )


def _write(facts: Facts, family: Family) -> dict[str, Any]:
    """The family's config.json of the facts; what it cannot say, reading it back shows."""
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for key, entry in family.fields.items():
        value = facts[entry.facts[0]]
        words = [word for word, ours in entry.values.items() if ours == value]
        config[key] = words[0] if words else next(iter(entry.values), value)
    config |= {key: values[0] for key, values in family.fixed.items() if values[0] is not None}
    config |= dict.fromkeys(family.dropouts, 0.0)
    if family.rope_keys:
        kind = facts["rope_scaling"]
        named = {"rope_type": "default" if kind == "none" else kind}
        scaling = {key: facts[fact] for key, fact in SCALING.get(kind, {}).items() if facts[fact]}
        inner = {"rope_theta": facts["rope_theta"]}
        if "rotary_fraction" in family.rope_keys.values():
            inner["partial_rotary_factor"] = facts["rotary_fraction"]
        config |= {key: facts[fact] for key, fact in family.rope_keys.items()}
        config["rope_parameters"] = named | inner | scaling
        if kind != "none":
            config["rope_scaling"] = named | inner | scaling
    if family.windowed:
        config["sliding_window"] = None
    if family.window_switch:
        config[family.window_switch] = False
    return config


def rope_forms(facts: Facts, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of rotary positions in the forms of transformers 4 and 5, beside what `config` holds in one of them."""
    if not family.rope_keys:
        return {}
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = "default" if facts["rope_scaling"] == "none" else facts["rope_scaling"]
    inner = {"rope_type": kind} | given | {"rope_theta": facts["rope_theta"]}
    usual = {"rotary_fraction": 1.0, **family.rope_defaults}
    outside = {
        key: facts[fact] for key, fact in family.rope_keys.items() if key in config or facts[fact] != usual.get(fact)
    }
    return outside | {"rope_parameters": inner} | ({"rope_scaling": inner} if kind != "default" else {})


def facts_of(path: Path, max_seq_len: int | None = None) -> tuple[Facts, str]:
    """(model.* facts, what said so) of a Hugging Face folder, or of one of our checkpoints or run folders.

    Raises ConfigError or CheckpointError.
    """
    if (path / "config.json").exists():
        return read_config(path / "config.json", max_seq_len).facts, str(path / "config.json")
    manifests = [path / "manifest.json"]
    for root in (path / "checkpoints", path):
        manifests += sorted(root.glob("step_*/manifest.json"), reverse=True)
    for manifest in manifests:
        if manifest.exists():
            with manifest.open("rb") as file:
                if file.read(len(SEALED)) == SEALED:
                    raise CheckpointError(
                        "interop.model-encrypted",
                        f"{manifest}: is encrypted, and what model it is must be known before the secret is read: "
                        "`engine export CHECKPOINT FOLDER --secret ...`, and start from that folder",
                    )
            model = (json_object(manifest).get("config") or {}).get("model")
            if isinstance(model, dict):
                return {name: value for name, value in model.items() if name != "preset"}, str(manifest)
    raise CheckpointError(
        "interop.no-model-here", f"{path}: neither a Hugging Face folder (config.json) nor a checkpoint is here"
    )
