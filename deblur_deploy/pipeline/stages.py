"""Stages: what they are, and how each is done at most once.

A stage is a plain function that is given an empty folder, writes files into it and returns a small JSON record.  Its
result is kept under a key: the SHA-256 over its name, its source code, the hashes of what went in, its config and the
environment (versions, machine) that decides what comes out.  The same key again gives the same files without running
anything, so a killed run goes on where it was, and a changed option runs only what depends on it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec

import deblur_deploy
from deblur_deploy.errors import DeblurError, OutputError
from deblur_deploy.files import sha256
from deblur_deploy.pipeline.cache import Cache, DamagedError, Entry

Progress = Callable[[str], None]
Record = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Done:
    """A stage's result."""

    folder: Path
    """Where its files lie, as long as the run lasts."""
    outputs: dict[str, str]
    """SHA-256 by file name: the inputs of later stages."""
    record: Record
    """What it returned."""
    made: str
    """When: ISO 8601, UTC."""
    cached: bool
    """Whether it was made by an earlier run."""


class Stages:
    """Runs stages, or finds their results in ``cache``; ``work`` is an empty folder that outlives the last stage."""

    def __init__(self, cache: Cache, work: Path, on_progress: Progress = lambda _: None) -> None:
        self.cache, self.work, self.on_progress = cache, work, on_progress
        self.journal: list[Record] = []
        """What each stage took in and gave out, in order: a part of ``bundle.json``."""

    def run(
        self,
        name: str,
        make: Callable[[Path], Record],
        *,
        code: tuple[str, ...],
        inputs: Mapping[str, str],
        config: msgspec.Struct | Mapping[str, Any] | None = None,
        environment: Mapping[str, Any] | None = None,
        resumes: bool = False,
    ) -> Done:
        """The result of ``make(folder)``, which is called only if the cache does not hold it.

        ``make`` writes files, not folders; ``code`` names the modules whose source, with all that they import of ours,
        decides the result; ``inputs`` are hashes of all that ``make`` reads.  A stage that ``resumes`` finds in its
        folder what an unfinished run of it left there, and itself removes what is not for the result.

        Raises what ``make`` raises, with OutputError for any other OSError.
        """
        about: Record = {
            "stage": name,
            "code": {module: source_hash(module) for module in code},
            "inputs": dict(inputs),
            "config": {} if config is None else to_record(config),
            "environment": dict(environment or {}),
        }
        key = digest(about)
        target = self.work / key
        with self.cache.locked(key, lambda: self.on_progress(f"{name}: another run is at it; waiting")):
            entry, cached = self._taken(name, key, target), True
            if entry is None:
                self.on_progress(name)
                entry, cached = self._made(name, key, make, about, resumes), False
                self.cache.take(key, target)
            else:
                self.on_progress(f"{name}: from the cache, made {entry.made}")
        self.journal.append(
            {
                "name": name,
                "key": key,
                "inputs": about["inputs"],
                "config": about["config"],
                "outputs": entry.files,
                "seconds": entry.seconds,
                "made": entry.made,
                "cached": cached,
            }
        )
        return Done(folder=target, outputs=entry.files, record=entry.record, made=entry.made, cached=cached)

    def _taken(self, name: str, key: str, target: Path) -> Entry | None:
        try:
            return self.cache.take(key, target)
        except DamagedError as error:
            self.on_progress(f"{name}: the cache was damaged ({error}); made again")
            return None

    def _made(self, name: str, key: str, make: Callable[[Path], Record], about: Record, resumes: bool) -> Entry:
        start = time.perf_counter()
        try:
            folder = self.cache.part(key, keep=resumes)
            record = make(folder)
            entry = Entry(
                about=about,
                record=record,
                files={path.name: sha256(path) for path in sorted(folder.iterdir())},
                made=datetime.now(UTC).isoformat(timespec="seconds"),
                seconds=round(time.perf_counter() - start, 2),
            )
            self.cache.put(key, entry)
            self.cache.shrink()
        except BaseException as error:
            if not resumes:
                self.cache.drop(key)
            if isinstance(error, OSError) and not isinstance(error, DeblurError):
                raise OutputError(
                    f"{name} cannot write to {self.cache.folder}: {error.strerror or error}; "
                    "make room, or name another folder in DEBLUR_CACHE"
                ) from None
            raise
        return entry


def digest(values: object) -> str:
    """SHA-256 of ``values``, which JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def to_record(values: object) -> Any:
    """Dataclasses and structs, also with paths in them, as JSON can hold them."""
    return msgspec.to_builtins(values, enc_hook=str)


def from_record(values: object, kind: type[T]) -> T:
    """What :func:`to_record` was given, of type ``kind``."""
    return msgspec.convert(values, kind, dec_hook=lambda type_, value: type_(value))


@cache
def source_hash(module: str) -> str:
    """SHA-256 of the source of ``module`` and of every module of ours that it imports, anywhere in it or in them.

    It is found without importing anything: that would take longer than all else that a cached run does.
    """
    root = Path(deblur_deploy.__file__).parent
    found: dict[str, bytes] = {deblur_deploy.__name__: (root / "__init__.py").read_bytes()}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found or name.partition(".")[0] != deblur_deploy.__name__:
            continue
        path = root.parent / Path(*name.split(".")).with_suffix(".py")
        if not path.is_file():  # a package, or a name inside of a module
            continue
        found[name] = path.read_bytes()
        waiting += _imports(found[name])
    whole = hashlib.sha256()
    for name in sorted(found):
        whole.update(f"{name} {len(found[name])}\n".encode() + found[name])
    return whole.hexdigest()


@cache
def _imports(source: bytes) -> list[str]:
    """Names of the modules that ``source`` imports, and of what it takes from them, which may be modules too."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names
