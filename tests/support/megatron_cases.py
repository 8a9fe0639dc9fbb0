"""Checkpoints as Megatron-LM writes them, made by torch itself from random canonical tensors."""

from __future__ import annotations

import argparse
import collections
import io
import json
import math
import pathlib
import signal
import sys
import tempfile
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

LAYERS, HIDDEN, HEADS, KV, HEAD_DIM, FFN, VOCAB, PADDED, POSITIONS = 4, 16, 4, 2, 6, 20, 45, 48, 32
LLAMA: dict[str, Any] = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "group_query_attention": True,
    "num_query_groups": KV,
    "kv_channels": HEAD_DIM,
    "ffn_hidden_size": FFN,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "rotary_base": 50000,
    "max_position_embeddings": POSITIONS,
    "padded_vocab_size": PADDED,
    "vocab_size": VOCAB,
    "num_experts": None,
    "params_dtype": torch.bfloat16,
    "activation": torch.nn.functional.silu,
    "iteration_times": [1.5, (2, None)],
}
QWEN = LLAMA | {"qk_layernorm": True, "add_qkv_bias": True, "untie_embeddings_and_output_weights": False}
GPT = LLAMA | {
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_bias_linear": True,
    "group_query_attention": False,
    "num_query_groups": 1,
    "position_embedding_type": "learned_absolute",
    "untie_embeddings_and_output_weights": False,
}
MODELS = {"llama": LLAMA, "qwen": QWEN, "gpt": GPT}


def canonical(args: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tensors of a model under this engine's names."""
    torch.manual_seed(0)
    kv = KV if args["group_query_attention"] else HEADS
    norm = ("weight", "bias") if args["normalization"] == "LayerNorm" else ("weight",)
    every = args["add_bias_linear"]
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (VOCAB, HIDDEN)}
    if args["untie_embeddings_and_output_weights"]:
        shapes["head.weight"] = (VOCAB, HIDDEN)
    if args["position_embedding_type"] == "learned_absolute":
        shapes["positions.weight"] = (POSITIONS, HIDDEN)
    norms = {"norm": HIDDEN}
    for layer in range(LAYERS):
        name = f"layers.{layer}"
        norms |= {f"{name}.attention_norm": HIDDEN, f"{name}.mlp_norm": HIDDEN}
        if args.get("qk_layernorm"):
            norms |= {f"{name}.attention.{part}_norm": HEAD_DIM for part in "qk"}
        matrices = {
            "attention.q": (HEADS * HEAD_DIM, HIDDEN, every or args.get("add_qkv_bias")),
            "attention.k": (kv * HEAD_DIM, HIDDEN, every or args.get("add_qkv_bias")),
            "attention.v": (kv * HEAD_DIM, HIDDEN, every or args.get("add_qkv_bias")),
            "attention.out": (HIDDEN, HEADS * HEAD_DIM, every),
            "mlp.up": (FFN, HIDDEN, every),
            "mlp.down": (HIDDEN, FFN, every),
        }
        if args["swiglu"]:
            matrices["mlp.gate"] = (FFN, HIDDEN, every)
        for part, (rows, width, bias) in matrices.items():
            shapes[f"{name}.{part}.weight"] = (rows, width)
            if bias:
                shapes[f"{name}.{part}.bias"] = (rows,)
    shapes |= {f"{name}.{part}": (size,) for name, size in norms.items() for part in norm}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def padded(x: Tensor) -> Tensor:
    """An embedding with the rows that make-vocab-size-divisible-by adds."""
    return torch.cat((x, torch.full((PADDED - VOCAB, HIDDEN), 7.0, dtype=x.dtype)))


