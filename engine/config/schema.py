"""The schema of the configuration: typed, frozen sections with all settings and their defaults.

Needs no torch, so `--help` and config errors appear immediately. The docstrings of fields are the help texts. Values
are loaded and merged in engine.config.load, checked against each other in engine.config.checks, and derived values are
computed in engine.config.derived.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from engine.config.group_table import GroupConfig
from engine.config.objective_table import ObjectiveConfig
from engine.config.phase_table import PhaseConfig
from engine.config.section import Section, row_class
from engine.optim.update_rules import RULES
from engine.pipeline.schedules import SCHEDULES


class RunConfig(Section):
    """Where the run writes its files."""

    dir: str = "runs/default"
    """folder of this run: config.toml, metrics.jsonl, checkpoints/, TensorBoard events, exit.json; use a new one for
    each run"""


class ModelConfig(Section):
    """Shape of the model. Start from model.preset or checkpoint.init and change single values."""

    preset: str = ""
    """published model shape to start from; other model.* values override it"""
    type: str = "decoder"
    """model type; decoder: a Transformer that predicts the next token"""
    vocab_size: int = Field(4096, ge=1)
    """rows of the embedding matrix: the tokenizer's vocabulary size or more (ranks pad internally)"""
    hidden_size: int = Field(256, ge=1)
    """width of the residual stream"""
    num_layers: int = Field(4, ge=1)
    """number of transformer blocks"""
    num_heads: int = Field(8, ge=1)
    """number of query heads"""
    num_kv_heads: int = Field(0, ge=0)
    """number of key/value heads; fewer than num_heads is grouped-query attention; 0: as many as query heads"""
    head_dim: int = Field(0, ge=0)
    """width of one attention head; 0: hidden_size / num_heads"""
    ffn_size: int = Field(688, ge=1)
    """inner width of the MLP"""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """activation of the MLP; gelu_tanh: the tanh approximation of GELU"""
    gated_mlp: bool = True
    """true: activation(gate) * up with three matrices (SwiGLU if silu); false: activation(up) with two matrices"""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """normalisation layer; layernorm has a bias"""
    norm_eps: float = Field(1e-5, gt=0)
    """epsilon of the norms"""
    norm_offset: bool = False
    """RMSNorm scales by 1 + weight (Gemma)"""
    norm_position: Literal["pre", "post", "sandwich"] = "pre"
    """pre: normalise the input of attention and MLP; post: normalise their output before the residual sum (OLMo-2);
    sandwich: both, with two norms each (Gemma 2)"""
    parallel_residual: bool = False
    """attention and MLP of a block read the same input (GPT-NeoX)"""
    qk_norm: bool = False
    """normalise queries and keys before RoPE"""
    qk_norm_span: Literal["head", "projection"] = "head"
    """with qk_norm; head: over each head with the norm of model.norm, including the bias of LayerNorm (Qwen3);
    projection: over all heads together, always RMSNorm without offset (OLMo-2)"""
    qkv_bias: bool = False
    """add biases to the query, key and value projections"""
    attention_out_bias: bool = False
    """add a bias to the output projection of attention"""
    mlp_bias: bool = False
    """add biases to the MLP"""
    window: int = Field(0, ge=0)
    """sliding window, in tokens: each token attends to itself and to the window - 1 tokens before it; 0: to all"""
    window_layers: str = ""
    """with window: the layers that have it, as a pattern that repeats over the layers, w: window, f: full attention;
    wwwwwf: every sixth layer attends to all tokens (Gemma 3); empty: all have it (Mistral)"""
    positions: Literal["rope", "learned"] = "rope"
    """rope: rotary positions; learned: one learned vector for each of max_seq_len positions (GPT-2), of which training
    updates the first train.seq_len; learned positions restart at each document with data.separate_documents"""
    rope_theta: float = Field(10000.0, gt=0)
    """base of the rotary angles; larger for longer contexts"""
    rotary_fraction: float = Field(1.0, gt=0, le=1)
    """fraction of each head's width that is rotated, from its start (GPT-NeoX)"""
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """method that stretches the rotary angles for contexts longer than the original one"""
    rope_factor: float = Field(1.0, ge=1)
    """with rope_scaling: factor by which the context is stretched"""
    rope_original_seq_len: int = Field(0, ge=0)
    """llama3, yarn: context length before stretching, in tokens; 0: max_seq_len"""
    rope_low_freq_factor: float = Field(1.0, gt=0)
    """llama3: frequencies with fewer turns than this over the original context are stretched"""
    rope_high_freq_factor: float = Field(4.0, gt=0)
    """llama3: frequencies with more turns than this over the original context are kept"""
    rope_beta_fast: float = Field(32.0, gt=0)
    """yarn: frequencies with more turns than this over the original context are kept"""
    rope_beta_slow: float = Field(1.0, gt=0)
    """yarn: frequencies with fewer turns than this over the original context are stretched"""
    rope_attention_factor: float = Field(0.0, ge=0)
    """yarn: factor that scales queries and keys; 0: 0.1 ln(rope_factor) + 1"""
    scale_embeddings: bool = False
    """multiply embeddings by sqrt(hidden_size) (Gemma)"""
    tie_embeddings: bool = False
    """use the embedding matrix as the output head too"""
    init_std: float = Field(0.02, gt=0)
    """standard deviation of the initial weights; projections into the residual stream get init_std / sqrt(2 *
    num_layers)"""
    max_seq_len: int = Field(2048, ge=1)
    """longest sequence the exported model claims to handle, in tokens; with learned positions their number"""

    @property
    def rotary_dim(self) -> int:
        """Number of values of a head that are rotated; 0 for learned positions. Only for a resolved config."""
        return int(self.head_dim * self.rotary_fraction) if self.positions == "rope" else 0

    def layer(self, index: int) -> LayerConfig:
        """The settings of layer `index`, from 0. Only for a resolved config."""
        return LayerConfig(self, index)


