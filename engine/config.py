"""Typed, frozen configuration: TOML files, presets and dotted overrides merged, every fault reported at once.

Values are looked up in this order, later wins: default < preset < config files < command line. `Resolved.sources`
remembers where each came from. Nothing here needs torch, so `--help` and config errors come at once. Field
docstrings below are the help texts.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from engine.errors import CheckpointError, ConfigError, Fault, PlanError
from engine.hf_config import facts_of
from engine.layout import Layout
from engine.mixture import read_mixture
from engine.pipeline.actions import Plan
from engine.pipeline.schedules import SCHEDULES, build, load_plan
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
    """inner width of the MLP"""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """of the MLP; gelu_tanh: GELU by its tanh formula"""
    gated_mlp: bool = True
    """activation(gate) * up and three matrices (with silu: SwiGLU); false: activation(up) and two"""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """layernorm has a bias"""
    norm_eps: float = Field(1e-5, gt=0)
    """epsilon inside the norms"""
    norm_offset: bool = False
    """RMSNorm scales by 1 + weight (Gemma)"""
    norm_position: Literal["pre", "post"] = "pre"
    """norm of what goes into attention and MLP; or of what comes out, before it is added (OLMo-2)"""
    parallel_residual: bool = False
    """attention and MLP of a block read the same input (GPT-NeoX)"""
    qk_norm: bool = False
    """RMSNorm of queries and keys before RoPE"""
    qk_norm_span: Literal["head", "projection"] = "head"
    """with qk_norm: over each head (Qwen3), or over all heads together (OLMo-2)"""
    qkv_bias: bool = False
    """biases of the query, key and value projections"""
    attention_out_bias: bool = False
    """bias of the attention's output projection"""
    mlp_bias: bool = False
    """biases of the MLP"""
    positions: Literal["rope", "learned"] = "rope"
    """rotary positions, or a learned vector for each of max_seq_len positions (GPT-2)"""
    rope_theta: float = Field(10000.0, gt=0)
    """base of the rotary position angles"""
    rotary_fraction: float = Field(1.0, gt=0, le=1)
    """share of a head's width that is rotated, from its beginning (GPT-NeoX)"""
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """how the angles are stretched for longer contexts"""
    rope_factor: float = Field(1.0, ge=1)
    """with rope_scaling: by how much"""
    rope_original_seq_len: int = Field(0, ge=0)
    """llama3, yarn: length of context before stretching; 0: max_seq_len"""
    rope_low_freq_factor: float = Field(1.0, gt=0)
    """llama3: angles that turn less often than this over the original context are stretched"""
    rope_high_freq_factor: float = Field(4.0, gt=0)
    """llama3: angles that turn more often than this over the original context are left alone"""
    rope_beta_fast: float = Field(32.0, gt=0)
    """yarn: angles that turn more often than this over the original context are left alone"""
    rope_beta_slow: float = Field(1.0, gt=0)
    """yarn: angles that turn less often than this over the original context are stretched"""
    rope_attention_factor: float = Field(0.0, ge=0)
    """yarn: queries and keys are scaled by this; 0: 0.1 ln(rope_factor) + 1"""
    scale_embeddings: bool = False
    """multiply embeddings by sqrt(hidden_size) (Gemma)"""
    tie_embeddings: bool = False
    """use the embedding matrix as output head too"""
    init_std: float = Field(0.02, gt=0)
    """standard deviation of initial weights; projections into the residual get init_std / sqrt(2 * num_layers)"""
    max_seq_len: int = Field(2048, ge=1)
    """longest sequence the exported model claims to handle; the number of learned positions"""

    @property
    def rotary_dim(self) -> int:
        """How many values of a head are rotated; 0 where positions are learned. Of a resolved config."""
        return int(self.head_dim * self.rotary_fraction) if self.positions == "rope" else 0


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
    sequence: bool = True
    """cut the sequence over the tensor ranks outside the matrices (sequence parallelism)"""
    keep_gathered: bool = False
    """with sequence: keep gathered inputs of column-parallel products instead of gathering again in the backward"""
    schedule: str = "1f1b"
    """pipeline schedule: gpipe, 1f1b, interleaved, zb-h1, zb-v, dualpipe-v, or a file that `engine schedule` saved"""
    chunks: int = Field(0, ge=0)
    """pipeline stages on each rank; 0: as the schedule has it (2 for interleaved and the V-shaped ones, else 1)"""
    layers: str = ""
    """blocks of each pipeline stage in order, such as 9,8,8,7; empty: equally many"""
    zero: int = Field(1, ge=0, le=1)
    """1: ZeRO-1, each data rank holds and updates its part of master weights and optimizer state; 0: all of it"""
    reduce_dtype: Literal["main", "bf16"] = "main"
    """what gradients are summed over the data ranks in; main: the dtype they are added up in (fp32)"""
    bucket_mib: float = Field(32.0, gt=0)
    """size of a gradient bucket"""
    overlap: bool = True
    """reduce each bucket over the data ranks while the rest of the backward still runs"""
    overlap_gather: bool = True
    """with zero: gather updated weights while the next forward already runs"""
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
    """number format of weights and activations; bf16 and fp16 keep fp32 master weights and gradients"""
    loss_scale: float = Field(65536.0, gt=0)
    """fp16: first loss scale; it is halved when a gradient overflows"""
    loss_scale_window: int = Field(1000, ge=1)
    """fp16: steps without overflow after which the loss scale doubles"""
    recompute: Literal["none", "selective", "full"] = "none"
    """what the backward computes again instead of keeping it; selective: norms, SwiGLU product, attention core"""
    recompute_layers: int = Field(0, ge=0)
    """recompute in so many blocks of each stage, from its first; 0: in all"""
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
    """prefix of the training .bin/.idx; or a blend, weights and prefixes in turn such as "0.7 a/web 0.3 b/code"; or a
    .toml file with [[source]] prefix, weight | tokens | epochs, name, and [[change]] step, weights (docs/data.md)"""
    valid: str = ""
    """prefix of the validation .bin/.idx; empty: no validation"""
    tokenizer: str = ""
    """folder with tokenizer.json; copied into exports, its digest is compared with the data's"""
    mask_eod: bool = False
    """leave the token after an end of document out of the loss: nothing before it tells what the next one is about"""
    mask_tokens: str = ""
    """leave labels that are one of these tokens out of the loss: spellings of tokens with spaces between them"""
    separate_documents: bool = False
    """attention does not cross the end of a document, in training and validation"""
    fim_rate: float = Field(0.0, ge=0, le=1)
    """fill-in-the-middle: the share of documents (as far as they are in a sample) that is cut in three and permuted"""
    fim_spm_rate: float = Field(0.5, ge=0, le=1)
    """the share of those in which the suffix comes before the prefix"""
    fim_tokens: str = ""
    """spellings of the prefix, suffix and middle token, with spaces; empty: those of a usual family"""
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
    init: str = ""
    """start a new run from these weights: a Hugging Face folder, a checkpoint or a run folder, of any layout; model.*
    follows from it"""
    allow: str = ""
    """fields that may differ from the checkpoint's when resuming, such as "data.num_tokens train.seq_len"; the lineage
    of later checkpoints records it (a difference that is not named is refused, and the message names its field)"""


