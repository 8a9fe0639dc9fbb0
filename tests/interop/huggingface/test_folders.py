"""Folders with redundant or missing information: read as transformers reads them, or rejected naming both sides.

Each case is from a public report: folders saved over an old index, both RoPE forms, one of two tied names.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file

from engine.errors import CheckpointError, ConfigError
from engine.inference.load import config_of, load_model
from engine.interop.convert import import_folder, widest_dtype
from engine.interop.huggingface.config_json import read_config
from engine.interop.huggingface.families import FAMILIES
from engine.interop.huggingface.weights import INDEX, SINGLE, HfReader
from tests.support.errors import raises
from tests.support.hf_folders import TOKENS, UP, rewrite, tensors_of
from tests.support.hf_models import save

transformers.logging.set_verbosity_error()
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"vocab_size": 97, "max_position_embeddings": 128}
GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 97, "n_positions": 128}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tied Llama in several files."""
    save("llama-tied-biased", tmp_path / "hf")
    return tmp_path / "hf"


def theirs(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS).logits


def ours(folder: Path, run: Path) -> torch.Tensor:
    import_folder(folder, run)
    with torch.no_grad():
        return load_model(run).logits(TOKENS)


def same_logits(folder: Path, run: Path) -> bool:
    return bool((ours(folder, run) - theirs(folder)).abs().max() < 1e-5)


def notes_of(folder: Path) -> str:
    with HfReader(folder) as reader:
        return "; ".join(reader.notes)


def test_a_single_file_comes_before_an_index(folder: Path, tmp_path: Path) -> None:
    """`save_pretrained` into a sharded folder leaves the old index, and the single file takes precedence."""
    index = (folder / INDEX).read_bytes()
    tensors = tensors_of(folder)
    tensors[UP] = tensors[UP] * 2
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    assert "index.json is not read: model.safetensors exists too" in notes_of(folder)
    assert "not read: model-0000" in notes_of(folder)
    assert same_logits(folder, tmp_path / "both")
    for file in folder.glob("model-*"):
        file.unlink()
    assert (folder / INDEX).read_bytes() == index and same_logits(folder, tmp_path / "saved again")
    del tensors[UP]
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    with raises(CheckpointError, "interop.tensors-missing", 1, UP, SINGLE, INDEX):
        HfReader(folder)


def test_stale_indexes(folder: Path, tmp_path: Path) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    listed: dict[str, str] = index["weight_map"]
    files = sorted(set(listed.values()))

    def write_index(weight_map: dict[str, str]) -> None:
        path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    other = next(name for name in files if name != listed[UP])
    write_index(listed | {UP: other})  # all files exist, but one tensor is in another of them
    assert f"is stale: {UP} are in other files" in notes_of(folder) and same_logits(folder, tmp_path / "moved")
    write_index({key: file for key, file in listed.items() if key != UP})  # a tensor that is not in the index
    assert f"is stale: {UP} are in other files" in notes_of(folder) and same_logits(folder, tmp_path / "unnamed")
    write_index(listed | {HEAD: listed[UP]})  # a tied head that is in no file, as in torchtitan's exports
    assert same_logits(folder, tmp_path / "head")
    write_index(listed | {UP: "model-00001-of-00099.safetensors"})
    with raises(CheckpointError, "interop.shard-missing", path, "model-00001-of-00099.safetensors"):
        HfReader(folder)
    write_index(dict.fromkeys(listed, listed[UP]))
    with raises(CheckpointError, "interop.index-stale", path, listed[UP]):
        HfReader(folder)
    write_index(listed)
    tensors = tensors_of(folder)
    both = {key: tensors[key] for key in listed if listed[key] == other} | {UP: tensors[UP] + 1}
    save_file(both, folder / other, {"format": "pt"})
    with raises(CheckpointError, "interop.tensor-twice", UP, other, listed[UP]):
        HfReader(folder)


def test_unread_weights_are_reported(folder: Path) -> None:
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    assert "not read: adapter_model.safetensors" in notes_of(folder) and "adapters are not read" in notes_of(folder)


@pytest.mark.parametrize("name", ["llama-tied-biased", "gpt2"])
def test_a_tied_model_may_be_saved_under_either_name(tmp_path: Path, name: str) -> None:
    """Deduplication of shared tensors keeps one of two names; both names with different values are rejected."""
    folder = tmp_path / "hf"
    save(name, folder)
    embed = EMBED if name != "gpt2" else "transformer.wte.weight"
    rewrite(folder, lambda t: t.update({HEAD: t.pop(embed)}))
    assert same_logits(folder, tmp_path / "run")
    rewrite(folder, lambda t: t.update({embed: t[HEAD] + 1e-3}))
    with raises(CheckpointError, "interop.head-is-not-the-embedding", HEAD, embed, "tie_word_embeddings"):
        import_folder(folder, tmp_path / "other")
    rewrite(folder, lambda t: t.update({embed: t[HEAD].bfloat16()}))
    with raises(CheckpointError, "interop.head-is-not-the-embedding", HEAD, embed):
        import_folder(folder, tmp_path / "dtype")


def test_precision_is_a_function_of_the_folder(folder: Path, tmp_path: Path) -> None:
    """bfloat16 matrices with float16 norms give float32. (Once this depended on the hash seed.)"""
    rewrite(folder, lambda t: t.update({k: x.half() if "norm" in k else x.bfloat16() for k, x in t.items()}))
    import_folder(folder, tmp_path / "run")
    assert config_of(tmp_path / "run").train.precision == "fp32"
    for names in itertools.permutations(("F16", "BF16", "BF16")):
        assert widest_dtype(names) == torch.float32
    assert widest_dtype(["BF16"]) == torch.bfloat16 and widest_dtype(["F16", "F64", "BF16"]) == torch.float64


