"""Command lines by tyro, with its framed complaints folded into our one line."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import Any, TypeVar

import tyro

from deblur_deploy.errors import InputError

T = TypeVar("T")

_FRAME = re.compile(r"[│╭╮╰╯─]|^[|+]|[|+]$|-{3,}", re.MULTILINE)


def parse_arguments(kind: type[T], name: str, argv: Sequence[str] | None, **options: Any) -> T:
    """``argv`` as a ``kind``; ``options`` go to ``tyro.cli``.

    Raises InputError for what makes no sense, and SystemExit for --help.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(kind, prog=name, args=argv, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(" ".join(_FRAME.sub(" ", said.getvalue()).split())) from None
    except ValueError as error:  # by the record as a whole, which tyro lets through
        raise InputError(str(error)) from None
