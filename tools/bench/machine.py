"""Description of the machine, and whether other programs used it during a measurement."""

from __future__ import annotations

import concurrent.futures
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


def commit() -> str:
    """Of the tree this file is in; "unknown" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe() -> dict[str, Any]:
    """CPU, cores, memory, versions, commit, allocator settings and the load before we add ours."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")},
        "load": "{:.1f} {:.1f} {:.1f}".format(*os.getloadavg()),
    }


def busy_s() -> float:
    """Seconds of work that all processors have done since boot (Linux; time stolen by other guests counts too)."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text(encoding="utf-8").split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(cores: float, patience_s: float) -> None:
    """Return when less than `cores` are busy over two seconds, or when patience is over."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        busy = busy_s()
        time.sleep(2.0)
        if busy_s() - busy < 2.0 * cores:
            return


# ---- shared by order.py and order_megatron.py ----

SEQ_LEN, BATCH, SEED = 2048, 8, 1234
SAMPLES = 4096  # read in random order; their pages are read once before
BLEND_SAMPLES = 10**8


def blend_weights(sources: int) -> Any:
    """Uneven integer weights [sources]."""
    return np.random.default_rng(0).integers(100, 10_000, sources)


def peak_memory(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """(seconds, peak MiB of anonymous memory above the start, result) of work()."""

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    base, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    peak[0] = max(peak[0], anonymous())
    done.set()
    thread.join()
    return seconds, (peak[0] - base) / 1024, result


def samples_per_s(read: Callable[[int], Any], step: int, threads: int = 1) -> dict[str, float]:
    """Samples a wall second, and a processor second, of read(low) for low in range(0, SAMPLES, step), pages warm.

    Thread t reads every threads-th step. The best of three passes, one at a time after one that brings the pages.
    """

    def part(thread: int) -> None:
        for low in range(thread * step, SAMPLES, threads * step):
            read(low)

    best = {"rate": 0.0, "cpu_rate": 0.0}
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for trial in range(4):
            wall, cpu = time.perf_counter(), time.process_time()
            list(pool.map(part, range(threads)))
            rate = {
                "rate": SAMPLES / (time.perf_counter() - wall),
                "cpu_rate": SAMPLES / (time.process_time() - cpu),
            }
            best = rate if trial and rate["rate"] > best["rate"] else best
    return best


def drop_cache(folder: Path) -> None:
    """Forget the pages of all files below a folder."""
    for file in folder.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
