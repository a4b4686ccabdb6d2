"""What an engine may be told: checked before anything is loaded, and kept so that a pickled engine says the same."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from numbers import Integral, Real
from os import PathLike
from typing import Any, get_args

from deblur_deploy.errors import InputError
from deblur_deploy.runtime.variants import Wish

MOST_THREADS = 1024
"""More than any machine's cores: a runtime that is asked for millions ends the process."""


def checked(
    model: object, provider: object, precision: object, threads: Any, max_memory_mb: Any, options: object
) -> dict[str, Any]:
    """The engine's arguments by name; raises InputError that names what is not allowed."""
    if model is not None and not isinstance(model, str | PathLike):
        raise InputError(f"model is {_named(model)}; allowed: a path, or None for the model that ships with us")
    if not isinstance(provider, str):
        raise InputError(f"provider is {_named(provider)}; allowed: a name such as 'auto' or 'cpu'")
    if not (isinstance(precision, str) and precision in get_args(Wish)):
        raise InputError(f"precision is {_named(precision)}; allowed: {', '.join(get_args(Wish))}")
    if threads is not None and not (_is_number(threads, Integral) and 1 <= threads <= MOST_THREADS):
        raise InputError(f"threads is {_named(threads)}; allowed: None, or a whole number from 1 to {MOST_THREADS}")
    if max_memory_mb is not None and not (_is_number(max_memory_mb, Real) and 0 < max_memory_mb < inf):
        raise InputError(f"max_memory_mb is {_named(max_memory_mb)}; allowed: None, or more than 0 and finite")
    if options is not None and not (
        isinstance(options, Mapping) and all(isinstance(text, str) for item in options.items() for text in item)
    ):
        raise InputError(f"options is {_named(options)}; allowed: None, or a dictionary of text to text")
    if options and provider == "auto":
        raise InputError("options belong to one provider; name it instead of provider='auto'")
    return {
        "model": model,
        "provider": provider,
        "precision": precision,
        "threads": None if threads is None else int(threads),
        "max_memory_mb": max_memory_mb,
        "options": dict(options) if options else None,
    }


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _named(value: object) -> str:
    text = repr(value)
    return text if isinstance(value, str | int | float) and len(text) < 60 else type(value).__name__