class MonitorConfig(Section):
    log_every_s: float = Field(5.0, ge=0)
    """seconds between progress lines when the output is not a terminal"""
    tensorboard: bool = True
    """write TensorBoard events into the run folder"""
    peak_tflops: float = Field(0.0, ge=0)
    """peak TFLOP/s of one device, to report MFU; 0: report achieved GFLOP/s"""
    timeline_step: int = Field(3, ge=0)
    """of each start, the step whose pipeline timeline is written for `engine schedule --from`; 0: none"""


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
    given = set(tree["model"])
    start = _apply_init(tree, sources, faults)
    config, wrong = _parse(tree, faults)
    faults += _contradictions(config.model, start, given - {path.removeprefix("model.") for path in wrong}, sources)
    p = config.parallel
    world = world or p.tensor * p.pipeline * max(1, p.data)
    # what a relation says of a value that is wrong by itself, or of what follows from it, would mislead
    if wrong & {"parallel.tensor", "parallel.pipeline", "parallel.data"}:
        wrong |= {"parallel = ", "train.global_batch_size"}
    if any(fault.path == "model.preset" for fault in faults):
        wrong.add("model.")
    faults += [f for f in relations(config, world) if not any(path in str(f) for path in wrong)]
    faults += _data_faults(config)
    if faults:
        raise ConfigError(faults)
    config = _fill_in(config, world, sources)
    return Resolved(config, {f"{s}.{n}": sources.get(f"{s}.{n}", "default") for s, n, _ in fields()})


