"""config.json: keys that are read, keys that are rejected by name, and that a written model reads back the same."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.load import load, model_config
from engine.config.presets import PRESETS
from engine.config.schema import ModelConfig
from engine.errors import CheckpointError, ConfigError
from engine.interop.convert import import_folder
from engine.interop.huggingface.config_json import read_config, write_config
from engine.interop.huggingface.families import FAMILIES
from engine.interop.huggingface.weights import HfReader
from tests.support.command import run_cli
from tests.support.errors import raises
from tests.support.hf_folders import UP, rewrite
from tests.support.hf_models import MODELS, build, save

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
DEFAULTS = ModelConfig().model_dump(exclude={"preset"})


def read(tmp_path: Path, fields: Any, max_seq_len: int | None = None) -> dict[str, Any]:
    (tmp_path / "config.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return read_config(tmp_path / "config.json", max_seq_len).model_fields


# change of a valid Llama -> (change, error code, values in the message)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"model_type": "mamba"},
        "model-type-unknown",
        ("model_type = 'mamba'", "LlamaForCausalLM"),
    ),
    "no type": ({"model_type": None}, "model-type-unknown", ("model_type",)),
    "task": (
        {"architectures": ["LlamaForSequenceClassification"]},
        "architecture-unknown",
        ("LlamaForSequenceClassification", "LlamaForCausalLM"),
    ),
    "quantised": ({"quantization_config": {"bits": 4}}, "key-not-supported", ("quantization_config = {'bits': 4}",)),
    "experts": ({"num_local_experts": 8}, "key-not-supported", ("num_local_experts = 8",)),
    "softcapping": ({"final_logit_softcapping": 30.0}, "key-not-supported", ("final_logit_softcapping = 30.0",)),
    "both ways": ({"is_causal": False}, "key-value-fixed", ("is_causal = False", None)),
    "activation": ({"hidden_act": "relu2"}, "key-value-unknown", ("hidden_act = 'relu2'", "silu")),
    "missing": ({"hidden_size": None}, "key-missing", ("hidden_size: is missing",)),
    "wrong type": ({"num_hidden_layers": "2"}, "key-type", ("num_hidden_layers = '2'",)),
    "rope type": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "rope-type-unknown",
        ("rope_scaling = ", "rope_type dynamic"),
    ),
    "longrope": ({"rope_parameters": {"rope_type": "longrope"}}, "rope-type-unknown", ("rope_type longrope",)),
    "old rope name": ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope-type-unknown", ("rope_type su",)),
    "two rope types": (
        {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
        "rope-type-unknown",
        ("linear and yarn",),
    ),
    "rope detail": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}},
        "rope-entry-unknown",
        ("mscale 0.7",),
    ),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "rope-factor-missing", ("'linear'}", "factor")),
    "rope list": ({"rope_scaling": [1, 2]}, "rope-not-an-object", ("rope_scaling = [1, 2]",)),
    "rope text": ({"rope_theta": "1e4"}, "rope-number-malformed", ("rope_theta '1e4'",)),
    "partial rotation": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "rope-entry-unknown",
        ("partial_rotary_factor 0.5",),
    ),
    "window as text": (
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": "32"},
        "window-malformed",
        ("sliding_window = '32'", "is not a number"),
    ),
    "window of too few layers": (
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 4}
        | {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"]},
        "window-malformed",
        ("sliding_window = 8", "layer_types of 2 layers"),
    ),
    "window from no layer on": (
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 4}
        | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": "1"},
        "window-malformed",
        ("sliding_window = 8", "max_window_layers"),
    ),
    "layers of two kinds": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "attention-not-supported",
        ("layer_types = ", "sliding_attention"),
    ),
    "both directions": (
        {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "use_bidirectional_attention": True},
        "key-value-fixed",
        ("use_bidirectional_attention = True", None),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_keys_are_rejected_by_name(tmp_path: Path, case: str) -> None:
    change, code, values = REFUSED[case]
    fields = {key: value for key, value in (LLAMA | change).items() if value is not None}
    with raises(ConfigError, f"interop.{code}", tmp_path / "config.json", *values) as caught:
        read(tmp_path, fields)
    assert len(caught.value.errors) == 1


def test_everything_is_rejected_at_once(tmp_path: Path) -> None:
    with raises(ConfigError, "interop.key-not-supported", "num_experts", "hidden_act", "rope_scaling") as caught:
        read(tmp_path, LLAMA | {"num_experts": 2, "hidden_act": "x", "rope_scaling": {"type": "dynamic", "factor": 2}})
    codes = ["key-not-supported", "key-value-unknown", "rope-type-unknown"]
    assert sorted(fault.code.removeprefix("interop.") for fault in caught.value.errors) == codes


@pytest.mark.parametrize(
    "change",
    [
        {
            "sliding_window": None,
            "quantization_config": None,
            "auto_map": {"AutoModel": "x.py"},
            "attention_dropout": 0.1,
        },
        {
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "pretraining_tp": 1,
            "torch_dtype": "bfloat16",
            "use_cache": False,
        },
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
        {"layer_types": ["full_attention"] * 2, "num_key_value_heads": 4, "head_dim": 8, "eos_token_id": [1, 2]},
    ],
    ids=str,
)
def test_keys_without_effect_are_accepted(tmp_path: Path, change: dict[str, Any]) -> None:
    assert model_config(tmp_path, read(tmp_path, LLAMA | change)) == model_config(tmp_path, read(tmp_path, LLAMA))
    parsed = read_config(tmp_path / "config.json")
    assert not {"auto_map", "hidden_size"} & parsed.extras.keys()


def test_not_json_and_not_there(tmp_path: Path) -> None:
    for text, code in (("{", "malformed"), ("[1]", "not-an-object")):
        with raises(CheckpointError, f"interop.json-{code}", tmp_path / "config.json"):
            read(tmp_path, text)
    with raises(CheckpointError, "interop.json-missing", tmp_path / "other.json"):
        read_config(tmp_path / "other.json")


@pytest.mark.parametrize("name", MODELS)
def test_a_written_config_reads_back(tmp_path: Path, name: str) -> None:
    """Written from the table alone, without the original folder; transformers reads it as the same model."""
    config = build(name).config
    config.save_pretrained(tmp_path)
    parsed = read_config(tmp_path / "config.json")
    fields = model_config(tmp_path, parsed.model_fields).model_dump(exclude={"preset"})
    family, written = write_config(fields, DEFAULTS, [parsed.family.model_type])
    assert family is parsed.family
    assert model_config(tmp_path, read(tmp_path, written)).model_dump(exclude={"preset"}) == fields
    theirs = type(config).from_pretrained(tmp_path).to_dict()
    derived = ("head_dim", "n_inner", "hidden_act", "partial_rotary_factor", "rope_parameters", "dtype")
    of_the_folder = ("bos_token_id", "eos_token_id", "pad_token_id", "attn_pdrop", "embd_pdrop", "resid_pdrop")
    for key, value in config.to_dict().items():
        if key not in (
            *derived,
            *of_the_folder,
            "architectures",
            "transformers_version",
            "original_max_position_embeddings",
        ):
            assert theirs[key] == value, key


ARCHITECTURES = {
    "tiny": "Llama",
    "micro": "Llama",
    "llama-2-7b": "Llama",
    "llama-3-8b": "Llama",
    "llama-3.1-8b": "Llama",
    "mistral-7b": "Mistral",
    "qwen3-8b": "Qwen3",
    "qwen2.5-7b": "Qwen2",
    "gemma-7b": "Gemma",
    "olmo-2-7b": "Olmo2",
    "phi-3-mini": "Phi3",
    "gpt2": "GPT2LMHead",
    "pythia-6.9b": "GPTNeoX",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_its_family(preset: str) -> None:
    cfg = load([], {"model.preset": preset}).config.model
    near = [family.model_type for family in FAMILIES.values() if preset.startswith(family.preset)]
    family, _ = write_config(cfg.model_dump(exclude={"preset"}), DEFAULTS, near)
    assert family.architecture.startswith(ARCHITECTURES[preset])


OTHERS: dict[str, Any] = {
    "activation": "gelu",
    "norm": "layernorm",
    "norm_position": "post",
    "qk_norm_span": "projection",
    "positions": "learned",
    "rope_scaling": "llama3",
    "rotary_fraction": 0.5,
    "rope_original_seq_len": 8,
}


@settings(deadline=None, max_examples=200)
@given(st.sets(st.sampled_from(sorted(ModelConfig.model_fields.keys() - {"preset"})), max_size=8))
def test_fields_that_no_family_can_express_are_never_lost(changed: set[str]) -> None:
    """Any model gives a config.json that reads back as exactly that model, or an error that names the obstacles."""
    fields = DEFAULTS | {"num_kv_heads": 8, "head_dim": 32}
    for name in changed:
        value = fields[name]
        fields[name] = OTHERS.get(name, not value if isinstance(value, bool) else value * 2)
    if "rope_scaling" in changed:
        fields["rope_original_seq_len"] = 8  # a resolved config has it
    try:
        family, config = write_config(fields, DEFAULTS)
    except CheckpointError as error:
        assert any(f"model.{name} = {value!r}" in str(error) for name, value in fields.items())
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        parsed = read_config(Path(folder) / "config.json")
    assert parsed.family is family
    assert DEFAULTS | parsed.model_fields == fields


def test_no_family_has_sandwich_norms() -> None:
    with raises(CheckpointError, "interop.no-architecture-fits", "model.norm_position = 'sandwich'"):
        write_config(DEFAULTS | {"num_kv_heads": 8, "head_dim": 32, "norm_position": "sandwich"}, DEFAULTS)


# -- damaged and foreign folders --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save("llama-tied-biased", tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("change", "code", "values"),
    [
        (lambda t: t.pop(UP), "tensors-missing", (1, UP)),
        (lambda t: t.update(surprise=torch.ones(2)), "tensors-unknown", (1, "LlamaForCausalLM", "surprise")),
        (lambda t: t.update({UP: t[UP].t().contiguous()}), "shape-differs", (UP, [32, 48], [48, 32])),
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), "dtype-not-read", (UP, "I8")),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(61, 32)}),
            "head-is-not-the-embedding",
            ("lm_head.weight",),
        ),
    ],
)
def test_unexpected_tensors_are_rejected(
    folder: Path, tmp_path: Path, change: Any, code: str, values: tuple[Any, ...]
) -> None:
    rewrite(folder, change)
    with raises(CheckpointError, f"interop.{code}", folder, *values):
        import_folder(folder, tmp_path / "run")
    assert not (tmp_path / "run/checkpoints/step_00000000").exists()


def test_a_tied_head_equal_to_the_embedding_is_accepted(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    import_folder(folder, tmp_path / "run")


def test_damaged_indexes_are_rejected(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    listed = index["weight_map"]
    for change, code, values in (
        ({"weight_map": listed | {UP: "../../etc/passwd"}}, "shard-name-not-plain", ("../../etc/passwd",)),
        ({"weight_map": listed | {UP: "pytorch_model.bin"}}, "shard-name-not-plain", ("pytorch_model.bin",)),
        ({"weight_map": listed | {UP: "model-00009-of-00009.safetensors"}}, "shard-missing", ("00009-of-00009",)),
        ({"weight_map": listed | {"x": listed[UP]}}, "index-stale", ("x", listed[UP])),
        ({"weight_map": [1]}, "index-malformed", ("weight_map",)),
        ({}, "index-malformed", ("weight_map",)),
    ):
        path.write_text(json.dumps(change))
        with raises(CheckpointError, f"interop.{code}", path, *values):
            HfReader(folder)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_torn_files_are_rejected(folder: Path, cut: int) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:cut])
    with raises(CheckpointError, "interop.shard-unreadable", file):
        HfReader(folder)


def test_pickles_are_rejected_with_what_to_do(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with raises(CheckpointError, "interop.no-weights", folder, "model.safetensors"):
        HfReader(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with raises(CheckpointError, "interop.weights-are-pickles", "pytorch_model.bin", "save_pretrained"):
        HfReader(folder)


def test_the_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """import, verify, export --verify, and errors of each."""
    engine = functools.partial(run_cli, capsys)
    run = tmp_path / "run"
    code, text = engine("import", folder, run, "--shard-mib", 0.02)
    assert code == 0 and "no tokenizer in the folder" in text and f"--checkpoint.init {run}" in text
    assert engine("verify", run)[0] == 0
    code, text = engine("import", folder, run)
    assert code == 1 and "already has checkpoints; choose another folder" in text
    code, text = engine("export", run, tmp_path / "back", "--verify")
    assert code == 0 and "LlamaForCausalLM" in text and "transformers computes the same logits" in text
    assert engine("export", run, tmp_path / "back")[0] == 1
    assert engine("import", folder, tmp_path / "x", "--shard-mib", 0)[0] == 2
    assert engine("import", folder, tmp_path / "x", "--max-seq-len", -1)[0] == 2
    assert engine("import", tmp_path, tmp_path / "x")[0] == 1
    code, text = engine("train", "--run.dir", run, "--checkpoint.init", folder, "--model.ffn-size", 64, "--dry-run")
    assert code == 2 and "the weights of checkpoint.init have 48" in text
