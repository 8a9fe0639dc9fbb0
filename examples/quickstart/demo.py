"""The complete workflow on a CPU in a few minutes: raw text to a trained, resumed, evaluated and exported model.

Every step prints the command that it runs, so that you can repeat and change it. `make demo` runs this script. The text
is available on every machine: the sources of the Python standard library.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
EXCLUDE = ["site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "pydoc_data", "encodings"]
OUTPUTS = ("tokenizer", "data", "run", "hf", "loss.png")  # written to the demo's folder, and removed by its next start
MARK = ".made-by-the-demo"
console = Console(highlight=False, soft_wrap=True)


class Failed(Exception):
    """A step did not have the expected result."""


@dataclass
class Demo:
    """The steps of the demo. folder: of all outputs. short: the smaller version of the test."""

    folder: Path
    steps: int
    vocab_size: int
    include: list[str]
    config: Path
    short: bool

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def prepare(self) -> None:
        stdlib = sysconfig.get_path("stdlib")
        command = ["engine", "prepare", "--input", stdlib, "--include", *self.include, "--exclude", *EXCLUDE]
        command += ["--train-vocab-size", str(self.vocab_size), "--tokenizer", str(self.folder / "tokenizer")]
        command += ["--valid-fraction", "0.05", "--output", str(self.folder / "data/stdlib")]
        announce("a", "train a tokenizer and write train and validation files", command)
        call(command)

    def train_command(self, *layout: str) -> list[str]:
        data = {"train": "data/stdlib-train", "valid": "data/stdlib-valid", "tokenizer": "tokenizer"}
        command = ["torchrun", "--standalone", "--nproc-per-node", "4", "-m", "engine", "train"]
        command += ["--config", str(self.config), "--run.dir", str(self.run), "--train.steps", str(self.steps)]
        command += [part for key, path in data.items() for part in (f"--data.{key}", str(self.folder / path))]
        return [*command, *layout]

    def train_half(self) -> None:
        command = self.train_command("--parallel.tensor", "2", "--parallel.pipeline", "2")
        announce(
            "b",
            f"train on 4 processes as tensor 2 x pipeline 2; stop by SIGTERM half-way (step {self.steps // 2})",
            command,
        )
        begin = time.time()
        process = start(command)
        while process.poll() is None and last_step(self.run) < self.steps // 2:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # as a cluster does before it ends a job
        process.wait(timeout=120)
        path = self.run / "exit.json"
        ending = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if ending.get("code") != 75:
            raise Failed(f"the ranks should have saved and exited with code 75, but exit.json contains {ending}")
        console.print(f"  stopped: {ending} after {time.time() - begin:.0f} s")

    def resume(self) -> None:
        before = metrics(self.run)
        command = self.train_command("--parallel.pipeline", "2", "--parallel.data", "2")
        announce("c", "resume the same run as pipeline 2 x data 2: another layout, the same losses", command)
        call(command)
        after = metrics(self.run)
        stop = max(before)
        if stop + 1 not in after or abs(after[stop + 1] - before[stop]) > 1.0:
            raise Failed(f"the loss jumped at the resume: {before[stop]} at step {stop}, then {after.get(stop + 1)}")
        pairs = ", ".join(f"{s}: {after[s]:.4f}" for s in (stop - 1, stop, stop + 1, stop + 2) if s in after)
        console.print(f"  loss around the stop, by step: {pairs}")

    def use(self) -> None:
        command = ["engine", "evaluate", str(self.run)]
        announce("d", "compute its validation loss", command)
        call(command)
        command = ["engine", "generate", str(self.run), "--prompt", "def ", "--max-tokens", "96"]
        announce("d", "generate text", command)
        call(command)

    def export(self) -> None:
        command = ["engine", "export", str(self.run), str(self.folder / "hf"), "--verify"]
        announce("e", "export a Hugging Face folder; transformers must compute the same logits", command)
        call(command)
        command = ["engine", "plot", str(self.run), "--output", str(self.folder / "loss.png")]
        announce("f", "draw the loss curve", command)
        call(command)

    def summary(self, seconds: float) -> None:
        report = json.loads((self.folder / "data/stdlib-report.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        scores = [line for line in lines if "val_loss" in line]
        loss, unigram = scores[-1]["val_loss"], report["valid"]["unigram_entropy"]
        goal = math.log(self.vocab_size) if self.short else unigram  # the short version cannot learn context
        if not loss < goal - 0.5:
            raise Failed(f"validation loss {loss:.3f} is not well below {goal:.3f} (unigram entropy {unigram:.3f})")
        table = Table("output", "path", "size or score", title=f"Done in {seconds:.0f} s", title_justify="left")
        rows = [
            ("tokenizer", "tokenizer", f"{report['vocab_size']:,} tokens"),
            ("training data", "data/stdlib-train.bin", f"{report['train']['tokens']:,} tokens"),
            ("validation data", "data/stdlib-valid.bin", f"unigram entropy {unigram:.3f} nats/token"),
            ("run: metrics, checkpoints, TensorBoard", "run", f"validation loss {loss:.3f} nats/token"),
            ("Hugging Face model", "hf", f"perplexity {math.exp(loss):.1f}, {scores[-1]['val_bpb']:.3f} bits/byte"),
            ("loss curve", "loss.png", f"{self.steps} steps"),
        ]
        for output, path, figure in rows:
            table.add_row(output, str(self.folder / path), figure)
        console.print(table)
        console.print("next steps:")
        for command in (
            f"{show(BIN / 'engine')} generate {show(self.run)} --prompt 'import ' --temperature 0",
            f"{show(BIN / 'tensorboard')} --logdir {show(self.run)}",
            f"{show(BIN / 'engine')} train --config examples/configs/llama-2-7b.toml --dry-run",
            "your own text: README.md, section 'Your own data'",
        ):
            console.print(f"  {command}", markup=False)


def show(path: Path) -> Path:
    """The path relative to the current folder if it is inside, else unchanged."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def announce(step: str, text: str, command: list[str]) -> None:
    """Print the title of a step and the command that a user would type."""
    console.rule(style="dim")
    console.print(f"[bold]{step}.[/bold] {text}\n[cyan]$ {shlex.join(command)}[/cyan]")


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a command of this environment; torchrun with one thread per process, as it starts more than two of them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} if command[0] == "torchrun" else dict(os.environ)
    log = None if command[0] != "torchrun" else subprocess.DEVNULL
    return subprocess.Popen([str(BIN / command[0]), *command[1:]], env=environment, stderr=log)


