"""Configuration: every error is reported once and completely; sources, presets, TOML round trip, dry run and help."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import os
import re
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.cli.main import main
from engine.config import checks as checks_module
from engine.config import load as load_module
from engine.config import model_checks as model_checks_module
from engine.config import schema as schema_module
from engine.config import tree as tree_module
from engine.config.derived import NOT_BUILT, derive
from engine.config.load import Resolved, load
from engine.config.presets import PRESETS
from engine.config.schema import Config, ModelConfig, fields
from engine.distributed.env import Env, pick_device, read_env
from engine.errors import EXIT_CONFIG, EXIT_OK, ConfigError, FieldError
from engine.model.build import num_parameters
from engine.pipeline.schedules import build
from engine.planner.flops import balanced_layers, flops_per_token, stage_flops
from engine.planner.sheet import sheets
from tests.support.errors import raises

NAMED = re.compile(r"[\w.,/:-]*[\w]")
# overrides, number of ranks, then the single expected error: its path, its code, and the numbers, settings or files
# that its problem and fix name
ERROR_CASES: dict[str, tuple[dict[str, Any], int, str, str, str]] = {
    "fim without tokenizer": ({"data.fim_rate": 0.5}, 1, "data.fim_rate", "config.setting-missing", "data.tokenizer"),
    "fim tokens alone": (
        {"data.fim_tokens": "<p> <s> <m>"},
        1,
        "data.fim_tokens",
        "config.without-effect",
        "data.fim_rate",
    ),
    "two fim tokens": (
        {"data.fim_rate": 0.5, "data.tokenizer": "corpus", "data.fim_tokens": "<p> <s>"},
        1,
        "data.fim_tokens",
        "config.fim-tokens-not-three",
        "",
    ),
    "fim for no source": (
        {"data.fim_rate": 0.5, "data.tokenizer": "corpus", "data.train": "plain.toml"},
        1,
        "data.fim_rate",
        "config.settings-contradict",
        "0",
    ),
    "fim for a source at rate 0": (
        {"data.train": "fim.toml"},
        1,
        "data.train",
        "config.settings-contradict",
        "data.fim_rate 0 0.5",
    ),
    "objective": ({"objective.kind": "pretrian"}, 1, "objective.kind", "config.objective-unknown", "pretrain"),
    "model type": ({"model.type": "encoder"}, 1, "model.type", "config.model-type-unknown", "decoder"),
    "kv heads": (
        {"model.num_kv_heads": 3},
        1,
        "model.num_kv_heads",
        "config.kv-heads-do-not-divide",
        "model.num_heads 8 2",
    ),
    "more kv heads than heads": (
        {"model.num_kv_heads": 16},
        1,
        "model.num_kv_heads",
        "config.kv-heads-do-not-divide",
        "model.num_heads 8",
    ),
    "width of heads": (
        {"model.hidden_size": 260},
        1,
        "model.hidden_size",
        "config.hidden-size-not-a-multiple",
        "model.num_heads 8 256 264 model.head_dim",
    ),
    "encryption without a secret": (
        {"checkpoint.encrypt": True},
        1,
        "checkpoint.encrypt",
        "config.setting-missing",
        "checkpoint.secret file:/home/me/run.key",
    ),
    "the secret itself": ({"checkpoint.secret": "hunter2"}, 1, "checkpoint.secret", "config.secret-not-a-place", ""),
    "keep_every alone": (
        {"checkpoint.keep_every": 10},
        1,
        "checkpoint.keep_every",
        "config.setting-missing",
        "checkpoint.keep 0",
    ),
    "keep_every between saves": (
        {"checkpoint.keep": 2, "checkpoint.every": 4, "checkpoint.keep_every": 10},
        1,
        "checkpoint.keep_every",
        "config.keep-every-not-a-multiple",
        "checkpoint.every 4 8",
    ),
    "odd head": ({"model.head_dim": 31}, 1, "model.head_dim", "config.rotation-odd", "32"),
    "part of a head": (
        {"model.rotary_fraction": 0.3},
        1,
        "model.rotary_fraction",
        "config.rotation-odd",
        "32 9 0.3125",
    ),
    "rope scaling of learned positions": (
        {"model.positions": "learned", "model.rope_scaling": "linear"},
        1,
        "model.rope_scaling",
        "config.without-effect",
        "model.positions",
    ),
    "rope factor": (
        {"model.rope_factor": 8.0},
        1,
        "model.rope_factor",
        "config.without-effect",
        "model.rope_scaling llama3",
    ),
    "llama3 bounds": (
        {"model.rope_scaling": "llama3", "model.rope_low_freq_factor": 4.0},
        1,
        "model.rope_low_freq_factor",
        "config.rope-bounds-crossed",
        "model.rope_high_freq_factor 4 3 1",
    ),
    "yarn bounds": (
        {"model.rope_scaling": "yarn", "model.rope_beta_slow": 40.0},
        1,
        "model.rope_beta_slow",
        "config.rope-bounds-crossed",
        "model.rope_beta_fast 32 1",
    ),
    "window of the whole context": (
        {"model.window": 2048},
        1,
        "model.window",
        "config.without-effect",
        "model.max_seq_len 2048",
    ),
    "window pattern alone": (
        {"model.window_layers": "wf"},
        1,
        "model.window_layers",
        "config.without-effect",
        "model.window",
    ),
    "window pattern of other letters": (
        {"model.window": 8, "model.window_layers": "wl"},
        1,
        "model.window_layers",
        "config.window-pattern-not-valid",
        "w f wwwwwf",
    ),
    "window pattern without a window": (
        {"model.window": 8, "model.window_layers": "ffffw"},
        1,
        "model.window_layers",
        "config.without-effect",
        "4 model.window 8",
    ),
    "window pattern longer than the model": (
        {"model.window": 8, "model.window_layers": "wfwfw"},
        1,
        "model.window_layers",
        "config.window-pattern-too-long",
        "model.num_layers 4 wfwf",
    ),
    "norm offset": (
        {"model.norm": "layernorm", "model.norm_offset": True},
        1,
        "model.norm_offset",
        "config.without-effect",
        "model.norm",
    ),
    "span of qk norm": (
        {"model.qk_norm_span": "projection"},
        1,
        "model.qk_norm_span",
        "config.without-effect",
        "model.qk_norm",
    ),
    "weights of another model": (
        {"checkpoint.init": "hf", "model.ffn_size": 64},
        1,
        "model.ffn_size",
        "config.init-contradicts",
        "checkpoint.init 48",
    ),
    "no weights": ({"checkpoint.init": "none"}, 1, "checkpoint.init", "config.init-not-readable", "config.json"),
    "weights of an impossible model": (
        {"checkpoint.init": "bad"},
        1,
        "bad/config.json: model.rope_theta",
        "config.weights-not-a-model",
        "0",
    ),
    "tensor and heads": (
        {"model.num_heads": 6, "model.num_kv_heads": 2, "model.head_dim": 32, "parallel.tensor": 4},
        4,
        "parallel.tensor",
        "config.tensor-does-not-divide",
        "model.num_heads 6 2",
    ),
    "tensor and kv heads": (
        {"model.num_heads": 12, "model.num_kv_heads": 6, "model.head_dim": 32, "parallel.tensor": 4},
        4,
        "parallel.tensor",
        "config.tensor-does-not-divide",
        "model.num_kv_heads 6 2",
    ),
    "tensor and ffn": (
        {"model.ffn_size": 690, "parallel.tensor": 4},
        4,
        "parallel.tensor",
        "config.tensor-does-not-divide",
        "model.ffn_size 690 688 692 2",
    ),
    "rows out of order": ({"phase.3.from_step": 3}, 1, "phase.3.from_step", "config.row-out-of-order", "0 phase.1"),
    "context": ({"parallel.context": 2}, 1, "parallel.context", "config.not-built", "1"),
    "expert": ({"parallel.expert": 2}, 1, "parallel.expert", "config.not-built", "1"),
    "too few ranks": (
        {"parallel.tensor": 2, "parallel.data": 2},
        1,
        "parallel",
        "config.world-does-not-fit",
        "4 1 --nproc-per-node",
    ),
    "too many ranks": ({"parallel.data": 2}, 4, "parallel", "config.world-does-not-fit", "2 4 --nproc-per-node"),
    "ranks left over": ({"parallel.tensor": 2}, 3, "parallel", "config.world-does-not-fit", "2 3 --nproc-per-node 4"),
    "layers": (
        {"parallel.pipeline": 3},
        3,
        "parallel.pipeline",
        "config.layers-not-a-multiple",
        "model.num_layers 4 3 6 2 parallel.layers 2,1,1",
    ),
    "layers and chunks": (
        {"parallel.pipeline": 4, "parallel.schedule": "zb-v"},
        4,
        "parallel.pipeline",
        "config.layers-not-a-multiple",
        "2 8 model.num_layers 4 parallel.layers 1,1,1,1,0,0,0,0",
    ),
    "list of layers": (
        {"parallel.pipeline": 2, "parallel.layers": "3;1"},
        2,
        "parallel.layers",
        "config.layers-not-a-list",
        "2,2",
    ),
    "sum of layers": (
        {"parallel.pipeline": 2, "parallel.layers": "3,2"},
        2,
        "parallel.layers",
        "config.layers-do-not-add-up",
        "5 2 4 2,2",
    ),
    "schedule": ({"parallel.schedule": "1f2b"}, 1, "parallel.schedule", "config.unknown-choice", "1f1b zb-h1"),
    "chunks": ({"parallel.chunks": 2}, 1, "parallel.chunks", "config.chunks-do-not-fit", "parallel.schedule 1f1b 1"),
    "plan that is none": (
        {"parallel.schedule": "none.plan"},
        1,
        "parallel.schedule",
        "config.plan-not-valid",
        "--save",
    ),
    "plan of another size": (
        {"parallel.schedule": "two.plan"},
        1,
        "parallel.schedule",
        "config.plan-does-not-fit",
        "2 3 --ranks 1 --microbatches 8 --save",
    ),
    "cut sequence": (
        {"train.seq_len": 255, "parallel.tensor": 2},
        2,
        "train.seq_len",
        "config.seq-len-not-a-multiple",
        "parallel.tensor 2 254 256 parallel.sequence",
    ),
    "gathered inputs without a cut": (
        {"parallel.keep_gathered": True},
        1,
        "parallel.keep_gathered",
        "config.without-effect",
        "parallel.tensor 2 parallel.sequence",
    ),
    "gathered inputs recomputed": (
        {"parallel.keep_gathered": True, "parallel.tensor": 2, "train.recompute": "selective"},
        2,
        "parallel.keep_gathered",
        "config.settings-contradict",
        "train.recompute",
    ),
    "layers of no recompute": (
        {"train.recompute_layers": 1},
        1,
        "train.recompute_layers",
        "config.without-effect",
        "train.recompute",
    ),
    "steps that are no numbers": (
        {"train.skip_steps": "3 five"},
        1,
        "train.skip_steps",
        "config.ranges-not-valid",
        "10-12",
    ),
    "proof in bf16": (
        {"train.precision": "fp64", "parallel.reduce_dtype": "bf16"},
        1,
        "parallel.reduce_dtype",
        "config.settings-contradict",
        "train.precision fp64",
    ),
    "attention dropout of a kernel": (
        {"train.attention_dropout": 0.1, "train.attention": "flash"},
        1,
        "train.attention",
        "config.settings-contradict",
        "train.attention_dropout",
    ),
    "fp8 of another precision": (
        {"train.fp8": "rowwise"},
        1,
        "train.fp8",
        "config.setting-missing",
        "train.precision bf16 fp32 fp8",
    ),
    "fp8 of odd matrices": (
        {"train.fp8": "tensorwise", "train.precision": "bf16", "model.ffn_size": 72},
        1,
        "model.ffn_size",
        "config.fp8-size-not-a-multiple",
        "72 16 train.fp8",
    ),
    "loss scale": (
        {"train.loss_scale": 60000.0},
        1,
        "train.loss_scale",
        "config.loss-scale-not-a-power-of-two",
        "65536",
    ),
    "global batch": (
        {"train.global_batch_size": 9, "train.micro_batch_size": 2},
        2,
        "train.global_batch_size",
        "config.batch-not-a-multiple",
        "2 train.micro_batch_size 8 12",
    ),
    "global batch smaller than one round": (
        {"train.global_batch_size": 1},
        4,
        "train.global_batch_size",
        "config.batch-not-a-multiple",
        "4 train.micro_batch_size 1",
    ),
    "sequence": ({"train.seq_len": 4096}, 1, "train.seq_len", "config.seq-len-too-long", "model.max_seq_len 2048 4096"),
    "wsd without decay": (
        {"lr_schedule.kind": "wsd"},
        1,
        "lr_schedule.decay_steps",
        "config.decay-does-not-fit",
        "1 90 10",
    ),
    "horizon of wsd": (
        {"lr_schedule.kind": "wsd", "lr_schedule.decay_steps": 60, "lr_schedule.horizon_steps": 60},
        1,
        "lr_schedule.decay_steps",
        "config.decay-does-not-fit",
        "1 50 6",
    ),
    "horizon in the warm-up": (
        {"lr_schedule.horizon_steps": 10},
        1,
        "lr_schedule.horizon_steps",
        "config.decay-does-not-fit",
        "lr_schedule.warmup_steps 10 100",
    ),
    "horizon of nothing": (
        {"lr_schedule.horizon_steps": 50, "lr_schedule.kind": "constant"},
        1,
        "lr_schedule.horizon_steps",
        "config.without-effect",
        "",
    ),
    "decay without wsd": ({"lr_schedule.decay_steps": 5}, 1, "lr_schedule.decay_steps", "config.without-effect", ""),
    "preset": (
        {"model.preset": "llama3-8b"},
        1,
        "model.preset",
        "config.unknown-choice",
        "llama-2-7b llama-3-8b mistral-7b qwen3-8b",
    ),
    "unknown": ({"model.hiden_size": 3}, 1, "model.hiden_size", "config.unknown-setting", "model.hidden_size"),
    "not a number": ({"train.steps": "ten"}, 1, "train.steps", "config.value-not-valid", "100"),
    "too small": ({"train.steps": 0}, 1, "train.steps", "config.value-not-valid", "1 100"),
    "not a choice": ({"train.device": "tpu"}, 1, "train.device", "config.value-not-valid", ""),
    "not a bool": ({"parallel.overlap": "maybe"}, 1, "parallel.overlap", "config.value-not-valid", ""),
    "nan": ({"optimizer.lr": "nan"}, 1, "optimizer.lr", "config.value-not-valid", "0.001"),
}


@pytest.fixture
def plans(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan files that a parallel.schedule can name, blends for data.train, folders for checkpoint.init."""
    folder = tmp_path_factory.mktemp("plans")
    (folder / "none.plan").write_text("rank 0: 0F0\n")
    (folder / "two.plan").write_text(str(build("1f1b", 2, 1, 3)))
    for name, fim in (("plain", "false"), ("fim", "true")):
        (folder / f"{name}.toml").write_text(f'[[source]]\nprefix = "a"\nweight = 1\nfim = {fim}\n')
    for name, theta in (("hf", 10000.0), ("bad", -1.0)):
        values: dict[str, Any] = {
            "hidden_size": 256,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "rope_theta": theta,
        }
        values |= {"model_type": "llama", "num_attention_heads": 8, "vocab_size": 4096}
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(values))
    monkeypatch.chdir(folder)


