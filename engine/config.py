"""Typed, frozen configuration: TOML files, presets and dotted overrides merged, every fault reported at once.

Values are looked up in this order, later wins: default < preset < config files < command line. `Resolved.sources`
remembers where each came from. Nothing here needs torch, so `--help` and config errors come at once. Field
docstrings below are the help texts.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from engine.errors import ConfigError, Fault
from engine.layout import Layout
from engine.pipeline.schedules import SCHEDULES
from engine.presets import PRESETS


class Section(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_one(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise PydanticCustomError("bool", "is neither a number nor a text")
        return value


class RunConfig(Section):
    dir: str = "runs/default"
    """folder of this run: config.toml, metrics.jsonl, checkpoints/, TensorBoard events, exit.json"""


class ModelConfig(Section):
    preset: str = ""
    """start from a named model (see `engine presets`); other model.* values override it"""
    vocab_size: int = Field(4096, ge=1)
    """rows of the embedding; at least the tokenizer's vocabulary"""
    hidden_size: int = Field(256, ge=1)
    """width of the residual stream"""
    num_layers: int = Field(4, ge=1)
    """transformer blocks"""
    num_heads: int = Field(8, ge=1)
    """query heads"""
    num_kv_heads: int = Field(0, ge=0)
    """key/value heads (grouped-query attention); 0: as many as query heads"""
    head_dim: int = Field(0, ge=0)
    """width of one head; 0: hidden_size / num_heads"""
    ffn_size: int = Field(688, ge=1)
    """inner width of the SwiGLU MLP"""
    rope_theta: float = Field(10000.0, gt=0)
    """base of the rotary position angles"""
    norm_eps: float = Field(1e-5, gt=0)
    """epsilon inside RMSNorm"""
    tie_embeddings: bool = False
    """use the embedding matrix as output head too"""
    qk_norm: bool = False
    """RMSNorm on every query and key head before RoPE (Qwen3)"""
    init_std: float = Field(0.02, gt=0)
    """standard deviation of initial weights; projections into the residual get init_std / sqrt(2 * num_layers)"""
    max_seq_len: int = Field(2048, ge=1)
    """longest sequence the exported model claims to handle"""


class ParallelConfig(Section):
    tensor: int = Field(1, ge=1)
    """ranks that share every matrix"""
    pipeline: int = Field(1, ge=1)
    """ranks that share the layers"""
    data: int = Field(0, ge=0)
    """ranks that share the batch; 0: all that the other degrees leave"""
    context: int = Field(1, ge=1)
    """ranks that share the sequence (only 1 so far)"""
    expert: int = Field(1, ge=1)
    """ranks that share the experts (only 1 so far)"""
    schedule: str = "1f1b"
    """pipeline schedule, a name from engine.pipeline.schedules: 1f1b or gpipe"""
    bucket_mib: float = Field(32.0, gt=0)
    """size of a gradient bucket"""
    overlap: bool = True
    """reduce each bucket over the data ranks while the rest of the backward still runs"""
    timeout_s: float = Field(600.0, gt=0)
    """a collective that takes longer ends the job"""


class TrainConfig(Section):
    steps: int = Field(100, ge=1)
    """optimizer steps of the whole run (resumed parts included)"""
    global_batch_size: int = Field(8, ge=1)
    """sequences an optimizer step learns from, over all ranks"""
    micro_batch_size: int = Field(1, ge=1)
    """sequences in one forward pass"""
    seq_len: int = Field(256, ge=2)
    """tokens a sequence"""
    seed: int = Field(1234, ge=0)
    """initial weights and sample order follow from it"""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """number format of weights and activations; bf16 keeps fp32 master weights and gradients"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA when every local rank can have a GPU of its own, otherwise CPU; which one is printed"""
    eval_every: int = Field(0, ge=0)
    """validate every so many steps; 0: only after the last"""
    eval_batches: int = Field(8, ge=0)
    """global batches per validation during training; 0: the whole validation set"""


class OptimizerConfig(Section):
    lr: float = Field(1e-3, gt=0)
    """peak learning rate"""
    beta1: float = Field(0.9, ge=0, lt=1)
    """decay of AdamW's first moment"""
    beta2: float = Field(0.95, ge=0, lt=1)
    """decay of AdamW's second moment"""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon"""
    weight_decay: float = Field(0.1, ge=0)
    """decoupled decay of matrices (norms and biases have none)"""
    clip_norm: float = Field(1.0, ge=0)
    """largest global gradient norm; 0: no clipping"""


class ScheduleConfig(Section):
    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """learning rate after the warm-up; wsd: constant, then linear decay over the last decay_steps"""
    warmup_steps: int = Field(10, ge=0)
    """steps of linear warm-up"""
    decay_steps: int = Field(0, ge=0)
    """wsd only: steps of the final decay"""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """learning rate at the end, as a share of the peak"""


class DataConfig(Section):
    train: str = ""
    """prefix of the training .bin/.idx"""
    valid: str = ""
    """prefix of the validation .bin/.idx; empty: no validation"""
    tokenizer: str = ""
    """folder with tokenizer.json; copied into exports, its digest is compared with the data's"""
    prefetch: int = Field(2, ge=1)
    """global batches prepared ahead by the loader thread"""


