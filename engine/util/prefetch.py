"""Run an iterator, or a function of its items, in threads a few items ahead of the consumer."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from engine.util.signals import Stopped

T = TypeVar("T")
U = TypeVar("U")
Check = Callable[[], None]
_END = object()
_POLL_S = 0.2  # between two calls of `check`


def run_in_thread(call: Callable[[], T]) -> Future[T]:
    """The result of a call that a thread of its own makes: a native one, which lets others run meanwhile."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as err:
            future.set_exception(err)

    threading.Thread(target=work, daemon=True, name="beside").start()
    return future


def read_ahead(source: Iterator[T], depth: int = 2, check: Check = lambda: None) -> Generator[T, None, None]:
    """The items of `source` in order; its exception is raised where it stood. Memory: `depth` + 2 items.

    `check` is called while an item is waited for, and may end that by an exception.
    """
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
        while (item := _get(items, check)) is not _END:
            if isinstance(item, _Failed):
                raise item.error
            yield item  # type: ignore[misc]  # what work() puts besides T was taken out above
    finally:
        left.set()


def _get(items: queue.Queue[object], check: Check) -> object:
    while True:
        check()
        with contextlib.suppress(queue.Empty):
            return items.get(timeout=_POLL_S)


def map_ahead(
    call: Callable[[T], U], source: Iterator[T], threads: int, check: Check = lambda: None
) -> Generator[tuple[T, U], None, None]:
    """(item, call(item)) in the order of `source`, which one thread reads and `threads` threads work on.

    An exception of a call, or of `source`, is raised where it stood. Memory: `threads` + 2 items and results. `check`
    is called while a result is waited for; when it raises Stopped, no call is waited for.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="map-ahead")
    pairs = read_ahead(((item, pool.submit(call, item)) for item in source), threads, check)
    stopped = False
    try:
        for item, future in pairs:
            yield item, _result(future, check)
    except Stopped:
        stopped = True
        raise
    finally:
        pairs.close()
        pool.shutdown(wait=not stopped, cancel_futures=True)


def _result(future: Future[U], check: Check) -> U:
    while True:
        check()
        if wait((future,), _POLL_S).done:
            return future.result()


class _Failed:
    """Carries an exception from one thread to the other."""

    def __init__(self, error: BaseException):
        self.error = error
