"""The house stays readable: no file over 300 lines, no function over 60, and first sentences that differ."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "deblur_deploy"
FILES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
MOST_LINES, MOST_LINES_OF_FUNCTION = 300, 60


def functions(text: str) -> Iterator[tuple[str, int]]:
    """Names of functions and methods, with their lines, decorators not counted."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def test_no_file_is_too_long_to_read():
    assert {name: len(text.splitlines()) for name, text in FILES.items() if len(text.splitlines()) > MOST_LINES} == {}


def test_no_function_is_too_long_to_read():
    long = [
        f"{file}: {name} has {lines} lines"
        for file, text in FILES.items()
        for name, lines in functions(text)
        if lines > MOST_LINES_OF_FUNCTION
    ]
    assert long == []


def test_every_file_says_first_what_it_is_and_no_two_the_same():
    said: dict[str, str] = {}
    for name, text in FILES.items():
        first = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
        assert first, f"{name} does not say what it is"
        assert first not in said, f"{name} says the same as {said[first]}"
        said[first] = name
