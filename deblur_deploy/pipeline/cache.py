"""Results of stages on disk: found again by what they were made from, and believed only if they are whole.

An entry is a folder named by its key.  It is written under another name and renamed, so it exists whole or not at all;
``entry.json`` lists the SHA-256 of every file and seals itself, so that what was truncated or edited later is noticed
when it is read.  A lock per key, which dies with its process, lets two exports share a cache: the second waits for
what the first is making.  (Lock files are empty and stay: removing one that somebody waits for would let two in.)
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from filelock import FileLock, Timeout

from deblur_deploy.errors import OutputError
from deblur_deploy.system.folders import cache_folder

MAX_BYTES = 4 * 2**30
"""What a cache may take on disk."""

_ENTRY = "entry.json"
_PART = ".part"
_OURS = re.compile(rf"[0-9a-f]{{64}}({re.escape(_PART)})?")
"""Folders of entries, beside which those of others may lie."""


class DamagedError(Exception):
    """An entry is not what was written; the message says in what."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """What a stage gave, besides its files."""

    about: dict[str, Any]
    """What the key was made from: for people who look into the cache."""
    record: dict[str, Any]
    """What the stage found out, as JSON."""
    files: dict[str, str]
    """SHA-256 by file name."""
    made: str
    """When: ISO 8601, UTC."""
    seconds: float
    """How long it took."""


class Cache:
    """A folder of entries, bounded: those that were not used for longest go first."""

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES) -> None:
        """Raises OutputError if the folder cannot be used."""
        self.folder, self.max_bytes = folder.absolute(), max_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "lock", timeout=10):
                pass
        except (OSError, NotImplementedError) as error:
            raise OutputError(f"cannot use the cache {folder}: {error}; set DEBLUR_CACHE or give --no-cache") from None

    @classmethod
    def usual(cls) -> Cache:
        """The folder that the environment variable ``DEBLUR_CACHE`` names, or else the user's own for caches.

        Raises OutputError if there is none, or it cannot be used.
        """
        return cls(cache_folder())

    @contextmanager
    def locked(self, key: str, on_wait: Callable[[], object]) -> Iterator[None]:
        """Hold ``key`` against every other process and thread; ``on_wait`` is called if somebody else has it."""
        lock = self._lock(key)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def take(self, key: str, target: Path) -> Entry | None:
        """Copy the files of ``key`` to the new folder ``target``; None if there is no such entry.

        Raises DamagedError if there is one that is not what was written; it is then removed.
        """
        folder = self.folder / key
        if not folder.is_dir():
            return None
        try:
            entry = _read(folder / _ENTRY)
            files = {name: _whole(folder / name, digest) for name, digest in entry.files.items()}
        except DamagedError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        os.utime(folder)
        target.mkdir(parents=True)
        for name, data in files.items():
            (target / name).write_bytes(data)
        return entry

    def part(self, key: str, *, keep: bool) -> Path:
        """The folder in which ``key`` is made; with ``keep``, what a killed process left there is still in it."""
        folder = self.folder / f"{key}{_PART}"
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def put(self, key: str, entry: Entry) -> None:
        """Make an entry of what lies in ``part(key)``; its files' hashes are those in ``entry``."""
        part, folder = self.folder / f"{key}{_PART}", self.folder / key
        body = msgspec.json.encode(entry)
        (part / _ENTRY).write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        os.replace(part, folder)

    def drop(self, key: str) -> None:
        """Forget what was begun of ``key``."""
        shutil.rmtree(self.folder / f"{key}{_PART}", ignore_errors=True)

    def shrink(self) -> None:
        """Remove entries until the rest fits, those that were not used for longest first."""
        entries = sorted(
            (*_usage(path), path) for path in self.folder.iterdir() if _OURS.fullmatch(path.name) and path.is_dir()
        )
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total <= self.max_bytes:
                return
            try:
                with self._lock(path.name.removesuffix(_PART)).acquire(timeout=0):
                    shutil.rmtree(path, ignore_errors=True)
                    total -= size
            except Timeout:  # somebody is at it
                continue

    def _lock(self, key: str) -> FileLock:
        return FileLock(self.folder / f"{key}.lock")


def _read(path: Path) -> Entry:
    seal, _, body = _bytes(path).partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != seal:
        raise DamagedError(f"{path.name} differs from what was written")
    try:
        return msgspec.json.decode(body, type=Entry)
    except msgspec.MsgspecError as error:  # whole, but of another version of this module
        raise DamagedError(f"{path.name} cannot be read: {error}") from None


def _whole(path: Path, digest: str) -> bytes:
    data = _bytes(path)
    if hashlib.sha256(data).hexdigest() != digest:
        raise DamagedError(f"{path.name} differs from what was written")
    return data


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedError(f"{path.name}: {error.strerror}") from None


def _usage(folder: Path) -> tuple[float, int]:
    """When it was used last, and its size in bytes."""
    try:
        return folder.stat().st_mtime, sum(file.stat().st_size for file in folder.rglob("*"))
    except FileNotFoundError:  # another run has just removed it
        return 0.0, 0