def faults_of(overrides: dict[str, Any], world: int | None = 1, files: tuple[Path, ...] = ()) -> tuple[FieldError, ...]:
    with pytest.raises(ConfigError) as caught:
        load(files, {k: str(v) for k, v in overrides.items()}, world=world)
    return caught.value.errors


@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize("case", ERROR_CASES)
def test_each_fault_is_said_in_full(case: str) -> None:
    overrides, world, path, code, named = ERROR_CASES[case]
    (fault,) = faults_of(overrides, world)
    assert (fault.path, fault.code) == (path, code)
    assert set(named.split()) <= set(NAMED.findall(f"{fault.problem}. {fault.fix}"))
    if path in overrides and fault.value != "...":  # a secret is never shown
        assert str(fault.value) == str(overrides[path])
    assert str(fault) == f"{path} = {fault.value!r}: {fault.problem}. {fault.fix} [{fault.code}]"


@pytest.mark.usefixtures("plans")
def test_every_fault_of_the_modules_has_a_case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every error code in the sources of these modules has a case above."""
    modules = (schema_module, checks_module, model_checks_module, load_module, tree_module)
    seen: set[tuple[str, int]] = set()

    def note(*args: Any) -> FieldError:
        frame = sys._getframe(1)
        seen.add((frame.f_globals["__name__"], frame.f_lineno))
        return FieldError(*args)

    for module in modules:
        if hasattr(module, "FieldError"):
            monkeypatch.setattr(module, "FieldError", note)
    for overrides, world, *_ in ERROR_CASES.values():
        faults_of(overrides, world)
    with monkeypatch.context() as built:  # an axis of positions: see tests/house/test_parallel_axis.py
        built.delitem(NOT_BUILT, "context")
        faults_of({"parallel.context": 4, "train.seq_len": 18}, 4)
    (tmp_path / "bad.toml").write_text("[model\n")
    (tmp_path / "rows.toml").write_text("[phase]\nfrom_step = 3\n")
    for file in (tmp_path / "bad.toml", tmp_path / "none.toml", tmp_path / "rows.toml"):
        faults_of({}, files=(file,))
    with pytest.raises(ConfigError):
        load([], {}, unknown=["run.toml", "--train.eval-every"])
    calls = [
        (module.__name__, node.lineno)
        for module in modules
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "FieldError"
    ]
    assert len(calls) >= 20
    assert set(calls) == seen


@pytest.mark.parametrize("world", [2, 3, 4, 6, 8, 12, 16])
@pytest.mark.parametrize(("heads", "kv", "ffn"), [(6, 2, 688), (12, 6, 690), (8, 8, 44), (12, 4, 30)])
def test_the_repair_of_a_tensor_degree_works(world: int, heads: int, kv: int, ffn: int) -> None:
    """The tensor degree that the fix suggests has no error."""
    model = {"model.num_heads": heads, "model.num_kv_heads": kv, "model.head_dim": 8, "model.ffn_size": ffn}
    batch = {"train.seq_len": 48}
    try:
        load([], {k: str(v) for k, v in {**model, **batch, "parallel.tensor": world}.items()}, world=world)
    except ConfigError as error:
        degrees = {re.search(r"(\d+)\.$", fault.fix).group(1) for fault in error.errors}  # type: ignore[union-attr]
        assert len(degrees) == 1, "all faults about it give the same advice"
        values = {k: str(v) for k, v in {**model, **batch, "parallel.tensor": degrees.pop()}.items()}
        load([], values, world=None)


def test_all_faults_at_once_and_exit_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[train]\nsteps = 0\nsteppes = 3\n[modle]\nvocab_size = 5\n[optimizer]\nlr = "fast"\n')
    options = ["--config", str(file), "--model.num-kv-heads", "3", "--train.loss-scale", "3", "--train.sede", "1"]
    with pytest.raises(SystemExit) as caught:
        main(["train", "--dry-run", *options])
    assert caught.value.code == EXIT_CONFIG == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: configuration has 7 errors:\n")
    for text in (
        f"train.steppes = 3: no such setting (file {file}). Did you mean train.steps?",
        f"modle.vocab_size = 5: no such setting (file {file}). Did you mean model.vocab_size?",
        "train.sede = '': no such setting (command line). Did you mean train.seed?",
        "train.steps = 0: input should be greater than or equal to 1. Give int; the default is 100.",
        "optimizer.lr = 'fast': input should be a valid number",
        "model.num_kv_heads = 3: does not divide model.num_heads = 8. Nearest that does: 2.",
        "train.loss_scale = 3.0: is not a power of two, so scaling would round. Nearest: 4.",
    ):
        assert err.count(text) == 1, text


def test_a_fault_does_not_cause_others() -> None:
    """Errors that only follow from an invalid value are not reported."""
    assert [f.path for f in faults_of({"parallel.tensor": "two", "parallel.data": 2}, 4)] == ["parallel.tensor"]
    assert [f.path for f in faults_of({"train.global_batch_size": 2, "parallel.pipeline": "x"}, 4)] == [
        "parallel.pipeline"
    ]
    # the unknown preset could have 32 heads and long sequences
    unknown = {"model.preset": "llama-3b", "parallel.tensor": 16, "train.seq_len": 4096}
    assert [f.path for f in faults_of(unknown, 16)] == ["model.preset"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[model\n", "is not valid TOML: Expected ']' at the end of a table declaration (at line 1, column 7)"),
        ("steps = 3\n", "steps = 3: no such setting"),
        ("[train]\nsteps = true\n", "train.steps = True: is neither a number nor a string. Give int"),
        ("[optimizer]\nlr = true\n", "optimizer.lr = True: is neither a number nor a string. Give float"),
        ("[train]\nsteps = 1.5\n", "train.steps = 1.5: input should be a valid integer"),
        ("[train]\nsteps = [1]\n", "train.steps = [1]: input should be a valid integer"),
        ("[train.steps]\na = 1\n", "train.steps = {'a': 1}: input should be a valid integer"),
        ("[run]\ndir = 3\n", "run.dir = 3: input should be a valid string"),
        ('[model]\npreset = ["tiny"]\n', "model.preset = ['tiny']: input should be a valid string"),
        ("[[model]]\npreset = 1\n", "model = [{'preset': 1}]: no such setting"),
    ],
)
def test_files_that_are_wrong(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    (fault,) = faults_of({}, files=(file,))
    assert expected in str(fault)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    files = (tmp_path / "none.toml", tmp_path, binary)
    errors = faults_of({}, files=files)
    assert [f.value for f in errors] == [str(f) for f in files]
    assert all(f.path == "--config" and "cannot be read" in f.problem for f in errors)


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["run.toml"], "command line", "run.toml"),
        (["--config", "a.toml", "b.toml"], "command line", "b.toml"),
        (["--train.stepps", "3"], "train.stepps", ""),
        (["--train.stepps=3"], "train.stepps", ""),
        (["--train.stepps=3", "stray"], "command line", "stray"),
        (["-q"], "command line", "-q"),
    ],
)
def test_no_word_of_the_command_line_is_dropped(
    words: list[str], path: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.cli.train import parse_train

    monkeypatch.chdir(tmp_path)
    Path("a.toml").write_text("")
    options = parse_train(words, "engine train")
    with pytest.raises(ConfigError) as caught:
        load(options.files, options.overrides, unknown=options.unknown)
    assert (path, value) in [(f.path, f.value) for f in caught.value.errors]


@pytest.mark.parametrize(("section", "name"), [(s, n) for s, n, _ in fields()])
def test_a_misspelt_setting_names_the_right_one(section: str, name: str) -> None:
    (fault,) = faults_of({f"{section}.{name[0]}{name.replace('_', '-')}": 1})
    assert fault.fix == f"Did you mean {section}.{name}?"


def test_sources_and_precedence(tmp_path: Path) -> None:
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text("[train]\nsteps = 50\nseed = 7\n[model]\nnum_layers = 2\n")
    second.write_text("[train]\nsteps = 60\nmicro_batch_size = 2\n")
    overrides = {"train.micro_batch_size": "4", "model.preset": "tiny", "model.ffn_size": "512"}
    resolved = load([first, second], overrides, world=2)
    cfg, sources = resolved.config, resolved.sources
    assert (cfg.train.steps, sources["train.steps"]) == (60, f"file {second}")
    assert (cfg.train.seed, sources["train.seed"]) == (7, f"file {first}")
    assert (cfg.train.micro_batch_size, sources["train.micro_batch_size"]) == (4, "command line")
    assert (cfg.model.num_layers, sources["model.num_layers"]) == (2, f"file {first}")  # beats the preset
    assert (cfg.model.ffn_size, sources["model.ffn_size"]) == (512, "command line")
    assert (cfg.model.num_kv_heads, sources["model.num_kv_heads"]) == (4, "preset tiny")
    assert (cfg.model.head_dim, sources["model.head_dim"]) == (32, "derived")
    assert (cfg.parallel.data, sources["parallel.data"]) == (2, "derived")
    assert (cfg.optimizer.lr, sources["optimizer.lr"]) == (1e-3, "default")
    assert sources["model.rope_theta"] == "default"  # the preset says nothing about it
    assert list(sources) == [f"{s}.{n}" for s, n, _ in fields()]
    swapped = load([second, first], overrides, world=2)
    assert (swapped.config.train.steps, swapped.sources["train.steps"]) == (50, f"file {first}")


def test_config_is_frozen() -> None:
    cfg = load([], {}).config
    with pytest.raises(ValueError, match="frozen"):
        cfg.train.steps = 3  # type: ignore[misc]


def test_world_none_takes_what_the_degrees_need() -> None:
    cfg = load([], {"parallel.tensor": "2", "parallel.pipeline": "4", "parallel.data": "8"}, world=None).config
    layout = derive(cfg).layout
    assert (layout.world, layout.tensor, layout.pipeline, layout.data) == (64, 2, 4, 8)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("mistral-7b", 7_248_023_552),
        ("qwen3-8b", 8_190_735_360),
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen2.5-7b", 7_615_616_512),
        ("gemma-7b", 8_537_680_896),
        ("olmo-2-7b", 7_298_617_344),
        ("phi-3-mini", 3_821_079_552),
        ("gpt2", 124_439_808),
        ("pythia-6.9b", 6_857_302_016),
        ("tiny", None),
        ("micro", None),
    ],
)
def test_presets_have_the_published_sizes(preset: str, parameters: int | None) -> None:
    cfg = load([], {"model.preset": preset}).config
    for key, value in PRESETS[preset].items():
        assert getattr(cfg.model, key) == value
    if parameters is not None:
        assert num_parameters(cfg.model) == parameters
        other = cfg.model.model_copy(update={"tie_embeddings": not cfg.model.tie_embeddings})
        matrix = cfg.model.vocab_size * cfg.model.hidden_size
        assert num_parameters(other) == parameters + (matrix if cfg.model.tie_embeddings else -matrix)


def test_every_preset_is_tested_and_has_only_known_keys() -> None:
    assert len(PRESETS) == 13
    for values in PRESETS.values():
        assert values.keys() <= ModelConfig.model_fields.keys()


def reloaded(resolved: Resolved, tmp_path: Path) -> Config:
    file = tmp_path / "config.toml"
    file.write_text(resolved.toml())
    return load([file], {}, world=resolved.derived.layout.world).config


@pytest.mark.parametrize("preset", PRESETS)
def test_toml_loads_back(preset: str, tmp_path: Path) -> None:
    overrides = {
        "model.preset": preset,
        "parallel.tensor": "2",
        "optimizer.lr": "1.2345678901234567e-05",
        "optimizer.eps": "1e-30",
        "parallel.timeout_s": "1e22",
        "parallel.overlap": "false",
        "run.dir": 'a "quoted" \\ name\n\t\r\x7f é €',
    }
    resolved = load([], overrides, world=4)
    assert reloaded(resolved, tmp_path) == resolved.config
    assert f'preset = "{preset}"  # command line' in resolved.toml()
    assert "data = 2  # derived" in resolved.toml()


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.characters(codec="utf-8")), lr=st.floats(1e-300, 1e300))
def test_toml_of_any_value_is_valid(text: str, lr: float) -> None:
    resolved = load([], {"run.dir": text, "optimizer.lr": repr(lr)})
    read = tomllib.loads(resolved.toml())
    assert read["run"]["dir"] == text and read["optimizer"]["lr"] == lr


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def run_cli(*args: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.usefixtures("wide")
def test_dry_run_for_4096_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    """Hand-computed numbers of Llama-3-8B on 8 x 8 x 64 ranks, without process groups."""
    degrees = ["--parallel.tensor", "8", "--parallel.pipeline", "8", "--world-size", "4096"]
    batch = ["--train.global-batch-size", "1024", "--train.seq-len", "4096", "--train.precision", "bf16"]
    assert run_cli("train", "--dry-run", "--model.preset", "llama-3-8b", *degrees, *batch) == EXIT_OK
    assert not torch.distributed.is_initialized()
    out, err = capsys.readouterr()
    assert err == ""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert ["parallel.data", "64", "derived"] in rows
    assert ["model.num_kv_heads", "8", "preset llama-3-8b"] in rows
    block = (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) // 8 + 2 * 4096
    ends = 128256 * 4096 // 8
    stages = [row for row in rows if len(row) == 6]
    middle = [f"layers {4 * i}..{4 * i + 3}" for i in range(1, 7)]
    assert [row[1] for row in stages] == ["embedding, layers 0..3", *middle, "layers 28..31, head"]
    assert [row[0] for row in stages] == [f"{512 * i}..{512 * i + 511}" for i in range(8)]
    counts = [4 * block + ends, *[4 * block] * 6, 4 * block + ends + 4096]
    assert [row[2] for row in stages] == [f"{count:,}" for count in counts]
    bytes_each = 2 + 4 + 12 / 64  # bf16 weight, fp32 gradient, and of master weight and two moments a 64th (ZeRO-1)
    assert [row[3] for row in stages] == [f"{bytes_each * count / 2**30:,.3f}" for count in counts]
    hidden, tokens = 512 * 4096 * 2, 4096  # bf16 hidden states of a rank's part of the sequence
    core = tokens * (2 * (4 + 1 + 1 + 4) * 128 + 4 * 4)  # 4 query heads and 1 KV head: q, k, v, output; log-sum-exp
    saved = 4 * (
        4 * hidden + 2 * 512 * 4 + core + tokens * 2 * 3 * 1792
    )  # inputs, stats, core, gate|up and its product
    saved += tokens * 128 * 2  # the RoPE table
    alive = [8 * (9 * tokens + saved + hidden), *((8 - i) * (saved + hidden) for i in range(1, 7))]
    alive.append(saved + 2 * hidden + 512 * 4)
    assert [row[4] for row in stages] == [f"{size / 2**30:,.3f}" for size in alive]
    assert "D = 64, C = 1, T = 8" in out
    for line in (
        "ranks: 4,096",
        "parameters in total: 8,030,261,248",
        "tokens per step: 4,194,304 (1024 sequences of 4096)",
        "micro-batches per step and rank: 16 of 1 sequences",
        "pipeline: 1f1b, bubble 30.4% if F, I and W take the same time on all stages",
        "activations in memory on a rank: at most those of 8 micro-batches of a stage",
        "model FLOPs: 48.25 GFLOP per token",
    ):
        assert line in out.splitlines() or line in out, line


@pytest.mark.usefixtures("wide")
def test_dry_run_prints_the_grid_of_a_small_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("train", "--dry-run", "--parallel.pipeline", "2", "--parallel.data", "2") == EXIT_OK
    out = capsys.readouterr().out
    assert "pipeline   1  data   1  ranks 3..3" in out and "ranks: 4" in out.splitlines()


@pytest.mark.usefixtures("wide")
def test_dry_run_counts_a_tied_embedding_once_where_both_ends_are_on_a_rank(capsys: pytest.CaptureFixture[str]) -> None:
    degrees = ["--parallel.pipeline", "2", "--parallel.schedule", "zb-v", "--model.tie-embeddings", "true"]
    assert run_cli("train", "--dry-run", *degrees) == EXIT_OK
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    counts = [int(row[2].replace(",", "")) for row in rows if len(row) == 6]
    assert len(counts) == 2 and f"parameters in total: {sum(counts):,}" in out


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 12),
    stages=st.integers(1, 4),
    vocab=st.sampled_from([1, 50, 400, 5_000]),
    seq_len=st.integers(2, 64),
)
def test_balanced_stages_are_the_best_there_are(layers: int, stages: int, vocab: int, seq_len: int) -> None:
    cfg = ModelConfig(num_layers=layers, vocab_size=vocab, hidden_size=8, num_heads=2, num_kv_heads=1, head_dim=4)
    chosen = balanced_layers(cfg, seq_len, stages)
    heaviest = {
        counts: max(stage_flops(cfg, seq_len, counts))
        for counts in itertools.product(range(layers + 1), repeat=stages)
        if sum(counts) == layers
    }
    assert heaviest[tuple(chosen)] == min(heaviest.values())
    assert sorted(chosen[:-1]) == chosen[:-1]
    assert sum(stage_flops(cfg, seq_len, chosen)) == flops_per_token(cfg, seq_len)


@pytest.mark.parametrize(("window", "pattern"), [(1, ""), (5, "wf"), (16, "fw"), (99, "")])
def test_flops_of_a_windowed_layer_follow_the_keys_that_it_attends_to(window: int, pattern: str) -> None:
    """Half of the diagonal counts, as without a window: s^2 / 2 of s (s + 1) / 2 pairs. 99: more than the sequence."""
    full = ModelConfig(num_layers=4, hidden_size=8, num_heads=2, num_kv_heads=1, head_dim=4)
    windowed = full.model_copy(update={"window": window, "window_layers": pattern})
    s = 16
    width = min(window, s)
    pairs = {"w": sum(min(i + 1, width) for i in range(s)) - width / 2, "f": s * s / 2}
    counts = [pairs[letter] for letter in (pattern or "w") * 4][:4]
    saved = 12 * 8 * sum(pairs["f"] - count for count in counts) / s
    assert flops_per_token(full, s) - flops_per_token(windowed, s) == pytest.approx(saved, abs=4)
    assert sum(stage_flops(windowed, s, [1, 3])) == flops_per_token(windowed, s)
    assert (
        stage_flops(windowed, s, [1, 3])[0] == stage_flops(windowed.model_copy(update={"num_layers": 1}), s, [1, 0])[0]
    )


def test_balanced_is_resolved_and_a_run_that_would_gain_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"model.preset": "llama-3-8b", "parallel.pipeline": "8", "train.global_batch_size": "16"}
    balanced = load([], sizes | {"parallel.layers": "balanced"}, world=None)
    assert balanced.config.parallel.layers == "4,4,4,4,4,5,5,2"
    assert balanced.sources["parallel.layers"] == "derived"
    words = [f"--{key}={value}" for key, value in sizes.items()]
    note = "the heaviest pipeline rank computes 1.49 times the mean; --parallel.layers balanced (4,4,4,4,4,5,5,2)"
    for more, output in (
        ([], True),
        (["--parallel.layers=balanced"], False),
        (["--parallel.layers=4,4,4,4,4,4,5,3"], False),
    ):
        assert run_cli("train", "--dry-run", *words, *more) == EXIT_OK
        assert (note in " ".join(capsys.readouterr().out.split())) is output


def test_stages_are_balanced_for_the_longest_sequences_of_the_run() -> None:
    """Attention to 131,072 tokens makes blocks heavier than to 256, so the last stage gets more of them."""
    sizes = {"model.preset": "llama-3-8b", "parallel.pipeline": "8", "train.global_batch_size": "16"}
    sizes |= {"parallel.layers": "balanced", "model.max_seq_len": "131072"}
    longer = {"phase.1.from_step": "50", "phase.1.seq_len": "131072"}

    def split(words: dict[str, str]) -> str:
        return load([], sizes | words, world=None).config.parallel.layers

    short, long = split({"train.seq_len": "256"}), split({"train.seq_len": "131072"})
    assert short != long
    assert split(longer | {"train.seq_len": "256"}) == long
    assert split(longer | {"train.seq_len": "256", "train.steps": "49"}) == short, "the run ends before"
    resolved = [load([], sizes | {"train.steps": n} | longer, world=None) for n in ("49", "50")]
    short_bytes, long_bytes = (sheets(r.config, r.derived)[0].activations for r in resolved)
    assert long_bytes > 100 * short_bytes


def test_help_lists_every_field(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")  # one column of boxes
    assert run_cli("train", "--help") == EXIT_OK
    out = capsys.readouterr().out
    text = "".join(out.replace("│", "").split())
    for section, name, field in fields():
        assert f"--{section}.{name} ".replace("_", "-") in out, name
        assert field.description, f"{section}.{name} has no help text"
        if name != "preset":
            assert "".join(field.description.split()) in text, name
    for preset in PRESETS:
        assert preset in text
    for option in ("--config", "--dry-run", "--world-size"):
        assert option in out


def test_overview_and_wrong_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("--help") == EXIT_OK
    overview = capsys.readouterr().out
    for verb in ("prepare", "train", "evaluate", "generate", "export", "verify", "plot", "doctor"):
        assert f"\n  {verb} " in overview
    assert run_cli() == EXIT_CONFIG
    assert run_cli("trane") == EXIT_CONFIG
    assert "unknown command 'trane'" in capsys.readouterr().err


@pytest.fixture
def bare_env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def torchrun_env(patch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **values}.items():
        patch.setenv(name, value)


def test_read_env(bare_env: pytest.MonkeyPatch) -> None:
    assert read_env() == Env(rank=0, world=1, local_rank=0, local_world=1)
    torchrun_env(bare_env, RANK="5", WORLD_SIZE="8", LOCAL_WORLD_SIZE="4")
    assert read_env() == Env(rank=5, world=8, local_rank=1, local_world=4)
    bare_env.delenv("WORLD_SIZE")
    bare_env.setenv("LOCAL_RANK", "one")
    with pytest.raises(ConfigError) as caught:
        read_env()
    assert [(f.path, f.value) for f in caught.value.errors] == [("WORLD_SIZE", None), ("LOCAL_RANK", "one")]
    for fault in caught.value.errors:
        assert fault.problem == "is not a number, but RANK is set ('5')"
        assert fault.fix == "Start the ranks with torchrun."


@pytest.mark.parametrize(
    ("wanted", "gpus", "ranks", "device"),
    [
        ("cpu", 8, 2, "cpu"),
        ("auto", 0, 1, "cpu"),
        ("auto", 1, 2, "cpu"),
        ("auto", 2, 2, "cuda:1"),
        ("cuda", 4, 2, "cuda:1"),
    ],
)
def test_pick_device(wanted: str, gpus: int, ranks: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert str(pick_device(wanted, Env(1, ranks, 1, ranks))) == device


def test_cuda_without_enough_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with raises(ConfigError, "distributed.too-few-gpus", "train.device = 'cuda'", 1, 2):
        pick_device("cuda", Env(0, 2, 0, 2))


@pytest.fixture
def handlers() -> Iterator[None]:
    """Restore the signal handlers that `engine train` replaces."""
    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def no_data(tmp_path: Path) -> list[str]:
    return ["train", "--run.dir", str(tmp_path / "run")]


def no_ranks(tmp_path: Path) -> list[str]:
    return ["train", "--world-size", "-4", "--dry-run"]


def no_degree(tmp_path: Path) -> list[str]:
    return ["evaluate", str(tmp_path), "--tensor", "0", "--pipeline", "-1"]


@pytest.mark.usefixtures("bare_env", "handlers")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (no_data, "data.train = '': no training data given. Make some with `engine prepare`."),
        (no_degree, "--pipeline = -1: is below 1. Use 1 or more ranks."),
        (no_ranks, "--world-size = -4: is not a number of ranks. Use 0 for the product of the degrees."),
    ],
)
def test_faults_found_later_end_with_2_too(
    arguments: Callable[[Path], list[str]], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(*arguments(tmp_path)) == EXIT_CONFIG
    assert expected in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_one_rank_speaks_of_faults_that_all_have(
    bare_env: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 reports immediately and exits; torchrun ends the others while they still wait."""
    waits: list[float] = []
    bare_env.setattr("time.sleep", waits.append)
    torchrun_env(bare_env)
    assert run_cli("train", "--train.steps", "0") == EXIT_CONFIG and sum(waits) >= 10
    waits.clear()
    torchrun_env(bare_env, RANK="0", LOCAL_RANK="0")
    assert run_cli("train", "--train.steps", "0") == EXIT_CONFIG and not waits
    assert "train.steps = '0': input should be greater" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["generate", "export"])
def test_single_process_verbs_refuse_torchrun(
    verb: str, bare_env: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torchrun_env(bare_env)
    rest = ["--prompt", "x"] if verb == "generate" else ["out"]
    assert run_cli(verb, "run", *rest) == EXIT_CONFIG
    assert f"WORLD_SIZE = 2: {verb} runs on one process. Start `engine {verb} ...`" in capsys.readouterr().err


def test_world_size_belongs_to_the_dry_run(bare_env: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("train", "--world-size", "8") == EXIT_CONFIG
    assert "--world-size = 8: has no effect without --dry-run" in capsys.readouterr().err
