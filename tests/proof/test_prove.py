"""`engine prove`: right layouts pass, injected faults are found and the tensor is named, bad input is explained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.cli.main import main
from engine.config.load import load
from engine.proof.prove import Proof, prove
from tests.support.command import run_cli
from tests.support.drawn_configs import valid_configs
from tests.support.planted import planted

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel.tensor": 2, "model.num_kv_heads": 1, "train.z_loss": 1e-3, "train.dropout": 0.1},
    "pipeline": {"parallel.pipeline": 2, "model.tie_embeddings": "true", "train.recompute": "full"},
    "data": {"parallel.data": 2, "data.separate_documents": "true", "data.mask_eod": "true", "data.valid": "v"},
}
SETTINGS = {"train.global_batch_size": 8, "model.num_layers": 8}


def proof(**settings: Any) -> Proof:
    values = {name: str(value) for name, value in (SETTINGS | settings).items()}
    return prove(load([], values, world=None).config)


def failures(found: Proof) -> dict[str, str]:
    """Failed check -> the tensor or step that it names."""
    return {check.what: check.worst for check in found.checks if not check.passed}


@pytest.mark.parametrize("name", ["tensor", "data", pytest.param("pipeline", marks=pytest.mark.heavy)])
def test_a_layout_passes(name: str) -> None:
    found = proof(**LAYOUTS[name])
    assert found.passed and found.layout.world == 2 and not found.notes, failures(found)
    whats = {check.what for check in found.checks}
    assert {"initial weights", "loss of step 1", "gradients of step 1", "weights after step 6"} <= whats
    assert ("z_loss of step 1" in whats) == (name == "tensor") and ("validation" in whats) == (name == "data")


def everything(tmp_path: Path) -> dict[str, Any]:
    """A config with every data option, phases, groups, skipped steps and samples."""
    blend = tmp_path / "blend.toml"
    sources = ('name = "web"\nprefix = "a"\nweight = 3', 'name = "code"\nprefix = "b"\nweight = 1\nfim = false')
    blend.write_text("".join(f"[[source]]\n{source}\n" for source in sources))
    values: dict[str, Any] = {"data.train": blend, "data.tokenizer": "t", "data.fim_rate": 0.5, "data.valid": "v"}
    values |= {"data.mask_tokens": "<a> e", "data.mask_eod": "true", "data.separate_documents": "true"}
    values |= {"data.skip_samples": "5000", "train.skip_steps": "70", "train.dropout": 0.1, "train.z_loss": 1e-3}
    values |= {
        "phase.1.from_step": 20,
        "phase.1.global_batch_size": 16,
        "phase.2.from_step": 50,
        "phase.2.seq_len": 512,
    }
    values |= {"phase.2.weights": "0.2 web 0.8 code", "phase.2.rope_theta": 5e5, "model.window": 100}
    values |= {"optimizer.groups.1.names": "layers.5.*", "optimizer.groups.1.lr_factor": 0.5}
    return values | {"parallel.tensor": 2, "parallel.data": 2, "train.micro_batch_size": 2, "eval.batches": 3}


@pytest.mark.heavy
def test_every_option_of_the_data_passes(tmp_path: Path) -> None:
    found = proof(**everything(tmp_path))
    assert found.passed, failures(found)
    assert {"loss of web of step 1", "validation"} <= {check.what for check in found.checks}


@pytest.mark.heavy
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", range(12))
def test_drawn_configs_pass(number: int) -> None:
    found = prove(valid_configs(100 + number, 1)[0].config, most=8 if number < 3 else 4)
    assert found.passed, failures(found)


# fault of tests/proofs/mutations -> the layout that shows it, a check that has to fail, parts of the name of its tensor
FAULTS: dict[str, tuple[str, str, str]] = {
    "kv_replicas_not_summed": ("tensor", "gradients of step 1", ".k.weight .v.weight"),
    "tied_gradient_not_summed_over_the_stages": ("pipeline", "gradients of step 1", "embed.weight"),
    "gradient_averaged_over_data_ranks": ("data", "gradient norm of step 1", ""),
    "dropout_mask_by_rank": ("tensor", "loss of step 1", ""),
    "zero_gather_forgotten": ("data", "loss of all steps", ""),
    "initial_values_by_rank": ("tensor", "initial weights", ""),
    "moments_not_loaded": ("data", "resumed: optimizer state", "exp_avg"),
    "named_sum_on_every_tensor_rank": ("tensor", "z_loss of step 1", ""),
    "samples_depend_on_the_data_degree": ("data", "loss of step 1", ""),
    "validation_loss_depends_on_accumulation": ("data", "validation", ""),
}
QUICK = ("kv_replicas_not_summed", "moments_not_loaded")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.heavy) for name in FAULTS]
)
def test_a_fault_is_found_and_named(name: str) -> None:
    layout, what, tensor = FAULTS[name]
    with planted(name):
        found = proof(**LAYOUTS[layout])
    failed = failures(found)
    assert what in failed and (not tensor or any(part in failed[what] for part in tensor.split())), failed


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[train]\nglobal_batch_size = 8\n[parallel]\ntensor = 2\n[model]\npreset = 'gpt2'\n")
    code, text = run_cli(capsys, "prove", file, "--parallel.data", "8", "--processes", "2")
    assert code == 0 and "note: parallel: data 8 -> 1: 16 ranks, at most 2 processes" in text, text
    assert max(map(len, text.splitlines())) <= 80
    with planted("only_the_last_microbatch_trained"), pytest.raises(SystemExit) as end:
        main(["prove", str(file), "--train.micro-batch-size=2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert end.value.code == 1 and found["passed"] is False and found["processes"] == 2
    assert [check["what"] for check in found["checks"] if not check["passed"]]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--processes", "0"], 2, "cli.too-small"),
        (["--train.steps"], 2, "cli.setting-without-value"),
        (["--train.stepz", "3"], 2, "train.steps"),
        (["missing.toml"], 2, "missing.toml"),
        (["--parallel.tensor", "3"], 2, "config.tensor-does-not-divide"),
        (["--parallel.transport", "shared", "--parallel.context", "2"], 2, "config.not-built"),
    ],
)
def test_bad_input_is_explained(words: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    found, printed = run_cli(capsys, "prove", *words)
    assert found == code and text in printed