@dataclass(frozen=True)
class LayerConfig:
    """A view of one layer of a model; `ModelConfig.layer` makes it, and the layer's modules read it.

    model: the settings that all layers share. index: the layer's number in the whole model, from 0.
    mixer, feed_forward: its two sublayers, by their names in engine.model.build.
    """

    model: ModelConfig
    index: int
    mixer: str = "attention"
    feed_forward: str = "mlp"

    @property
    def window(self) -> int:
        """The layer's sliding window in tokens; 0: full attention."""
        pattern = self.model.window_layers or "w"
        return self.model.window if pattern[self.index % len(pattern)] == "w" else 0


class ParallelConfig(Section):
    """How ranks share model and batch. Number of ranks = tensor x pipeline x data."""

    tensor: int = Field(1, ge=1)
    """ranks that split each matrix (tensor parallelism); use it inside a node when the model does not fit on one
    device"""
    pipeline: int = Field(1, ge=1)
    """ranks that split the layers (pipeline parallelism); use it across nodes"""
    data: int = Field(0, ge=0)
    """ranks that split the batch (data parallelism); 0: all ranks that the other degrees leave"""
    context: int = Field(1, ge=1)
    """ranks that split the sequence (context parallelism); only 1 so far"""
    expert: int = Field(1, ge=1)
    """ranks that split the experts (expert parallelism); only 1 so far"""
    sequence: bool = True
    """with tensor above 1: also shard the sequence outside the matmuls (sequence parallelism), which saves activation
    memory; set false if train.seq_len is not a multiple of tensor"""
    keep_gathered: bool = False
    """with sequence: save the gathered inputs of column-parallel matmuls instead of gathering again in the backward;
    less communication, more memory"""
    schedule: str = Field(
        "1f1b", description=f"pipeline schedule: {', '.join(SCHEDULES)}, or a file that `engine schedule --save` wrote"
    )
    chunks: int = Field(0, ge=0)
    """pipeline stages on each rank (virtual stages); 0: as the schedule needs (2 for interleaved and the V-shaped ones,
    else 1)"""
    layers: str = ""
    """number of blocks of each pipeline stage in order, such as 9,8,8,7; empty: equal numbers; balanced: the split
    whose slowest stage computes least, with the output head counted as part of the last stage"""
    zero: int = Field(1, ge=0, le=1)
    """1: ZeRO-1, each data rank stores and updates only its part of master weights and optimizer state; 0: each stores
    all"""
    reduce_dtype: Literal["main", "bf16"] = "main"
    """dtype in which gradients are summed across data ranks; main: the dtype they are accumulated in (fp32); bf16
    halves the traffic but rounds each rank's part and every partial sum, so the result depends on the number of data
    ranks"""
    bucket_mib: float = Field(32.0, gt=0)
    """size in MiB at which the gradients of a block are split into several buckets; no bucket spans two blocks;
    smaller: the overlap starts earlier; larger: fewer collectives"""
    overlap: bool = True
    """reduce each gradient bucket across data ranks while the rest of the backward runs"""
    overlap_gather: bool = True
    """with zero: all-gather the updated weights while the next forward runs"""
    timeout_s: float = Field(600.0, gt=0)
    """seconds after which an unfinished collective ends the job"""
    transport: Literal["auto", "shared", "gloo"] = "auto"
    """how CPU ranks communicate; auto: shared memory if all ranks of an axis are on one host, else gloo; shared: fail
    if shared memory is not possible; GPU ranks always use NCCL"""


