"""Hints for an unknown setting, command or key: names of other engines, misspellings, or no hint."""

from __future__ import annotations

import random
import string
import sys
from pathlib import Path

import pytest

from engine.cli.main import _SYNONYMS, _VERBS, main
from engine.config import hints
from engine.config.hints import nearest
from engine.config.load import load
from engine.config.peers import ENGINES
from engine.config.schema import fields, tables
from engine.errors import ConfigError
from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import coming_from

KNOWN = [f"{section}.{name}" for section, name, _ in fields()]
OF_ROWS = [f"{table}.N.{name}" for table, row in tables().items() for name in row.model_fields]
OPTIONS = ("--config", "--dry-run")  # of engine train, in addition to the settings


def fix_of(word: str) -> str:
    """The fix in the error for an unknown option of the command line."""
    with pytest.raises(ConfigError) as caught:
        load([], {}, unknown=[word])
    (fault,) = caught.value.errors
    return fault.fix


@pytest.mark.parametrize(
    ("option", "ours"),
    [
        ("--lr", "optimizer.lr"),
        ("--train.lr", "optimizer.lr"),
        ("--learning-rate", "optimizer.lr"),
        ("--learning_rate", "optimizer.lr"),
        ("--min-lr", "lr_schedule.min_lr_ratio"),
        ("--tensor-model-parallel-size", "parallel.tensor"),
        ("--tensor-model-paralel-size", "parallel.tensor"),
        ("--parallel.tp", "parallel.tensor"),
        ("--num-experts", "parallel.expert"),
        ("--use-distributed-optimizer", "parallel.zero"),
        ("--bf16", "train.precision"),
        ("--save-interval", "checkpoint.every"),
        ("--save", "run.dir"),
        ("--finetune", "checkpoint.init"),
        ("--training.seq_len", "train.seq_len"),
        ("--training.local_batch_size", "train.micro_batch_size"),
        ("--tensor_parallel_degree", "parallel.tensor"),
        ("--batch-size", "train.global_batch_size"),
        ("--model.layers", "model.num_layers"),
        ("--model.num_attention_heads", "model.num_heads"),
        ("--num-epochs", "train.steps"),
        ("--steps", "train.steps"),
        ("--seq-len", "train.seq_len"),
        ("--hidden_size", "model.hidden_size"),
        ("--train.precison", "train.precision"),
        ("--trian.steps", "train.steps"),
        ("--window-size", "model.window"),
        ("--hidden-dropout", "train.dropout"),
        ("--attention-dropout", "train.attention_dropout"),
        ("--dropout", "train.dropout"),
        ("--model.dropout", "train.dropout"),
        ("--model.attn_pdrop", "train.attention_dropout"),
        ("--z-loss", "train.z_loss"),
        ("--z_loss_multiplier", "train.z_loss"),
        ("--decoupled-lr", "optimizer.groups.N.lr_factor"),
        ("--freeze-layers", "optimizer.groups.N.frozen"),
        ("--rampup-batch-size", "phase.N.global_batch_size"),
        ("--yaml-cfg", "--config"),
    ],
)
def test_names_of_others_and_misspellings_find_ours(option: str, ours: str) -> None:
    assert fix_of(option) == f"Did you mean {ours}?"


@pytest.mark.parametrize(
    "option",
    [
        *("--mtp-num-layers", "--kv-lora-rank", "--use-megatron-fsdp"),
        *("--wandb-project", "--report_to", "--optimizer", "--lora_rank", "--fsdp"),
        *("--exit-duration-in-mins", "--profile", "--float8.filter_fqns", "--nproc_per_node"),
    ],
)
def test_what_has_no_counterpart_says_so_and_why(option: str) -> None:
    assert fix_of(option) == "It has no counterpart here; see docs/coming_from.md."


