"""All measurements of one GPU in one call, in less than ten minutes, from a new machine and a checkout.

    python tools/bench/gpu.py                      # on the GPU machine, from the repository's root
    python tools/bench/gpu.py --device cpu --tiny  # runs all code on a CPU in seconds; the numbers mean nothing

It builds the extension, runs the checks, measures this machine's two limits (a large bf16 matmul of random values, a
large copy), then times each operation against them, every attention that can run, and whole steps of Llama-2-7B's
shape. Results are written to gpu.json (--out) after every measurement, so a time limit loses nothing.
--wheels installs missing packages from a folder of wheels, for a machine without a network.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_measure import Session

ROOT = Path(__file__).resolve().parents[2]
AIM = 0.80
BUDGET_S = {  # about 9 minutes on an H200; a section may exceed its budget by one measurement
    "checks": 100.0,
    "limits": 20.0,
    "step": 150.0,
    "attention": 35.0,
    "ops": 60.0,
    "profile": 15.0,
    "variants": 70.0,
    "curve": 25.0,
    "peers": 40.0,
}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first, into a separate folder")
    parser.add_argument("--sections", nargs="+", default=list(BUDGET_S), choices=list(BUDGET_S))
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="file of the results")
    parser.add_argument("--no-build", action="store_true", help="take the extension as it is")
    return parser.parse_args()


def prepare(o: argparse.Namespace) -> None:
    """Install the packages of --wheels and build the extension, so that imports work on a new machine."""
    if o.wheels is not None:
        site = ROOT / "build" / "site"
        shutil.rmtree(site, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target"]
        subprocess.run([*pip, str(site), *map(str, sorted(o.wheels.glob("*.whl")))], check=True)
        sys.path.insert(0, str(site))
        os.environ["PYTHONPATH"] = f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    sys.path.insert(0, str(ROOT))
    if not o.no_build:
        began = time.monotonic()
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        try:
            built = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=300)
        except subprocess.TimeoutExpired:
            print("the extension was not built within 300 s: continuing without it", flush=True)
            return
        print(f"built the extension: code {built.returncode}, {time.monotonic() - began:.0f} s", flush=True)
        if built.returncode:
            print(built.stdout[-1500:], built.stderr[-1500:], flush=True)


def main() -> None:
    o = options()
    began = time.monotonic()
    prepare(o)
    import gpu_ops
    import gpu_step
    import torch
    from gpu_measure import TINY, Session, Sizes, measure_limits, rows_of
    from machine import describe
    from report import header, show_rows

    device = torch.device(o.device, 0) if o.device == "cuda" else torch.device("cpu")
    out = o.out
    machine = describe() | {"gpu": torch.cuda.get_device_name() if o.device == "cuda" else "none"}
    session = Session(device, TINY if o.tiny else Sizes(), out, machine)
    sections = {
        "checks": lambda: checks(session),
        "limits": lambda: measure_limits(session),
        "step": lambda: gpu_step.step(session),
        "attention": lambda: gpu_ops.attention(session),
        "ops": lambda: gpu_ops.ops(session),
        "profile": lambda: gpu_step.profile(session),
        "variants": lambda: gpu_step.variants(session),
        "curve": lambda: gpu_step.curve(session),
        "peers": lambda: gpu_step.peers(session),
    }
    for name in [name for name in sections if name in o.sections or name == "limits"]:
        session.begin(name, BUDGET_S[name])
        sections[name]()
        session.results.setdefault("seconds", {})[name] = time.monotonic() - began
        session.save()
    show_rows(f"{machine['gpu']}; {header(machine)}", rows_of(session.results))
    print(summary(session.results), flush=True)


def checks(session: Session) -> None:
    """`engine doctor`, and the tests for GPUs where there are any."""
    session.attempt("engine doctor", _check, session, "engine doctor", ["engine", "doctor"])
    if session.cuda and (ROOT / "tests/gpu").is_dir():
        words = ["pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
        session.attempt("tests/gpu", _check, session, "tests/gpu", words)


def _check(session: Session, name: str, words: list[str]) -> None:
    began = time.monotonic()
    command = [sys.executable, "-m", *words]
    left = max(10.0, session.deadline - began)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=left)
    session.record(name, code=done.returncode, s=time.monotonic() - began, output=done.stdout.splitlines()[-40:])


def summary(results: dict[str, list[dict[str, float]]]) -> str:
    """The summary line."""
    steps = [row for row in results.get("step", []) if "share" in row]
    if not steps:
        return "no step was measured"
    best = max(steps, key=lambda row: row["share"])
    share = best["share"]
    return (
        f"best: {best['what']}, {best['layers']} layers: {best['tokens_per_s']:,.0f} tokens/s, {best['tflops']:,.3g} "
        f"TFLOP/s = {share:.3f} of the large matmul in this call; aim {AIM:.2f}: {'met' if share >= AIM else 'missed'}"
    )


if __name__ == "__main__":
    main()
