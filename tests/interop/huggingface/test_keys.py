"""Keys of config.json that matter are those that transformers reads, checked against its source.

A key that the family's class does not read has no effect, even if its name suggests one. A key that it reads is in the
family's table, so that unsupported values are rejected. Published files have keys of both kinds.
"""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

import pytest
import transformers

from engine.cli import main as cli
from engine.config.load import model_config
from engine.errors import CheckpointError, ConfigError
from engine.interop.huggingface.config_json import known_keys, read_config
from engine.interop.huggingface.families import FAMILIES
from tests.support.errors import raises

SOURCE = Path(transformers.__file__).parent
SHARED = ("masking_utils.py", "modeling_rope_utils.py", "cache_utils.py")
LLAMA: dict[str, Any] = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61, "max_position_embeddings": 64},
}
# Attributes of configs in the source that are not keys of the file: properties, methods, keys of other tasks' classes
NO_KEYS = {
    *dir(transformers.PreTrainedConfig),
    *("num_labels", "problem_type", "classifier_dropout", "_rope_type_labels", "nested_rope_parameter_keys"),
    *("cumulative_length", "kv_sharing_modes", "crossattention", "q_attn", "summary_last_dropout", "is_heterogeneous"),
    *(
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "max_position_embeddings",
        "head_dim",
    ),  # under any alias
}
# Keys read only by other tasks' classes, or by a method that the family overrides
NOT_BY_THIS_CLASS = {
    "gpt2": {"hidden_dropout", "rope_parameters"},
    "gpt_neox": {"rope_theta", "partial_rotary_factor"},
}


