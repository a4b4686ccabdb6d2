"""Image files in and out, through OpenCV."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from deblur_deploy.errors import InputError, OutputError
from deblur_deploy.files import existing, writing_file

Image = NDArray[np.uint8]

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def list_images(folder: Path) -> list[Path]:
    """Image files directly inside ``folder``, by name; raises MissingFileError without such a folder."""
    return sorted(path for path in existing(folder, kind="folder").iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def read_image(path: Path) -> Image:
    """uint8 HxWx3 RGB, turned as its EXIF orientation says.

    Raises MissingFileError if there is no such file, InputError if OpenCV cannot decode it.
    """
    data = np.fromfile(existing(path, kind="file"), np.uint8)
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB) if data.size else None
    except cv2.error:
        image = None
    if image is None:
        raise InputError(f"{path} is not an image that can be read; it may be damaged or of an unsupported format")
    return image


def write_image(path: Path, image: Image) -> None:
    """Write uint8 HxWx3 RGB in the format that the suffix names, whole or not at all."""
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise OutputError(f"cannot write {path}: unknown image format; use one of {', '.join(sorted(IMAGE_SUFFIXES))}")
    quality = [cv2.IMWRITE_JPEG_QUALITY, 95] if path.suffix.lower() in (".jpg", ".jpeg") else []
    done, data = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), quality)
    if not done:
        raise OutputError(f"cannot write {path}: the encoder refused {image.shape[1]}x{image.shape[0]} pixels")
    with writing_file(path) as temporary:
        temporary.write_bytes(data.tobytes())
