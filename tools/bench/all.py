"""Run all benchmarks of this folder (`make bench`) and print one table; also writes one JSON file.

    python tools/bench/all.py                          # more than an hour, on an idle machine
    python tools/bench/all.py --quick                  # about 3 minutes: too few repetitions to quote the numbers
    python tools/bench/all.py --only train checkpoint

The output of the scripts, with more detailed tables, is written to a .log file next to the JSON. A script that fails
has a line in the table, and the exit code is then 1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from machine import describe
from peers_env import python_of
from report import Row, finish, from_json

HERE = Path(__file__).resolve().parent
SCRIPTS = {
    "train": "train_cpu.py",
    "startup": "startup.py",
    "prepare": "prepare.py",
    "checkpoint": "checkpoint.py",
    "order": "order.py",
}
QUICK = {
    "train": "--rounds 1 --steps 2 --warmup 1 --tries 1 --patience 0 --no-peers "
    "--cases engine loop data data.loop tensor",
    "startup": "--repeats 1 --patience 0",
    "prepare": "--megabytes 20 --repeat 1",
    "checkpoint": "--gib 0.25 --ranks 1 --repeats 2",
    "order": "--documents 1000000 --trials 1",
}
TINY = QUICK | {
    "train": "--rounds 1 --steps 1 --warmup 1 --tries 1 --patience 0 --no-peers --cases engine loop tensor --hidden 64 "
    "--layers 2 --heads 4 --ffn 176 --vocab 500 --seq 32 --micro-batch 2 --gemm-size 256",
    "startup": "--repeats 1 --patience 0 --ranks 2 --torchrun 2",
    "prepare": "--megabytes 1 --repeat 1",
    "checkpoint": "--gib 0.05 --ranks 1 --repeats 1",
    "order": "--documents 10000 --trials 1 --sources 0",
}


@dataclass(frozen=True)
class Options:
    """What to run, and where to write it."""

    only: tuple[str, ...] = tuple(SCRIPTS)
    """train, startup, prepare, checkpoint, order"""
    quick: bool = False
    """small sizes and few repetitions, without optional peers"""
    tiny: bool = False
    """tiny sizes, in half a minute: only checks that the scripts run"""
    rounds: int = 3
    """of the training rows: about 20 minutes each"""
    peers_env: Path = field(default_factory=lambda: HERE.parents[1] / "build/bench-peers")
    """folder of the peers' packages; made on first use"""
    json: Path = Path("bench.json")
    """write every number here; the scripts' output goes to a .log file next to it"""


def arguments(o: Options, name: str, python: Path | None) -> list[str]:
    """Of a script."""
    if o.tiny or o.quick:
        return (TINY if o.tiny else QUICK)[name].split()
    if name == "train":
        return ["--peers-env", str(o.peers_env), "--rounds", str(o.rounds), "--steps", "4", "--tries", "3"]
    option = {"prepare": "--datatrove", "order": "--megatron-python"}.get(name)
    return [option, str(python)] if option and python else []


def run(o: Options, name: str, python: Path | None, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """(rows, output) of one script; if it failed, one row with the reason."""
    out = folder / f"{name}.json"
    command = [sys.executable, str(HERE / SCRIPTS[name]), *arguments(o, name, python), "--json", str(out)]
    begin = time.monotonic()
    with o.json.with_suffix(".log").open("a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=log).returncode
    seconds = round(time.monotonic() - begin, 1)
    print(f"{SCRIPTS[name]}: {seconds} s" + f", ended with code {code}" * bool(code), flush=True)
    if code or not out.exists():
        note = f"{SCRIPTS[name]} ended with code {code}: see {o.json.with_suffix('.log')}"
        return [Row(name, "FAILED", [], note=note)], {"failed": code, "seconds": seconds}
    found = json.loads(out.read_text(encoding="utf-8"))
    return [from_json(row) for row in found["rows"]], found | {"seconds": seconds}


def main() -> None:
    o = tyro.cli(Options, description=__doc__)
    if unknown := set(o.only) - set(SCRIPTS):
        sys.exit(f"not known: {', '.join(sorted(unknown))}; there are {', '.join(SCRIPTS)}")
    machine = describe()
    wanted = not (o.tiny or o.quick) and {"prepare", "order"} & set(o.only)  # train asks for them itself
    python, why = python_of(o.peers_env) if wanted else (None, "")
    if why:
        print(why, file=sys.stderr)
    o.json.with_suffix(".log").write_text("", encoding="utf-8")
    rows: list[Row] = []
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in SCRIPTS:
            if name in o.only:
                found, details[name] = run(o, name, python, Path(folder))
                rows += found
    finish(rows, details, o.json, machine=machine)
    sys.exit(any("failed" in one for one in details.values()))


if __name__ == "__main__":
    main()
