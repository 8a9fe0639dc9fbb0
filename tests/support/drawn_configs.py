"""Random valid configs, with every option of model, layout, batches, phases, parameter groups and data."""

from __future__ import annotations

import random
from typing import Any

from engine.config.load import Resolved, load
from engine.config.presets import PRESETS
from engine.errors import ConfigError
from engine.model.build import parameter_specs
from engine.optim.groups import group_errors

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v")


def drawn(draw: random.Random) -> dict[str, str]:
    """Settings of a config by dotted path; they may not fit together."""
    pick, coin = draw.choice, lambda p=0.3: draw.random() < p
    tensor, pipeline, data = pick((1, 2, 3, 4, 8)), pick((1, 2, 4, 8)), pick((1, 2, 3, 4, 64))
    schedule = pick(SCHEDULES)
    chunks = {"interleaved": pick((2, 3, 4)), "zb-v": 2, "dualpipe-v": 2}.get(schedule, 1)
    stages = pipeline * chunks
    micro = pick((1, 2, 3))
    values: dict[str, Any] = {
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "parallel.data": data,
        "parallel.schedule": schedule,
        "parallel.chunks": chunks,
        "train.micro_batch_size": micro,
        "train.global_batch_size": data * micro * pick((1, 2, 5, 16)),
        "train.seq_len": pick((12, 48, 96, 4096)),
        "train.steps": pick((4, 1000)),
        "train.precision": pick(("fp32", "bf16", "fp16")),
        "parallel.zero": pick((0, 1)),
        "parallel.overlap": pick(("true", "false")),
        "train.dropout": pick((0, 0.1)),
        "train.attention_dropout": pick((0, 0.1)),
        "train.z_loss": pick((0, 1e-4)),
        "model.max_seq_len": pick((4096, 8192)),
    }
    if coin():
        values["model.preset"] = pick(list(PRESETS))
        values["parallel.layers"] = "balanced"
    else:
        values |= _model(draw, tensor, stages)
    if coin(0.4):
        values["train.recompute"] = pick(("selective", "full"))
        values["train.recompute_layers"] = pick((0, 1, 2))
    if coin(0.2):
        values["parallel.sequence"] = "false"
    elif tensor > 1 and coin():
        values["parallel.keep_gathered"] = "true"
    kind = pick(("cosine", "linear", "constant", "wsd"))
    values |= {"lr_schedule.kind": kind, "lr_schedule.warmup_steps": pick((0, 1, 100))}
    values |= {"lr_schedule.decay_steps": 1} if kind == "wsd" else {}
    if coin() and kind != "constant":
        values["lr_schedule.horizon_steps"] = pick((900, 1000, 5000))
    if coin():
        values |= {"train.skip_steps": "120 130-132", "data.skip_samples": "5003"}
    return {name: str(value) for name, value in (values | _phases(draw, values) | _groups(draw, values)).items()}


def _model(draw: random.Random, tensor: int, stages: int) -> dict[str, Any]:
    pick = draw.choice
    heads = tensor * pick((1, 2, 4, 6))
    kv = pick([n for n in range(1, heads + 1) if heads % n == 0 and (n % tensor == 0 or tensor % n == 0)])
    layers = stages * pick((1, 2, 3))
    found: dict[str, Any] = {"num_heads": heads, "num_kv_heads": kv, "num_layers": layers}
    found |= {"hidden_size": heads * 64, "ffn_size": tensor * pick((100, 172)), "vocab_size": pick((300, 32000, 50257))}
    if draw.random() < 0.3:
        found["head_dim"] = pick((32, 128))
    for name in ("parallel_residual", "qk_norm", "qkv_bias", "attention_out_bias", "mlp_bias", "tie_embeddings"):
        found[name] = pick(("true", "false"))
    found |= {"gated_mlp": pick(("true", "false")), "scale_embeddings": pick(("true", "false"))}
    found |= {"norm": pick(("rmsnorm", "layernorm")), "norm_position": pick(("pre", "post", "sandwich"))}
    found["activation"] = pick(("silu", "gelu", "gelu_tanh"))
    if found["qk_norm"] == "true":
        found["qk_norm_span"] = pick(("head", "projection"))
    if draw.random() < 0.3:
        found["positions"] = "learned"
    else:
        found |= {"rotary_fraction": pick((1, 0.5, 0.25)), "rope_scaling": pick(("none", "linear", "llama3", "yarn"))}
        found |= {"rope_factor": 4} if found["rope_scaling"] != "none" else {}
    if draw.random() < 0.4:
        found["window"] = pick((3, 100, 3000))
        found["window_layers"] = pick(("", "wf", "fw", "wwwwwf", "wfww"))[:layers]
    settings = {f"model.{name}": value for name, value in found.items()}
    counts = [layers // stages] * stages
    if draw.random() < 0.3 and stages > 1:
        counts[0], counts[-1] = counts[0] + counts[-1], 0
        settings["parallel.layers"] = ",".join(map(str, counts))
    return settings


def _phases(draw: random.Random, values: dict[str, Any]) -> dict[str, Any]:
    if draw.random() < 0.6:
        return {}
    found: dict[str, Any] = {"phase.1.from_step": draw.choice((1, 3))}
    found["phase.1.global_batch_size"] = 6 * values["train.global_batch_size"]
    found |= {"phase.2.from_step": 4, "phase.2.micro_batch_size": 2 * values["train.micro_batch_size"]}
    found |= {"phase.3.from_step": 500, "phase.3.seq_len": 2 * values["train.seq_len"]}
    if draw.random() < 0.5:
        found |= {"phase.4.from_step": draw.choice((501, 5000)), "phase.4.rope_theta": 1e6}
    return found


def _groups(draw: random.Random, values: dict[str, Any]) -> dict[str, Any]:
    layers = values.get("model.num_layers", 4)
    rows = {
        "last": {"names": f"layers.{layers - 1}.attention.*", "lr_factor": 0.5},
        "frozen": {"names": "embed.weight layers.0.*", "frozen": "true"},
        "vector": {"role": "vector", "lr_factor": 2},
        "middle": {"names": f"layers.{layers // 2}.mlp.*", "weight_decay": 0},
    }
    chosen = draw.sample(list(rows), draw.choice((0, 0, 1, 2, 3)))
    return {f"optimizer.groups.{n}.{k}": v for n, name in enumerate(chosen, 1) for k, v in rows[name].items()}


def valid_configs(seed: int, count: int) -> list[Resolved]:
    """The first `count` valid configs of a seed."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        try:
            resolved = load([], drawn(draw), world=None)
        except ConfigError:
            continue
        if not list(group_errors(parameter_specs(resolved.config.model), resolved.config.optimizer)):
            found.append(resolved)
    return found
