"""Files here or in an object store: a path, or any URL that fsspec knows (``s3://``, ``gs://``, ``hf://``, ...)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deblur_deploy.bundles.hub import opened, url
from deblur_deploy.errors import DeblurError, InputError, MissingFileError, OutputError


def listing(place: str, pattern: str, *, recursive: bool) -> dict[str, str]:
    """Files at a URL, one or a folder of them: name inside the folder to URL; raises MissingFileError or InputError."""
    system, path = opened(place)
    try:
        if system.isfile(path):
            return {Path(path).name: place}
        found = system.find(path, maxdepth=None if recursive else 1)
    except Exception as error:  # whatever the store's own library raises
        raise _failed(InputError, "list", place, error) from None
    if not found:
        raise MissingFileError(f"no such file or folder: {place}")
    names = sorted(name.removeprefix(path.rstrip("/") + "/") for name in found)
    return {name: f"{place.rstrip('/')}/{name}" for name in names if Path(name).match(pattern)}


def exists(place: str) -> bool:
    """Whether there is something at a path or URL."""
    if url(place) is None:
        return Path(place).exists()
    system, path = opened(place)
    return bool(system.exists(path))


@contextmanager
def reading(place: str) -> Iterator[Path]:
    """The file at a path or URL as a file here; raises InputError if it cannot be fetched."""
    if url(place) is None:
        yield Path(place)
        return
    with _copy(place) as (system, path, here):
        try:
            system.get_file(path, str(here))
        except Exception as error:
            raise _failed(InputError, "read", place, error) from None
        yield here


@contextmanager
def writing(place: str) -> Iterator[Path]:
    """Where to write, whole or not at all, what is to be at ``place``; it is there after the block.

    Raises OutputError.  An object store shows an object when its last byte is there, so uploading is enough.
    """
    if url(place) is None:
        yield Path(place)
        return
    with _copy(place) as (system, path, here):
        yield here
        try:
            system.makedirs(path.rpartition("/")[0], exist_ok=True)
            system.put_file(str(here), path)
        except Exception as error:
            raise _failed(OutputError, "write", place, error) from None


@contextmanager
def _copy(place: str) -> Iterator[tuple[Any, str, Path]]:
    """The store of a URL, the path in it, and where a copy of it may lie for a while."""
    system, path = opened(place)
    with tempfile.TemporaryDirectory(prefix="deblur-") as folder:
        yield system, path, Path(folder) / Path(path).name


def _failed(kind: type[DeblurError], verb: str, place: str, error: Exception) -> DeblurError:
    said = str(error).strip().splitlines() or [type(error).__name__]
    return kind(f"cannot {verb} {place}: {said[0]}")
