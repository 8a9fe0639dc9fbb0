"""Write docs/coming_from/*.md from the tables in engine/config/peers.py; a test compares them."""

from __future__ import annotations

from pathlib import Path

from engine.config.hints import suggest
from engine.config.peers import COMMON, MEGATRON, TORCHTITAN, Row
from engine.config.schema import fields

FOLDER = Path(__file__).resolve().parents[1] / "docs/coming_from"

# a line of their configuration, and the same setting in our TOML; empty where the table says why there is none
LLAMA_3_8B_MEGATRON: tuple[tuple[str, str], ...] = (
    ("--num-layers 32", "model.num_layers = 32"),
    ("--hidden-size 4096", "model.hidden_size = 4096"),
    ("--ffn-hidden-size 14336", "model.ffn_size = 14336"),
    ("--num-attention-heads 32", "model.num_heads = 32"),
    ("--group-query-attention", "model.num_kv_heads = 8"),
    ("--num-query-groups 8", "model.num_kv_heads = 8"),
    ("--kv-channels 128", "model.head_dim = 128"),
    ("--seq-length 8192", "train.seq_len = 8192"),
    ("--max-position-embeddings 8192", "model.max_seq_len = 8192"),
    ("--position-embedding-type rope", 'model.positions = "rope"'),
    ("--rotary-base 1000000", "model.rope_theta = 1000000.0"),
    ("--rotary-percent 1.0", "model.rotary_fraction = 1.0"),
    ("--attention-dropout 0.0", "train.attention_dropout = 0.0"),
    ("--hidden-dropout 0.0", "train.dropout = 0.0"),
    ("--swiglu", "model.gated_mlp = true"),
    ("--init-method-std 0.0134", "model.init_std = 0.0134"),
    ("--attention-backend fused", 'train.attention = "auto"'),
    ("--apply-layernorm-1p", "model.norm_offset = true"),
    ("--untie-embeddings-and-output-weights", "model.tie_embeddings = false"),
    ("--disable-bias-linear", "model.mlp_bias = false"),
    ("--vocab-size 128256", "model.vocab_size = 128256"),
    ("--use-mcore-models", ""),
    ("--micro-batch-size 1", "train.micro_batch_size = 1"),
    ("--global-batch-size 128", "train.global_batch_size = 128"),
    ("--train-samples 1953125000", "train.steps = 15258789"),
    ("--lr-warmup-samples 3906252", "lr_schedule.warmup_steps = 30517"),
    ("--lr 0.00015", "optimizer.lr = 0.00015"),
    ("--min-lr 0.00001", "lr_schedule.min_lr_ratio = 0.0667"),
    ("--decoupled-lr 5.0e-4", ""),
    ("--lr-decay-style cosine", 'lr_schedule.kind = "cosine"'),
    ("--clip-grad 1.0", "optimizer.clip_norm = 1.0"),
    ("--weight-decay 0.1", "optimizer.weight_decay = 0.1"),
    ("--adam-beta1 0.9", "optimizer.beta1 = 0.9"),
    ("--adam-beta2 0.95", "optimizer.beta2 = 0.95"),
    ("--bf16", 'train.precision = "bf16"'),
    ("--grad-reduce-in-bf16", 'parallel.reduce_dtype = "bf16"'),
    ("--cross-entropy-loss-fusion", ""),
    ("--calculate-per-token-loss", ""),
    ("--manual-gc", ""),
    ("--exit-duration-in-mins 235", ""),
    ("--fp8-format hybrid", 'train.fp8 = "tensorwise"'),
    ("--fp8-amax-history-len 1024", ""),
    ("--fp8-param-gather", ""),
    ("--tensor-model-parallel-size 1", "parallel.tensor = 1"),
    ("--context-parallel-size 1", "parallel.context = 1"),
    ("--sequence-parallel", "parallel.sequence = true"),
    ("--use-distributed-optimizer", "parallel.zero = 1"),
    ("--overlap-grad-reduce", "parallel.overlap = true"),
    ("--overlap-param-gather", "parallel.overlap_gather = true"),
    ("--data-path DATA", 'data.train = "data/corpus-train"'),
    ("--split '99,1,0'", 'data.valid = "data/corpus-valid"'),
    ("--tokenizer-model TOKENIZER", 'data.tokenizer = "data/tokenizer"'),
    ("--data-cache-path CACHE", ""),
    ("--no-mmap-bin-files", ""),
    ("--num-workers 1", "data.prefetch = 2"),
    ("--log-interval 1", "monitor.log_every_s = 5.0"),
    ("--eval-iters 32", "eval.batches = 32"),
    ("--eval-interval 100", "eval.every = 100"),
    ("--save-interval 1000", "checkpoint.every = 1000"),
    ("--log-throughput", "monitor.peak_tflops = 989.0"),
    ("--profile", ""),
    ("--ckpt-format torch_dist", ""),
    ("--distributed-timeout-minutes 60", "parallel.timeout_s = 3600.0"),
    ("--save CHECKPOINTS", 'run.dir = "runs/llama-3-8b"'),
    ("--load CHECKPOINTS", 'checkpoint.resume = "auto"'),
    ("--tensorboard-dir LOGS", "monitor.tensorboard = true"),
)

