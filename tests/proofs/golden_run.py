"""Creates a golden file: stopped runs in the current format, their corpora, and the metrics of their continuation.

    python tests/proofs/golden_run.py tests/proofs/golden/schema2.zip

Run it once per format, with the code that writes the format. `RUNS` are the same runs with the current names of config
fields: test_golden.py resumes them with these, even if the fields had other names when the file was created.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

SHAPE = {"num_heads": 4, "num_kv_heads": 2, "vocab_size": 276, "max_seq_len": 32, "tie_embeddings": True}
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    # tensor 2 x pipeline 2; a blend, fill-in-the-middle, validation; every tensor in two rectangles or more
    "fp32": {
        "model": {**SHAPE, "num_layers": 4, "hidden_size": 16, "ffn_size": 24, "qk_norm": True},
        "train": {"steps": 12, "global_batch_size": 8, "seq_len": 16, "seed": 7},
        "eval": {"every": 4, "batches": 2},
        "optimizer": {"lr": 0.01, "weight_decay": 0.2},
        "lr_schedule": {"kind": "linear", "warmup_steps": 3, "min_lr_ratio": 0.2},
        "data": {"train": "0.6 {root}/web 0.4 {root}/code", "valid": "{root}/web", "fim_rate": 0.5},
    },
    # one process, resumed once before; steps skipped by overflow, a loss scale, loss masks
    "fp16": {
        "model": {**SHAPE, "num_layers": 2, "hidden_size": 8, "ffn_size": 16, "norm": "layernorm"},
        "train": {
            **{"steps": 12, "global_batch_size": 4, "seq_len": 16},
            **{"precision": "fp16", "loss_scale": 2.0**24, "loss_scale_window": 4},
        },
        "optimizer": {"lr": 0.01},
        "lr_schedule": {"warmup_steps": 3, "horizon_steps": 12},
        "data": {
            "train": "{root}/web",
            "mask_eod": True,
            "mask_tokens": "e <|fim_suffix|>",
            "separate_documents": True,
        },
    },
}
COMMON = {
    "train": {"device": "cpu"},
    "data": {"tokenizer": "{root}/tokenizer"},
    "monitor": {"tensorboard": False},
}
# Golden file -> settings that the engine which wrote it did not have.
LACKS: dict[str, tuple[str, ...]] = {
    "schema1": ("data.fim_rate", "data.mask_tokens", "model.norm", "lr_schedule.horizon_steps"),
}
RANKS = {"fp32": (4, "--parallel.tensor", "2", "--parallel.pipeline", "2"), "fp16": (1,)}
SPECIAL = ("<|endoftext|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
TIMES = (
    "tokens_per_s",
    "step_s",
    "gflops_per_rank",
    "data_s",
)  # fields of metrics.jsonl that differ in every run, as traffic does


def options(name: str, root: Path, file: str = "") -> dict[str, str]:
    """A run's values by dotted name, with its corpora in `root`. file: name of the golden file; "": a new one."""
    sections = [*COMMON.items(), *RUNS[name].items()]
    values = {f"{section}.{key}": value for section, keys in sections for key, value in keys.items()}
    return {
        key: json.dumps(x) if isinstance(x, bool) else str(x).replace("{root}", str(root))
        for key, x in values.items()
        if key not in LACKS.get(file, ())
    }


def train(name: str, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start the run in folder/NAME, in the layout of the golden file."""
    ranks, *layout = RANKS[name]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "engine", "train", "--run.dir", f"{name}/run", *layout]
    command += [word for key, x in options(name, Path(".")).items() for word in (f"--{key.replace('_', '-')}", x)]
    return subprocess.Popen([*command, *more], cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"})


def records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def prepare(folder: Path) -> None:
    """Create two corpora, and a tokenizer trained on the first."""
    draw, words = random.Random(0), ["the", "of", "and", "to", "while", "return", "def", "self", "value", "loss"]
    for name in ("web", "code"):
        lines = (" ".join(draw.choices(words, k=draw.randint(2, 40))) for _ in range(60))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    engine = [sys.executable, "-m", "engine"]
    special = ["--special-tokens", *SPECIAL, "--vocab-size", str(SHAPE["vocab_size"])]
    trained = ["tokenizer", "train", "--input", "web.jsonl", "--output", "tokenizer", *special]
    subprocess.run([*engine, *trained], cwd=folder, check=True)
    for name in ("web", "code"):
        output = ["prepare", "--input", f"{name}.jsonl", "--output", name, "--tokenizer", "tokenizer"]
        subprocess.run([*engine, *output], cwd=folder, check=True)
        for suffix in ("bin", "idx", "json"):
            (folder / f"{name}-train.{suffix}").rename(folder / f"{name}.{suffix}")


def make(path: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            files = [folder / f"{name}.{suffix}" for name in ("web", "code") for suffix in ("bin", "idx", "json")]
            files += folder.glob("tokenizer/*")
            for name in RUNS:
                run = folder / name / "run"
                if name == "fp16":
                    assert train(name, folder, "--train.steps", "3").wait() == 0
                process = train(name, folder)
                while process.poll() is None and not any(r["step"] >= 5 for r in records(run)):
                    time.sleep(0.01)
                process.send_signal(signal.SIGTERM)
                process.wait()
                assert json.loads((run / "exit.json").read_text())["code"] == 75
                files += [file for file in run.rglob("*") if file.is_file()]
                stopped = max(r["step"] for r in records(run))
                for file in sorted(files):
                    archive.write(file, file.relative_to(folder))
                files.clear()
                scored = [sys.executable, "-m", "engine", "evaluate", str(run), "--data", "web"]
                archive.writestr(f"{name}/evaluated.txt", subprocess.check_output(scored, cwd=folder, text=True))
                assert train(name, folder).wait() == 0
                later = [r for r in records(run) if r["step"] > stopped]
                lines = ({k: v for k, v in r.items() if k not in TIMES and "bytes_" not in k} for r in later)
                archive.writestr(f"{name}/expected.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve())
