"""A bundle at a URL: on a model hub (``hf://USER/REPO``) or in any store that fsspec knows.

Every file is checked against the bundle's manifest before it is kept, and the engine checks it again whenever it loads
it.  The copy is named by the manifest's own hash, so a changed bundle is another copy; without a network the last copy
of a URL is used, and a warning says so.  Only what the engine reads is fetched.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from deblur_deploy.bundles.manifest import MANIFEST, Bundle
from deblur_deploy.errors import InputError, MissingExtraError, ModelError, OutputError
from deblur_deploy.files import sha256, writing_file, writing_folder
from deblur_deploy.system.folders import cache_folder

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+)", re.IGNORECASE | re.DOTALL)

_MOST_MANIFEST = 2**24
"""Bytes that a manifest may have."""


def url(name: str | Path) -> str | None:
    """The URL that ``name`` is, with the slashes that pathlib folds; None for a path (``C:/`` is one too)."""
    match = _URL.fullmatch(str(name))
    if match is None:
        return None
    return f"{match[1]}://{'/' if match[1].lower() in ('file', 'local') else ''}{match[2]}"


def opened(place: str) -> tuple[Any, str]:
    """fsspec's file system of a URL and the path in it; raises MissingExtraError or InputError."""
    try:
        # Here, since paths need no fsspec.
        import fsspec

        system, path = fsspec.core.url_to_fs(place)
    except ImportError as error:
        raise MissingExtraError(f"cannot open {place}: {_said(error)}; pip install 'deblur-deploy[hub]'") from None
    except ValueError as error:
        raise InputError(f"cannot open {place}: {_said(error)}") from None
    return system, str(path)


def fetched(place: str) -> Path:
    """The folder of a verified copy of the bundle at a URL.

    Raises ModelError if it is no bundle or not what its manifest says, OutputError if it cannot be kept.
    """
    system, path = opened(place)
    cache = cache_folder() / "hub"
    last = cache / f"{hashlib.sha256(place.encode()).hexdigest()[:32]}.txt"
    try:
        manifest: bytes = system.cat_file(f"{path}/{MANIFEST}", end=_MOST_MANIFEST)
    except FileNotFoundError:
        raise ModelError(f"{place} is no bundle: it has no {MANIFEST}") from None
    except Exception as error:  # whatever the store's own library raises
        copy = cache / last.read_text(encoding="ascii") if last.is_file() else cache / "none"
        if not copy.is_dir():
            raise ModelError(f"cannot fetch {place}: {_said(error)}") from None
        warnings.warn(f"{place} is out of reach ({_said(error)}); its last copy is used", RuntimeWarning, stacklevel=3)
        return copy
    folder = cache / hashlib.sha256(manifest).hexdigest()[:32]
    files = _files(manifest, place)
    if not _whole(folder, files):
        try:
            _fetch(system, path, place, manifest, files, folder)
        except OutputError:
            if not _whole(folder, files):  # another process has just fetched it
                raise
    with suppress(OutputError), writing_file(last) as temporary:  # a cache may be read-only, and hold all the same
        temporary.write_text(folder.name, encoding="ascii")
    return folder


def _whole(folder: Path, files: Mapping[str, str]) -> bool:
    """Whether a copy is there and nothing of it damaged or missing."""
    return (folder / MANIFEST).is_file() and all(
        (folder / name).is_file() and sha256(folder / name) == digest for name, digest in files.items()
    )


def _fetch(system: Any, path: str, place: str, manifest: bytes, files: Mapping[str, str], folder: Path) -> None:
    with writing_folder(folder, force=folder.is_dir()) as temporary:  # what is there already is damaged
        (temporary / MANIFEST).write_bytes(manifest)
        for name, digest in files.items():
            try:
                with system.open(f"{path}/{name}", "rb") as source, (temporary / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
            except Exception as error:
                raise ModelError(f"cannot fetch {place}/{name}: {_said(error)}") from None
            if sha256(temporary / name) != digest:
                raise ModelError(f"{place}/{name} is not the file that its {MANIFEST} describes; nothing was kept")
        try:
            Bundle.read(temporary)
        except ModelError as error:
            raise ModelError(str(error).replace(str(temporary), place)) from None


def _files(manifest: bytes, place: str) -> dict[str, str]:
    try:
        files = {str(row["file"]): str(row["sha256"]) for row in json.loads(manifest)["variants"]}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ModelError(f"{place}/{MANIFEST} is damaged ({error!r})") from None
    for name in files:
        # A manifest is data from somewhere else: it must not reach outside its own folder.
        if Path(name).name != name:
            raise ModelError(f"{place}/{MANIFEST} names {name!r}, which is not a file inside the bundle")
    return files


def _said(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
