"""`export --verify` passes correct exports and detects NaN, a wrong weight, rope_theta, epsilon and order of heads."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import CheckpointError
from engine.inference.compare import compare_with_transformers
from engine.interop.convert import export, import_folder
from engine.interop.huggingface.weights import SINGLE
from tests.support.command import run_cli
from tests.support.errors import raises
from tests.support.hf_folders import rewrite, tensors_of
from tests.support.hf_models import save

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path]:
    """(checkpoint, correct export) of a Llama model."""
    save("llama", tmp_path / "hf")
    folder, _ = import_folder(tmp_path / "hf", tmp_path / "run")
    export(folder, tmp_path / "out", dtype=None, tokenizer=None, eod=None)
    return folder, tmp_path / "out"


def problem_of(llama: tuple[Path, Path]) -> str:
    return compare_with_transformers(*llama).problem


@pytest.mark.parametrize("name", ["llama3-rope", "gemma", "gpt2", "neox"])
def test_correct_exports_pass_in_every_dtype(tmp_path: Path, name: str) -> None:
    save(name, tmp_path / "hf")
    folder, _ = import_folder(tmp_path / "hf", tmp_path / "run")
    for dtype in (None, torch.bfloat16, torch.float16):
        export(folder, tmp_path / str(dtype), dtype=dtype, tokenizer=None, eod=None)
        found = compare_with_transformers(folder, tmp_path / str(dtype), dtype)
        assert not found.problem and 0 < found.difference < found.bound < 1e-4 * found.largest
    assert compare_with_transformers(folder, tmp_path / "torch.bfloat16").problem  # weights with different rounding


def exchanged_heads(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The query weights of layer 0 with the first two heads (8 rows each) exchanged."""
    key = "model.layers.0.self_attn.q_proj.weight"
    return {key: torch.cat([tensors[key][8:16], tensors[key][:8], tensors[key][16:]])}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t[DOWN].view(-1)[5].fill_(float("nan")), "transformers' values after layer 1 are not finite"),
        (lambda t: t[DOWN].view(-1)[5].add_(1e-2), "layer 1 is the first that differs: max error .* rounding explains"),
        (lambda t: t["model.embed_tokens.weight"].mul_(1.001), "the embedding is the first that differs"),
        (lambda t: t["lm_head.weight"].mul_(1.001), "the final norm or the head is the first that differs"),
        (lambda t: t.update(exchanged_heads(t)), "layer 0 is the first"),
    ],
)
def test_wrong_weights_are_found_and_the_layer_named(llama: tuple[Path, Path], change: Any, problem: str) -> None:
    rewrite(llama[1], change)
    tensors = tensors_of(llama[1])
    save_file(tensors, llama[1] / SINGLE, {"format": "pt"})
    assert re.search(problem, problem_of(llama))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_wrong_config_is_found(llama: tuple[Path, Path], dtype: torch.dtype | None, tmp_path: Path) -> None:
    folder, out = llama[0], tmp_path / "cast"
    export(folder, out, dtype=dtype, tokenizer=None, eod=None)
    path = out / "config.json"
    right = json.loads(path.read_text())
    rope = {key: right[key] | {"rope_theta": 10100.0} for key in ("rope_parameters", "rope_scaling") if right.get(key)}
    for change in (rope, {"rms_norm_eps": 1e-5}, {"rms_norm_eps": 2e-6}, {"hidden_act": "gelu"}):
        path.write_text(json.dumps(right | change))
        assert "is the first that differs" in compare_with_transformers(folder, out, dtype).problem, change
    path.write_text(json.dumps(right | {"attention_bias": True}))
    with raises(CheckpointError, "inference.export-tensors-differ", "model.layers.0", "bias"):
        compare_with_transformers(folder, out, dtype)


def test_an_epsilon_is_found_where_activations_are_large(tmp_path: Path) -> None:
    """With embeddings of about 100 the effect of epsilon is below rounding; the scaled-down pass still detects it."""
    save("llama", tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda t: t["model.embed_tokens.weight"].mul_(1000))
    folder, _ = import_folder(tmp_path / "hf", tmp_path / "run")
    export(folder, tmp_path / "out", dtype=None, tokenizer=None, eod=None)
    assert not problem_of((folder, tmp_path / "out"))
    path = tmp_path / "out/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-5}))
    assert "layer 0 is the first that differs" in problem_of((folder, tmp_path / "out"))


def test_the_command_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the checkpoint: exit code 1. A value beyond float16: an error, and no files remain."""
    engine = functools.partial(run_cli, capsys)
    save("llama", tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda t: t[DOWN].view(-1)[5].fill_(float("nan")))
    assert engine("import", tmp_path / "hf", tmp_path / "run")[0] == 0
    code, text = engine("export", tmp_path / "run", tmp_path / "out", "--verify")
    assert code == 1 and "the engine's values after layer 1 are not finite. Do not use it" in text
    rewrite(tmp_path / "hf", lambda t: t[DOWN].nan_to_num_().view(-1)[5].fill_(-1e5))
    assert engine("import", tmp_path / "hf", tmp_path / "large")[0] == 0
    code, text = engine("export", tmp_path / "large", tmp_path / "half", "--dtype", "fp16", "--verify")
    assert code == 1 and "layers.1.mlp.down.weight: has the value 1e+05, and the largest in float16 is 6.55e+04" in text
    assert not (tmp_path / "half").exists() and not list(tmp_path.glob(".*"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, text = engine("export", tmp_path / "large", tmp_path / "bf16", "--dtype", "bf16", "--verify")
    assert code == 2 and "needs transformers" in text and not (tmp_path / "bf16").exists()
