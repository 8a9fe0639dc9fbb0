"""Progress for people: a rich bar on a terminal, otherwise one plain line every few seconds; rank 0 only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from engine.config import Config
from engine.context import ParallelContext
from engine.data.report import ProgressEvent


class Progress:
    """Shows step, loss, gradient norm, rate, tokens/s, MFU or GFLOP/s, and the time left."""

    def __init__(self, cfg: Config, ctx: ParallelContext, flops_per_token: int):
        self.cfg, self.ctx, self.flops_per_token = cfg, ctx, flops_per_token
        self.console = Console(highlight=False, quiet=ctx.rank != 0, soft_wrap=True)
        self.bar: Bar | None = None
        self.first_step = self.shown_step = 0
        self.began = self.shown_at = time.perf_counter()

    def start(self, step: int, source: str, parameters: int) -> None:
        """Say what is about to run, and from where."""
        cfg, ctx = self.cfg, self.ctx
        degrees = f"tensor {ctx.tensor.size} x pipeline {ctx.pipeline.size} x data {ctx.data.size}"
        origin = f"resuming from {source}" if source else "from initial weights"
        steps = f"steps {step + 1}..{cfg.train.steps}"
        if step >= cfg.train.steps:
            steps = f"nothing left to do: step {step} of {cfg.train.steps} is done"
        self.note(
            f"training {parameters:,} parameters in {cfg.train.precision} on {ctx.device.type}, {degrees}, "
            f"{cfg.parallel.schedule}; {steps}, {origin}"
        )
        self.first_step = self.shown_step = step

    def __enter__(self) -> Progress:
        self.began = self.shown_at = time.perf_counter()
        if self.console.is_terminal and not self.console.quiet:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=8), TimeRemainingColumn())
            text = TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True))  # cut on the right if narrow
            self.bar = Bar(*columns, text, console=self.console)
            self.bar.add_task("train", total=self.cfg.train.steps, completed=self.first_step, text="")
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def rates(self, tokens: int, seconds: float) -> dict[str, float]:
        """Throughput of one step: tokens/s over all ranks, achieved GFLOP/s a rank, and MFU if the peak is known."""
        per_second = tokens / seconds
        gflops = per_second * self.flops_per_token / self.ctx.world.size / 1e9
        rates = {"tokens_per_s": per_second, "step_s": seconds, "gflops_per_rank": gflops}
        if self.cfg.monitor.peak_tflops:
            rates["mfu"] = gflops / 1e3 / self.cfg.monitor.peak_tflops
        return rates

    def step(self, record: dict[str, float]) -> None:
        """Show a step's record (as from MetricsLog.step)."""
        step, now = int(record["step"]), time.perf_counter()
        speed = f"MFU {record['mfu']:.1%}" if "mfu" in record else f"{record['gflops_per_rank']:,.1f} GFLOP/s/rank"
        text = (
            f"loss {record['loss']:.4f}  {record['tokens_per_s']:,.0f} tokens/s  norm {record['grad_norm']:.3f}  "
            f"lr {record['lr']:.2e}  {speed}"
        )
        if sent := sum(value for name, value in record.items() if name.startswith("bytes_")):
            text += f"  sent {sent / 1e6:,.1f} MB"
        if "loss_scale" in record:
            text += f"  scale {record['loss_scale']:g}"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step, text=text)
            return
        edge = step == self.first_step + 1 or step == self.cfg.train.steps
        if edge or now - self.shown_at >= self.cfg.monitor.log_every_s:
            left = (self.cfg.train.steps - step) * (now - self.began) / (step - self.first_step)
            self.console.print(f"step {step}/{self.cfg.train.steps}  {text}  left {left:.0f} s", markup=False)
            self.shown_step, self.shown_at = step, now

    def note(self, text: str) -> None:
        """Print a line beside the progress."""
        self.console.print(text, markup=False)


@contextmanager
def prepare_progress(every_s: float = 5.0) -> Iterator[Callable[[ProgressEvent], None]]:
    """A callback for data.prepare: a bar on a terminal, otherwise a line every few seconds."""
    console = Console(highlight=False, soft_wrap=True)
    shown = {"at": time.perf_counter()}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def show(event: ProgressEvent) -> None:
            elapsed = max(event.elapsed_s, 1e-9)
            rate = event.input_bytes_here / elapsed
            text = f"{event.documents:,} documents, {rate / 1e6:.2f} MB/s"
            if event.tokens:
                text += f", {event.tokens:,} tokens, {event.tokens_here / elapsed:,.0f} tokens/s"
            if event.phase not in tasks:
                tasks[event.phase] = bar.add_task(event.phase, total=event.input_bytes_total, text="")
            bar.update(tasks[event.phase], completed=event.input_bytes, text=text)
            if not console.is_terminal and time.perf_counter() - shown["at"] >= every_s:
                shown["at"] = time.perf_counter()
                done = event.input_bytes / max(1, event.input_bytes_total)
                left = (event.input_bytes_total - event.input_bytes) / max(rate, 1e-9)
                console.print(f"{event.phase}: {done:.0%}, {text}, left {left:.0f} s")

        yield show
