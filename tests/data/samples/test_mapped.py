"""A corpus truncated while it is read raises an error; no SIGBUS, and no zeros are read as tokens."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.data.samples.indexed import IndexedDataset
from engine.data.samples.indexed_writer import IndexedWriter
from engine.data.samples.loader import Loader
from engine.data.samples.mapped import MappedFile
from engine.data.samples.native_index import native_index
from engine.data.samples.order import SampleOrder
from engine.errors import DataError
from tests.support.errors import raises
from tests.support.shares import share_of

BUILT = importlib.util.find_spec("engine._index") is not None
needs_extension = pytest.mark.skipif(not BUILT, reason="engine._index is not built")
DOCUMENTS, LENGTH = 3000, 60


@pytest.fixture
def data(tmp_path: Path) -> IndexedDataset:
    with IndexedWriter(tmp_path / "c", 1000) as writer:
        for k in range(DOCUMENTS):
            writer.add(np.arange(1, LENGTH + 1) + k % 900)
        writer.finish({})
    return IndexedDataset(tmp_path / "c", 1000)


def everything(order: SampleOrder) -> np.ndarray:
    return order.gather(np.arange(order.samples_per_epoch))


@needs_extension
@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("kept", [0, 5000, -10_000, -1])
def test_truncated_while_training(data: IndexedDataset, suffix: str, kept: int) -> None:
    """By whole pages (SIGBUS without the guard) and within the last one (zeros that look like tokens)."""
    order = SampleOrder(data, 32, 0)
    before = everything(order)
    loader = Loader(share_of(order, 8, 8, data_rank=0, data_size=1))
    next(loader)
    path = Path(f"{data.prefix}.{suffix}")
    whole = path.read_bytes()
    os.truncate(path, kept % len(whole) if kept else 0)
    with raises(DataError, "samples.corpus-cut-short", f"c.{suffix}", f"{len(whole)} bytes"):
        everything(order)
    with raises(DataError, "samples.corpus-cut-short"):
        for _ in range(4):  # batches made before are still returned
            next(loader)
    with raises(DataError, "samples.corpus-cut-short"):  # data from a page of zeros is never used, also not later
        everything(order)
    loader.close()
    path.write_bytes(whole)
    np.testing.assert_array_equal(everything(SampleOrder(IndexedDataset(data.prefix, 1000), 32, 0)), before)


def test_without_the_extension_the_next_look_finds_it(data: IndexedDataset) -> None:
    order = SampleOrder(data, 32, 0, native=False)
    path = Path(f"{data.prefix}.bin")
    os.truncate(path, path.stat().st_size - 1)  # within a page: no signal is raised
    with raises(DataError, "samples.corpus-cut-short", "bytes and now has"):
        everything(order)


@needs_extension
def test_a_page_that_was_lost_is_not_forgotten(tmp_path: Path) -> None:
    """The file has its old size again (it was overwritten), but zeros were read meanwhile."""
    path = tmp_path / "f"
    path.write_bytes(b"x" * 100_000)
    mapped = MappedFile(path, native_index())
    other = MappedFile(path, native_index())
    os.truncate(path, 0)
    assert int(mapped.bytes[50_000]) == 0
    path.write_bytes(b"y" * 100_000)
    with raises(DataError, "samples.corpus-cut-short", tmp_path / "f", 49152):
        mapped.check()
    other.check()
    assert int(other.bytes[50_000]) == ord("y")
    del mapped, other
    gc.collect()
    MappedFile(path, native_index()).check()


@needs_extension
def test_other_bus_errors_end_the_process_as_before(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 100_000)
    program = (
        "import mmap, os, signal, sys; from pathlib import Path; "
        "from engine.data.samples.native_index import native_index; "
        "from engine.data.samples.mapped import MappedFile; path = Path(sys.argv[1]); "
        "guarded = MappedFile(path, native_index()); file = path.open('rb'); "
        "bare = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); "
        "os.truncate(path, 0); assert guarded.bytes[0] == 0; "
        "os.kill(os.getpid(), signal.SIGBUS) if sys.argv[2] == 'sent' else bare[50_000]; print('survived')"
    )
    for how in ("sent", "touched"):
        path.write_bytes(b"x" * 100_000)
        done = subprocess.run([sys.executable, "-c", program, path, how], capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGBUS and "survived" not in done.stdout, done