class TrainConfig(Section):
    """Steps, batch, precision and memory."""

    steps: int = Field(100, ge=1)
    """optimizer steps of the whole run, resumed parts included; lr_schedule.horizon_steps sets the end of the decay"""
    global_batch_size: int = Field(8, ge=1)
    """sequences per optimizer step, over all ranks"""
    micro_batch_size: int = Field(1, ge=1)
    """sequences per forward pass of a rank; raise it until memory is full"""
    seq_len: int = Field(256, ge=2)
    """tokens per sequence"""
    seed: int = Field(1234, ge=0, lt=2**63)
    """seed of the initial weights, the sample order and dropout; all its 63 bits count"""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """dtype of weights and activations; bf16 and fp16 keep fp32 master weights and gradients; use bf16 on GPUs"""
    loss_scale: float = Field(65536.0, gt=0)
    """fp16: initial loss scale, a power of two; it is halved when a gradient overflows"""
    loss_scale_window: int = Field(1000, ge=1)
    """fp16: number of steps without overflow after which the loss scale doubles"""
    dropout: float = Field(0.0, ge=0, lt=1)
    """probability of a zero in embeddings, MLP activations, attention and MLP outputs; masks do not depend on layout"""
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """probability of a zero among the attention weights; train.attention own (CPU, fp32) and sdpa support it"""
    recompute: Literal["none", "selective", "full"] = "none"
    """activations that the backward recomputes instead of saving, to save memory; selective: norms, SwiGLU product,
    attention core; full: all of a block"""
    recompute_layers: int = Field(0, ge=0)
    """recompute only in the first N blocks of each stage; 0: in all"""
    attention: Literal["auto", "own", "cudnn", "flash", "varlen", "flash-attn-3", "flash-attn-2", "sdpa"] = "auto"
    """attention implementation (docs/training.md); auto: the fastest that can run; sdpa: torch's, with the kernel that
    torch chooses"""
    fp8: Literal["none", "tensorwise", "rowwise"] = "none"
    """with bf16: run the blocks' matmuls in 8-bit floats, scaled per tensor, or per row and column; needs GPUs of
    compute capability 8.9 or above; on CPUs it is slow and only for tests"""
    compile: bool = False
    """torch.compile the functions between matmuls, attention and collectives, instead of the custom kernels"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if every local rank can have its own GPU, else CPU; the choice is printed"""
    z_loss: float = Field(0.0, ge=0)
    """adds this times the mean of (log Z)^2 to the objective, Z the sum of exp(logits); PaLM: 1e-4; 0: no z-loss"""
    skip_steps: str = ""
    """optimizer steps to skip, as after a loss spike, such as "120 130-132": batches are consumed without an update"""


class OptimizerConfig(Section):
    """Update rule, parameter groups and gradient clipping."""

    rule: str = Field("adamw", description=f"update rule of the weights: {', '.join(RULES)}")
    lr: float = Field(1e-3, gt=0)
    """peak learning rate"""
    beta1: float = Field(0.9, ge=0, lt=1)
    """decay rate of AdamW's first moment"""
    beta2: float = Field(0.95, ge=0, lt=1)
    """decay rate of AdamW's second moment"""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon"""
    weight_decay: float = Field(0.1, ge=0)
    """decoupled weight decay of matrices, embeddings and learned positions; norms and biases have none"""
    clip_norm: float = Field(1.0, ge=0)
    """maximum global gradient norm; 0: no clipping"""
    groups: tuple[GroupConfig, ...] = ()
    """parameters with other settings"""


class LrScheduleConfig(Section):
    """Learning rate over the steps."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """learning rate after the warm-up; wsd: constant, then linear decay over the last decay_steps"""
    warmup_steps: int = Field(10, ge=0)
    """steps of linear warm-up; about 1 % of the run is usual"""
    decay_steps: int = Field(0, ge=0)
    """wsd only: steps of the final decay; about 10 % of the run is usual"""
    horizon_steps: int = Field(0, ge=0)
    """step at which the decay ends, with a constant rate after it; 0: train.steps. Set it if the run may be extended:
    more train.steps then keep the same rates (a learning rate that jumps on resume is an error)"""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """learning rate at the end of the decay, as a fraction of the peak"""


class DataConfig(Section):
    """Training and validation data."""

    train: str = ""
    """prefix of the training .bin/.idx; or a blend: weights and prefixes in turn, such as "0.7 a/web 0.3 b/code"; or a
    .toml file with [[source]] prefix, weight | tokens | epochs, name (docs/samples.md)"""
    valid: str = ""
    """prefix of the validation .bin/.idx; empty: no validation"""
    tokenizer: str = ""
    """folder with tokenizer.json; copied into exports, its digest is compared with the data's"""
    mask_eod: bool = False
    """exclude the token after an end of document from the loss: the previous document cannot predict it"""
    mask_tokens: str = ""
    """exclude labels that are one of these tokens from the loss: token strings with spaces between them"""
    separate_documents: bool = False
    """document masking: attention does not cross the end of a document, in training and validation"""
    fim_rate: float = Field(0.0, ge=0, le=1)
    """fill-in-the-middle: fraction of documents (of their part inside a sample) that are cut in three and permuted"""
    fim_spm_rate: float = Field(0.5, ge=0, le=1)
    """fraction of the permuted documents in which the suffix comes before the prefix"""
    fim_tokens: str = ""
    """prefix, suffix and middle token with spaces between them; empty: those of a common model family"""
    skip_samples: str = ""
    """global numbers of samples to skip, such as "5003 6000-6010", as errors and warnings print them; they count
    nothing in the loss, and all other samples keep their number and step"""
    prefetch: int = Field(2, ge=1)
    """global batches that the loader thread prepares ahead; raise it if steps wait for data"""


