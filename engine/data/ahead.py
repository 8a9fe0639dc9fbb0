"""Run an iterator, or a function of its items, in threads a few items ahead of the consumer."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")
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


def map_ahead(call: Callable[[T], U], source: Iterator[T], threads: int) -> Generator[tuple[T, U], None, None]:
    """(item, call(item)) in the order of `source`, worked on by `threads` threads.

    An exception of a call, or of `source`, is raised where it stood. Memory: `threads` + 2 items and results.
    """
    waiting: deque[tuple[T, Future[U]]] = deque()
    failed: Exception | None = None
    pool = ThreadPoolExecutor(threads, thread_name_prefix="map-ahead")
    try:
        while True:
            try:
                item = next(source)
            except StopIteration:
                break
            except Exception as err:  # what was read before it comes first
                failed = err
                break
            waiting.append((item, pool.submit(call, item)))
            if len(waiting) == threads + 2:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
        if failed is not None:
            raise failed
    finally:
        pool.shutdown(cancel_futures=True)


class _Failed:
    """Carries an exception from one thread to the other."""

    def __init__(self, error: BaseException):
        self.error = error
