"""Import and export of Hugging Face folders against transformers: logits, gradients, round trips, any layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.checkpoint.format import read_manifest, verify_all
from engine.checkpoint.load import Reader
from engine.config.load import load
from engine.config.schema import ModelConfig
from engine.data.tokenize.tokenizer import Tokenizer
from engine.distributed.context import ParallelContext, make_context
from engine.distributed.layout import Layout
from engine.distributed.sharding import parameters, piece_of
from engine.errors import CheckpointError
from engine.inference.compare import compare_with_transformers
from engine.inference.load import load_model
from engine.interop.convert import export, import_folder
from engine.interop.huggingface.companions import COMPANIONS_DIR, copy_companions
from engine.interop.huggingface.weights import HfReader
from engine.model.build import StageShape
from engine.model.layers import Build
from engine.model.transformer import Transformer
from engine.optim.update_rules import MODEL
from engine.train.resume import save_state, start_from
from engine.train.state import setup
from engine.train.step import train_step
from tests.support.cases import config, layout_of, micro_batch, random_batches, same_bytes
from tests.support.errors import raises
from tests.support.harness import run_ranks
from tests.support.hf_folders import TOKENS, same_bits, tensors_of
from tests.support.hf_models import MODELS, save

METADATA: dict[str, Any] = {"prefix": "x", "num_documents": 1, "num_tokens": 1, "tokenizer_digest": None}


def meaning(folder: Path) -> dict[str, Any]:
    """The config that transformers reads from a folder, without the keys about its writer."""
    fields = AutoConfig.from_pretrained(folder).to_dict()
    return {k: v for k, v in fields.items() if k not in ("transformers_version", "_name_or_path")}


@pytest.mark.parametrize("name", MODELS)
def test_import_gives_transformers_logits_and_gradients(tmp_path: Path, name: str) -> None:
    theirs = save(name, tmp_path / "hf")
    folder, _ = import_folder(tmp_path / "hf", tmp_path / "run", max_shard_bytes=20_000)
    manifest = read_manifest(folder)
    verify_all(folder, manifest)
    assert len(manifest.files) > 1 and manifest.step == 0
    ours = load_model(tmp_path / "run")
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        found = ours.logits(TOKENS)
    assert float((found - expected).abs().max()) < 1e-5
    assert float(expected.abs().max()) > 0.1

    labels, mask = TOKENS.roll(-1, 1), torch.rand(TOKENS.shape) < 0.7
    losses = ours((), micro_batch(TOKENS, labels, mask)).losses
    assert losses is not None
    losses.sum().backward()
    losses = torch.nn.functional.cross_entropy(theirs(TOKENS).logits.transpose(1, 2), labels, reduction="none")
    (losses * mask).sum().backward()
    grads = {piece.name: piece_of(piece, p.grad) for p in parameters(ours) for piece in p.spec.pieces(ours.ctx)}
    for p in theirs.parameters():  # transformers' gradients, read through the same mapping as weights
        p.data = p.grad
    theirs.save_pretrained(tmp_path / "grads")
    with HfReader(tmp_path / "grads") as reader:
        assert reader.shapes(MODEL).keys() == grads.keys()
        for key, grad in grads.items():
            expected = reader.read_whole(MODEL, key)
            assert float((grad - expected).abs().max()) < 1e-4 * max(1.0, float(expected.abs().max())), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_changes_no_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    save(name, tmp_path / "hf", dtype)
    folder, _ = import_folder(tmp_path / "hf", tmp_path / "run", max_shard_bytes=20_000)
    family, size, _ = export(folder, tmp_path / "back", dtype=None, tokenizer=None, eod=None, max_shard_bytes=20_000)
    assert same_bits(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back"))
    assert meaning(tmp_path / "hf") == meaning(tmp_path / "back")
    assert [family.architecture] == json.loads((tmp_path / "hf/config.json").read_text())["architectures"]
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size and len(set(index["weight_map"].values())) > 1
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["llama3-rope", "gemma", "olmo2", "phi3", "gpt2", "neox"])
def test_starting_from_a_folder_in_any_layout_and_exporting_from_it(tmp_path: Path, name: str) -> None:
    """`checkpoint.init` on 2 x 2 ranks: the weights are bitwise those of the folder. The export of the next step gives
    the logits of transformers, and the export of the start equals the folder."""
    save(name, tmp_path / "hf")
    words = {
        "checkpoint.init": tmp_path / "hf",
        "parallel.tensor": 2,
        "parallel.pipeline": 2,
        "train.seq_len": 16,
        "run.dir": tmp_path / "run",
        "train.device": "cpu",
    }
    resolved = load([], {key: str(value) for key, value in words.items()}, world=4)
    cfg = resolved.config
    assert resolved.sources["model.hidden_size"] == f"file {tmp_path / 'hf/config.json'}"

    def job(ctx: ParallelContext) -> None:
        state = setup(cfg, ctx)
        start_from(state, Path(cfg.checkpoint.init))
        save_state(state, tmp_path / "run/checkpoints", METADATA)
        train_step(state, random_batches(cfg, ctx, 0))
        save_state(state, tmp_path / "run/checkpoints", METADATA)

    run_ranks(layout_of(cfg), job, dtype=torch.float32)
    copy_companions(tmp_path / "hf", tmp_path / "run")  # as `train` does: Phi-3 is a Llama whose matrices are fused
    for step in (0, 1):
        folder = tmp_path / f"run/checkpoints/step_{step:08d}"
        export(folder, tmp_path / f"out{step}", dtype=torch.float32, tokenizer=None, eod=None)
        found = compare_with_transformers(folder, tmp_path / f"out{step}", num_tokens=64)
        assert not found.problem and found.difference < 1e-5 and found.largest > 0.1
        before, after = (AutoConfig.from_pretrained(tmp_path / name) for name in ("hf", f"out{step}"))
        assert after.max_position_embeddings == before.max_position_embeddings > cfg.train.seq_len
    assert same_bits(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "out0"))
    assert not same_bits(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "out1"))


def test_starting_from_our_own_checkpoint_of_another_layout(tmp_path: Path) -> None:
    """Weights only: optimizer, step and data position start from zero."""
    save("qwen2", tmp_path / "hf")
    folder, _ = import_folder(tmp_path / "hf", tmp_path / "imported")
    words = {"checkpoint.init": str(tmp_path / "imported"), "parallel.tensor": "2", "train.seq_len": "16"}
    cfg = load([], words, world=2).config
    assert cfg.model.qkv_bias and cfg.model.tie_embeddings and cfg.model.vocab_size == 61

    def job(ctx: ParallelContext) -> None:
        state = setup(cfg, ctx)
        start_from(state, Path(cfg.checkpoint.init))
        assert (state.step, state.optimizer.steps) == (0, 0)
        save_state(state, tmp_path / "run", METADATA)

    run_ranks(layout_of(cfg), job, dtype=torch.float32)
    with Reader(folder) as a, Reader(tmp_path / "run/step_00000000") as b:
        assert a.shapes(MODEL) == b.shapes(MODEL)
        assert all(torch.equal(a.read_whole(MODEL, name), b.read_whole(MODEL, name)) for name in a.shapes(MODEL))


def test_own_models_are_exported_with_their_tokenizer(tmp_path: Path) -> None:
    """Without an imported folder, the family is the first in the table that fits the model, or that of the preset."""
    cfg = config(2, train_precision="fp32", parallel_tensor=2, run_dir=tmp_path / "run", model_preset="mistral-7b")

    def job(ctx: Any) -> None:
        state = setup(cfg, ctx)
        train_step(state, random_batches(cfg, ctx, 0))
        save_state(state, tmp_path / "run/checkpoints", METADATA)

    run_ranks(layout_of(cfg), job, dtype=torch.float32)
    tokenizer = Tokenizer.train(iter(["some text to learn from"]), 300)
    tokenizer.save(tmp_path / "tokenizer")
    folder = tmp_path / "run/checkpoints/step_00000001"
    words = {"dtype": torch.float32, "tokenizer": tmp_path / "tokenizer", "eod": tokenizer.eod}
    family, *_ = export(folder, tmp_path / "hf", **words)
    assert family.architecture == "MistralForCausalLM"
    found = compare_with_transformers(tmp_path / "run", tmp_path / "hf", num_tokens=64)
    assert not found.problem and found.difference < 1e-5 and found.largest > 0.1
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.decode(tokenizer.encode("some <|endoftext|> text")) == "some <|endoftext|> text"
    assert theirs.eos_token_id == tokenizer.eod == AutoConfig.from_pretrained(tmp_path / "hf").eos_token_id
    with raises(CheckpointError, "interop.output-exists", tmp_path / "hf"):
        export(folder, tmp_path / "hf", **words)


def test_a_model_of_no_family_is_not_exported(tmp_path: Path) -> None:
    cfg = config(1, model_parallel_residual=True)

    def job(ctx: Any) -> None:
        save_state(setup(cfg, ctx), tmp_path, METADATA)

    run_ranks(layout_of(cfg), job)
    with raises(CheckpointError, "interop.no-architecture-fits", "model.parallel_residual = True"):
        export(tmp_path / "step_00000000", tmp_path / "hf", dtype=None, tokenizer=None, eod=None)


def test_companion_files_are_exported(tmp_path: Path) -> None:
    """Token ids, dropout rates, generation settings, tokenizer and chat template survive a run."""
    model = save("gpt2", tmp_path / "hf")
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.7
    model.generation_config.save_pretrained(tmp_path / "hf")
    Tokenizer.train(iter(["text to learn from"]), 300).save(tmp_path / "hf")
    (tmp_path / "hf/chat_template.jinja").write_text("{{ messages }}")
    folder, notes = import_folder(tmp_path / "hf", tmp_path / "run")
    assert any("attn_pdrop 0.1: not taken over; set train.attention_dropout" in note for note in notes)
    export(folder, tmp_path / "back", dtype=None, tokenizer=tmp_path / "run/tokenizer", eod=0)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        same_bytes(tmp_path / "back" / name, tmp_path / "hf" / name)
    assert meaning(tmp_path / "hf") == meaning(tmp_path / "back")


def test_folders_saved_without_their_head(tmp_path: Path) -> None:
    """The first GPT-2 releases: names without `transformer.`, and the causal mask saved like a weight."""
    model = save("gpt2", tmp_path / "hf")
    from safetensors.torch import save_file

    bare = {k.removeprefix("transformer."): v.contiguous() for k, v in tensors_of(tmp_path / "hf").items()}
    for file in tmp_path.glob("hf/*.safetensors*"):
        file.unlink()
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, tmp_path / "hf/model.safetensors")
    import_folder(tmp_path / "hf", tmp_path / "run")
    with torch.no_grad():
        assert torch.allclose(load_model(tmp_path / "run").logits(TOKENS), model(TOKENS).logits, atol=1e-5)


def test_a_shorter_context_makes_a_sliding_window_idle(tmp_path: Path) -> None:
    model = save("mistral", tmp_path / "hf")
    model.config.sliding_window = 16
    model.config.save_pretrained(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "run", max_seq_len=16)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    with torch.no_grad():
        difference = load_model(tmp_path / "run").logits(TOKENS[:, :16]) - theirs(TOKENS[:, :16]).logits
    assert float(difference.abs().max()) < 1e-5


WINDOWS = [
    ("mistral", {"sliding_window": 5}, (5, "")),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, (6, "fw")),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2}, (4, "")),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
        (3, "wf"),
    ),
]


@pytest.mark.parametrize(("name", "change", "expected"), WINDOWS, ids=str)
def test_sliding_windows_are_those_of_transformers(
    tmp_path: Path, name: str, change: dict[str, Any], expected: tuple[int, str]
) -> None:
    """Import, and export with and without the folder's own config.json: the same logits as transformers."""
    full = save(name, tmp_path / "hf")
    file = tmp_path / "hf/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_types": None} | change))
    folder, _ = import_folder(tmp_path / "hf", tmp_path / "run")
    ours = load_model(tmp_path / "run")
    assert (ours.cfg.window, ours.cfg.window_layers) == expected
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    with torch.no_grad():
        found, wanted = ours.logits(TOKENS), theirs(TOKENS).logits
        assert float((found - wanted).abs().max()) < 1e-5 < float((full(TOKENS).logits - wanted).abs().max())
    for origin in (True, False):
        if not origin:
            (tmp_path / "run" / COMPANIONS_DIR / "config.json").unlink()
        export(folder, tmp_path / f"out{origin}", dtype=None, tokenizer=None, eod=None)
        back = AutoModelForCausalLM.from_pretrained(tmp_path / f"out{origin}", attn_implementation="eager")
        with torch.no_grad():
            assert torch.equal(back(TOKENS).logits, wanted)


