"""Reading, computing and writing at the same time, in order, with a bounded number of images under way."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Generic, TypeVar

from deblur_deploy.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Failed:
    error: BaseException


class _End:
    pass


class _Stage(Thread, Generic[Result]):
    """A thread that fills a bounded queue; it ends by itself soon after ``stop`` is set."""

    def __init__(self, source: Callable[[], Iterator[Result]], ahead: int, stop: Event) -> None:
        super().__init__(daemon=True)
        self._source, self._stop_asked = source, stop
        self._queue: Queue[Result | _Failed | _End] = Queue(ahead)
        self._process = os.getpid()
        self.start()

    def run(self) -> None:
        try:
            for value in self._source():
                if not self._put(value):
                    return
            self._put(_End())
        except BaseException as error:
            self._put(_Failed(error))

    def _put(self, value: Result | _Failed | _End) -> bool:
        while not self._stop_asked.is_set():
            try:
                self._queue.put(value, timeout=0.1)
            except Full:
                continue
            return True
        return False

    def __iter__(self) -> Iterator[Result]:
        while not self._stop_asked.is_set():
            if os.getpid() != self._process:
                raise InputError("this stream was begun before a fork; begin it anew in the child")
            try:
                value = self._queue.get(timeout=0.1)
            except Empty:
                continue
            if isinstance(value, _End):
                return
            if isinstance(value, _Failed):
                raise value.error
            yield value


def overlapped(
    items: Iterable[Item], work: Callable[[Item], Result], *, ahead: int = 2, patient: bool = False
) -> Generator[Result, None, None]:
    """``map(work, items)`` in which items are fetched, worked on and consumed at the same time.

    At most ``ahead`` items wait before the work and as many results behind it.  An error of ``items`` or ``work`` is
    raised here, after the results before it.  Closing the iterator early, or Ctrl-C, ends both threads; ``patient``
    waits for an item that is just being fetched, as whoever closes its source next must.
    """
    stop = Event()
    fetched = _Stage(lambda: iter(items), ahead, stop)
    worked = _Stage(lambda: map(work, fetched), ahead, stop)
    try:
        yield from worked
    finally:
        stop.set()
        worked.join()
        # ``items`` may be blocked in somebody's camera or socket: its thread is a daemon and is not waited for long.
        fetched.join(timeout=None if patient else 1)