class CheckpointConfig(Section):
    every: int = Field(0, ge=0)
    """save every so many steps; 0: only after the last step and on SIGTERM"""
    keep: int = Field(0, ge=0)
    """how many newest checkpoints to keep; 0: all"""
    resume: str = "auto"
    """auto: go on from the run folder's newest checkpoint if there is one; latest: there must be one;
    never: start anew; or the path of a checkpoint"""


class MonitorConfig(Section):
    log_every_s: float = Field(5.0, ge=0)
    """seconds between progress lines when the output is not a terminal"""
    tensorboard: bool = True
    """write TensorBoard events into the run folder"""
    peak_tflops: float = Field(0.0, ge=0)
    """peak TFLOP/s of one device, to report MFU; 0: report achieved GFLOP/s"""


class Config(Section):
    """Everything a training run depends on."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()


@dataclass(frozen=True)
class Resolved:
    """A checked config, and for each dotted path where its value came from."""

    config: Config
    sources: dict[str, str]

    def toml(self) -> str:
        """The whole config as TOML that loads back to itself, each value with its source as a comment."""
        lines = []
        for section, values in self.config.model_dump().items():
            lines.append(f"[{section}]")
            for key, value in values.items():
                lines.append(f"{key} = {_toml_value(value)}  # {self.sources[f'{section}.{key}']}")
            lines.append("")
        return "\n".join(lines)


def fields() -> Iterator[tuple[str, str, Any]]:
    """(section, name, pydantic FieldInfo) of every value there is; the command line is made from it."""
    for section, info in Config.model_fields.items():
        assert isinstance(info.annotation, type)
        for name, field in info.annotation.model_fields.items():
            yield section, name, field


def type_name(annotation: Any) -> str:
    """How a field's type is called in help and error texts: `int`, or `a|b|c` for a choice."""
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    return {"bool": "true|false"}.get(annotation.__name__, annotation.__name__)


def load(
    files: Sequence[Path], overrides: Mapping[str, str], *, unknown: Sequence[str] = (), world: int | None = 1
) -> Resolved:
    """Merge, type-check and check all relations; `world`: ranks the config must fit, None: as many as it needs.

    overrides: dotted path -> text from the command line. unknown: further words of the command line nobody knows.
    Raises ConfigError with every fault found.
    """
    faults: list[Fault] = []
    tree: dict[str, dict[str, Any]] = {section: {} for section in Config.model_fields}
    sources: dict[str, str] = {}
    for file in files:
        for path, value in _read_toml(file, faults):
            _put(tree, sources, path, value, f"file {file}", faults)
    for path, text in overrides.items():
        _put(tree, sources, path, text, "command line", faults)
    faults += [_unknown(word[2:], "", "command line") if word.startswith("--") else _stray(word) for word in unknown]
    _apply_preset(tree, sources, faults)
    config, wrong = _parse(tree, faults)
    p = config.parallel
    world = world or p.tensor * p.pipeline * max(1, p.data)
    # what a relation says of a value that is wrong by itself, or of what follows from it, would mislead
    if wrong & {"parallel.tensor", "parallel.pipeline", "parallel.data"}:
        wrong |= {"parallel = ", "train.global_batch_size"}
    if any(fault.path == "model.preset" for fault in faults):
        wrong.add("model.")
    faults += [f for f in relations(config, world) if not any(path in str(f) for path in wrong)]
    if faults:
        raise ConfigError(faults)
    config = _fill_in(config, world, sources)
    return Resolved(config, {f"{s}.{n}": sources.get(f"{s}.{n}", "default") for s, n, _ in fields()})


def _fill_in(config: Config, world: int, sources: dict[str, str]) -> Config:
    """Replace the zeros that mean "work it out" by numbers, so that nobody downstream works them out again."""
    model, parallel = config.model, config.parallel
    derived = {
        ("model", "num_kv_heads"): model.num_kv_heads or model.num_heads,
        ("model", "head_dim"): model.head_dim or model.hidden_size // model.num_heads,
        ("parallel", "data"): parallel.data or world // (parallel.tensor * parallel.pipeline),
    }
    for (section, name), value in derived.items():
        part = getattr(config, section)
        if getattr(part, name) != value:
            config = config.model_copy(update={section: part.model_copy(update={name: value})})
            sources[f"{section}.{name}"] = "derived"
    return config


