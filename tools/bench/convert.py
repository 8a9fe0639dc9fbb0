"""`engine import` and `engine export` compared with a plain copy of the same folder.

    python tools/bench/convert.py --layers 32 --repeats 1      # 7B: 13.5 GB, needs three times that on the disk

The model has Llama-2-7B's widths in bf16 and `--layers` layers. Each of the three runs in a fresh process that reads
files outside the page cache and syncs its files; the copy reads and writes 16 MiB at a time, in one thread. Peak: the
largest resident set of the process.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent))

from machine import describe, drop_cache
from report import Row, finish

from engine.checkpoint.tensorfile import write_safetensors

CONFIG = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5},
    **{
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
    },
    **{"rope_theta": 10000.0, "tie_word_embeddings": False, "initializer_range": 0.02},
}
MODULES = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    layers: int = 6
    hidden: int = 4096
    ffn: int = 11008
    vocab: int = 32000
    shard_mib: float = 4096.0
    """of the folder that is read and of what is written"""
    repeats: int = 3
    folder: Path = Path(tempfile.gettempdir())
    """on the disk to measure"""
    json: Path | None = None
    """write every number here"""
    work: tuple[str, ...] = ()
    """for the processes that this script starts: what to do, from where, to where"""


def make_folder(o: Options, folder: Path) -> int:
    """A Hugging Face folder of random weights; its bytes."""
    folder.mkdir()
    h, f = o.hidden, o.ffn
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (o.vocab, h)}
    for i in range(o.layers):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}self_attn.{m}_proj.weight": (h, h) for m in MODULES}
        shapes |= {f"{layer}mlp.{m}_proj.weight": (f, h) for m in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (h, f)}
        shapes |= {f"{layer}{m}_layernorm.weight": (h,) for m in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (h,), "lm_head.weight": (o.vocab, h)}
    noise = torch.randn(max(o.vocab, f) * h).bfloat16()
    files: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, shape in shapes.items():
        x = noise[: torch.Size(shape).numel()].view(shape)
        if size + x.nbytes > o.shard_mib * 2**20:
            files.append({})
            size = 0
        files[-1][name] = x
        size += x.nbytes
    weight_map, total = {}, 0
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(folder / name, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(x.nbytes for x in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    sizes = {"hidden_size": h, "intermediate_size": f, "num_hidden_layers": o.layers, "vocab_size": o.vocab}
    (folder / "config.json").write_text(json.dumps(CONFIG | sizes), encoding="utf-8")
    return total


def copy(source: Path, target: Path) -> None:
    """Every file of a folder, 16 MiB at a time, each synced."""
    target.mkdir()
    block = memoryview(bytearray(16 << 20))
    for file in sorted(source.iterdir()):
        with file.open("rb", buffering=0) as there, (target / file.name).open("wb", buffering=0) as here:
            while count := there.readinto(block):
                here.write(block[:count])
            os.fsync(here.fileno())


def work(o: Options) -> None:
    """One of the three in this process: prints seconds and MiB."""
    what, source, target = o.work
    from engine.cli.main import main as engine  # its imports are not timed

    torch.empty(1).bfloat16()
    before = time.perf_counter()
    if what == "copy":
        copy(Path(source), Path(target))
    else:
        try:
            engine([what, source, target, "--shard-mib", str(o.shard_mib)])
        except SystemExit as end:
            if end.code:
                raise
    seconds = time.perf_counter() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"s": seconds, "mib": peak}))


def measure(o: Options, what: str, source: Path, target: Path) -> dict[str, float]:
    """Run one of the three in a fresh process."""
    shutil.rmtree(target, ignore_errors=True)
    drop_cache(source)
    os.sync()
    command = [sys.executable, __file__, "--shard-mib", str(o.shard_mib), "--work", what, str(source), str(target)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"{what} failed: {done.stdout}{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(o: Options) -> None:
    """Print one table."""
    if o.work:
        return work(o)
    machine, found = describe(), []
    with tempfile.TemporaryDirectory(dir=o.folder) as name:
        root = Path(name)
        size = make_folder(o, root / "hf")
        measure(o, "import", root / "hf", root / "run")
        for number in range(o.repeats):
            now, steps = {}, [("copy", "hf", "copy"), ("import", "hf", "new"), ("export", "run", "out")]
            random.Random(number).shuffle(steps)
            for what, source, target in steps:
                now[what] = measure(o, what, root / source, root / target)
                shutil.rmtree(root / target)
            found.append(now)
    copies = [now["copy"]["s"] for now in found]
    rows = []
    for what in ("import", "export"):
        peak = max(now[what]["mib"] for now in found)
        mine = [now[what]["s"] for now in found]
        note = f"peak {peak:,.0f} MiB, of the copy {max(now['copy']['mib'] for now in found):,.0f}"
        rows.append(Row(what, "s", mine, limit="plain copy + fsync", limits=copies, more=False, note=note))
    finish(rows, found, o.json, f"Conversion of {size / 1e9:.2f} GB in bf16", machine)
    return None


if __name__ == "__main__":
    main(tyro.cli(Options))
