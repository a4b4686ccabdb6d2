"""Where the user keeps what programs find out, and what is theirs."""

from __future__ import annotations

import os
from pathlib import Path

from deblur_deploy.errors import OutputError


def cache_folder() -> Path:
    """Where this library keeps what it can find out again: ``DEBLUR_CACHE``, else the user's cache directory.

    Raises OutputError if the user has no home.
    """
    folder = _folder("DEBLUR_CACHE", "XDG_CACHE_HOME", ".cache")
    if folder is None:
        raise OutputError("there is no home directory for a cache; set DEBLUR_CACHE to a folder")
    return folder


def data_folder() -> Path | None:
    """The user's folder of bundles: ``DEBLUR_BUNDLES``, else in their data directory; None if they have no home."""
    return _folder("DEBLUR_BUNDLES", "XDG_DATA_HOME", ".local/share", "bundles")


def _folder(own: str, base: str, usual: str, inside: str = "") -> Path | None:
    """The folder that ``own`` names, or ours in that which ``base`` names, or in the ``usual`` one at home."""
    if named := os.environ.get(own):
        return Path(named)
    try:
        return Path(os.environ.get(base) or Path.home() / usual) / "deblur-deploy" / inside
    except RuntimeError:
        return None
