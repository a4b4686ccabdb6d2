"""Command lines by tyro, with its framed complaints folded into our one line, and help that fits a screen."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from deblur_deploy.errors import InputError

T = TypeVar("T")

Usual = Mapping[Any, Collection[str]]
"""Fields that ``--help`` shows, by the config that holds them; a config that is not named is left out as a whole."""

_FRAME = re.compile(r"[│╭╮╰╯─]|^[|+]|[|+]$|-{3,}", re.MULTILINE)
_ALL = "--help-all"
_METAVARS = {Path: "PATH", str: "TEXT", int: "INT", float: "FLOAT"}


def parse_arguments(
    kind: type[T], name: str, argv: Sequence[str] | None, *, usual: Usual | None = None, **options: Any
) -> T:
    """``argv`` as a ``kind``; ``options`` go to ``tyro.cli``.

    ``--help`` shows what is ``usual``, if that is given, and ``--help-all`` everything.  Raises InputError for what
    makes no sense, SystemExit for help.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if _ALL in words:
        words = ["--help"]
    elif usual is not None and {"-h", "--help"} & set(words):
        _help(kind, name, usual, **options)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(kind, prog=name, args=words, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(" ".join(_FRAME.sub(" ", said.getvalue()).split())) from None
    except ValueError as error:  # by the record as a whole, which tyro lets through
        raise InputError(str(error)) from None


def _help(kind: type[Any], name: str, usual: Usual, **options: Any) -> None:
    """Print the help that fits a screen; raises SystemExit."""
    registry = options.pop("registry", None) or ConstructorRegistry()
    inside = False

    @registry.struct_rule  # type: ignore[untyped-decorator]
    def only_usual(info: StructTypeInfo) -> StructConstructorSpec | None:
        nonlocal inside
        if inside:
            return None
        inside = True
        try:
            spec = ConstructorRegistry.get_struct_spec(info)
        finally:
            inside = False
        if not isinstance(spec, StructConstructorSpec) or not isinstance(info.type, type):
            return None
        shown = usual.get(info.type, ())
        return replace(spec, fields=tuple(_short(field, shown, usual) for field in spec.fields))

    marks = (tyro.conf.FlagCreatePairsOff,)
    try:
        tyro.cli(kind, prog=name, args=["--help"], registry=registry, config=marks, **options)
    finally:
        sys.stdout.write(f"These are the usual options; {name} {_ALL} shows every one.\n")


def _short(field: StructFieldSpec, shown: Collection[str], usual: Usual) -> StructFieldSpec:
    """The field, hidden unless it is among those ``shown`` or holds a config that is."""
    if any(type(field.default) is config for config in usual):
        return replace(field, helptext="")  # its options tell more than its heading
    kind: Any = field.type
    if field.name not in shown:
        kind = Annotated[kind, tyro.conf.Suppress]
    elif get_origin(kind) is not Annotated and field.default in (None, (), False, ""):
        # "{None}|PATH (default: None)" says no more than "PATH".
        metavar = _metavar(kind) if field.default is None else None
        kind = Annotated[kind, tyro.conf.arg(help_behavior_hint="", metavar=metavar)]
    return replace(field, type=kind)


def _metavar(kind: Any) -> str | None:
    """For a type that may be None: what else it may be."""
    for other in get_args(kind):
        if get_origin(other) is Literal:
            return "{" + ",".join(map(str, get_args(other))) + "}"
        if get_origin(other) is tuple:
            return " ".join(_METAVARS[item] for item in get_args(other))
        if other in _METAVARS:
            return _METAVARS[other]
    return None
