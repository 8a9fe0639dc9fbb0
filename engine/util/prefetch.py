"""Prefetching: run an iterator, or a function of its items, in threads a few items ahead of the consumer."""

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
    """Run a call in a separate thread; for native calls, which release the interpreter lock."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as err:
            future.set_exception(err)

    threading.Thread(target=work, daemon=True, name="run-in-thread").start()
    return future


def read_ahead(source: Iterator[T], depth: int = 2, check: Check = lambda: None) -> Generator[T, None, None]:
    """The items of `source` in order; its exception is raised at its position. Memory: `depth` + 2 items.

    check: called while the consumer waits for an item; it may raise to end the wait.
    """
    items: queue.Queue[object] = queue.Queue(depth)
    consumer_gone = threading.Event()

    def put(item: object) -> bool:
        while not consumer_gone.is_set():
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
            yield item  # type: ignore[misc]  # it is a T: _Failed and _END were handled above
    finally:
        consumer_gone.set()


def _get(items: queue.Queue[object], check: Check) -> object:
    while True:
        check()
        with contextlib.suppress(queue.Empty):
            return items.get(timeout=_POLL_S)


def map_ahead(
    call: Callable[[T], U], source: Iterator[T], threads: int, check: Check = lambda: None
) -> Generator[tuple[T, U], None, None]:
    """(item, call(item)) in the order of `source`: one thread reads the items, `threads` threads make the calls.

    An exception of a call, or of `source`, is raised at its position. Memory: `threads` + 2 items and results. check:
    called while the consumer waits for a result; if it raises Stopped, running calls are not waited for.
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
