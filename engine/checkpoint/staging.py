"""Host copies of what a rank owns, so that training goes on while they are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from engine.optim.adamw import Held


class Staging:
    """Buffers in host memory, kept from one save to the next; page-locked where the state lives on a GPU."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def reserve(self, states: Iterable[Held]) -> list[Held]:
        """Make sure of the buffers and their memory: a first save is then as quick as any. Returns them, unfilled."""
        states = list(states)
        if [(b.shape, b.dtype) for b in self._buffers] != [(h.flat.shape, h.flat.dtype) for h in states]:
            self._buffers = [
                torch.zeros(len(h.flat), dtype=h.flat.dtype, pin_memory=h.flat.device.type == "cuda").fill_(0)
                for h in states  # fill_: zeros alone leaves it to the first write to find the memory
            ]
        return [dataclasses.replace(h, flat=b) for h, b in zip(states, self._buffers)]

    def copy(self, states: Iterable[Held]) -> tuple[list[Held], Callable[[], None]]:
        """Copies of the states as they are now, and what to call before they are read.

        On a GPU the copies are queued behind the work of its current stream, so whatever that stream does to the states
        later comes after them; the caller need not wait.
        """
        states = list(states)
        copies = self.reserve(states)
        with torch.no_grad():
            for theirs, ours in zip(states, copies):
                ours.flat.copy_(theirs.flat, non_blocking=True)
        if not any(h.flat.device.type == "cuda" for h in states):
            return copies, lambda: None
        done = torch.cuda.Event()
        done.record()
        return copies, done.synchronize