def test_embeddings_are_scaled_as_gemma_rounds_them() -> None:
    """sqrt(3072) is 55.4256 in float32 and 55.5 in bfloat16."""
    for dtype, scale in ((torch.float32, 55.4256), (torch.bfloat16, 55.5)):
        ctx = make_context(Layout(), 0, dtype=dtype, device="meta")
        cfg = ModelConfig(hidden_size=3072, num_heads=1, num_kv_heads=1, head_dim=2, scale_embeddings=True)
        model = Transformer(cfg, Build(ctx), StageShape(range(0), True, False))
        assert model.embed.scale == pytest.approx(scale, rel=1e-6)


MEASURE = """
import sys, threading, time
from pathlib import Path
from engine.interop.convert import export, import_folder
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) << 10
peak, done = [0], threading.Event()
def watch():
    while not done.wait(0.0005):
        peak[0] = max(peak[0], anonymous())
root = Path(sys.argv[1])
import_folder(root / "hf", root / "warm", max_shard_bytes=1 << 20)  # what is loaded and kept once
base = anonymous()
threading.Thread(target=watch).start()
folder, _ = import_folder(root / "hf", root / "run", max_shard_bytes=4 << 20)
first, peak[0] = peak[0] - base, 0
export(folder, root / "out", dtype=None, tokenizer=None, eod=None, max_shard_bytes=4 << 20)
done.set()
print(first, peak[0] - base)
"""


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.heavy) for n in ("phi3", "neox", "gpt2"))]
)
def test_memory_is_a_shard_and_a_tensor(tmp_path: Path, name: str) -> None:
    """A model of 50 or 60 MiB in float32, shards of 4 MiB, tensors of up to 2 MiB; measured every half millisecond."""
    wide = {"vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 16, "intermediate_size": 1024}
    wide |= {"n_embd": 256, "n_layer": 16, "n_inner": 1024}
    kind, words = MODELS[name]
    MODELS["wide"] = (kind, words | {key: value for key, value in wide.items() if key in words})
    try:
        whole = sum(x.numel() * 4 for x in save("wide", tmp_path / "hf", shard="100MB").state_dict().values())
    finally:
        del MODELS["wide"]
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536"
    }  # return freed memory to the system at once, so that it is not counted
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert result.returncode == 0, result.stderr
    peaks = [int(text) / 2**20 for text in result.stdout.split()]
    print(f"{name}: {whole / 2**20:.1f} MiB; peak of import and export: {peaks[0]:.1f} and {peaks[1]:.1f} MiB")
    assert whole > 40 << 20 and all(1 < peak < 9 for peak in peaks)
