"""Megatron-LM checkpoints written by torch are read bitwise; unsupported models are rejected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.serialization import set_crc32_options

from engine.checkpoint.load import load_into
from engine.config.schema import ModelConfig
from engine.distributed.context import make_context
from engine.distributed.layout import Layout
from engine.distributed.sharding import parameters
from engine.errors import CheckpointError
from engine.interop.megatron.source import MegatronSource, open_megatron
from engine.model.build import StageShape
from engine.model.layers import Build
from engine.model.transformer import Transformer
from engine.optim.optimizer import StateShard
from tests.support.errors import raises
from tests.support.harness import run_ranks
from tests.support.megatron_cases import (
    GPT,
    LLAMA,
    MODELS,
    PADDED,
    QWEN,
    VOCAB,
    canonical,
    dist_state,
    save_common,
    save_dist,
    save_legacy,
)


def assert_holds(source: MegatronSource, wanted: dict[str, Tensor]) -> None:
    """Check names, shapes and all values bitwise, and rectangles across any shard boundaries."""
    assert source.shapes("model") == {name: tuple(x.shape) for name, x in wanted.items()}
    assert source.shapes("exp_avg") == {}
    generator = torch.Generator().manual_seed(1)
    for name, x in wanted.items():
        whole = source.read_whole("model", name)
        assert whole.dtype == x.dtype and torch.equal(whole, x), name
        for _ in range(3):
            begin = [int(torch.randint(n, (), generator=generator)) for n in x.shape]
            size = [1 + int(torch.randint(n - b, (), generator=generator)) for n, b in zip(x.shape, begin)]
            part = x[tuple(slice(b, b + n) for b, n in zip(begin, size))]
            assert torch.equal(source.read("model", name, tuple(begin), tuple(size)), part), name


@pytest.mark.parametrize("form", ["stacked", "layers", "halves"])
@pytest.mark.parametrize("model", MODELS)
def test_torch_dist(tmp_path: Path, model: str, form: str) -> None:
    wanted = save_dist(tmp_path / "iter_0000007", MODELS[model], form)
    with open_megatron(tmp_path / "iter_0000007") as source:
        assert source.step == 7 and source.cfg.vocab_size == VOCAB
        assert_holds(source, wanted)
        source.verify()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    wanted = save_dist(tmp_path, QWEN, dtype=dtype)
    assert_holds(open_megatron(tmp_path), wanted)


def test_torch_dist_of_two_ranks(tmp_path: Path) -> None:
    """Two gloo ranks write their shards, as tensor ranks do."""
    wanted, state = canonical(LLAMA), dist_state(canonical(LLAMA), "stacked")
    save_common(tmp_path, LLAMA)

    def job(ctx: Any) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh, shards = init_device_mesh("cpu", (2,)), {}
        for name, x in state.items():
            dim = 2 if "linear_proj" in name or "linear_fc2" in name else 1 if name.startswith("decoder.layers.") else 0
            whole = "norm" in name or x.dim() == 1
            shards[name] = distribute_tensor(x, mesh, [Replicate() if whole else Shard(dim)])
        dcp.save(shards, checkpoint_id=tmp_path)

    run_ranks(Layout(world=2, data=2), job)
    assert len(list(tmp_path.glob("*.distcp"))) == 2
    assert_holds(open_megatron(tmp_path), wanted)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_legacy(tmp_path: Path, model: str, shape: tuple[int, int, int]) -> None:
    wanted = save_legacy(tmp_path, MODELS[model], *shape, fused_norms=shape[0] == 2)
    with open_megatron(tmp_path) as source:
        assert source.folder.name == "iter_0000007"
        assert_holds(source, wanted)
        source.verify()


def test_args_to_model_fields(tmp_path: Path) -> None:
    def cfg(args: dict[str, Any]) -> ModelConfig:
        shutil.rmtree(tmp_path)
        save_dist(tmp_path, args)
        return open_megatron(tmp_path).cfg

    got = cfg(LLAMA)
    assert (got.num_kv_heads, got.head_dim, got.norm_eps, got.rope_theta, got.norm) == (2, 6, 1e-6, 50000, "rmsnorm")
    assert got.gated_mlp and got.activation == "silu" and not got.tie_embeddings and got.max_seq_len == 32
    got = cfg(GPT)
    assert (got.norm, got.activation, got.positions) == ("layernorm", "gelu_tanh", "learned") and got.mlp_bias
    assert cfg(GPT | {"bias_gelu_fusion": False}).activation == "gelu"
    got = cfg(LLAMA | {"use_rope_scaling": True, "rope_scaling_factor": 4.0, "rotary_percent": 0.5})
    assert (got.rope_scaling, got.rope_factor, got.rope_original_seq_len, got.rotary_fraction) == (
        "llama3",
        4,
        8192,
        0.5,
    )
    assert cfg(LLAMA | {"rotary_seq_len_interpolation_factor": 3}).rope_scaling == "linear"
    assert cfg(LLAMA | {"vocab_size": None}).vocab_size == PADDED
    assert open_megatron(tmp_path, vocab_size=40).shapes("model")["head.weight"] == (40, 16)
    with raises(CheckpointError, "interop.megatron-vocabulary-differs", 49, 48):
        open_megatron(tmp_path, vocab_size=49)


REFUSED: dict[str, Any] = {
    "num_experts": 8,
    "multi_latent_attention": True,
    "mtp_num_layers": 1,
    "rotary_interleaved": True,
    "squared_relu": True,
    "qk_l2_norm": True,
    "window_size": (128, 0),
    "softmax_type": "learnable",
    "position_embedding_type": "mrope",
    "normalization": "L2Norm",
    "hidden_size": True,
    "num_layers": 1 << 40,
    "num_query_groups": 3,
    "spec": ["a", "b"],
    "swiglu": "yes",
    "norm_epsilon": "small",
}


def test_models_of_another_kind_are_rejected_all_at_once(tmp_path: Path) -> None:
    for name, value in REFUSED.items():
        save_common(tmp_path, LLAMA | {name: value})
        dcp.save({"x": torch.zeros(1)}, checkpoint_id=tmp_path, no_dist=True)
        with raises(CheckpointError, "interop.megatron-args-not-supported", name):
            open_megatron(tmp_path)
    save_common(tmp_path, LLAMA | {"num_experts": 8, "mtp_num_layers": 1, "swiglu": None, "apply_layernorm_1p": True})
    with raises(CheckpointError, "interop.megatron-args-not-supported", "num_experts = 8", "mtp_num_layers = 1"):
        open_megatron(tmp_path)


def rejected(path: Path, code: str, *values: object) -> None:
    with raises(CheckpointError, f"interop.megatron-{code}", *values):
        source = open_megatron(path)
        for name in source.shapes("model"):
            source.read_whole("model", name)


def test_tensors_that_do_not_fit_are_rejected(tmp_path: Path) -> None:
    state = dist_state(canonical(LLAMA), "layers")
    norm = "decoder.final_layernorm.weight"
    for number, (change, code, *values) in enumerate(
        [
            ({"decoder.layers.0.mlp.router.weight": torch.ones(2, 2)}, "tensors-unknown", 1, "router"),
            ({"output_layer.weight": torch.ones(PADDED, 17)}, "shape-differs", [PADDED, 17], [48, 16]),
            ({"output_layer.weight": None}, "tensor-missing", "output_layer.weight"),
            ({"embedding.word_embeddings.weight": None}, "embedding-missing", "word_embeddings.weight"),
            ({"decoder.layers.1.input_layernorm.weight": torch.ones(16)}, "tensor-missing", "input_layernorm.weight"),
            ({norm: torch.ones(16, dtype=torch.int64)}, "dtype-not-read", norm, "torch.int64"),
            ({norm: torch.ones(())}, "shape-differs", norm, [], [16]),
        ]
    ):
        folder = tmp_path / str(number)
        save_common(folder, LLAMA)
        kept = {k: x for k, x in (state | change).items() if x is not None}
        dcp.save(kept, checkpoint_id=folder, no_dist=True)
        rejected(folder, code, *values)


def legacy_file(root: Path, rank: str = "mp_rank_00") -> Path:
    return root / "iter_0000007" / rank / "model_optim_rng.pt"


def test_incomplete_legacy_folders_are_rejected(tmp_path: Path) -> None:
    save_legacy(tmp_path, QWEN, 2, 2)
    one = legacy_file(tmp_path, "mp_rank_01_001")
    top = torch.load(one, weights_only=False)
    name = "decoder.layers.1.self_attention.q_layernorm.weight"
    top["model"][name] = top["model"][name] + 1
    torch.save(top, one)
    rejected(tmp_path, "copies-differ", name)
    top["model"][name] = top["model"][name] - 1
    top["model"]["output_layer.weight"] = top["model"]["output_layer.weight"] + 1
    torch.save(top, one)
    rejected(tmp_path, "copies-differ", "q_layernorm")
    del top["model"]["output_layer.weight"]
    torch.save(top, one)
    rejected(tmp_path, "tensor-not-on-all-ranks", "output_layer.weight")
    shutil.rmtree(one.parent)
    rejected(tmp_path, "ranks-missing", [(1, 1)])
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    rejected(tmp_path, "tracker-malformed", "../../etc")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("8")
    rejected(tmp_path, "tracked-step-missing", "iter_0000008")
    torch.save({"args": top["args"], "model": {"language_model": {}}}, legacy_file(tmp_path, "mp_rank_00_000"))
    rejected(tmp_path / "iter_0000007", "before-core", "tools/checkpoint/convert.py")
    rejected(tmp_path / "nowhere", "not-a-folder", tmp_path / "nowhere")
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    rejected(tmp_path, "format-not-read", "zarr")


def test_a_flipped_bit_of_a_weight_is_found(tmp_path: Path) -> None:
    """torch.load ignores its own checksums. If they were disabled when saving, nothing can be detected."""
    save_legacy(tmp_path, LLAMA, 1, 1)
    path = legacy_file(tmp_path)
    raw = bytearray(path.read_bytes())
    x = canonical(LLAMA)["layers.2.mlp.down.weight"].numpy().tobytes()
    raw[raw.index(x) + 5] ^= 1
    path.write_bytes(raw)
    rejected(tmp_path, "archive-checksum-differs", "data/")
    with raises(CheckpointError, "interop.megatron-archive-checksum-differs", "data/"):
        open_megatron(tmp_path).verify()
    shutil.rmtree(tmp_path)
    set_crc32_options(False)
    try:
        wanted = save_dist(tmp_path, LLAMA)
    finally:
        set_crc32_options(True)
    assert_holds(open_megatron(tmp_path), wanted)


def test_a_model_is_filled_from_it(tmp_path: Path) -> None:
    """`load_into` on tensor rank 1 of 2 (a context without processes)."""
    wanted = save_dist(tmp_path, LLAMA)
    with open_megatron(tmp_path) as source:
        alone = make_context(Layout(1), 0, dtype=torch.float32)
        model = Transformer(source.cfg, Build(alone), StageShape(range(4), True, True))
        load_into(source, (StateShard("model", p, 0, p.data.view(-1)) for p in parameters(model)), alone)
    assert torch.equal(model.layers["3"].attention.sublayer.qkv.weight[:24], wanted["layers.3.attention.q.weight"])