def layout_of(config: Config) -> Layout:
    """The layout a resolved config describes."""
    p = config.parallel
    world = p.tensor * p.pipeline * p.data * p.context
    return Layout(world, tensor=p.tensor, pipeline=p.pipeline, data=p.data, context=p.context)


def _known_paths() -> list[str]:
    return [f"{s}.{n}" for s, n, _ in fields()]


def _unknown(path: str, value: object, source: str) -> Fault:
    path = path.replace("-", "_")
    near = difflib.get_close_matches(path, _known_paths(), n=1, cutoff=0.0)[0]
    return Fault(path, value, f"no such setting ({source})", f"Did you mean {near}?")


def _stray(word: str) -> Fault:
    repair = "Options begin with two dashes." if word.startswith("-") else f"A config file is given as --config {word}."
    return Fault("command line", word, "belongs to no option", repair)


def _read_toml(file: Path, faults: list[Fault]) -> Iterator[tuple[str, Any]]:
    try:
        tree = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        faults.append(Fault("--config", str(file), f"cannot be read ({error})", "Give the path of a TOML file."))
        return
    except tomllib.TOMLDecodeError as error:
        faults.append(Fault("--config", str(file), f"is not valid TOML: {error}", "Mend that line."))
        return
    for section, values in tree.items():
        if isinstance(values, dict):
            yield from ((f"{section}.{name}", value) for name, value in values.items())
        else:
            faults.append(_unknown(section, values, f"file {file}"))


def _put(
    tree: dict[str, Any], sources: dict[str, str], path: str, value: Any, source: str, faults: list[Fault]
) -> None:
    if path not in _known_paths():
        faults.append(_unknown(path, value, source))
        return
    section, name = path.split(".")
    tree[section][name] = value
    sources[path] = source


def _apply_preset(tree: dict[str, dict[str, Any]], sources: dict[str, str], faults: list[Fault]) -> None:
    name = tree["model"].get("preset", "")
    if not name or not isinstance(name, str):  # the type check will say so
        return
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        known = ", ".join(PRESETS)
        faults.append(Fault("model.preset", name, f"is none of {known}", f"Did you mean {near}?"))
        return
    for key, value in PRESETS[name].items():
        if key not in tree["model"]:
            tree["model"][key] = value
            sources[f"model.{key}"] = f"preset {name}"


def _parse(tree: dict[str, dict[str, Any]], faults: list[Fault]) -> tuple[Config, set[str]]:
    """The tree as a Config, and the paths of values that are wrong by themselves: those are left at their defaults."""
    try:
        return Config.model_validate(tree), set()
    except ValidationError as error:
        by_path = {f"{s}.{n}": f for s, n, f in fields()}
        good = {section: dict(values) for section, values in tree.items()}
        wrong = set()
        for item in error.errors():
            section, name = map(str, item["loc"])
            field = by_path[f"{section}.{name}"]
            relation = item["msg"][0].lower() + item["msg"][1:]
            repair = f"Give {type_name(field.annotation)}; the default is {field.default!r}."
            faults.append(Fault(f"{section}.{name}", item["input"], relation, repair))
            wrong.add(f"{section}.{name}")
            good[section].pop(name, None)
        return Config.model_validate(good), wrong


def _divisors_near(value: int, divisor: int) -> str:
    """The multiples of `divisor` around `value`, for a repair text."""
    low = value // divisor * divisor
    return f"{low} or {low + divisor}" if low else f"{divisor}"


def relations(cfg: Config, world: int) -> list[Fault]:
    """Everything that must hold between values, for this many ranks."""
    return [*_model_relations(cfg), *_parallel_relations(cfg, world), *_train_relations(cfg)]


def _model_relations(cfg: Config) -> Iterator[Fault]:
    m = cfg.model
    kv = m.num_kv_heads or m.num_heads
    if m.num_heads % kv:
        nearest = max(d for d in range(1, m.num_heads + 1) if m.num_heads % d == 0 and d <= kv)
        yield Fault(
            "model.num_kv_heads",
            kv,
            f"does not divide model.num_heads = {m.num_heads}",
            f"Nearest that does: {nearest}.",
        )
    if not m.head_dim and m.hidden_size % m.num_heads:
        yield Fault(
            "model.hidden_size",
            m.hidden_size,
            f"is not a multiple of model.num_heads = {m.num_heads}",
            f"Use {_divisors_near(m.hidden_size, m.num_heads)}, or set model.head_dim.",
        )
    head_dim = m.head_dim or m.hidden_size // m.num_heads
    if head_dim % 2:
        yield Fault("model.head_dim", head_dim, "is odd, but RoPE rotates pairs", f"Use {head_dim + 1}.")
    t = cfg.parallel.tensor
    if m.num_heads % t:
        yield Fault(
            "parallel.tensor",
            t,
            f"does not divide model.num_heads = {m.num_heads}",
            f"Nearest degree that fits the model: {_nearest_tensor(m, t)}.",
        )
    if kv % t and t % kv:
        yield Fault(
            "parallel.tensor",
            t,
            f"neither divides model.num_kv_heads = {kv} nor is a multiple of it",
            f"Nearest degree that fits the model: {_nearest_tensor(m, t)}.",
        )
    if m.ffn_size % t:
        yield Fault(
            "parallel.tensor",
            t,
            f"does not divide model.ffn_size = {m.ffn_size}",
            f"Use model.ffn_size {_divisors_near(m.ffn_size, t)}, or tensor {_nearest_tensor(m, t)}.",
        )


