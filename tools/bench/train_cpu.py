"""Tokens/s of training on this CPU: the engine and its peers, on one process and in three parallel layouts.

    python tools/bench/train_cpu.py                                  # the whole table; hours on two cores
    python tools/bench/train_cpu.py --columns one --rounds 3         # the one-process comparison only
    python tools/bench/train_cpu.py --cases engine litgpt compiled   # chosen programs

Single runs on a noisy machine are useless, so the measurement has rounds. A round runs every case once, each in a fresh
process, in a rotating order, and measures a matmul as the limit; a ratio is of one round. A step during which other
programs used the CPU does not count; more steps run until enough were undisturbed. A round without enough of them for
one of the two sides does not count if there are other rounds. If all are disturbed the row says so; then use
`--threads 1` and the column of CPU seconds, which do not include waiting. Allocators are not tuned: MALLOC_* variables
reach all cases.

Every peer must do the same work: the same number of parameters, a similar first loss, and a similar fall of the loss
over the same steps on the same random tokens. Otherwise it is shown with the reason, and not compared.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tyro
from machine import describe, wait_until_quiet
from measure import CASES, COLUMNS, Case, Column, Options
from peers_env import python_of
from report import Row, finish, show, spread

Result = dict[str, Any]
SAME_LOSS = 0.3  # nats by which a peer's first loss may differ from ours
SAME_FALL = 1.5  # and so many times as much or as little may it fall


def end(process: subprocess.Popen[str]) -> None:
    """Terminate it; torchrun also ends its ranks, which have separate sessions, unless it is killed."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def run_case(o: Options, name: str, python: Path, compiled: Path | None = None) -> Result:
    """Run a case once in fresh processes; returns the measurements or {"error": its last line}.

    compiled: cache folder of torch.compile for the case's next run; else its default.
    """
    case = Case("", "one") if name == "gemm" else o.case(name)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [str(python)]
        if case.processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.processes}"]
        options = json.dumps(asdict(o) | {"json": None, "peers_env": str(o.peers_env)})
        command += [str(Path(__file__).with_name("worker.py")), name, str(out), options]
        threads = o.threads if name == "gemm" else case.threads
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONFAULTHANDLER": "1"}
        if compiled is not None:
            env["TORCHINDUCTOR_CACHE_DIR"] = str(compiled / name)
        with open(Path(folder) / "words", "w+", encoding="utf-8") as words:
            process = subprocess.Popen(command, env=env, stdout=words, stderr=words, encoding="utf-8")
            code: int | None = None
            try:
                code = process.wait(o.timeout)
            except subprocess.TimeoutExpired:
                pass
            finally:  # also when this program is interrupted
                if code is None:
                    end(process)
            words.seek(0)
            output = [line.strip() for line in words if line.strip()]
        if code == 0 and out.exists():
            return dict(json.loads(out.read_text(encoding="utf-8")))
        if code is None:
            return {"error": f"not done after {o.timeout:.0f} s"}
        output = output[: next((i for i, line in enumerate(output) if "torch/distributed/elastic" in line), None)]
        causes = [line.split("]:")[-1].strip() for line in output if "Error: " in line or line.endswith("Error")]
        return {"error": (causes or output[-1:] or [f"ended with code {code}"])[0], "output": output[-60:]}


def doubt(o: Options, result: Result, ours: Result | None) -> str:
    """Why a run is not the same work as ours, or nothing."""
    wanted, has = o.parameters(), result["parameters"]
    if abs(has / wanted - 1) > 0.005:
        return f"{has:,} parameters instead of {wanted:,}"
    losses, own = result["losses"], ours["losses"] if ours else []
    if own and abs(losses[0] - own[0]) > SAME_LOSS:
        return f"its first loss is {losses[0]:.2f}, ours {own[0]:.2f}"
    last = min(len(losses), len(own)) - 1
    if last > 0:
        fall, our_fall = losses[0] - losses[last], own[0] - own[last]
        if not our_fall / SAME_FALL < fall < our_fall * SAME_FALL:
            return f"its loss falls by {fall:.3f} in {last} steps, ours by {our_fall:.3f}"
    return ""