def _data_faults(config: Config) -> Sequence[Fault]:
    """What is wrong with data as texts. Not a relation: a checkpoint's data.train may name a file that is gone."""
    data = config.data
    needs = {"data.fim_rate": data.fim_rate, "data.mask_tokens": data.mask_tokens}
    repair = "Give the folder of the corpus' tokenizer."
    faults = [Fault(k, v, "needs data.tokenizer", repair) for k, v in needs.items() if v and not data.tokenizer]
    if data.fim_tokens and not data.fim_rate:
        faults.append(
            Fault("data.fim_tokens", data.fim_tokens, "has no meaning without data.fim_rate", "Leave it out.")
        )
    if data.fim_tokens and len(set(data.fim_tokens.split())) != 3:
        relation, repair = "is not three different tokens", "Give the prefix, suffix and middle token, with spaces."
        faults.append(Fault("data.fim_tokens", data.fim_tokens, relation, repair))
    try:
        wanted = read_mixture(data.train).fim if data.train else (None,)
    except ConfigError as error:
        return [*faults, *error.faults]
    if data.fim_rate and all(fim is False for fim in wanted):
        faults.append(Fault("data.fim_rate", data.fim_rate, "is for no source: all say fim = false", "Set it to 0."))
    if not data.fim_rate and any(wanted):
        faults.append(Fault("data.train", data.train, "says fim = true, but data.fim_rate is 0", "Such as 0.5."))
    return faults


