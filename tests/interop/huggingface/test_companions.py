"""Companion files of a Hugging Face folder are exported again, consistent with the exported model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from engine.cli.main import main
from engine.data.samples.indexed_writer import IndexedWriter
from engine.data.tokenize.equivalence import EDGE_CASES
from engine.data.tokenize.tokenizer import Tokenizer
from engine.errors import CheckpointError
from engine.interop.convert import export, import_folder
from engine.interop.huggingface.companions import copy_companions, read_inside
from tests.support.errors import raises
from tests.support.hf_folders import rewrite
from tests.support.hf_models import ROPE3, save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save("gpt2", tmp_path / "hf")
    return tmp_path / "hf"


def engine(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    assert end.value.code in (0, None), captured.out + captured.err
    return captured.out


def read_json(folder: Path, name: str = "config.json") -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / name).read_text())
    return fields


def change(folder: Path, name: str = "config.json", **fields: Any) -> None:
    path = folder / name
    path.write_text(json.dumps((read_json(folder, name) if path.exists() else {}) | fields))


def test_several_chat_templates_come_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Tokenizer.train(iter(["text to learn from"]), 300).save(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "{{messages}}", "tool_use": "TOOLS {{messages}}"}
    tokenizer.save_pretrained(folder)
    engine(capsys, "import", folder, tmp_path / "run")
    engine(capsys, "export", tmp_path / "run", tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    Tokenizer.load(folder).save(tmp_path / "copy")  # as in a run that starts from the folder
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template == tokenizer.chat_template


def test_tokenizers_without_tokenizer_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2's two files become a tokenizer.json that gives transformers' ids; files of other kinds are copied."""
    trained = Tokenizer.train(iter(["text to learn from, 12 words and don't"] * 9), 290)
    trained.save(tmp_path / "trained")
    model = read_json(tmp_path / "trained", "tokenizer.json")["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    change(folder, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", eos_token="<|endoftext|>")
    right = transformers.AutoTokenizer.from_pretrained(folder)
    assert "tokenizer.json built from vocab.json" in engine(capsys, "import", folder, tmp_path / "run")
    ours = Tokenizer.load(tmp_path / "run/tokenizer")
    for text in (*EDGE_CASES[:8], EDGE_CASES[9]):
        assert ours.encode(text) == right.encode(text)
    engine(capsys, "export", tmp_path / "run", tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").encode(EDGE_CASES[2]) == right.encode(
        EDGE_CASES[2]
    )

    change(folder, "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    assert "how Qwen2Tokenizer splits texts is not known" in engine(capsys, "import", folder, tmp_path / "other")
    engine(capsys, "export", tmp_path / "other", tmp_path / "kept")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "kept" / name).read_bytes() == (folder / name).read_bytes()
    assert not (tmp_path / "kept/tokenizer.json").exists()


