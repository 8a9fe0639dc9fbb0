"""tools/convert_checkpoint.py: Megatron's argument names, the functions of `engine`, an error for all others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.errors import raises
from tests.support.hf_folders import same_bits, tensors_of
from tests.support.hf_models import save
from tests.support.megatron_cases import LLAMA, save_dist
from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import convert_checkpoint

from engine.checkpoint.format import find_checkpoint
from engine.checkpoint.load import Reader
from engine.errors import ConfigError


def test_there_and_back(tmp_path: Path, warm: Path) -> None:
    save("qwen3", tmp_path / "hf")
    for words in (
        ["--loader", "llama_mistral", "--load-dir", "hf", "--save-dir", "run", "--target-tensor-parallel-size", "2"],
        ["--loader", "trident", "--saver", "hf", "--load-dir", "run", "--save-dir", "back", "--no-checking"],
    ):
        command = [str(warm / "python"), str(ROOT / "tools/convert_checkpoint.py"), "--model-type", "GPT", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "has no effect here: a checkpoint loads in any layout" in done.stdout
    assert same_bits(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back"))


def test_from_megatron(tmp_path: Path, warm: Path) -> None:
    """The documented command converts a torch_dist checkpoint bit-exactly to a run, without vocabulary padding."""
    wanted = save_dist(tmp_path / "core" / "iter_0000007", LLAMA)
    (tmp_path / "core" / "latest_checkpointed_iteration.txt").write_text("7")
    words = ["--loader", "core", "--load-dir", "core", "--save-dir", "run", "--true-vocab-size", "40"]
    command = [str(warm / "python"), str(ROOT / "tools/convert_checkpoint.py"), "--model-type", "GPT", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with Reader(find_checkpoint(tmp_path / "run")) as reader:
        assert reader.shapes("model").keys() == wanted.keys()
        for name, x in wanted.items():
            rows = x[:40] if name in ("embed.weight", "head.weight") else x
            assert torch.equal(reader.read_whole("model", name), rows), name
    done = subprocess.run([sys.executable, "-m", "engine", "verify", "run"], capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "code", "values"),
    [
        (["--model-type", "BERT", "--loader", "hf"], "not-gpt", ("--model-type = 'BERT'",)),
        (
            ["--model-type", "GPT", "--loader", "hf", "--saver", "core"],
            "format-not-written",
            ("--saver = 'core'",),
        ),
        (["--model-type", "GPT", "--loader", "gguf"], "format-unknown", ("--loader = 'gguf'", "hf")),
        (["--model-type", "GPT", "--loader", "hf", "--saver", "hf"], "both-of-one-side", ("--loader hf",)),
        (
            ["--model-type", "GPT", "--loader", "hf", "--true-vocab-size", "3"],
            "vocab-size-unused",
            ("--true-vocab-size = 3", "--loader core"),
        ),
        (["--model-type", "GPT", "--loader", "hf", "--vocab-file", "v"], "option-not-supported", ("--vocab-file",)),
        (["--model-type", "GPT", "--loader", "hf", "--saverr", "hf"], "option-unknown", ("--saverr", "--saver?")),
        (["--model-type", "GPT", "--loader", "hf", "more"], "stray-argument", ("'more'",)),
    ],
)
def test_what_is_refused(words: list[str], code: str, values: tuple[str, ...]) -> None:
    with raises(ConfigError, f"convert.{code}", *values):
        convert_checkpoint.parse([*words, "--load-dir", "a", "--save-dir", "b"])