def _fill_in(config: Config, world: int, sources: dict[str, str]) -> Config:
    """Replace the zeros that mean "work it out" by numbers, so that nobody downstream works them out again."""
    model, parallel = config.model, config.parallel
    derived = {
        ("model", "num_kv_heads"): model.num_kv_heads or model.num_heads,
        ("model", "head_dim"): model.head_dim or model.hidden_size // model.num_heads,
        ("model", "rope_original_seq_len"): model.rope_original_seq_len
        or (model.max_seq_len if model.rope_scaling in _ROPE_SCALES["rope_original_seq_len"] else 0),
        ("parallel", "data"): parallel.data or world // (parallel.tensor * parallel.pipeline),
        ("parallel", "chunks"): _chunks(parallel),
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
    return Layout(
        p.tensor * p.pipeline * p.data * p.context,
        tensor=p.tensor,
        pipeline=p.pipeline,
        data=p.data,
        context=p.context,
        sequence=p.sequence and p.tensor > 1,
        tail=_placement(p)[-1],
    )


def microbatches_of(config: Config) -> int:
    """Microbatches that each data rank takes through its pipeline in an optimizer step of a resolved config."""
    return config.train.global_batch_size // (config.parallel.data * config.train.micro_batch_size)


def pipeline_plan(config: Config) -> Plan:
    """The checked plan that a resolved config runs. PlanError when a plan file cannot be read or does not fit."""
    p = config.parallel
    if p.schedule in SCHEDULES:
        return build(p.schedule, p.pipeline, p.chunks, microbatches_of(config))
    return load_plan(Path(p.schedule))


def layers_of_stages(config: Config) -> list[int]:
    """How many blocks each pipeline stage of a resolved config has, in order."""
    p = config.parallel
    if p.layers:
        return [int(count) for count in p.layers.split(",")]
    stages = p.pipeline * p.chunks
    return [config.model.num_layers // stages] * stages


def _chunks(p: ParallelConfig) -> int:
    if p.chunks:
        return p.chunks
    if p.schedule in SCHEDULES:
        return SCHEDULES[p.schedule].chunks or 2
    return len(_placement(p)) // p.pipeline


def _placement(p: ParallelConfig) -> tuple[int, ...]:
    if p.schedule in SCHEDULES:
        return SCHEDULES[p.schedule].placement(p.pipeline, p.chunks)
    return load_plan(Path(p.schedule)).placement


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


def model_config(path: Path, facts: Mapping[str, Any]) -> ModelConfig:
    """The model that facts read from a file describe. Raises ConfigError where they are impossible."""
    try:
        return ModelConfig.model_validate(facts)
    except ValidationError as error:
        repair = "The folder is damaged, or of a model that the engine does not have."
        raise ConfigError(
            [Fault(f"{path}: model.{item['loc'][0]}", item["input"], item["msg"], repair) for item in error.errors()]
        ) from None


def _apply_init(tree: dict[str, dict[str, Any]], sources: dict[str, str], faults: list[Fault]) -> dict[str, Any]:
    """Fill in model.* from checkpoint.init where nothing else says it; returns what the folder says."""
    path = tree["checkpoint"].get("init")
    if not path or not isinstance(path, str):
        return {}
    wanted = str(tree["model"].get("max_seq_len", ""))
    try:
        facts, said = facts_of(Path(path), int(wanted) if wanted.isdecimal() else None)
        facts = model_config(Path(said), facts).model_dump(exclude={"preset"})
    except ConfigError as error:
        faults += error.faults
        return {}
    except CheckpointError as error:
        faults.append(Fault("checkpoint.init", path, str(error), "Give a folder with weights."))
        return {}
    for key, value in facts.items():
        if key not in tree["model"]:
            tree["model"][key] = value
            sources[f"model.{key}"] = f"file {said}"
    return facts


def _contradictions(
    model: ModelConfig, start: Mapping[str, Any], given: set[str], sources: Mapping[str, str]
) -> Iterator[Fault]:
    """Where model.* as given is not what the weights of checkpoint.init are of."""
    free = {"preset", "init_std", *(("max_seq_len",) if model.positions == "rope" else ())}
    for name in sorted(given & start.keys() - free):
        value = getattr(model, name)
        derived = name in ("num_kv_heads", "head_dim") and value == 0
        if value != start[name] and not derived:
            relation = f"({sources[f'model.{name}']}), but the weights of checkpoint.init have {start[name]!r}"
            yield Fault(f"model.{name}", value, relation, "Leave it out.")


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
    yield from _position_relations(m)
    if m.norm_offset and m.norm == "layernorm":
        yield Fault("model.norm_offset", True, "has no meaning for model.norm layernorm", "Leave it out.")
    if m.qk_norm_span != "head" and not m.qk_norm:
        repair = "Leave it out, or set model.qk_norm true."
        yield Fault("model.qk_norm_span", m.qk_norm_span, "has no meaning without model.qk_norm", repair)
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


_ROPE_SCALES = {  # what each fact of rope_scaling belongs to
    "rope_factor": ("linear", "llama3", "yarn"),
    "rope_original_seq_len": ("llama3", "yarn"),
    "rope_low_freq_factor": ("llama3",),
    "rope_high_freq_factor": ("llama3",),
    "rope_beta_fast": ("yarn",),
    "rope_beta_slow": ("yarn",),
    "rope_attention_factor": ("yarn",),
}


def _position_relations(m: ModelConfig) -> Iterator[Fault]:
    head_dim = m.head_dim or m.hidden_size // m.num_heads
    if m.positions == "learned":
        for name, of_rope in (("rope_scaling", m.rope_scaling != "none"), ("rotary_fraction", m.rotary_fraction != 1)):
            if of_rope:
                relation = "belongs to rotary positions, but model.positions is learned"
                yield Fault(f"model.{name}", getattr(m, name), relation, "Leave it out.")
    elif m.rotary_fraction == 1 and head_dim % 2:
        yield Fault("model.head_dim", head_dim, "is odd, but RoPE rotates pairs", f"Use {head_dim + 1}.")
    elif not (rotated := int(head_dim * m.rotary_fraction)) or rotated % 2:
        relation = f"of head_dim {head_dim} rotates {rotated} values, but RoPE rotates pairs"
        near = max(2, rotated + rotated % 2) / head_dim
        yield Fault("model.rotary_fraction", m.rotary_fraction, relation, f"Use {near:g}.")
    for name, kinds in _ROPE_SCALES.items():
        if m.rope_scaling not in kinds and getattr(m, name) != ModelConfig.model_fields[name].default:
            relation = f"has no meaning for model.rope_scaling {m.rope_scaling}"
            yield Fault(f"model.{name}", getattr(m, name), relation, f"Leave it out, or use {' or '.join(kinds)}.")
    if m.rope_scaling == "llama3" and m.rope_low_freq_factor >= m.rope_high_freq_factor:
        relation = f"is not below model.rope_high_freq_factor = {m.rope_high_freq_factor:g}"
        yield Fault("model.rope_low_freq_factor", m.rope_low_freq_factor, relation, "Llama 3 has 1 and 4.")
    if m.rope_scaling == "yarn" and m.rope_beta_slow >= m.rope_beta_fast:
        relation = f"is not below model.rope_beta_fast = {m.rope_beta_fast:g}"
        yield Fault("model.rope_beta_slow", m.rope_beta_slow, relation, "The usual values are 1 and 32.")


def _nearest_tensor(m: ModelConfig, to: int) -> int:
    """The tensor degree nearest to `to` that all three relations of the model allow."""
    kv = m.num_kv_heads or m.num_heads
    degrees = (d for d in range(1, m.num_heads + 1) if not m.num_heads % d and not m.ffn_size % d)
    return min((d for d in degrees if not kv % d or not d % kv), key=lambda d: (abs(d - to), d))


def _nearest_divisor(number: int, to: int) -> int:
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - to), d))