def test_ids_follow_another_tokenizer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run with another end token: config.json and generation_config.json had kept the old one."""
    Tokenizer.train(iter(["text to learn from"]), 300).save(folder)
    change(folder, bos_token_id=50, eos_token_id=50, pad_token_id=3)
    change(folder, "generation_config.json", eos_token_id=[50, 51], pad_token_id=50, temperature=0.5)
    engine(capsys, "import", folder, tmp_path / "run")
    engine(
        capsys, "export", tmp_path / "run", tmp_path / "same"
    )  # the folder's files may disagree, and are exported as they are
    assert read_json(tmp_path / "same")["eos_token_id"] == 50
    Tokenizer.train(iter(["text"]), 300, special_tokens=("<a>", "<end>")).save(tmp_path / "new")
    change(tmp_path / "new", "tokenizer_config.json", eos_token="<end>")
    text = engine(capsys, "export", tmp_path / "run", tmp_path / "out", "--tokenizer", tmp_path / "new")
    assert "note: eos_token_id is 1, the tokenizer's: the folder had 50, 51" in text
    config, generation = read_json(tmp_path / "out"), read_json(tmp_path / "out", "generation_config.json")
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 1, 3)
    assert (generation["eos_token_id"], generation["pad_token_id"], generation["temperature"]) == (1, 1, 0.5)
    change(tmp_path / "run/hugging_face", "generation_config.json", eos_token_id=[1, 50])
    engine(capsys, "export", tmp_path / "run", tmp_path / "named", "--tokenizer", tmp_path / "new")
    assert read_json(tmp_path / "named")["eos_token_id"] == 50  # the folder lists this end token too


def test_generation_config_is_checked_at_import(folder: Path, tmp_path: Path) -> None:
    path = folder / "generation_config.json"
    for text, code, value in (
        ("[1]", "json-not-an-object", ""),
        ("{", "json-malformed", ""),
        ('{"eos_token_id": "2"}', "generation-config-malformed", "eos_token_id '2'"),
    ):
        path.write_text(text)
        with raises(CheckpointError, f"interop.{code}", path, value):
            import_folder(folder, tmp_path / "run")
    path.write_text('{"eos_token_id": [1, 61]}')
    _, notes = import_folder(folder, tmp_path / "run")
    assert any("eos_token_id 61 is outside the vocabulary of 61" in note for note in notes)


def test_dtype_is_the_folders(folder: Path, tmp_path: Path) -> None:
    """Norms in float32 among bfloat16: the export has the dtype in config.json, bfloat16."""
    rewrite(folder, lambda t: t.update({k: x if "ln" in k else x.bfloat16() for k, x in t.items()}))
    change(folder, dtype="bfloat16", torch_dtype=None)
    checkpoint, _ = import_folder(folder, tmp_path / "run")
    export(checkpoint, tmp_path / "out", dtype=None, tokenizer=None, eod=None)
    assert read_json(tmp_path / "out")["dtype"] == read_json(tmp_path / "out")["torch_dtype"] == "bfloat16"
    export(checkpoint, tmp_path / "wide", dtype=torch.float32, tokenizer=None, eod=None)
    assert read_json(tmp_path / "wide")["dtype"] == "float32"


def test_a_value_beyond_the_range_of_a_dtype_is_an_error(folder: Path, tmp_path: Path) -> None:
    """66,000 is finite in float32 and bfloat16, and infinite in float16, whose largest value is 65,504."""
    rewrite(folder, lambda t: next(iter(t.values())).view(-1)[0].fill_(66_000))
    checkpoint, _ = import_folder(folder, tmp_path / "run")
    with raises(CheckpointError, "interop.value-out-of-range", "6.6e+04", "6.55e+04"):
        export(checkpoint, tmp_path / "narrow", dtype=torch.float16, tokenizer=None, eod=None)
    assert not list(tmp_path.glob(".narrow*")) and not (tmp_path / "narrow").exists()
    export(checkpoint, tmp_path / "wide", dtype=torch.bfloat16, tokenizer=None, eod=None)


@pytest.mark.parametrize("form", ["new", "old", "older"])
def test_exports_have_both_rope_forms(tmp_path: Path, form: str) -> None:
    """transformers 4 reads rope_theta and rope_scaling, and used 10000 for folders saved by version 5."""
    folder = tmp_path / "hf"
    save("llama3-rope" if form != "older" else "llama-linear", folder)
    new = transformers.AutoConfig.from_pretrained(folder).rope_parameters
    if form != "new":
        change(folder, rope_parameters=None, rope_theta=new["rope_theta"])
        scaling = {"type": "linear", "factor": 2.0} if form == "older" else ROPE3 | {"rope_theta": None}
        change(folder, rope_scaling={key: value for key, value in scaling.items() if value is not None})
    checkpoint, _ = import_folder(folder, tmp_path / "run")
    export(checkpoint, tmp_path / "out", dtype=None, tokenizer=None, eod=None)
    out = read_json(tmp_path / "out")
    assert out["rope_theta"] == new["rope_theta"]
    for key, value in new.items():
        assert out["rope_parameters"][key] == value and out["rope_scaling"][key] == value
    again = transformers.AutoConfig.from_pretrained(tmp_path / "out").rope_parameters
    assert {key: value for key, value in again.items() if key != "type"} == new


def test_small_files_are_copied_if_asked_and_never_dropped_silently(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "LICENSE").write_text("free")
    (folder / "README.md").write_text("card")
    (folder / "large.txt").write_bytes(bytes((1 << 20) + 1))
    (folder / "original").mkdir()
    (tmp_path / "private").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "private")
    text = engine(capsys, "import", folder, tmp_path / "run")
    assert "note: skipped, neither read nor kept for exports: large.txt, link.txt, original" in text
    text = engine(capsys, "export", tmp_path / "run", tmp_path / "plain")
    assert "note: not copied: LICENSE, README.md of the imported folder; use --copy-extra" in text
    assert not (tmp_path / "plain/LICENSE").exists()
    assert "not copied" not in engine(capsys, "export", tmp_path / "run", tmp_path / "out", "--copy-extra")
    assert (tmp_path / "out/LICENSE").read_text() == "free" and (tmp_path / "out/README.md").read_text() == "card"
    assert not (tmp_path / "out/link.txt").exists()
    copy_companions(tmp_path / "run/checkpoints/step_00000000", tmp_path / "next")  # a run that starts from the import
    assert (tmp_path / "next/hugging_face/extra/LICENSE").read_text() == "free"


def test_every_verb_on_a_folder_speaks_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fields(*words: object) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(engine(capsys, *words, "--json"))
        assert found["verb"] == words[0]
        return found

    run = tmp_path / "run"
    found = fields("import", folder, run)
    assert found["checkpoint"] == str(run / "checkpoints/step_00000000") and "no tokenizer" in str(found["notes"])
    assert fields("verify", run)["step"] == 0
    found = fields("inspect", run, "--no-norms")
    assert found["step"] == 0 and found["tensors"][0]["shape"] and found["tensors"][0]["norm"] is None
    found = fields("export", run, tmp_path / "out", "--verify")
    assert found["architecture"] == "GPT2LMHeadModel" and found["compared"]["difference"] < found["compared"]["bound"]
    with IndexedWriter(tmp_path / "corpus", vocab_size=97) as writer:
        writer.add(np.array([1, 2, 3], dtype=np.int32))
        writer.add(np.array([4, 5], dtype=np.int32))
        writer.finish({})
    found = fields("inspect", tmp_path / "corpus", "--output", tmp_path / "picture.png", "--verify")
    assert found["documents"] == 2 and found["tokens"] == 5 and found["picture"] == str(tmp_path / "picture.png")


def test_links_out_of_a_folder_are_not_copied_but_a_hub_cache_is_read(tmp_path: Path) -> None:
    (tmp_path / "private").write_text("secret", encoding="utf-8")
    snapshot = tmp_path / "models--a--b/snapshots/123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b/blobs").mkdir()
    (tmp_path / "models--a--b/blobs/abc").write_text("blob", encoding="utf-8")
    (snapshot / "merges.txt").symlink_to("../../blobs/abc")
    assert read_inside(snapshot, "merges.txt") == b"blob"
    (snapshot / "vocab.json").symlink_to(tmp_path / "private")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.jinja").write_text("secret", encoding="utf-8")
    (snapshot / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    for name in ("vocab.json", "additional_chat_templates/a.jinja"):
        with raises(CheckpointError, "interop.companion-is-a-link", snapshot / name):
            read_inside(snapshot, name)
