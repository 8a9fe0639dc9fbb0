"""Shared by the parts of gpu.py: timing, time budgets, and results, written after every measurement."""

from __future__ import annotations

import gc
import itertools
import json
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from report import Row, as_json


@dataclass(frozen=True)
class Sizes:
    """What is measured: Llama-2-7B's shapes, or tiny ones that run every line on a CPU in seconds."""

    hidden: int = 4096
    ffn: int = 11008
    heads: int = 32
    head_dim: int = 128
    vocab: int = 32_000
    tokens: int = 8192  # of a microbatch
    step_tokens: int = 32_768  # of an optimizer step: AdamW's bytes are spread over so many
    seqs: tuple[int, ...] = (4096, 8192)
    gemm: int = 8192
    copy_bytes: int = 8 << 30
    layers: int = 32
    few_layers: int = 8  # for comparing variants and peers
    curve_steps: int = 150
    curve_hidden: int = 1024
    repeat_s: float = 0.25  # how long a timing repeats


TINY = Sizes(64, 96, 4, 16, 128, 64, 128, (16, 32), 64, 1 << 20, 3, 2, 3, 32, 0.01)


@dataclass
class Session:
    """One run of the script. results: all that is known so far, saved after every record."""

    device: torch.device
    sizes: Sizes
    out: Path
    machine: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    section: str = ""
    deadline: float = 0.0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def begin(self, section: str, budget_s: float) -> None:
        """A section may start new measurements for so long."""
        self.section, self.deadline = section, time.monotonic() + budget_s
        self.results.setdefault(section, [])
        print(f"\n== {section}", flush=True)

    def record(self, what: str, **values: Any) -> None:
        """Keep a figure, print it, and write everything to disk."""
        self.results[self.section].append({"what": what} | values)
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"{what}: {shown}", flush=True)
        self.save()

    def save(self) -> None:
        """Write all results so far, atomically."""
        device_info = {"machine": self.machine, "command": shlex.join(sys.argv)}
        device_info["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        rows = [as_json(row) for row in rows_of(self.results)]
        part = self.out.with_suffix(".part")
        part.write_text(
            json.dumps(device_info | {"rows": rows, "details": self.results}, indent=1) + "\n", encoding="utf-8"
        )
        part.replace(self.out)

    def attempt(self, what: str, measure: Callable[..., None], *arguments: Any, **more: Any) -> None:
        """Run a measurement if there is time; an error is recorded, and the next one still runs."""
        if time.monotonic() > self.deadline:
            self.record(what, skipped="out of time")
            return
        try:
            measure(*arguments, **more)
        except Exception as error:  # any error: one kernel must not end the whole run
            last = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{Path(last.filename).name}:{last.lineno}"
            self.record(what, failed=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]} ({at})")
        self.forget()  # outside the except block: the error keeps tensors alive

    def forget(self) -> None:
        """Free unused memory and return it to the device, so that the next measurement has all of it.

        A training state has reference cycles (parameters and buckets), which only gc frees.
        """
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def time_s(self, work: Callable[[], Any]) -> float:
        """Median seconds of work(), after three calls that warm up.

        On a GPU by events in its queue. Where the host takes longer to launch than the device to run, the queue is held
        until it is filled: else the host would be timed.
        """
        for _ in range(3):
            work()
        self.synchronize()
        began = time.perf_counter()
        work()
        launch_s = time.perf_counter() - began
        self.synchronize()
        whole_s = max(time.perf_counter() - began, 1e-6)
        count = max(3, min(200, int(self.sizes.repeat_s / whole_s)))
        if not self.cuda:
            seconds = []
            for _ in range(count):
                began = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - began)
            return statistics.median(seconds)
        held = launch_s > whole_s / 2
        count = min(count, 40) if held else count  # a queue takes about a thousand launches
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        if held:
            torch.cuda._sleep(int(2 * launch_s * count * 2e9))  # in cycles, of which a second has less than 2e9
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1000

    def randn(self, *shape: int, grad: bool = False) -> torch.Tensor:
        """Random values (zeros run faster on these machines): bf16."""
        return torch.randn(*shape, device=self.device).to(self.dtype).requires_grad_(grad)

    def limit(self, name: str) -> float:
        """A measured limit of this machine: "gemm" in FLOP/s, "copy" in bytes/s."""
        return float(self.results["limits"][0][name])


def rows_of(results: dict[str, Any]) -> list[Row]:
    """Rows in the format of all scripts of this folder: ours, a peer's, the machine's limit."""
    rows = []
    for found in (row for section in ("step", "variants", "ops") for row in results.get(section, ())):
        if "tokens_per_s" in found:
            rate, middle = found["tokens_per_s"], statistics.median(found["step_s"])
            rates, limits = [rate * middle / seconds for seconds in found["step_s"]], [rate / found["share"]]
            rows.append(Row(found["what"], "tokens/s", rates, limit="large matmul", limits=limits))
        elif "us" in found:
            ours, theirs, floor = found["us"], found["us"] * found["torch_ratio"], found["us"] * found["share"]
            limit = "bytes or FLOPs"
            rows.append(Row(found["what"], "us", [ours], "torch", [theirs], limit, [floor], more=False))
    return rows


def measure_limits(session: Session) -> None:
    """Measure both limits of this machine."""

    def measure() -> None:
        n = session.sizes.gemm
        a, b = session.randn(n, n), session.randn(n, n)
        gemm = 2 * n**3 / session.time_s(lambda: a @ b)
        source = torch.empty(session.sizes.copy_bytes // 2, dtype=torch.uint8, device=session.device).random_()
        target = torch.empty_like(source)
        copy = 2 * source.numel() / session.time_s(lambda: target.copy_(source))
        session.record(f"{n}^3 bf16 product of random values, and a copy", gemm=gemm, copy=copy)

    measure()  # without them there is nothing to compare with: a fault here ends the script
    session.forget()