def _nearest_tensor(m: ModelConfig, to: int) -> int:
    """The tensor degree nearest to `to` that all three relations of the model allow."""
    kv = m.num_kv_heads or m.num_heads
    degrees = (d for d in range(1, m.num_heads + 1) if not m.num_heads % d and not m.ffn_size % d)
    return min((d for d in degrees if not kv % d or not d % kv), key=lambda d: (abs(d - to), d))


def _nearest_divisor(number: int, to: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - to), d))


def _parallel_relations(cfg: Config, world: int) -> Iterator[Fault]:
    p, m = cfg.parallel, cfg.model
    for name in ("context", "expert"):
        degree = getattr(p, name)
        if degree > 1:
            yield Fault(f"parallel.{name}", degree, f"{name} parallelism is not built yet", "Use 1.")
    shards = p.tensor * p.pipeline
    wanted = shards * (p.data or 1)
    if p.data and wanted != world:
        yield Fault(
            "parallel",
            f"tensor {p.tensor} x pipeline {p.pipeline} x data {p.data}",
            f"needs {wanted} processes, but there {'is 1' if world == 1 else f'are {world}'}",
            f"Start `torchrun --nproc-per-node {wanted} -m engine train ...`, or change the degrees.",
        )
    elif not p.data and world % shards:
        yield Fault(
            "parallel",
            f"tensor {p.tensor} x pipeline {p.pipeline}",
            f"= {shards} does not divide the {world} processes",
            f"Start `torchrun --nproc-per-node {shards * -(-world // shards)} -m engine train ...`.",
        )
    if m.num_layers % p.pipeline:
        yield Fault(
            "parallel.pipeline",
            p.pipeline,
            f"does not divide model.num_layers = {m.num_layers}",
            f"Use {_divisors_near(m.num_layers, p.pipeline)} layers, "
            f"or pipeline {_nearest_divisor(m.num_layers, p.pipeline)}.",
        )
    if p.schedule not in SCHEDULES:
        near = difflib.get_close_matches(p.schedule, SCHEDULES, n=1, cutoff=0.0)[0]
        known = ", ".join(SCHEDULES)
        yield Fault("parallel.schedule", p.schedule, f"is none of {known}", f"Did you mean {near}?")
    data = p.data or max(1, world // shards)
    slice_ = data * cfg.train.micro_batch_size
    if cfg.train.global_batch_size % slice_:
        yield Fault(
            "train.global_batch_size",
            cfg.train.global_batch_size,
            f"is not a multiple of data {data} x train.micro_batch_size {cfg.train.micro_batch_size}",
            f"Use {_divisors_near(cfg.train.global_batch_size, slice_)}.",
        )


def _train_relations(cfg: Config) -> Iterator[Fault]:
    t, s = cfg.train, cfg.schedule
    if t.precision == "fp16":
        yield Fault("train.precision", "fp16", "dynamic loss scaling is not built yet", "Use bf16 or fp32.")
    if t.seq_len > cfg.model.max_seq_len:
        yield Fault(
            "train.seq_len",
            t.seq_len,
            f"is longer than model.max_seq_len = {cfg.model.max_seq_len}",
            f"Set model.max_seq_len to {t.seq_len} or more.",
        )
    if s.kind == "wsd" and not 0 < s.decay_steps <= t.steps - s.warmup_steps:
        yield Fault(
            "schedule.decay_steps",
            s.decay_steps,
            f"must be at least 1 and fit in the {t.steps - s.warmup_steps} steps after the warm-up for wsd",
            f"A tenth of the run is usual: {max(1, t.steps // 10)}.",
        )
    if s.kind != "wsd" and s.decay_steps:
        yield Fault("schedule.decay_steps", s.decay_steps, f"has no meaning for {s.kind}", "Leave it out, or use wsd.")


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON's escapes are TOML's
    return repr(value)
