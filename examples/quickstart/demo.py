"""The main job on this machine's CPU, in a few minutes: raw text to a trained, resumed, evaluated, exported model.

Every step prints the very command that it runs, so each can be repeated and changed by hand. `make demo` calls this.
The text is what every machine has: the Python standard library's own sources.
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
MADE = ("tokenizer", "data", "run", "hf", "loss.png")  # what the demo makes in its folder, and may remove from it
MARK = ".made-by-the-demo"
console = Console(highlight=False, soft_wrap=True)


class Failed(Exception):
    """A step did not do what it should."""


@dataclass
class Demo:
    """Where the demo works and how much it does."""

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
        announce("a", "text that every machine has -> tokenizer -> train and valid files", command)
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
            f"train on 4 processes as tensor 2 x pipeline 2; stopped by SIGTERM half-way ({self.steps // 2})",
            command,
        )
        begin = time.time()
        process = start(command)
        while process.poll() is None and last_step(self.run) < self.steps // 2:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # what a cluster does before it takes the machine away
        process.wait(timeout=120)
        exit_facts = (
            json.loads((self.run / "exit.json").read_text(encoding="utf-8"))
            if (self.run / "exit.json").exists()
            else {}
        )
        if exit_facts.get("code") != 75:
            raise Failed(f"the ranks should have saved and left with code 75, but exit.json says {exit_facts}")
        console.print(f"  stopped: {exit_facts} after {time.time() - begin:.0f} s")

    def resume(self) -> None:
        before = metrics(self.run)
        command = self.train_command("--parallel.pipeline", "2", "--parallel.data", "2")
        announce("c", "the same run goes on as pipeline 2 x data 2: another layout, the same numbers", command)
        call(command)
        after = metrics(self.run)
        stop = max(before)
        if stop + 1 not in after or abs(after[stop + 1] - before[stop]) > 1.0:
            raise Failed(
                f"the loss did not go on where it was: {before[stop]} at step {stop}, then {after.get(stop + 1)}"
            )
        pairs = ", ".join(f"{s}: {after[s]:.4f}" for s in (stop - 1, stop, stop + 1, stop + 2) if s in after)
        console.print(f"  loss around the stop, by step: {pairs}")

    def use(self) -> None:
        command = ["engine", "evaluate", str(self.run)]
        announce("d", "score it", command)
        call(command)
        command = ["engine", "generate", str(self.run), "--prompt", "def ", "--max-tokens", "96"]
        announce("d", "let it write", command)
        call(command)

    def export(self) -> None:
        command = ["engine", "export", str(self.run), str(self.folder / "hf"), "--verify"]
        announce("e", "write a Hugging Face folder; transformers must give the same logits", command)
        call(command)
        command = ["engine", "plot", str(self.run), "--output", str(self.folder / "loss.png")]
        announce("f", "draw the loss", command)
        call(command)

    def summary(self, seconds: float) -> None:
        report = json.loads((self.folder / "data/stdlib-report.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        scores = [line for line in lines if "val_loss" in line]
        loss, unigram = scores[-1]["val_loss"], report["valid"]["unigram_entropy"]
        goal = math.log(self.vocab_size) if self.short else unigram  # the short form has no time to learn context
        if not loss < goal - 0.5:
            raise Failed(f"validation loss {loss:.3f} is not well below {goal:.3f} (unigram entropy {unigram:.3f})")
        table = Table("what", "where", "figure", title=f"Done in {seconds:.0f} s", title_justify="left")
        rows = [
            ("tokenizer", "tokenizer", f"{report['vocab_size']:,} tokens"),
            ("training data", "data/stdlib-train.bin", f"{report['train']['tokens']:,} tokens"),
            ("validation data", "data/stdlib-valid.bin", f"unigram entropy {unigram:.3f} nats/token"),
            ("run: metrics, checkpoints, TensorBoard", "run", f"validation loss {loss:.3f} nats/token"),
            ("Hugging Face model", "hf", f"perplexity {math.exp(loss):.1f}, {scores[-1]['val_bpb']:.3f} bits/byte"),
            ("loss curve", "loss.png", f"{self.steps} steps"),
        ]
        for what, where, figure in rows:
            table.add_row(what, str(self.folder / where), figure)
        console.print(table)
        console.print("try next:")
        for command in (
            f"{show(BIN / 'engine')} generate {show(self.run)} --prompt 'import ' --temperature 0",
            f"{show(BIN / 'tensorboard')} --logdir {show(self.run)}",
            f"{show(BIN / 'engine')} train --config examples/configs/llama-2-7b.toml --dry-run",
            "your own text: README.md, section 'Your own data'",
        ):
            console.print(f"  {command}", markup=False)


def show(path: Path) -> Path:
    """A path as short as it can be said from here."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def announce(step: str, what: str, command: list[str]) -> None:
    """One line: what happens now, and the command a user would type."""
    console.rule(style="dim")
    console.print(f"[bold]{step}.[/bold] {what}\n[cyan]$ {shlex.join(command)}[/cyan]")


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """Start a command of this environment, on one thread a process (there are as many processes as cores, or more)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} if command[0] == "torchrun" else dict(os.environ)
    log = None if command[0] != "torchrun" else subprocess.DEVNULL
    return subprocess.Popen([str(BIN / command[0]), *command[1:]], env=environment, stderr=log)


def call(command: list[str]) -> None:
    """Run a command to its end; it must succeed."""
    code = start(command).wait()
    if code:
        raise Failed(f"exit code {code}: {shlex.join(command)}")


def metrics(run: Path) -> dict[int, float]:
    """Training loss by step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def last_step(run: Path) -> int:
    """The newest step in metrics.jsonl, 0 before there is one."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except ValueError:  # the line is being written
        return 0


def make_room(folder: Path) -> bool:
    """Make the folder, or remove from it what an earlier demo made there; False where no demo made it."""
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARK).exists():
            return False
        console.print(f"{folder} is an earlier demo's, which starts anew: removing {', '.join(MADE)}", markup=False)
        for path in (folder / name for name in MADE):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where everything is written")
    parser.add_argument(
        "--short", action="store_true", help="a smaller corpus and a handful of steps (the test does this)"
    )
    args = parser.parse_args()
    if not make_room(args.folder):
        console.print(f"error: {args.folder} is no demo's: remove it or choose another --folder", style="red")
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