@pytest.mark.parametrize(
    "option",
    [
        *("--v-head-dim", "--qk-head-dim", "--img-h", "--num-classes", "--squash", "--spec", "--mask-prob", "--ema"),
        *(
            "--train.ema",
            "--model.alibi",
            "--model.num_stages",
            "--label-smoothing",
            "--kd-alpha",
            "--use-one-sent-docs",
        ),
        *("--adlr-autoresume", "--iter-per-epoch", "--head-size", "--rl-profile", "--patch-dim", "--sample-rate"),
        *("--bert-load", "--ict-load", "--embedding-path", "--block-data-path", "--mscale", "--langrl-env-config"),
        *("--inference-max-seq-length", "--num-channels", "--disable-msc", "--model.bias", "--train.schedule-free"),
        *("--num-speculative-tokens", "--grpo-group-size", "--sft", "--every", "--kind", "--fairscale"),
    ],
)
def test_no_hint_rather_than_a_wrong_one(option: str) -> None:
    assert fix_of(option) == "`engine train --help` lists all settings."


def test_random_words_get_no_hint() -> None:
    draw = random.Random(1)
    words = ["".join(draw.choice(string.ascii_lowercase) for _ in range(draw.randint(5, 14))) for _ in range(25)]
    for word in words:
        assert hints.suggest(word, KNOWN) is None and hints.suggest(f"train.{word}", KNOWN) is None, word
        assert nearest(word, _VERBS) == "", word


def test_the_table_names_only_what_exists() -> None:
    rows = [row for rows in ENGINES.values() for row in rows]
    for theirs, ours, remark in rows:
        assert ours in [*KNOWN, *OF_ROWS] or ours in OPTIONS or (not ours and remark), theirs
    for engine, own in ENGINES.items():
        names = [name for theirs, _, _ in own for name in theirs.split()]
        assert len(names) == len(set(names)), f"{engine} has a name twice"
    assert not {name.strip("-").replace("-", "_") for theirs, _, _ in rows for name in theirs.split()} & set(KNOWN) - {
        path for path in KNOWN if path.startswith("optimizer.")
    }


def test_the_pages_have_these_tables() -> None:
    for name, text in coming_from.pages().items():
        assert (ROOT / "docs/coming_from" / name).read_text() == text, "run python tools/coming_from.py"


@pytest.mark.parametrize("config", [coming_from.LLAMA_3_8B_MEGATRON, coming_from.LLAMA_3_8B_TORCHTITAN])
def test_the_configurations_line_by_line_load_and_agree_with_the_table(
    config: tuple[tuple[str, str], ...], tmp_path: Path
) -> None:
    for theirs, ours in config:
        hint = hints.suggest(theirs.split()[0], KNOWN)
        assert hint is not None and hint.engine in ("Megatron-LM", "torchtitan"), theirs
        assert ours.split(" = ")[0] == hint.ours if ours else hint.remark, theirs
    file = tmp_path / "theirs.toml"
    more = coming_from.TORCHTITAN_MORE if config is coming_from.LLAMA_3_8B_TORCHTITAN else ()
    file.write_text(coming_from.toml((*(ours for _, ours in config), *more)))
    resolved = load([file], {}, world=None).config
    assert resolved.model.hidden_size == 4096 and resolved.train.seq_len == 8192


def test_keys_of_files_get_the_same_answer(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        "lr = 3e-4\n[training]\nseq_len = 4096\n[train]\nepochs = 3\nwandb = true\nhidden_dropout = 0.1\nxyzzy = 1\n"
    )
    with pytest.raises(ConfigError) as caught:
        load([file], {})
    assert [fault.fix for fault in caught.value.errors] == [
        "Did you mean optimizer.lr?",
        "Did you mean train.seq_len?",
        "Did you mean train.steps?",
        "It has no counterpart here; see docs/coming_from.md.",
        "Did you mean train.dropout?",
        "`engine train --help` lists all settings.",
    ]
    assert "of torchtitan" in caught.value.errors[1].problem
    assert caught.value.errors[3].problem.endswith("not supported; use metrics.jsonl or TensorBoard")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("tarin", "train"),
        ("evalute", "evaluate"),
        ("plt", "plot"),
        ("eval", "evaluate"),
        ("preprocess-data", "prepare"),
    ],
)
def test_a_mistyped_verb_gets_a_hint(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([word])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: unknown command {word!r}. Did you mean {hint}?\n")


def test_other_words_are_no_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("banana", "launch", "test", "--verbose"):
        with pytest.raises(SystemExit):
            main([word])
        assert capsys.readouterr().err.startswith(f"error: unknown command {word!r}\n")
    assert all(verb in _VERBS for suggestion in _SYNONYMS.values() for verb in suggestion.split(" or "))