LLAMA_3_8B_TORCHTITAN: tuple[tuple[str, str], ...] = (
    ('job.dump_folder = "./outputs"', 'run.dir = "outputs"'),
    ('job.description = "Llama 3 8B training"', ""),
    ("profiling.enable_profiling = true", ""),
    ("metrics.log_freq = 10", "monitor.log_every_s = 5.0"),
    ("metrics.enable_tensorboard = true", "monitor.tensorboard = true"),
    ('model.name = "llama3"', 'model.preset = "llama-3-8b"'),
    ('model.flavor = "8B"', 'model.preset = "llama-3-8b"'),
    ("model.tokenizer_path = ...", 'data.tokenizer = "data/tokenizer"'),
    ('optimizer.name = "AdamW"', ""),
    ("optimizer.lr = 3e-4", "optimizer.lr = 3e-4"),
    ("optimizer.eps = 1e-8", "optimizer.eps = 1e-8"),
    ("lr_scheduler.warmup_steps = 200", "lr_schedule.warmup_steps = 200"),
    ("training.local_batch_size = 1", "train.micro_batch_size = 1"),
    ("training.seq_len = 8192", "train.seq_len = 8192"),
    ("training.max_norm = 1.0", "optimizer.clip_norm = 1.0"),
    ("training.steps = 1000", "train.steps = 1000"),
    ("training.compile = false", "train.compile = false"),
    ('training.dataset = "c4"', 'data.train = "data/corpus-train"'),
    ("parallelism.data_parallel_replicate_degree = 1", "parallel.data = 64"),
    ("parallelism.data_parallel_shard_degree = -1", "parallel.data = 64"),
    ("parallelism.tensor_parallel_degree = 1", "parallel.tensor = 1"),
    ("parallelism.pipeline_parallel_degree = 1", "parallel.pipeline = 1"),
    ("parallelism.context_parallel_degree = 1", "parallel.context = 1"),
    ("checkpoint.enable_checkpoint = false", "checkpoint.every = 500"),
    ('checkpoint.folder = "checkpoint"', 'run.dir = "outputs"'),
    ("checkpoint.interval = 500", "checkpoint.every = 500"),
    ("checkpoint.model_weights_only = false", ""),
    ('checkpoint.export_dtype = "float32"', ""),
    ('checkpoint.async_mode = "disabled"', "checkpoint.async_save = false"),
    ('activation_checkpoint.mode = "selective"', 'train.recompute = "selective"'),
    ('activation_checkpoint.selective_ac_option = "op"', "train.recompute_layers = 0"),
    ("float8.enable_fsdp_float8_all_gather = false", ""),
    ('float8.filter_fqns = "output"', ""),
)
TORCHTITAN_MORE = ("train.global_batch_size = 64", 'train.precision = "bf16"')  # settings that their file does not have

OTHERS = """An unknown option is looked up in these tables, and the error names the setting of this engine
([overview](../coming_from.md)):"""

