"""Image files in and out, through OpenCV: pixels of any depth, and what cameras write beside them.

Pixels stay turned as the file stores them and the EXIF orientation stays with them, so that nothing is turned twice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from deblur_deploy.errors import InputError, OutputError
from deblur_deploy.files import existing, writing_file
from deblur_deploy.media.headers import pixel_size
from deblur_deploy.media.tiff import Tags, as_exif, page_count, read_tags, unturned, with_tags

Image = NDArray[np.uint8]

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"})

MAX_PIXELS = 2**28
"""Images that state more pixels are refused before they are decoded, unless a caller allows more."""

_KEPT = (cv2.IMAGE_METADATA_EXIF, cv2.IMAGE_METADATA_XMP, cv2.IMAGE_METADATA_ICCP)
_CARRIERS = frozenset({".jpeg", ".jpg", ".png", ".webp"})
_DEEPEST: dict[str, type[np.uint8] | type[np.uint16]] = {
    ".bmp": np.uint8,
    ".jpeg": np.uint8,
    ".jpg": np.uint8,
    ".png": np.uint16,
    ".webp": np.uint8,
}


@dataclass(frozen=True, kw_only=True)
class Photo:
    """An image file's content."""

    pixels: NDArray[Any]
    """uint8, uint16 or float; HxW gray, HxWx3 RGB or HxWx4 RGBA; not turned by the EXIF orientation."""
    metadata: tuple[tuple[int, bytes], ...] = ()
    """EXIF, XMP and ICC profile, by OpenCV's numbers for them."""
    tiff_tags: Tags = field(default_factory=dict)
    """The same of a TIFF file."""

    def with_pixels(self, pixels: NDArray[Any]) -> Photo:
        """The same metadata with other pixels."""
        return replace(self, pixels=pixels)


def is_stream(name: str) -> bool:
    """Whether ``name`` is ``camera:NUMBER`` or a URL, and not a path."""
    return re.fullmatch(r"camera:\d+|[a-z][a-z0-9+.-]+://.+", name, re.IGNORECASE | re.DOTALL) is not None