def paired(o: Options, ours: list[Result], theirs: list[Result]) -> tuple[list[int], str]:
    """Rounds to compare: those undisturbed on both sides, or else all, and then a note."""
    rounds = range(min(len(ours), len(theirs)))
    quiet = [i for i in rounds if max(ours[i]["others"], theirs[i]["others"]) <= o.quiet]
    return (quiet, "") if quiet else (list(rounds), "disturbed")


FIGURES = {  # of a run: key -> (unit, larger is better)
    "tokens_per_s": ("tokens/s", True),
    "peak_sum_mib": ("peak MiB, all ranks", False),
    "first_step_s": ("first step, s", False),
}


def best_peer(key: str, more: bool, mine: str, runs: dict[str, list[Result]], doubts: dict[str, str]) -> str:
    """The case of the same column that has the best median of a figure; "" if there is none."""
    able = [
        name
        for name, found in runs.items()
        if found and name != mine and name not in doubts and CASES[name].column == CASES[mine].column
    ]
    figures = {name: [run[key] for run in runs[name]] for name in able}
    middle = {name: found[0] if key == "first_step_s" else statistics.median(found) for name, found in figures.items()}
    return (max if more else min)(able, key=middle.__getitem__, default="")


def rows_of(o: Options, runs: dict[str, list[Result]], doubts: dict[str, str], gemms: list[Result]) -> list[Row]:
    """Each figure of each column: ours, the peer that is best at it, and of tokens/s the limit."""
    rows = []
    limits = [max(one.values()) * 1e9 / o.flops_per_token() for one in gemms]
    for key, (unit, more) in FIGURES.items():
        for column in COLUMNS.values():
            ours = runs.get(column.ours)
            if not ours:
                continue
            speed, peer = key == "tokens_per_s", best_peer(key, more, column.ours, runs, doubts)
            theirs = runs[peer] if peer else []
            rounds, note = paired(o, ours, theirs or ours)
            notes = [note, not_compared(column, doubts) if speed else ""]
            if key == "first_step_s":
                rounds = [0]  # later rounds use the compile cache of the first
            row = Row(f"train, {column_title(o, column)}", unit, [ours[i][key] for i in rounds], more=more)
            if peer:
                row = replace(row, peer=CASES[peer].title, peers=[theirs[i][key] for i in rounds])
            if speed:
                row = replace(row, limit="at GEMM peak", limits=[limits[i] for i in rounds])
            rows.append(replace(row, note="; ".join(filter(None, notes))) if key != "peak_sum_mib" else row)
    return rows


def not_compared(column: Column, doubts: dict[str, str]) -> str:
    """The cases that are not compared in a column, grouped by reason."""
    names: dict[str, list[str]] = {}
    for name, why in doubts.items():
        if CASES[name].column == CASES[column.ours].column:
            names.setdefault(why, []).append(CASES[name].title)
    text = "; ".join(f"{', '.join(titles)} ({why})" for why, titles in names.items())
    return f"not compared: {text}" if text else ""


def column_title(o: Options, column: Column) -> str:
    """With as many threads as asked for."""
    return column.title if column.processes > 1 else f"1 process x {o.threads} threads"


def show_cases(o: Options, runs: dict[str, list[Result]], doubts: dict[str, str], gemms: list[Result]) -> None:
    """All that is known of every case."""
    lines = []
    peak = statistics.median(max(one.values()) for one in gemms)
    for name, found in runs.items():
        case = o.case(name)
        ours = runs.get(COLUMNS[case.column].ours, [])
        if not found:
            lines.append((name, case.title, "-", "", "", "", "", "", "", "", "", doubts[name]))
            continue
        flops = statistics.median(r["tokens_per_s"] for r in found) * o.flops_per_token() / 1e9
        ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(ours, found)]
        losses = found[0]["losses"]
        lines.append(
            (
                name,
                case.title,
                spread([r["tokens_per_s"] for r in found], 0),
                spread(ratios, 2) if ratios and found is not ours else "",
                f"{flops / peak:.2f}",
                spread([statistics.median(r["cpu_seconds"]) for r in found], 2),
                f"{statistics.median(r['page_faults_per_step'] for r in found):,.0f}",
                f"{statistics.median(r['peak_rss_mib'] for r in found):,.0f}",
                f"{statistics.median(r['peak_sum_mib'] for r in found):,.0f}",
                f"{found[0]['first_step_s']:.1f}",
                f"{losses[0]:.2f} > {losses[-1]:.2f}",
                f"{max(r['others'] for r in found):.2f}" + (f"; {doubts[name]}" if name in doubts else ""),
            )
        )
    kinds = ", ".join(f"{kind} {spread([g[kind] for g in gemms], 0)}" for kind in gemms[0])
    show(
        f"{o.parameters() / 1e6:.1f} M parameters, {o.flops_per_token() / 1e6:.0f} MFLOP a token, fp32; "
        f"GFLOP/s of {o.gemm_size}^3, {o.threads} threads: {kinds}",
        ("case", "program", "tokens/s", "engine is", "of GEMM", "CPU s", "faults", "MiB", "MiB all", "first s", "loss")
        + ("others",),
        lines,
        "median (range) over rounds; engine is: so many times as fast, of the same round; CPU s, page faults and peak "
        "MiB (rank 0, sum of all): a step; first s: the first step of the first round; others: most cores that others "
        "used in a step that counts",
    )


