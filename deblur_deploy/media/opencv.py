"""OpenCV, from whichever wheel is there: what this package needs of it, or one line that says how to get it."""

from __future__ import annotations

import cv2

from deblur_deploy.errors import MissingExtraError
from deblur_deploy.runtime import wheels

_NEEDED = ("IMAGE_METADATA_EXIF", "IMREAD_COLOR_RGB", "imdecodeWithMetadata", "imencodeWithMetadata")
"""The youngest of what is used; OpenCV 4.12 has them all."""


def check() -> None:
    """Raise MissingExtraError if OpenCV is too old, or put together from the files of several wheels."""
    if lacking := [name for name in _NEEDED if not hasattr(cv2, name)]:
        version = getattr(cv2, "__version__", "without a version")
        why = wheels.clash("opencv") or "4.12 or later is needed"
        raise MissingExtraError(f"OpenCV {version} lacks {lacking[0]}; {why}: {wheels.mend('opencv')}")


def silence() -> None:
    """What OpenCV would print about a damaged file, our own line says."""
    # 4.12 has it at the top, the later ones below.
    getattr(cv2.utils, "logging", cv2).setLogLevel(0)


check()
