"""MB/s of `engine prepare` beside a bare loop of the same libraries (orjson + gigatoken + write), on the same text.

Each run is a process of its own, whole: start-up and imports, checks, syncs and the index count for ours. Runs of the
bare loop and of ours alternate, so that a machine that others use slows both. Peers (Megatron-LM, datatrove) are not
run here. `python tools/bench/prepare.py --megabytes 200 --repeat 3`
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from machine import busy_s, describe
from rich.console import Console
from rich.table import Table

from engine.data.tokenizer import Tokenizer

BARE = """
import sys, json, orjson, gigatoken, numpy as np
source, tokenizer, target = sys.argv[1:]
definition = json.load(open(tokenizer + "/tokenizer.json"))
definition["added_tokens"] = []
encode = gigatoken.Tokenizer.from_json(json.dumps(definition)).encode_batch
with open(source, "rb") as lines, open(target, "wb") as out:
    while batch := lines.readlines(4 << 20):
        out.write(np.asarray(encode([orjson.loads(line)["text"] for line in batch]).layout.content.data).astype("<u2"))
"""
Figures = tuple[float, float, float, float]
FORMATS = ("jsonl", "jsonl.zst", "jsonl.gz", "parquet")


def make_corpus(folder: Path, megabytes: int) -> None:
    """Documents of the standard library's sources in pieces of 500 to 20,000 characters, and a tokenizer."""
    texts = [
        path.read_text(errors="replace") for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))[:1500]
    ]
    Tokenizer.train(iter(texts[::8]), 16000).save(folder / "tokenizer")
    written, number = 0, 0
    with open(folder / "in.jsonl", "wb") as out:
        while written < megabytes * 1_000_000:
            text = texts[number % len(texts)]
            size = 500 + (number * 7919) % 19_500
            start = (number * 104_729) % max(1, len(text) - size)
            out.write(json.dumps({"id": number, "text": f"{number}\n{text[start : start + size]}"}).encode() + b"\n")
            written, number = out.tell(), number + 1
    pack(folder)


def pack(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet
    import zstandard

    data = (folder / "in.jsonl").read_bytes()
    (folder / "in.jsonl.gz").write_bytes(gzip.compress(data, 3))
    (folder / "in.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(data))
    texts = [json.loads(line)["text"] for line in data.splitlines()]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "in.parquet", row_group_size=10_000)


def measure(command: list[str]) -> Figures:
    """(seconds, its processor seconds, peak MB, share of all processor time that others used) of a process."""
    before, began = busy_s(), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"failed: {command}")
    own = usage.ru_utime + usage.ru_stime
    others = max(0.0, (busy_s() - before - own) / (seconds * (os.cpu_count() or 1)))
    return seconds, own, usage.ru_maxrss / 1e3, others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--make", type=Path, help="write the corpus to this folder and stop")
    args = parser.parse_args()
    if args.make:
        make_corpus(args.make, args.megabytes)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own: what is started from a large process counts that one's memory as its own peak.
        make = [sys.executable, __file__, "--make", name, "--megabytes", str(args.megabytes)]
        subprocess.run(make, check=True)
        size = (folder / "in.jsonl").stat().st_size
        runs: dict[str, list[Figures]] = {"bare loop, jsonl": []}
        for number in range(args.repeat):
            bare = [
                sys.executable,
                "-c",
                BARE,
                str(folder / "in.jsonl"),
                str(folder / "tokenizer"),
                str(folder / "bare"),
            ]
            runs["bare loop, jsonl"].append(measure(bare))
            for kind in FORMATS:
                ours = [sys.executable, "-m", "engine", "prepare", "--input", str(folder / f"in.{kind}")]
                ours += ["--tokenizer", str(folder / "tokenizer"), "--output", str(folder / f"out{number}{kind}")]
                runs.setdefault(f"engine prepare, {kind}", []).append(measure(ours))
        facts = describe()
        title = f"{size / 1e6:.0f} MB of jsonl, {facts['cores']} cores, {facts['cpu']}; median of {args.repeat} runs"
        table = Table(
            "what",
            "seconds",
            "MB/s",
            "of the bare loop",
            "CPU s",
            "peak MB",
            "others",
            title=title,
            title_justify="left",
        )
        limit = statistics.median(run[0] for run in runs["bare loop, jsonl"])
        for what, figures in runs.items():
            seconds, own, peak, others = (statistics.median(column) for column in zip(*figures))
            rate = f"{size / 1e6 / seconds:.1f}"
            table.add_row(
                what, f"{seconds:.2f}", rate, f"{limit / seconds:.2f}", f"{own:.2f}", f"{peak:.0f}", f"{others:.0%}"
            )
        Console(width=140).print(table)
        print("'others': share of the machine that others used meanwhile; above a few % this is no measurement")


if __name__ == "__main__":
    main()
