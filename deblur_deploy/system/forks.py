"""What a forked process finds: threads stay behind, and locks stay as they were at that moment.

So whoever holds either is told in the child, before anything else runs there: locks are made anew, and sessions, which
compute on threads that are no longer there and wait for them when they are released, are never released and made anew
when they are first needed.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import Lock
from types import TracebackType
from typing import Protocol
from weakref import WeakSet


class Forked(Protocol):
    """Something that must know of a fork."""

    def after_fork(self) -> None:
        """Called in the child, whose only thread this is; takes no locks, computes nothing."""


_living: WeakSet[Forked] = WeakSet()


def tell(who: Forked) -> None:
    """From now on, as long as it lives, ``who`` is told of forks."""
    _living.add(who)


class ForkedLock:
    """A lock that is free in a forked child, whoever held it in the parent."""

    def __init__(self, kind: Callable[[], AbstractContextManager[object]] = Lock) -> None:
        """``kind``: ``threading.Lock`` or ``threading.RLock``."""
        self._kind, self._lock = kind, kind()
        tell(self)

    def after_fork(self) -> None:
        self._lock = self._kind()

    def __enter__(self) -> None:
        self._lock.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, error, trace)


def never_release(what: object) -> None:
    """Keep ``what`` to the end of the process and beyond, so that no destructor ever runs."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(what))


def _in_child() -> None:
    for one in list(_living):
        one.after_fork()
    _leave_without_destructors()


def _leave_without_destructors() -> None:
    """onnxruntime (1.32) starts a thread when it is imported (its telemetry's), and waits for it at the very end.

    In a child it would wait for good.  So once Python has done all that it has to do, the process ends without the
    destructors of C++, with its status and with what was printed.
    """
    libc = ctypes.CDLL(None)
    # Where there is no such function, children of a fork may wait.
    if hasattr(libc, "on_exit"):
        # The last that is registered comes first; ``_exit`` is given the status.
        libc.on_exit(libc._exit, None)
        libc.__cxa_atexit(libc.fflush, None, None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
