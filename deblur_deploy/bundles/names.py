"""Bundles by name: those that ship with the package, and those that the user keeps in one folder of their own."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from deblur_deploy.bundles.manifest import MANIFEST
from deblur_deploy.errors import MissingFileError
from deblur_deploy.files import kind_of
from deblur_deploy.shipped import MODELS
from deblur_deploy.system.folders import data_folder


def bundles() -> dict[str, Path]:
    """Folders by name; the user's own come before those that ship."""
    found: dict[str, Path] = {}
    for folder in filter(None, (MODELS, data_folder())):
        with suppress(OSError):
            found |= {path.name: path for path in folder.iterdir() if _is_bundle(path)}
    return dict(sorted(found.items()))


def _is_bundle(path: Path) -> bool:
    # Hidden ones are still being written.
    return not path.name.startswith(".") and os.path.isfile(path / MANIFEST)  # noqa: PTH113, since it never raises


def located(model: str | os.PathLike[str]) -> Path:
    """Where ``model`` lies: a path as it is, or else the bundle of that name.

    Raises MissingFileError, which lists the names, for a name that none has.
    """
    path = Path(model)
    if path.name != os.fspath(model) or kind_of(path):
        return path
    known = bundles()
    if path.name not in known:
        names = ", ".join(known) or "none is installed"
        raise MissingFileError(
            f"no such model: {path}; give a bundle folder or an .onnx file of deblur-export, or a name: {names}"
        )
    return known[path.name]