def by_group(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Megatron's row order of a fused QKV: for each key/value head its query heads, then k, then v."""
    kv, rest = k.shape[0] // HEAD_DIM, q.shape[1:]
    parts = [x.view(kv, -1, *rest) for x in (q, k, v)]
    return torch.cat(parts, 1).reshape(-1, *rest)


def layer_tensors(c: dict[str, Tensor], layer: int, fused_norms: bool) -> dict[str, Tensor]:
    """Megatron-core's global tensors of one layer, without the layer's prefix."""
    mine = {name.removeprefix(f"layers.{layer}."): x for name, x in c.items() if name.startswith(f"layers.{layer}.")}
    found: dict[str, Tensor] = {}
    before = {
        "attention_norm": "self_attention.linear_qkv.layer_norm_" if fused_norms else "input_layernorm.",
        "mlp_norm": "mlp.linear_fc1.layer_norm_" if fused_norms else "pre_mlp_layernorm.",
        "attention.q_norm": "self_attention.q_layernorm.",
        "attention.k_norm": "self_attention.k_layernorm.",
        "attention.out": "self_attention.linear_proj.",
        "mlp.down": "mlp.linear_fc2.",
    }
    for name, x in mine.items():
        stem, kind = name.rsplit(".", 1)
        if stem in before:
            found[before[stem] + kind] = x
    for kind in ("weight", "bias"):
        if f"attention.q.{kind}" in mine:
            found[f"self_attention.linear_qkv.{kind}"] = by_group(*(mine[f"attention.{p}.{kind}"] for p in "qkv"))
        halves = [mine[f"mlp.{p}.{kind}"] for p in ("gate", "up") if f"mlp.{p}.{kind}" in mine]
        if halves:
            found[f"mlp.linear_fc1.{kind}"] = torch.cat(halves)
    return found


def outer_tensors(c: dict[str, Tensor]) -> dict[str, Tensor]:
    """Megatron-core's global tensors outside the layers."""
    found = {"embedding.word_embeddings.weight": padded(c["embed.weight"])}
    if "positions.weight" in c:
        found["embedding.position_embeddings.weight"] = c["positions.weight"]
    if "head.weight" in c:
        found["output_layer.weight"] = padded(c["head.weight"])
    return found | {f"decoder.final_layernorm.{k}": c[f"norm.{k}"] for k in ("weight", "bias") if f"norm.{k}" in c}


def dist_state(c: dict[str, Tensor], form: str) -> dict[str, Any]:
    """All model tensors of a `torch_dist` folder. form: stacked, layers or halves."""
    layers = [layer_tensors(c, i, fused_norms=True) for i in range(LAYERS)]
    state: dict[str, Any] = dict(outer_tensors(c))
    if form == "stacked":
        state |= {f"decoder.layers.{name}": torch.stack([x[name] for x in layers]) for name in layers[0]}
    else:
        for i, tensors in enumerate(layers):
            state |= {f"decoder.layers.{i}.{name}": x for name, x in tensors.items()}
    if form == "halves":
        for name in [n for n in state if ".linear_fc1.w" in n]:
            state[f"{name}_w"], state[f"{name}_v"] = (x.clone() for x in state.pop(name).chunk(2))
    return state | {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(HIDDEN, dtype=torch.int32)}


def save_common(folder: Path, args: dict[str, Any]) -> None:
    """common.pt and metadata.json."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"args": argparse.Namespace(**args), "checkpoint_version": 3.0, "iteration": 7}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


def save_dist(folder: Path, args: dict[str, Any], form: str = "stacked", dtype: torch.dtype = torch.float32) -> Any:
    """Write a `torch_dist` folder from one process; returns the canonical tensors."""
    c = canonical(args, dtype)
    save_common(folder, args)
    dcp.save(dist_state(c, form), checkpoint_id=folder, no_dist=True)
    return c


def tensor_shards(name: str, x: Tensor, tp: int, gated: bool) -> list[Tensor]:
    """The shards that the tensor ranks of a legacy checkpoint hold."""
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return [part.contiguous() for part in x.chunk(tp, 1)]
    if ".linear_fc1." in name and "layer_norm" not in name and gated:
        return [torch.cat(pair) for pair in zip(*(half.chunk(tp) for half in x.chunk(2)))]
    if name.endswith(("word_embeddings.weight", "output_layer.weight")) or (
        name.endswith(("weight", "bias")) and (".linear_qkv." in name or ".linear_fc1." in name) and "norm" not in name
    ):
        return list(x.chunk(tp))
    return [x] * tp


def save_legacy(
    root: Path, args: dict[str, Any], tp: int, pp: int, chunks: int = 1, *, fused_norms: bool = False
) -> dict[str, Tensor]:
    """Write a legacy folder tp x pp with `chunks` interleaved stages a rank, with a tracker; returns the canonical."""
    c = canonical(args)
    outside, each = outer_tensors(c), LAYERS // (pp * chunks)
    for t in range(tp):
        for p in range(pp):
            file: dict[str, Any] = {"args": argparse.Namespace(**args), "checkpoint_version": 3.0, "iteration": 7}
            for v in range(chunks):
                model: dict[str, Any] = {}
                if p == v == 0:
                    model |= {k: x for k, x in outside.items() if k.startswith("embedding.")}
                begin = (v * pp + p) * each
                for i in range(each):
                    for name, x in layer_tensors(c, begin + i, fused_norms).items():
                        model[f"decoder.layers.{i}.{name}"] = x
                    model[f"decoder.layers.{i}.mlp.linear_fc1._extra_state"] = None
                if p == pp - 1 and v == chunks - 1:
                    model |= {k: x for k, x in outside.items() if not k.startswith("embedding.")}
                    if pp > 1 and "head.weight" not in c:
                        model["output_layer.weight"] = outside["embedding.word_embeddings.weight"]
                shards = {k: x if x is None else tensor_shards(k, x, tp, args["swiglu"])[t] for k, x in model.items()}
                file["model" if chunks == 1 else f"model{v}"] = shards
            name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "")
            folder = root / "iter_0000007" / name
            folder.mkdir(parents=True)
            torch.save(file, folder / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("7")
    assert math.prod((tp, pp)) == len(list((root / "iter_0000007").iterdir()))
    return c


def odd_values() -> dict[str, Any]:
    """Values in and around args whose pickled names differ between versions of Python, numpy or the protocol."""
    return {
        "exit_signal": signal.SIGTERM,
        "load": pathlib.PosixPath("/a/b"),
        "paths": [pathlib.PurePosixPath("a/b"), pathlib.PureWindowsPath("c:/b")],
        "sets": [{1, 2}, frozenset((3,))],
        "raw": [b"x", bytearray(b"y"), io.BytesIO(b"z")],
        "spaces": [types.SimpleNamespace(a=1), collections.OrderedDict(a=1), collections.defaultdict(int, a=1)],
        "scalars": [np.float64(1.5), np.float32(0.5), np.int64(3), np.bool_(True)],
        "types": [np.dtype("int32"), torch.float8_e4m3fn, torch.Size((2, 3)), torch.device("cpu"), torch.strided],
        "random": [np.random.RandomState(1).get_state(), np.arange(6.0).reshape(2, 3), np.asfortranarray(np.eye(2))],
    }


def write_sample(path: Path) -> None:
    """A small torch_dist folder, zipped, as this Python, torch and numpy write it."""
    with tempfile.TemporaryDirectory() as folder:
        save_dist(Path(folder), LLAMA | odd_values(), dtype=torch.bfloat16)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            for file in sorted(Path(folder).iterdir()):
                out.write(file, file.name)


if __name__ == "__main__":
    versions = f"python{sys.version.split()[0]}-torch{torch.__version__.split('+')[0]}-numpy{np.__version__}"
    write_sample(Path(sys.argv[1]) / f"{versions}.zip")
