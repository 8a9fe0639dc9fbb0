"""Console progress of a run: a rich bar on a terminal, otherwise one plain line every few seconds; rank 0 only."""

from __future__ import annotations

import time
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TextColumn
from rich.table import Column

from engine.config.phases import Phases
from engine.config.schema import Config
from engine.distributed.context import ParallelContext
from engine.distributed.layout import describe
from engine.model.attention import attention_names
from engine.model.build import layers_of
from engine.ops.apex import fused_norms
from engine.ops.native import describe_kernels, kernels
from engine.planner.flops import flops_per_token


class Progress:
    """Shows step, loss, gradient norm, learning rate, tokens/s, MFU or GFLOP/s, and the time left."""

    def __init__(self, cfg: Config, ctx: ParallelContext, phases: Phases):
        self.cfg, self.ctx, self.phases = cfg, ctx, phases
        self.console = Console(highlight=False, quiet=ctx.rank != 0, soft_wrap=True)
        self.bar: Bar | None = None
        self.first_step = 0
        self.began = self.shown_at = time.perf_counter()

    def start(self, phases: Phases, source: str, parameters: int) -> None:
        """Print a summary of the run: parameters, precision, layout, steps, and its starting point, their origin."""
        cfg, ctx, step = self.cfg, self.ctx, phases.origin.step
        self.phases = phases
        degrees = describe(ctx.layout.degrees)
        start = f"from the weights of {cfg.checkpoint.init}" if cfg.checkpoint.init else "from initial weights"
        origin = f"resuming from {source}" if source else start
        steps = f"steps {step + 1}..{cfg.train.steps}"
        if step >= cfg.train.steps:
            steps = f"nothing left to do: step {step} of {cfg.train.steps} is done"
        self.note(
            f"training {parameters:,} parameters in {cfg.train.precision} on {ctx.device.type}, {degrees}, "
            f"{cfg.parallel.schedule}; {steps}, {origin}"
        )
        if ctx.rank == 0:
            running = describe_kernels(ctx.device, ctx.dtype)
            self.note(f"kernels: {running}, attention: {self._attention()}{self._extra_kernels()}")
            if ctx.world.size > 1:
                self.note(f"ranks communicate over {ctx.describe_transports()}")
        self.first_step = step

    def _extra_kernels(self) -> str:
        """Compute backends other than the custom kernels and torch's operators, as text to append."""
        train, probe = self.cfg.train, torch.empty(1, device=self.ctx.device, dtype=self.ctx.dtype)
        text = f"; matmuls of blocks: fp8 {train.fp8}" if train.fp8 != "none" else ""
        if train.compile:
            return f"{text}; between matmuls: torch.compile"
        return f"{text}; norms: apex" if fused_norms(probe) and not kernels(probe) else text

    def _attention(self) -> str:
        model, layers = self.cfg.model, layers_of(self.cfg.model)
        text = " and ".join(attention_names(self.cfg, self.ctx))
        text += ", document masking" * self.cfg.data.separate_documents
        windowed = sum(layer.window > 0 for layer in layers)
        which = "all" if windowed == len(layers) else f"{windowed} of {len(layers)}"
        return text + f", sliding window of {model.window} tokens in {which} layers" * (windowed > 0)

    def __enter__(self) -> Progress:
        self.began = self.shown_at = time.perf_counter()
        if self.console.is_terminal and not self.console.quiet:
            place = TextColumn("step {task.completed}/{task.total}", table_column=Column(no_wrap=True, min_width=5))
            # truncated on the right if the terminal is narrow
            text = TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, ratio=1))
            self.bar = Bar(place, text, console=self.console, expand=True)
            self.bar.add_task("train", total=self.cfg.train.steps, completed=self.first_step, text="")
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def rates(self, step: int, tokens: int, seconds: float) -> dict[str, float]:
        """Throughput of one step: tokens/s over all ranks, achieved GFLOP/s per rank, and MFU if the peak is known."""
        per_second = tokens / seconds
        flops = flops_per_token(self.cfg.model, self.phases.at(step).seq_len)
        gflops = per_second * flops / self.ctx.world.size / 1e9
        rates = {"tokens_per_s": per_second, "step_s": seconds, "gflops_per_rank": gflops}
        if self.cfg.monitor.peak_tflops:
            rates["mfu"] = gflops / 1e3 / self.cfg.monitor.peak_tflops
        return rates

    def step(self, record: dict[str, float]) -> None:
        """Show a step's record (as from MetricsLog.step)."""
        step, now = int(record["step"]), time.perf_counter()
        first, at, end = (self.phases.consumed(n).tokens for n in (self.first_step, step, self.cfg.train.steps))
        left = (end - at) * (now - self.began) / max(1, at - first)
        # the fields that must be readable on 80 columns come first
        text = f"loss {record['loss']:.4f}  {short(record['tokens_per_s'])} tokens/s  {duration(left)} left"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step, text=f"{text}  {self._more(record)}")
            return
        edge = step == self.first_step + 1 or step == self.cfg.train.steps
        if edge or now - self.shown_at >= self.cfg.monitor.log_every_s:
            clock = time.strftime("%H:%M:%S")
            self.console.print(
                f"{clock} step {step}/{self.cfg.train.steps}  {text}  {self._more(record)}", markup=False
            )
            self.shown_at = now

    def _more(self, record: dict[str, float]) -> str:
        speed = f"MFU {record['mfu']:.1%}" if "mfu" in record else f"{record['gflops_per_rank']:,.1f} GFLOP/s/rank"
        text = f"norm {record['grad_norm']:.3f}  lr {record['lr']:.2e}  {speed}"
        if sent := sum(value for name, value in record.items() if name.startswith("bytes_")):
            text += f"  sent {sent / 1e6:,.1f} MB"
        if "z_loss" in record:
            text += f"  z {record['z_loss']:.2e}"
        if "loss_scale" in record:
            text += f"  scale {record['loss_scale']:g}"
        return text

    def note(self, text: str) -> None:
        """Print a line with the time of day above the progress bar."""
        self.console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False)


def duration(seconds: float) -> str:
    """A duration in its two largest units: 42 s, 7 min 05 s, 3 h 05 min, 2 d 15 h, 140 d."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    minutes, rest = divmod(total, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, rest = divmod(round(total / 60), 60)
    if hours < 24:
        return f"{hours} h {rest:02} min"
    days, rest = divmod(round(total / 3600), 24)
    return f"{days} d {rest} h" if days < 100 else f"{days:,} d"


def short(count: float) -> str:
    """A count in about six characters: 93,000, 1.25M, 3.40B."""
    if count >= 999.5e6:
        return f"{count / 1e9:,.2f}B"
    return f"{count / 1e6:.2f}M" if count >= 999_500 else f"{count:,.0f}"