def list_images(folder: Path) -> list[Path]:
    """Image files directly inside ``folder``, by name; raises MissingFileError without such a folder."""
    return [path for path in list_media(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def list_media(folder: Path, pattern: str = "*", *, recursive: bool = False) -> list[Path]:
    """Image and video files in ``folder`` whose names match ``pattern``, by name.

    Hidden files are left out: an interrupted run may have left its temporary files.
    Raises MissingFileError without such a folder.
    """
    existing(folder, kind="folder")
    known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    found = folder.rglob(pattern) if recursive else folder.glob(pattern)
    return sorted(
        path for path in found if path.suffix.lower() in known and not path.name.startswith(".") and path.is_file()
    )


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image:
    """uint8 HxWx3 RGB, turned as its EXIF orientation says.

    Raises MissingFileError if there is no such file, InputError if it cannot be decoded or has too many pixels.
    """
    image = _decoded(path, _content(path, max_pixels), cv2.IMREAD_COLOR_RGB)[0]
    return image.astype(np.uint8, copy=False)


def read_photo(path: Path, *, max_pixels: int = MAX_PIXELS) -> Photo:
    """The file as it is: depth, gray or alpha, and metadata.

    Raises as :func:`read_image` does, and InputError for a TIFF file of several pages, of which but one would be left.
    """
    data = _content(path, max_pixels)
    tags: Tags = {}
    if data[:2].tobytes() in (b"II", b"MM"):
        content = data.tobytes()
        pages = page_count(content)
        if pages > 1:
            raise InputError(f"{path} has {pages} pages, of which only one could be kept; save each as its own file")
        tags, data = read_tags(content), np.frombuffer(unturned(content), np.uint8)
    pixels, metadata = _decoded(path, data, cv2.IMREAD_UNCHANGED)
    if pixels.ndim == 3 and pixels.shape[2] in (3, 4):
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB if pixels.shape[2] == 3 else cv2.COLOR_BGRA2RGBA, dst=pixels)
    return Photo(pixels=pixels, metadata=metadata, tiff_tags=tags)


def write_image(path: Path, image: Image) -> None:
    """Write uint8 HxWx3 RGB in the format that the suffix names, whole or not at all."""
    write_photo(path, Photo(pixels=image))


def write_photo(path: Path, photo: Photo) -> None:
    """Write a photo in the format that the suffix names, whole or not at all; raises OutputError."""
    suffix, pixels = path.suffix.lower(), photo.pixels
    if suffix not in IMAGE_SUFFIXES:
        raise OutputError(f"cannot write {path}: unknown image format; use one of {', '.join(sorted(IMAGE_SUFFIXES))}")
    jpeg = suffix in (".jpg", ".jpeg")
    quality = [cv2.IMWRITE_JPEG_QUALITY, 95] if jpeg else []
    # The encoder would clip what its format cannot hold, nearly all of it to white.
    if suffix in _DEEPEST:
        pixels = _as_depth(pixels, _DEEPEST[suffix])
    if jpeg and pixels.ndim == 3 and pixels.shape[2] == 4:
        if pixels[..., 3].min() < 255:
            raise OutputError(f"cannot write {path}: JPEG has no transparency; name the file .png")
        pixels = pixels[..., :3]
    if pixels.ndim == 3 and pixels.shape[2] in (3, 4):
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR if pixels.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)
    # The orientation first: it counts most where not all can be kept.
    own = [(cv2.IMAGE_METADATA_EXIF, as_exif(photo.tiff_tags))] if photo.tiff_tags else []
    kept = sorted([*photo.metadata, *own], key=lambda entry: entry[0] != cv2.IMAGE_METADATA_EXIF)
    kept = kept if suffix in _CARRIERS else []
    done, data = False, None
    # A metadata block that was damaged already makes the encoder refuse the whole image: then it alone is left out.
    for entries in (some for count in range(len(kept), -1, -1) for some in combinations(kept, count)):
        try:
            kinds, blocks = (
                [kind for kind, _ in entries],
                [np.frombuffer(block, np.uint8)[None] for _, block in entries],
            )
            done, data = cv2.imencodeWithMetadata(suffix, pixels, kinds, blocks, quality)
        except cv2.error:
            continue
        if done:
            break
    if not done or data is None:
        size = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise OutputError(f"cannot write {path}: the {suffix} encoder refused {size} pixels of {pixels.dtype}")
    with writing_file(path) as temporary:
        temporary.write_bytes(with_tags(data.tobytes(), photo.tiff_tags))


def _as_depth(pixels: NDArray[Any], deepest: type[np.uint8] | type[np.uint16]) -> NDArray[Any]:
    """``pixels`` in a dtype that holds no more than ``deepest``; each keeps its share of the full scale."""
    most = np.iinfo(deepest).max
    if pixels.dtype.kind == "f":
        return np.rint(np.clip(pixels, 0, 1) * most).astype(deepest)
    if pixels.dtype == np.uint16 and deepest is np.uint8:
        return np.rint(pixels / np.float32(257)).astype(np.uint8)
    return pixels


def _content(path: Path, max_pixels: int) -> NDArray[np.uint8]:
    try:
        data = np.fromfile(existing(path, kind="file"), np.uint8)
    except PermissionError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    size = pixel_size(data[: 2**20].tobytes()) or pixel_size(data.tobytes())
    if size is None:
        raise InputError(f"{path} is not a JPEG, PNG, TIFF, WebP or BMP image, or is cut short")
    if size[0] * size[1] > max_pixels:
        raise InputError(
            f"{path} states {size[0]}x{size[1]} pixels, more than the limit of {max_pixels / 1e6:.0f} megapixels"
        )
    return data


def _decoded(path: Path, data: NDArray[np.uint8], flags: int) -> tuple[NDArray[Any], tuple[tuple[int, bytes], ...]]:
    try:
        image, kinds, blocks = cv2.imdecodeWithMetadata(data, flags=flags)
    except (cv2.error, MemoryError):
        image = None
    if image is None or not image.size:
        raise InputError(f"{path} is not an image that can be read; it may be damaged or of an unsupported format")
    found = zip(np.ravel(kinds).tolist() if len(blocks) else [], blocks, strict=True)
    return image, tuple((kind, block.tobytes()) for kind, block in found if kind in _KEPT)
