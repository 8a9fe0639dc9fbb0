"""Typed, frozen configuration: every value there is, with its default.

Nothing here needs torch, so `--help` and config errors come at once. Field docstrings below are the help texts. Values
are read and put together in engine.config.load; what must hold between them stands in engine.config.checks, and what
follows from them in engine.config.derived.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from engine.pipeline.schedules import SCHEDULES


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
    """start from a named model; other model.* values override it"""
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
    """norm of queries and keys before RoPE"""
    qk_norm_span: Literal["head", "projection"] = "head"
    """with qk_norm: over each head, as model.norm says, LayerNorm with its bias too (Qwen3); or over all heads
    together, always RMSNorm without offset (OLMo-2)"""
    qkv_bias: bool = False
    """biases of the query, key and value projections"""
    attention_out_bias: bool = False
    """bias of the attention's output projection"""
    mlp_bias: bool = False
    """biases of the MLP"""
    positions: Literal["rope", "learned"] = "rope"
    """rotary positions, or a learned vector for each of max_seq_len positions (GPT-2), of which training changes the
    first train.seq_len; with data.separate_documents they begin again in each document"""
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
    schedule: str = Field(
        "1f1b", description=f"pipeline schedule: {', '.join(SCHEDULES)}, or a file that `engine schedule` saved"
    )
    chunks: int = Field(0, ge=0)
    """pipeline stages on each rank; 0: as the schedule has it (2 for interleaved and the V-shaped ones, else 1)"""
    layers: str = ""
    """blocks of each pipeline stage in order, such as 9,8,8,7; empty: equally many; balanced: worked out so that the
    heaviest stage, the output head being part of the last, computes as little as possible"""
    zero: int = Field(1, ge=0, le=1)
    """1: ZeRO-1, each data rank holds and updates its part of master weights and optimizer state; 0: all of it"""
    reduce_dtype: Literal["main", "bf16"] = "main"
    """what gradients are summed over several data ranks in; main: the dtype they are added up in (fp32); bf16 rounds
    each rank's part and every sum of parts, so that the result depends on the number of data ranks"""
    bucket_mib: float = Field(32.0, gt=0)
    """size of a gradient bucket"""
    overlap: bool = True
    """reduce each bucket over the data ranks while the rest of the backward still runs"""
    overlap_gather: bool = True
    """with zero: gather updated weights while the next forward already runs"""
    timeout_s: float = Field(600.0, gt=0)
    """a collective that takes longer ends the job"""
    transport: Literal["auto", "shared", "gloo"] = "auto"
    """how ranks on CPUs speak; auto: over shared memory where those of an axis are on one host, else over gloo; shared:
    refuse to run where that cannot be (ranks on GPUs always speak over NCCL)"""


class TrainConfig(Section):
    steps: int = Field(100, ge=1)
    """optimizer steps of the whole run, resumed parts included (of the learning rate: lr_schedule.horizon_steps)"""
    global_batch_size: int = Field(8, ge=1)
    """sequences an optimizer step learns from, over all ranks"""
    micro_batch_size: int = Field(1, ge=1)
    """sequences in one forward pass"""
    seq_len: int = Field(256, ge=2)
    """tokens a sequence"""
    seed: int = Field(1234, ge=0, lt=2**63)
    """initial weights and sample order follow from it; all its 63 bits count"""
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
    attention: Literal["auto", "own", "cudnn", "flash", "varlen", "flash-attn-3", "flash-attn-2", "sdpa"] = "auto"
    """which implementation of attention runs (docs/training.md); auto: the fastest that can; sdpa: torch's, as it
    chooses"""
    fp8: Literal["none", "tensorwise", "rowwise"] = "none"
    """with bf16: matrix products of the blocks in 8-bit floats, scaled by tensor, or by row and column; on GPUs from
    compute capability 8.9 on, and slowly, for trying, on CPUs"""
    compile: bool = False
    """torch.compile what lies between matrix products, attention and collectives of a block, instead of our kernels"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA when every local rank can have a GPU of its own, otherwise CPU; which one is printed"""
    skip_steps: str = ""
    """steps to leave out, such as "120 130-132": their batches are consumed and change nothing"""


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
    """decoupled decay of matrices, embeddings and learned positions too (norms and biases have none)"""
    clip_norm: float = Field(1.0, ge=0)
    """largest global gradient norm; 0: no clipping"""


class LrScheduleConfig(Section):
    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """learning rate after the warm-up; wsd: constant, then linear decay over the last decay_steps"""
    warmup_steps: int = Field(10, ge=0)
    """steps of linear warm-up"""
    decay_steps: int = Field(0, ge=0)
    """wsd only: steps of the final decay"""
    horizon_steps: int = Field(0, ge=0)
    """step at which the decay ends; later ones keep that rate; 0: train.steps. A run that is made longer goes on with
    the same rates if this stays (a learning rate that would jump on resume is refused)"""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """learning rate at the end of the decay, as a share of the peak"""


class DataConfig(Section):
    train: str = ""
    """prefix of the training .bin/.idx; or a blend, weights and prefixes in turn such as "0.7 a/web 0.3 b/code"; or a
    .toml file with [[source]] prefix, weight | tokens | epochs, name, and [[change]] step, weights (docs/samples.md)"""
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
    skip_samples: str = ""
    """global numbers of samples to leave out, such as "5003 6000-6010", as an error or a warning names them: they count
    nothing, every other sample keeps its number and its step"""
    prefetch: int = Field(2, ge=1)
    """global batches prepared ahead by the loader thread"""


class EvalConfig(Section):
    every: int = Field(0, ge=0)
    """validate every so many steps; 0: only after the last"""
    batches: int = Field(8, ge=0)
    """global batches per validation, the last one too; 0: the whole validation set, as `engine evaluate` scores it"""


class CheckpointConfig(Section):
    every: int = Field(0, ge=0)
    """save every so many steps; 0: only after the last step and on SIGTERM"""
    keep: int = Field(0, ge=0)
    """how many newest checkpoints to keep; 0: all. Older ones go once the newest has been read back"""
    keep_every: int = Field(0, ge=0)
    """with keep: besides those, keep every step that is a multiple of this, for good; 0: none"""
    async_save: bool = True
    """train on while a checkpoint is written, from a copy in host memory; the last one is always waited for"""
    secret: str = ""
    """file:PATH or env:NAME of a secret of at least 32 bytes: checkpoints are signed, and only such are resumed"""
    encrypt: bool = False
    """with secret: encrypt them too (AES-256-GCM)"""
    resume: str = "auto"
    """auto: go on from the run folder's newest checkpoint if there is one; latest: there must be one;
    never: start anew; or the path of a checkpoint"""
    allow: str = ""
    """fields that may differ from the checkpoint's when resuming, such as "data.num_tokens train.seq_len", or
    lr_schedule for a learning rate that jumps by more than 1 %; the lineage of later checkpoints records it (a
    difference that is not named is refused, and the message names its field)"""
    init: str = ""
    """start a new run from these weights: a Hugging Face folder, a checkpoint or a run folder, of any layout; model.*
    follows from it"""


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
    lr_schedule: LrScheduleConfig = LrScheduleConfig()
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()


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
