"""Host copies of a rank's state shards, so that training continues while they are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from engine.optim.optimizer import StateShard


class Staging:
    """Buffers in host memory, reused by every save; page-locked if the states are on a GPU."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def reserve(self, states: Iterable[StateShard]) -> list[StateShard]:
        """Allocate the buffers now, so that the first save is as fast as later ones. Returns them unfilled."""
        states = list(states)
        if [(b.shape, b.dtype) for b in self._buffers] != [(h.flat.shape, h.flat.dtype) for h in states]:
            self._buffers = [
                torch.zeros(len(h.flat), dtype=h.flat.dtype, pin_memory=h.flat.device.type == "cuda").fill_(0)
                for h in states  # fill_ touches the pages: zeros alone allocates them at the first write
            ]
        return [dataclasses.replace(h, flat=b) for h, b in zip(states, self._buffers)]

    def copy(self, states: Iterable[StateShard]) -> tuple[list[StateShard], Callable[[], None], bool]:
        """(copies of the states, `ready` to call in another thread before reading them, whether the states may change).

        CPU: `ready` does the copying, so it overlaps the next forward and backward; the states must not change before
        it returns. GPU: the copies are enqueued on the current stream, so later work of that stream may change the
        states, and `ready` waits for the copies.
        """
        states = list(states)
        copies = self.reserve(states)
        if any(h.flat.device.type == "cuda" for h in states):
            _copy(states, copies)
            device = torch.cuda.current_device()
            done = torch.cuda.Event(blocking=True)
            done.record()

            def wait() -> None:
                with torch.cuda.device(device):  # a new thread starts on GPU 0, which belongs to another rank
                    done.synchronize()

            return copies, wait, True
        return copies, lambda: _copy(states, copies), False


def _copy(states: list[StateShard], copies: list[StateShard]) -> None:
    with torch.no_grad():
        for state, copy in zip(states, copies):
            copy.flat.copy_(state.flat, non_blocking=True)
