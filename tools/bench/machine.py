"""What a measurement is made on, and whether others were using the machine meanwhile."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """CPU, cores, torch version, allocator settings and the load before we add ours."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
        "load": "{:.1f} {:.1f} {:.1f}".format(*os.getloadavg()),
    }


def _busy_s() -> float:
    """Seconds of work that all processors have done since boot (Linux; time stolen by other guests counts too)."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@dataclass
class Others:
    """Cores that other programs kept busy since this object was made: everybody's time less our ended children's."""

    def __post_init__(self) -> None:
        self.began, self.busy, self.ours = time.monotonic(), _busy_s(), _children_s()

    def cores(self) -> float:
        work = (_busy_s() - self.busy) - (_children_s() - self.ours)
        return max(0.0, work / (time.monotonic() - self.began))


def wait_until_quiet(cores: float, patience_s: float) -> None:
    """Return when others use less than `cores` over two seconds, or when patience is over."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        others = Others()
        time.sleep(2.0)
        if others.cores() < cores:
            return