MEGATRON_TEXT = f"""# Coming from Megatron-LM

{OTHERS}

```bash test
engine train --tensor-model-parallel-size 4 2> error.txt || grep 'Did you mean parallel.tensor' error.txt
```

Its `.bin/.idx` data is read as it is, its checkpoints are read by [`engine import`](../megatron.md), and
`tools/preprocess_data.py` takes the arguments of its script ([data](../data.md#to-and-from-megatron-lm)). In the
tables, `-` means that there is no such setting.
"""

TORCHTITAN_TEXT = """# Coming from torchtitan

`llama3_8b.toml` of torchtitan for 64 GPUs, as a configuration of this engine. The dry run checks it and prints the
layout and its memory, without a GPU:
"""

OTHER_TEXT = f"""# Names from other engines

{OTHERS}

```bash test
engine train --per-device-train-batch-size 4 2> error.txt || grep 'Did you mean train.micro_batch_size' error.txt
```

The names below come from Hugging Face's Trainer, DeepSpeed, nanoGPT and others. They are found with dashes or
underscores, alone or in any section (`--lr`, `--train.lr`). `-` means that there is no such setting.
"""


def lines_of(config: tuple[tuple[str, str], ...]) -> list[str]:
    """One of the configurations above as a table."""
    rows = ["| theirs | ours |", "|---|---|"]
    for theirs, ours in config:
        hint = suggest(theirs.split()[0], known())
        assert hint is not None, theirs
        rows.append(f"| `{theirs}` | {f'`{ours}`' if ours else hint.remark} |")
    return rows


def table(rows: tuple[Row, ...]) -> list[str]:
    """A table of peers.py."""
    lines = ["| theirs | ours | remark |", "|---|---|---|"]
    for theirs, ours, remark in rows:
        names = ", ".join(f"`{name}`" for name in theirs.split())
        lines.append(f"| {names} | {f'`{ours}`' if ours else '-'} | {remark} |")
    return lines


def known() -> list[str]:
    """The paths of all settings."""
    return [f"{section}.{name}" for section, name, _ in fields()]


def toml(lines: tuple[str, ...]) -> str:
    """A TOML file from lines `section.name = value`, without repetitions."""
    sections: dict[str, list[str]] = {}
    for line in dict.fromkeys(filter(None, lines)):
        section, _, rest = line.partition(".")
        sections.setdefault(section, []).append(rest)
    return "\n\n".join(f"[{section}]\n" + "\n".join(rest) for section, rest in sections.items())


def pages() -> dict[str, str]:
    """File name -> text of every page."""
    ours = (*(line for _, line in LLAMA_3_8B_TORCHTITAN), *TORCHTITAN_MORE)
    dry_run = (
        f"```bash test\ncat > llama-3-8b.toml <<'END'\n{toml(ours)}\nEND\n"
        "engine train --config llama-3-8b.toml --dry-run --world-size 64\n```"
    )
    megatron = [
        MEGATRON_TEXT,
        "## Llama-3-8B, line by line",
        "`examples/llama/train_llama3_8b_h100_fp8.sh` of Megatron-LM:",
        "\n".join(lines_of(LLAMA_3_8B_MEGATRON)),
        "## Options",
        "\n".join(table(MEGATRON)),
    ]
    torchtitan = [
        TORCHTITAN_TEXT,
        dry_run,
        "torchtitan trains in bf16 with one sequence per GPU by default; here both are stated. In the tables, `-`\n"
        "means that there is no such setting.",
        "## Llama-3-8B, line by line",
        "\n".join(lines_of(LLAMA_3_8B_TORCHTITAN)),
        "## Settings",
        "\n".join(table(TORCHTITAN)),
    ]
    others = [OTHER_TEXT, "\n".join(table(COMMON))]
    parts = {"megatron_lm.md": megatron, "torchtitan.md": torchtitan, "other_engines.md": others}
    return {name: "\n\n".join(part.strip("\n") for part in texts) + "\n" for name, texts in parts.items()}


if __name__ == "__main__":
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