def call(command: list[str]) -> None:
    """Run a command; raise Failed if its exit code is not 0."""
    code = start(command).wait()
    if code:
        raise Failed(f"exit code {code}: {shlex.join(command)}")


def metrics(run: Path) -> dict[int, float]:
    """Training loss by step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl; 0 if there is none."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except ValueError:  # the line is incomplete: it is being written
        return 0


def prepare_folder(folder: Path) -> bool:
    """Create the folder, or remove an earlier demo's outputs from it. False if it has files but no demo wrote them."""
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARK).exists():
            return False
        console.print(f"{folder} is from an earlier demo: removing {', '.join(OUTPUTS)}", markup=False)
        for path in (folder / name for name in OUTPUTS):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="folder for all outputs (default: demo)")
    parser.add_argument("--short", action="store_true", help="use a smaller corpus and 60 steps, as the test does")
    args = parser.parse_args()
    if not prepare_folder(args.folder):
        console.print(
            f"error: {args.folder} is not empty and not from a demo: remove it or choose another --folder", style="red"
        )
        return 1
    size = {"steps": 300, "vocab_size": 4096, "include": ["*.py", "*.txt", "*.rst"]}
    if args.short:
        size = {"steps": 60, "vocab_size": 512, "include": ["a*.py", "s*.py", "t*.py"]}
    demo = Demo(folder=args.folder, config=HERE.parent / "configs/demo.toml", short=args.short, **size)
    begin = time.time()
    try:
        for step in (demo.prepare, demo.train_half, demo.resume, demo.use, demo.export):
            step()
        demo.summary(time.time() - begin)
    except Failed as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