def chosen(o: Options) -> tuple[str, ...]:
    """Names of the cases asked for, ours of a column first."""
    for words, known in ((o.cases, CASES), (o.columns, COLUMNS)):
        if unknown := set(words) - set(known):
            sys.exit(f"not known: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    names = o.cases or tuple(name for name, case in CASES.items() if case.column in o.columns)
    return tuple(name for name in CASES if name in names and (o.peers or not CASES[name].peer))


def one_round(
    o: Options, number: int, pythons: dict[str, Path], compiled: Path, runs: dict[str, list[Result]]
) -> dict[str, str]:
    """Every case once, in an order that turns; {case: why it could not be run}."""
    errors, names = {}, list(pythons)
    turn = number % max(1, len(names))
    for name in (*names[turn:], *names[:turn]):
        wait_until_quiet(o.quiet, o.patience)
        result = run_case(o, name, pythons[name], compiled)
        if "error" in result:
            errors[name] = result["error"]
            print(f"round {number + 1}/{o.rounds}  {name:<18} {result['error']}", flush=True)
            if name in (column.ours for column in COLUMNS.values()):
                sys.exit("\n".join(result.get("output", [])))
            continue
        tokens = CASES[name].sequences(o.micro_batch) * o.seq
        result["tokens_per_s"] = tokens / statistics.median(result["seconds"])
        runs[name].append(result)
        print(
            f"round {number + 1}/{o.rounds}  {name:<18} {result['tokens_per_s']:7.1f} tokens/s  "
            f"loss {result['losses'][0]:.3f} > {result['losses'][-1]:.3f}  others {result['others']:.2f} cores  "
            f"{result['steps_made']} steps made",
            flush=True,
        )
    return errors


def main() -> None:
    o = tyro.cli(Options, description=__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = chosen(o)
    machine = describe()
    own, doubts, pythons = Path(sys.executable), {}, {}
    peers, why = python_of(o.peers_env) if any(CASES[name].peer for name in names) else (None, "")
    for name in names:
        if not CASES[name].peer:
            pythons[name] = own
        elif peers is not None:
            pythons[name] = peers
        else:
            doubts[name] = why
    runs: dict[str, list[Result]] = {name: [] for name in names}
    gemms: list[Result] = []
    with tempfile.TemporaryDirectory() as compiled:
        for number in range(o.rounds):
            wait_until_quiet(o.quiet, o.patience)
            gemms.append(run_case(o, "gemm", own))
            if "error" in gemms[-1]:
                sys.exit(f"gemm: {gemms[-1]['error']}")
            able = {name: python for name, python in pythons.items() if name not in doubts}
            doubts |= one_round(o, number, able, Path(compiled), runs)
    for name, found in runs.items():
        ours = runs.get(COLUMNS[CASES[name].column].ours)
        output = [doubt(o, run, ours[0] if ours else None) for run in found]
        if name not in doubts and any(output):
            doubts[name] = next(filter(None, output))
    show_cases(o, runs, doubts, gemms)
    rows = rows_of(o, runs, doubts, gemms)
    finish(rows, {"runs": runs, "gemm": gemms, "not_compared": doubts}, o.json, "Training on this CPU", machine)


if __name__ == "__main__":
    main()
