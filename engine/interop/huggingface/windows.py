"""Sliding windows in config.json <-> model.window and model.window_layers. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import FieldError
from engine.interop.huggingface.families import Family

Fields = dict[str, Any]


def read_window(raw: Mapping[str, Any], family: Family, fields: Fields, path: Path) -> tuple[Fields, list[FieldError]]:
    """(window fields, errors). A window that covers the whole context counts as full attention."""
    layers = fields.get("num_layers", 0)
    window, letters = raw.get("sliding_window", family.window), _windowed_layers(raw, family, layers)
    if "w" not in letters or (type(window) is int and window >= fields["max_seq_len"]):
        return {}, []
    if type(window) is not int or window < 1:
        problem = "is not a number of tokens"
    elif len(letters) != layers or type(raw.get("max_window_layers", 0)) is not int:
        problem = f"needs layer_types of {layers} layers, or max_window_layers as a number"
    else:
        return {"window": window, "window_layers": shortest_pattern(letters)}, []
    return {}, [FieldError("interop.window-malformed", f"{path}: sliding_window", window, problem, "")]


def shortest_pattern(letters: str) -> str:
    """The shortest model.window_layers that gives the layers these letters, w or f; empty if all are w."""
    lengths = (n for n in range(1, len(letters) + 1) if (letters[:n] * len(letters))[: len(letters)] == letters)
    pattern = letters[: next(lengths)]
    return "" if pattern == "w" else pattern


def letters_of(fields: Fields) -> str:
    """w or f for each layer of a model with these fields, as model.window_layers says."""
    return ((fields["window_layers"] or "w") * fields["num_layers"])[: fields["num_layers"]]


def _windowed_layers(raw: Mapping[str, Any], family: Family, layers: int) -> str:
    """For each layer, w: transformers gives it the sliding window, or f: full attention. Empty without a window."""
    if not family.windowed or raw.get("sliding_window", family.window) is None:
        return ""
    if not family.window_switch:
        return "w" * layers
    if not raw.get(family.window_switch):
        return ""
    kinds, first = raw.get("layer_types"), raw.get("max_window_layers", 28)
    if isinstance(kinds, list):
        return "".join("w" if kind == "sliding_attention" else "f" for kind in kinds)
    first = min(max(first, 0), layers) if isinstance(first, int) else 0
    return "f" * first + "w" * (layers - first)


def unsupported_layer_types(raw: Mapping[str, Any], family: Family) -> list[str]:
    """Layer types that the engine does not support, or that need a window where transformers has none."""
    has_window = family.windowed and type(raw.get("sliding_window", family.window)) is int
    if family.window_switch and not raw.get(family.window_switch):
        has_window = False
    kinds = {str(kind) for kind in raw["layer_types"]} - {"full_attention"}
    return sorted(kinds - ({"sliding_attention"} if has_window else set()))


def window_keys(fields: Fields, family: Family) -> dict[str, Any]:
    """The keys of config.json that give the model with `fields` its windows, as far as the family can say them."""
    config: dict[str, Any] = {"sliding_window": fields["window"] or None} if family.windowed else {}
    if not family.window_switch:
        return config
    config[family.window_switch] = fields["window"] > 0
    if not fields["window"]:
        return config
    letters = letters_of(fields)
    first = letters.index("w")
    if "f" not in letters[first:]:  # readers of before layer_types know this form only
        config["max_window_layers"] = first
    return config | {"layer_types": [{"w": "sliding_attention", "f": "full_attention"}[x] for x in letters]}
