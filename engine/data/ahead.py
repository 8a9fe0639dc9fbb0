"""Run an iterator in a thread, a few items ahead of its consumer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")
_END = object()


def read_ahead(source: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The items of `source` in order; its exception is raised where it stood. Memory: `depth` + 2 items."""
    items: queue.Queue[object] = queue.Queue(depth)
    left = threading.Event()  # the consumer is gone

    def put(item: object) -> bool:
        while not left.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        end: object = _END
        try:
            for item in source:
                if not put(item):
                    return
        except BaseException as err:
            end = _Failed(err)
        put(end)

    threading.Thread(target=work, daemon=True, name="read-ahead").start()
    try:
        while (item := items.get()) is not _END:
            if isinstance(item, _Failed):
                raise item.error
            yield item  # type: ignore[misc]  # what work() puts besides T was taken out above
    finally:
        left.set()


class _Failed:
    """Carries an exception from one thread to the other."""

    def __init__(self, error: BaseException):
        self.error = error
