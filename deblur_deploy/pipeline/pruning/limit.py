"""A time limit for somebody else's code that may never come to an end, and the layer at which it was."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import nn

from deblur_deploy.errors import InputError


class _OverTimeError(BaseException):
    """Not an Exception, so that code which catches all of them does not go on."""


@contextmanager
def time_limit(seconds: float, model: nn.Module, what: str) -> Iterator[None]:
    """Raise InputError that says ``what``, and at which layer of ``model``, once the block took ``seconds``.

    It needs a signal, so outside of the main thread, and on Windows, there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    where = ""

    def stop(_: int, frame: FrameType | None) -> None:
        nonlocal where
        where = _layer(frame, model)
        raise _OverTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _OverTimeError:
        at = f" (layer {where})" if where else ""
        raise InputError(f"{what}, for more than {seconds:g} s{at}; export it without --prune") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _layer(frame: FrameType | None, model: nn.Module) -> str:
    """The layer that the innermost of the running functions has at hand."""
    names = {id(module): name for name, module in model.named_modules() if name}
    while frame:
        for value in frame.f_locals.values():
            for found in _modules(value):
                if id(found) in names:
                    return names[id(found)]
        frame = frame.f_back
    return ""


def _modules(value: Any) -> Iterator[Any]:
    """A module, or those that torch-pruning's records hold."""
    yield value
    for name in ("module", "target", "source", "dep"):
        inner = getattr(value, name, None) if type(value).__module__.startswith("torch_pruning") else None
        if inner is not None and inner is not value:
            yield inner
            yield getattr(inner, "module", None)