# -- config.json ------------------------------------------------------------------------------------------------------


def read(tmp_path: Path, raw: dict[str, Any]) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return read_config(tmp_path / "config.json")


def sized(kind: str) -> dict[str, Any]:
    return (GPT2 if kind == "gpt2" else SIZES) | {"model_type": kind, "architectures": [FAMILIES[kind].architecture]}


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: list[dict[str, Any]] = [
    {},
    {"rope_scaling": None},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 11.0}},
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}},
]
PARAMETERS: list[dict[str, Any]] = [
    {},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 13.0}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 3.0, "rope_theta": 13.0}},
]


@pytest.mark.parametrize("kind", [kind for kind, family in FAMILIES.items() if family.rope_keys])
def test_both_rope_forms_are_read_as_transformers_reads_them(tmp_path: Path, kind: str) -> None:
    family, taken = FAMILIES[kind], 0
    base = sized(kind) | ({"num_key_value_heads": 4} if "num_key_value_heads" in family.config_keys else {})
    base |= {"sliding_window": None} if family.windowed else {}
    outsides = [dict.fromkeys(keys, 0.5) for n in range(len(family.rope_keys) + 1)
              for keys in itertools.combinations(family.rope_keys, n)]  # fmt: skip
    for outside, scaling, parameters in itertools.product(outsides, SCALINGS, PARAMETERS):
        raw = json.loads(json.dumps(base | outside | scaling | parameters))
        try:
            parsed = read(tmp_path, raw)
        except ConfigError:
            continue  # a rope type that the family does not support
        fields, expected = parsed.model_fields, transformers.CONFIG_MAPPING[kind].from_dict(raw).rope_parameters
        taken += 1
        rope_type = fields.get("rope_scaling", "none").replace("none", "default")
        assert (fields["rope_theta"], rope_type) == (expected["rope_theta"], expected["rope_type"]), raw
        assert fields.get("rotary_fraction", 1.0) == expected.get("partial_rotary_factor", 1.0), raw
        if rope_type != "default":
            assert fields["rope_factor"] == expected["factor"], raw
        if rope_type in ("llama3", "yarn"):
            assert fields["rope_original_seq_len"] == expected["original_max_position_embeddings"], raw
        if scaling.get("rope_scaling") and parameters:
            assert any("rope_parameters is not read" in note for note in parsed.notes), raw
    assert taken >= 12


@pytest.mark.parametrize("kind", FAMILIES)
def test_missing_keys_have_the_defaults_of_transformers(tmp_path: Path, kind: str) -> None:
    """num_key_value_heads of Qwen is 32 if missing, and the number of heads if null."""
    family = FAMILIES[kind]
    for key, entry in family.config_keys.items():
        for null in (False, True):
            raw = {k: v for k, v in sized(kind).items() if k != key} | ({key: None} if null else {})
            if family.windowed:
                raw["sliding_window"] = None
            try:
                expected = getattr(transformers.CONFIG_MAPPING[kind].from_dict(dict(raw)), key, None)
            except (TypeError, ValueError, StrictDataclassError):
                if key in ("num_key_value_heads", "head_dim"):
                    with raises(ConfigError, "interop.key-null", f"{key}: is null"):
                        read(tmp_path, raw)
                continue
            if entry.default is None:
                continue  # a size, which is required
            found = read(tmp_path, raw).model_fields[entry.model_fields[0]]
            expected = {"num_key_value_heads": 4, "head_dim": 16, "n_inner": 256}[key] if expected is None else expected
            expected = entry.values.get(expected, expected) if isinstance(expected, str) else expected
            assert found == expected, (key, null)


NO_EFFECT: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"sliding_window": 8}),
    ("gemma", {"sliding_window": 8}),
    ("mistral", {"sliding_window": 128, "layer_types": ["sliding_attention"] * 2}),
    ("phi3", {"sliding_window": 200}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"] * 2}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 128, "layer_types": ["sliding_attention"] * 2}),
]
EFFECTIVE: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {"sliding_window": 127}),
    ("mistral", {"max_position_embeddings": 8192}),
    ("mistral", {"sliding_window": 8, "layer_types": ["full_attention"] * 2}),
    ("phi3", {"sliding_window": 127}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": True, "max_position_embeddings": 8192, "max_window_layers": 0}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}),
]


@pytest.mark.parametrize(("kind", "words"), NO_EFFECT + EFFECTIVE, ids=str)
def test_windows_are_read_if_they_have_an_effect(tmp_path: Path, kind: str, words: dict[str, Any]) -> None:
    raw = sized(kind) | {"num_key_value_heads": 4} | words
    if (kind, words) in EFFECTIVE:
        fields = read(tmp_path, raw).model_fields
        assert fields["window"] == words.get("sliding_window", 4096)
        assert fields["window_layers"] == ("fw" if words.get("max_window_layers") else "")
        return
    assert "window" not in read(tmp_path, raw).model_fields
    raw |= {"head_dim": 8, "pad_token_id": None}
    model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[kind].from_dict(dict(raw)))
    with torch.no_grad():  # the last position attends to the first
        tokens = torch.arange(256).view(2, 128) % 97
        tokens[1] = tokens[0]
        tokens[1, 0] += 1
        a, b = model.eval()(tokens, use_cache=False).logits[:, -1]
    assert not torch.equal(a, b)