def _parallel_relations(cfg: Config, world: int) -> Iterator[Fault]:
    p = cfg.parallel
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
    yield from _schedule_relations(cfg, world)
    data = p.data or max(1, world // shards)
    slice_ = data * cfg.train.micro_batch_size
    if cfg.train.global_batch_size % slice_:
        yield Fault(
            "train.global_batch_size",
            cfg.train.global_batch_size,
            f"is not a multiple of data {data} x train.micro_batch_size {cfg.train.micro_batch_size}",
            f"Use {_divisors_near(cfg.train.global_batch_size, slice_)}.",
        )


def _schedule_relations(cfg: Config, world: int) -> Iterator[Fault]:
    p, m = cfg.parallel, cfg.model
    name = "parallel.schedule"
    if p.schedule not in SCHEDULES and not Path(p.schedule).is_file():
        near = difflib.get_close_matches(p.schedule, SCHEDULES, n=1, cutoff=0.0)[0]
        known = ", ".join(SCHEDULES)
        yield Fault(name, p.schedule, f"is none of {known}, and no file", f"Did you mean {near}?")
        return
    if p.schedule not in SCHEDULES:
        try:
            plan = load_plan(Path(p.schedule))
        except PlanError as error:
            yield Fault(name, p.schedule, str(error), "Save it again with `engine schedule --save`.")
            return
        data = p.data or max(1, world // (p.tensor * p.pipeline))
        microbatches = cfg.train.global_batch_size // (data * cfg.train.micro_batch_size)
        if (plan.num_ranks, plan.microbatches) != (p.pipeline, microbatches):
            have = f"is a plan for {plan.num_ranks} ranks and {plan.microbatches} microbatches"
            want = f"--ranks {p.pipeline} --microbatches {microbatches}"
            yield Fault(name, p.schedule, have, f"This run needs `engine schedule ... {want} --save FILE`.")
            return
    chunks, fixed = _chunks(p), SCHEDULES[p.schedule].chunks if p.schedule in SCHEDULES else _chunks(p)
    if fixed is not None and chunks != fixed:
        yield Fault(
            "parallel.chunks",
            chunks,
            f"does not fit {name} {p.schedule}, which places {fixed} on a rank",
            f"Use {fixed}, or {name} interleaved.",
        )
        return
    stages = p.pipeline * chunks
    if p.layers:
        yield from _layer_list_relations(p.layers, stages, m.num_layers)
    elif m.num_layers % stages:
        fits = [d for d in range(1, m.num_layers + 1) if m.num_layers % (d * chunks) == 0]
        near_degree = f", or pipeline {min(fits, key=lambda d: (abs(d - p.pipeline), d))}" if fits else ""
        uneven = ",".join(str(m.num_layers // stages + (i < m.num_layers % stages)) for i in range(stages))
        yield Fault(
            "parallel.pipeline",
            p.pipeline,
            (f"x {chunks} chunks = {stages} stages " if chunks > 1 else "")
            + f"does not divide model.num_layers = {m.num_layers}",
            f"Use {_divisors_near(m.num_layers, stages)} layers{near_degree}, or parallel.layers {uneven}.",
        )


def _layer_list_relations(text: str, stages: int, num_layers: int) -> Iterator[Fault]:
    counts = text.split(",")
    even = ",".join(str(num_layers // stages + (i < num_layers % stages)) for i in range(stages))
    if not all(count.isdecimal() for count in counts):
        yield Fault("parallel.layers", text, "is not a list of numbers", f"Give one for each stage, such as {even}.")
    elif len(counts) != stages or sum(map(int, counts)) != num_layers:
        found = f"is {sum(map(int, counts))} layers in {len(counts)} stages, not {num_layers} in {stages}"
        yield Fault("parallel.layers", text, found, f"Such as {even}.")


def _train_relations(cfg: Config) -> Iterator[Fault]:
    t, s = cfg.train, cfg.schedule
    p = cfg.parallel
    if p.sequence and t.seq_len % p.tensor and not cfg.model.num_heads % p.tensor:
        yield Fault(
            "train.seq_len",
            t.seq_len,
            f"is not a multiple of parallel.tensor = {p.tensor}, which cut the sequence",
            f"Use {_divisors_near(t.seq_len, p.tensor)}, or parallel.sequence false.",
        )
    if p.keep_gathered and not (p.sequence and p.tensor > 1):
        repair = "Leave it out, or use parallel.tensor 2 or more with parallel.sequence true."
        yield Fault("parallel.keep_gathered", True, "has no meaning where the sequence is not cut", repair)
    if p.keep_gathered and t.recompute == "selective":
        relation = "keeps what train.recompute selective computes again"
        yield Fault("parallel.keep_gathered", True, relation, "Set one of the two back.")
    if t.recompute == "none" and t.recompute_layers:
        repair = "Set train.recompute to selective or full."
        yield Fault("train.recompute_layers", t.recompute_layers, "has no meaning without recompute", repair)
    if t.precision == "fp64" and p.reduce_dtype == "bf16":
        yield Fault("parallel.reduce_dtype", "bf16", "would spoil train.precision fp64", "Use main.")
    if math.log2(t.loss_scale) % 1:
        relation, near = "is not a power of two, so that scaling would round", 2 ** round(math.log2(t.loss_scale))
        yield Fault("train.loss_scale", t.loss_scale, relation, f"Nearest: {near}.")
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
