"""OpenCV, from whichever wheel is there: whole and new enough, or one line that says how to get it so."""

from __future__ import annotations

import re

import cv2

from deblur_deploy import wheels
from deblur_deploy.errors import MissingExtraError

OLDEST = (4, 13)
"""4.12 loses the alpha of BMP files, and colour profiles, which it has the functions for."""
_NEEDED = ("IMAGE_METADATA_EXIF", "IMREAD_COLOR_RGB", "imdecodeWithMetadata", "imencodeWithMetadata")


def check() -> None:
    """Raise MissingExtraError if OpenCV is too old, or put together from the files of several wheels."""
    version = getattr(cv2, "__version__", "without a version")
    lacking = next((name for name in _NEEDED if not hasattr(cv2, name)), None)
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < OLDEST:
        why = "is too old, {}.{} or later is needed".format(*OLDEST)
    elif lacking:
        why = f"lacks {lacking}"
    else:
        return
    clash = wheels.clash("opencv")
    raise MissingExtraError(f"OpenCV {version} {why}{f' ({clash})' if clash else ''}; {wheels.mend('opencv')}")


def silence() -> None:
    """What OpenCV would print about a damaged file, our own line says."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


check()