def reads(file: Path) -> set[str]:
    """Attributes that a source file reads from a variable named config, and fields that its config class declares."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            if owner == "config":
                found.add(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            of, name = node.args[:2]
            owner = of.id if isinstance(of, ast.Name) else of.attr if isinstance(of, ast.Attribute) else ""
            if owner in ("config", "self") and isinstance(name, ast.Constant) and "inv_freq" not in str(name.value):
                found.add(str(name.value))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            found |= {
                line.target.id
                for line in node.body
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
            }
    return found


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_key_that_transformers_reads_is_in_the_table(model_type: str) -> None:
    family, folder = FAMILIES[model_type], SOURCE / "models" / model_type
    read = reads(folder / f"modeling_{model_type}.py") | reads(folder / f"configuration_{model_type}.py")
    shared = [name for name in SHARED if family.rope_keys or "rope" not in name]
    read |= set().union(*(reads(SOURCE / name) for name in shared))
    read |= {"decoder", "generator", "text_config", "text_encoder"}  # names in strings
    read -= NOT_BY_THIS_CLASS.get(model_type, set())
    read |= set(transformers.CONFIG_MAPPING[model_type].attribute_map)
    assert len(read) > 25  # the source was found and parsed
    unknown = read - known_keys(family) - NO_KEYS
    assert not unknown, f"{family.architecture} reads {sorted(unknown)}, and the table does not say what they mean"


def parse(tmp_path: Path, change: dict[str, Any], **options: Any) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | change), encoding="utf-8")
    return read_config(tmp_path / "config.json", **options)


@pytest.mark.parametrize(
    "change",
    [
        {"transformers.js_config": {"dtype": "q4"}},  # SmolLM2-Instruct
        {"n_special": 0, "predict_special_tokens": True, "output_past": True},  # gpt2-medium, gpt2-xl
        {"custom_pipelines": {"text-generation": {"impl": "a.B"}}},  # Dolly
        {"max_length": 4096, "do_sample": True, "temperature": 0.9},  # settings of generation
        {"chunk_size_feed_forward": 0, "pruned_heads": {}, "use_bfloat16": False},  # saved with every default
        {"num_experts": 0, "alibi": False, "logit_scale": None},  # features that are off
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "finetuned": True}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_key_that_is_not_read_is_harmless_and_comes_back(tmp_path: Path, change: dict[str, Any]) -> None:
    plain = parse(tmp_path, {k: v for k, v in change.items() if k == "rope_scaling"})
    with_keys = parse(tmp_path, change)
    assert with_keys.model_fields == plain.model_fields
    extras = {key: value for key, value in change.items() if key != "rope_scaling"}
    assert extras.items() <= with_keys.extras.items()
    if set(extras) - {"num_experts", "alibi", "logit_scale"}:
        assert any(next(iter(extras)) in note for note in with_keys.notes)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"is_causal": False}, "key-value-fixed"),
        ({"text_config": {"hidden_size": 64}}, "key-value-fixed"),
        ({"partial_rotary_factor": 0.5}, "key-value-fixed"),
        ({"per_layer_config": {"0": {"intermediate_size": 8}}}, "key-value-fixed"),
        ({"num_experts": 8}, "key-not-supported"),
    ],
)
def test_unsupported_keys_are_rejected_unless_ignored(tmp_path: Path, change: dict[str, Any], code: str) -> None:
    ((key, value),) = change.items()
    with raises(ConfigError, f"interop.{code}", f"{key} = {value!r}", f"--ignore-key {key}"):
        parse(tmp_path, change)
    ignored = parse(tmp_path, change, ignore=(key,))
    assert ignored.model_fields == parse(tmp_path, {}).model_fields
    assert key not in ignored.extras
    with raises(ConfigError, "interop.ignore-key-unknown", "wobble"):  # not a key of the file
        parse(tmp_path, change, ignore=(key, "wobble"))


def test_aliases_with_different_values_are_rejected(tmp_path: Path) -> None:
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2}

    def read(change: dict[str, Any]) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(gpt2 | change), encoding="utf-8")
        return read_config(tmp_path / "config.json").model_fields

    assert read({"hidden_size": 32, "num_hidden_layers": 2}) == read({})
    with raises(ConfigError, "interop.key-names-differ", "hidden_size = 64", "n_embd", 32):
        read({"hidden_size": 64})


DEEP = "[" * 200_000


@pytest.mark.parametrize(
    "change",
    [
        *({"num_attention_heads": value} for value in (0, -4, 4.0, "4", [4], True, 10**25)),
        *({key: 10**18} for key in ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings")),
        {"hidden_size": 2**62},
        {"num_hidden_layers": 100_000},
        {"hidden_act": ["silu"]},
        {"hidden_act": {"a": 1}},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": -1e-5},
        {"rope_theta": float("inf")},
        {"rope_theta": 10**400},
        {"rope_scaling": {"type": ["linear"], "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": [2.0]}},
        {"model_type": ["llama"]},
        {"architectures": {"a": "b"}},
        {"layer_types": [["full_attention"]]},
        {"vocab_size": "x" * 5_000_000},
    ],
    ids=lambda change: f"{next(iter(change))}-{str(next(iter(change.values())))[:20]}",
)
def test_malformed_values_are_short_errors(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        model_config(tmp_path, parse(tmp_path, change).model_fields)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, "", "nul", "\x00" * 100, '{"a": ' + "9" * 10_000 + "}"])
def test_invalid_json_is_a_short_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        read_config(tmp_path / "config.json")
    assert len(str(caught.value)) < 1500


def test_ignored_keys_are_recorded_and_pipes_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def main(words: list[str]) -> int:
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        return int(stop.value.code or 0)

    cfg = transformers.LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "architectures"})
    transformers.LlamaForCausalLM(cfg).save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text(encoding="utf-8")) | {"num_experts": 8, "x": 1}
    (tmp_path / "hf/config.json").write_text(json.dumps(config), encoding="utf-8")
    words = ["import", str(tmp_path / "hf"), str(tmp_path / "run")]
    assert main(words) == 2
    assert "--ignore-key num_experts" in capsys.readouterr().err
    assert main([*words, "--ignore-key", "num_experts"]) == 0
    assert "LlamaForCausalLM does not read x: kept for exports" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert "ignored_keys ['num_experts']" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    back = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    assert "num_experts" not in back and back["x"] == 1
    for name in ("model.safetensors", "config.json"):  # these pipes have no writer, so opening them would block
        (tmp_path / "hf" / name).unlink()
        os.mkfifo(tmp_path / "hf" / name)
        assert main(["import", str(tmp_path / "hf"), str(tmp_path / "run2"), "--ignore-key", "num_experts"]) == 1
        assert "is not a regular file" in capsys.readouterr().err
