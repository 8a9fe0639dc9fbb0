"""What a measurement is made on, and whether others were using the machine meanwhile."""

from __future__ import annotations

import os
import time
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


def busy_s() -> float:
    """Seconds of work that all processors have done since boot (Linux; time stolen by other guests counts too)."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(cores: float, patience_s: float) -> None:
    """Return when less than `cores` are busy over two seconds, or when patience is over."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        busy = busy_s()
        time.sleep(2.0)
        if busy_s() - busy < 2.0 * cores:
            return
