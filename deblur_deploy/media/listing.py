"""What a folder holds: the images and videos in it, and why all else is left out."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from deblur_deploy.errors import MissingFileError
from deblur_deploy.files import existing, kind_of
from deblur_deploy.media.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A folder's content."""

    paths: list[Path] = field(default_factory=list)
    """Images and videos, by name."""
    left_out: Counter[str] = field(default_factory=Counter)
    """How many there are of what is neither, by what they are; what the pattern left out is not counted."""
    failed: list[str] = field(default_factory=list)
    """What could not be looked at, and why: one line each."""


def look_into(folder: Path, pattern: str = "*", *, recursive: bool = False, but: Path | None = None) -> Listing:
    """Images and videos in ``folder`` whose names match ``pattern``; a folder ``but`` inside is passed over.

    Links to folders are not followed, as they may lead in circles.  Hidden files and folders are left out: an
    interrupted run may have left its temporary files, and other programs keep thumbnails and what was deleted.  Raises
    MissingFileError without such a folder, or if it may not be read.
    """
    passed = None if but is None else os.path.realpath(but)
    found = Listing()
    folders = [existing(folder, kind="folder")]
    while folders:
        place = folders.pop()
        try:
            entries = sorted(place.iterdir())
        except OSError as error:
            if place == folder:
                raise MissingFileError(f"cannot read {folder}: {error.strerror}") from None
            found.failed.append(f"cannot read {place}: {error.strerror}")
            continue
        for path in entries:
            try:
                kind = kind_of(path)
            except MissingFileError as error:
                found.failed.append(str(error))
                continue
            if kind == "folder" and os.path.realpath(path) == passed:
                continue
            if kind == "folder" and recursive and not (path.name.startswith(".") or path.is_symlink()):
                folders.append(path)
            elif reason := _unlisted(path, kind, recursive):
                found.left_out[reason] += 1
            elif fnmatch(path.name, pattern):
                found.paths.append(path)
    found.paths.sort()
    return found


def _unlisted(path: Path, kind: str, recursive: bool) -> str:
    """Why ``path`` is left out; empty if it is not."""
    if path.name.startswith("."):
        return "hidden"
    if kind == "folder":
        return "linked folders" if recursive else "folders (--recursive goes into them)"
    if kind != "file":
        return f"{kind}s" if kind else "broken links"
    if path.suffix.lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
        return path.suffix.lower() or "without a suffix"
    return ""
