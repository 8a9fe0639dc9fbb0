"""Host copies of what a rank owns, so that training goes on while they are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from engine.optim.adamw import StateShard


class Staging:
    """Buffers in host memory, kept from one save to the next; page-locked where the state lives on a GPU."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def reserve(self, states: Iterable[StateShard]) -> list[StateShard]:
        """Make sure of the buffers and their memory: a first save is then as quick as any. Returns them, unfilled."""
        states = list(states)
        if [(b.shape, b.dtype) for b in self._buffers] != [(h.flat.shape, h.flat.dtype) for h in states]:
            self._buffers = [
                torch.zeros(len(h.flat), dtype=h.flat.dtype, pin_memory=h.flat.device.type == "cuda").fill_(0)
                for h in states  # fill_: zeros alone leaves it to the first write to find the memory
            ]
        return [dataclasses.replace(h, flat=b) for h, b in zip(states, self._buffers)]

    def copy(self, states: Iterable[StateShard]) -> tuple[list[StateShard], Callable[[], None], bool]:
        """Copies of the states, what another thread calls before it reads them, and whether the states may change now.

        On the CPU that call does the copying, so that it runs beside the next forward and backward; states must not
        change before it is over. On a GPU the copies are queued here, behind and ahead of the work of its current
        stream, so that whatever that stream does to the states later comes after them, and the call waits for them.
        """
        states = list(states)
        copies = self.reserve(states)
        if any(h.flat.device.type == "cuda" for h in states):
            _copy(states, copies)
            device = torch.cuda.current_device()
            done = torch.cuda.Event(blocking=True)
            done.record()

            def wait() -> None:
                with torch.cuda.device(device):  # a new thread begins on GPU 0, which is another rank's
                    done.synchronize()

            return copies, wait, True
        return copies, lambda: _copy(states, copies), False


def _copy(states: list[StateShard], copies: list[StateShard]) -> None:
    with torch.no_grad():
        for theirs, ours in zip(states, copies):
            ours.flat.copy_(theirs.flat, non_blocking=True)