class EvalConfig(Section):
    """Validation during training."""

    every: int = Field(0, ge=0)
    """validate every N steps; 0: only after the last"""
    batches: int = Field(8, ge=0)
    """global batches per validation, the last one included; 0: the whole validation set, as `engine evaluate` scores
    it"""


class CheckpointConfig(Section):
    """Saving, resuming and initial weights."""

    every: int = Field(0, ge=0)
    """save every N steps; 0: only after the last step and on SIGTERM"""
    keep: int = Field(0, ge=0)
    """number of newest checkpoints to keep; 0: all. Older ones are deleted after the newest has been read back"""
    keep_every: int = Field(0, ge=0)
    """with keep: also keep, permanently, every step that is a multiple of this; 0: none"""
    async_save: bool = True
    """continue training while a checkpoint is written, from a copy in host memory; the last save is always waited
    for"""
    secret: str = ""
    """file:PATH or env:NAME of a secret of at least 32 bytes: checkpoints are signed, and only signed ones are
    resumed"""
    encrypt: bool = False
    """with secret: also encrypt checkpoints (AES-256-GCM)"""
    resume: str = "auto"
    """auto: resume from the run folder's newest checkpoint if there is one; latest: there must be one; never: start a
    new run; or the path of a checkpoint"""
    allow: str = ""
    """fields that may differ from the checkpoint when resuming, such as "data.num_tokens train.seq_len", or lr_schedule
    for a learning rate that jumps by more than 1 %. Every other difference is an error that names its field; allowed
    ones are recorded in the lineage of later checkpoints"""
    init: str = ""
    """start a new run from these weights: a Hugging Face folder, a checkpoint or a run folder of any layout; model.* is
    taken from it"""


class MonitorConfig(Section):
    """Progress, metrics and timelines."""

    log_every_s: float = Field(5.0, ge=0)
    """seconds between progress lines if the output is not a terminal"""
    tensorboard: bool = True
    """write TensorBoard events into the run folder"""
    peak_tflops: float = Field(0.0, ge=0)
    """peak TFLOP/s of one device, to report MFU; 0: report achieved GFLOP/s"""
    timeline_step: int = Field(3, ge=0)
    """N: record the pipeline timeline of the N-th step after each start, for `engine schedule --from`; 0: none"""


class Config(Section):
    """Everything a training run depends on."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    phase: tuple[PhaseConfig, ...] = ()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_schedule: LrScheduleConfig = LrScheduleConfig()
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()


def fields() -> Iterator[tuple[str, str, Any]]:
    """(section, name, pydantic FieldInfo) of every setting of a section; arrays of tables are not among them."""
    for section, info in Config.model_fields.items():
        if isinstance(info.annotation, type):
            for name, field in info.annotation.model_fields.items():
                if row_class(field.annotation) is None:
                    yield section, name, field


def tables() -> dict[str, type[Section]]:
    """Every array of tables: its path, such as `phase` for [[phase]], -> the class of its rows."""
    found = {}
    for section, info in Config.model_fields.items():
        if row := row_class(info.annotation):
            found[section] = row
        elif isinstance(info.annotation, type):
            found |= {
                f"{section}.{name}": row
                for name, field in info.annotation.model_fields.items()
                if (row := row_class(field.annotation))
            }
    return found
