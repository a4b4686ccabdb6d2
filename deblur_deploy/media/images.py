"""Image files in and out: OpenCV decodes and encodes pixels of any depth, all else goes along as it was.

Pixels stay turned as the file stores them and the EXIF orientation stays with them, so that nothing is turned twice.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from deblur_deploy.errors import InputError, MissingFileError, OutputError
from deblur_deploy.files import existing, writing_file
from deblur_deploy.media.avif import read_avif
from deblur_deploy.media.beside import (
    Beside,
    Unkept,
    put_back,
    read_bmp,
    read_gif,
    read_jpeg,
    read_png,
    read_webp,
)
from deblur_deploy.media.headers import FORMATS, Format, foreign, format_of, pixel_size
from deblur_deploy.media.tiff import check_decodable, neutral, put_into_tiff, read_tiff

Image = NDArray[np.uint8]

IMAGE_SUFFIXES = frozenset(FORMATS)

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"})

MAX_PIXELS = 2**28
"""Images that state more pixels are refused before they are decoded, unless a caller allows more."""

_MAX_SIDE, _MAX_DECODED = 10**6, 2**30
"""What libpng takes of width or height, and what OpenCV takes of pixels."""

_READ: dict[Format, Callable[[bytes], Beside]] = {
    "AVIF": read_avif,
    "BMP": read_bmp,
    "GIF": read_gif,
    "JPEG": read_jpeg,
    "PNG": read_png,
    "TIFF": read_tiff,
    "WebP": read_webp,
}
_ENCODERS: dict[Format, str] = {
    "AVIF": ".avif",
    "BMP": ".bmp",
    "JPEG": ".jpg",
    "PNG": ".png",
    "TIFF": ".tif",
    "WebP": ".webp",
}
_DEPTHS = (np.uint8, np.uint16, np.float32)
_DEEPEST: dict[Format, type[np.uint8] | type[np.uint16]] = {
    "AVIF": np.uint8,
    "BMP": np.uint8,
    "JPEG": np.uint8,
    "PNG": np.uint16,
    "WebP": np.uint8,
}


@dataclass(frozen=True, kw_only=True)
class Photo:
    """An image file's content."""

    pixels: NDArray[Any]
    """uint8, uint16 or float; HxW gray, HxWx3 RGB or HxWx4 RGBA; not turned by the EXIF orientation."""
    beside: Beside | None = None
    """What the file carries beside them; None if they come from no file."""

    def with_pixels(self, pixels: NDArray[Any]) -> Photo:
        """The same metadata with other pixels."""
        return replace(self, pixels=pixels)

    def restored(self, restore: Callable[[NDArray[Any]], NDArray[Any]]) -> Photo:
        """The same with what ``restore`` makes of its pixels; gray stays gray, and what is no colour as it was."""
        pixels = self.pixels
        if self.beside is None or pixels.ndim < 3 or pixels.shape[2] < 4:
            return self.with_pixels(restore(pixels))
        if self.beside.fourth == "other":
            colour = restore(np.ascontiguousarray(pixels[..., :3]))
            return self.with_pixels(np.concatenate((colour, pixels[..., 3:]), axis=2))
        result = restore(pixels)
        if self.beside.gray:
            result[..., :3] = cv2.cvtColor(np.ascontiguousarray(result[..., :3]), cv2.COLOR_RGB2GRAY)[..., None]
        return self.with_pixels(result)


def is_stream(name: str) -> bool:
    """Whether ``name`` is ``camera:NUMBER`` or a URL, and not a path."""
    return re.fullmatch(r"camera:\d+|[a-z][a-z0-9+.-]+://.+", name, re.IGNORECASE | re.DOTALL) is not None


def list_images(folder: Path) -> list[Path]:
    """Image files directly inside ``folder``, by name, hidden ones left out.

    Raises MissingFileError without such a folder, or if it may not be read.
    """
    try:
        found = list(existing(folder, kind="folder").iterdir())
    except MissingFileError:
        raise
    except OSError as error:
        raise MissingFileError(f"cannot read {folder}: {error.strerror}") from None
    known = (path for path in found if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."))
    return sorted(path for path in known if path.is_file())


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image:
    """uint8 HxWx3 RGB, turned as its EXIF orientation says; of an animation the first picture.

    Raises MissingFileError if there is no such file, InputError if it cannot be decoded or has too many pixels.
    """
    data, kind = _content(path, max_pixels)
    return _decoded(path, data, kind, cv2.IMREAD_COLOR_RGB).astype(np.uint8, copy=False)


def read_photo(path: Path, *, max_pixels: int = MAX_PIXELS) -> Photo:
    """The file as it is: depth, gray or alpha, and what it carries beside its pixels.

    Raises as :func:`read_image` does, and InputError for what cannot be kept: several pages or pictures, and colours
    that are neither gray nor RGB.
    """
    data, kind = _content(path, max_pixels)
    try:
        try:
            beside = _READ[kind](data)
        except (struct.error, IndexError):
            raise InputError(f"{path} is damaged: it ends too early") from None
        if kind == "AVIF":
            pixels, beside = _decoded_avif(path, data, beside)
        else:
            data = neutral(data) if kind == "TIFF" else data
            pixels = _decoded(path, data, kind, cv2.IMREAD_UNCHANGED)
        if beside.fourth == "premultiplied" and pixels.ndim == 3 and pixels.shape[2] == 4 and not _opaque(pixels):
            raise Unkept("has premultiplied alpha; save it with straight alpha")
    except Unkept as why:
        raise InputError(f"{path} {why}") from None
    if pixels.dtype not in _DEPTHS:
        raise InputError(f"{path} has pixels of {pixels.dtype}; save it with 8 or 16 bits a value, or floats of 32")
    if beside.inverted:
        pixels = 65535 - pixels
    if beside.opaque and pixels.ndim == 3:
        pixels = np.ascontiguousarray(pixels[..., :3])
    if beside.key is not None and pixels.ndim == 2:
        alpha = np.where(pixels == beside.key, 0, np.iinfo(pixels.dtype).max).astype(pixels.dtype)
        pixels = np.dstack([pixels, pixels, pixels, alpha])
    elif pixels.ndim == 3 and pixels.shape[2] in (3, 4):
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB if pixels.shape[2] == 3 else cv2.COLOR_BGRA2RGBA, dst=pixels)
    return Photo(pixels=pixels, beside=beside)


def write_image(path: Path, image: Image) -> None:
    """Write uint8 HxWx3 RGB in the format that the suffix names, whole or not at all."""
    write_photo(path, Photo(pixels=image))


def write_photo(path: Path, photo: Photo, *, kind: Format | None = None) -> None:
    """Write a photo as ``kind``, or in the format that the suffix names, whole or not at all; raises OutputError.

    What it carries beside its pixels goes into a file of the format that it came from, and into no other.  WebP's
    encoder forgets colours that alpha hides.
    """
    kind, pixels = kind or FORMATS.get(path.suffix.lower()), photo.pixels
    if kind not in _ENCODERS:
        known = ", ".join(sorted(suffix for suffix, of in FORMATS.items() if of in _ENCODERS))
        raise OutputError(f"cannot write {path}: unknown image format; use one of {known}")
    beside = photo.beside if photo.beside and photo.beside.format == kind else Beside(format=kind)
    # The encoder would clip what its format cannot hold, nearly all of it to white.
    if kind in _DEEPEST:
        pixels = _as_depth(pixels, _DEEPEST[kind])
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if kind == "JPEG" and channels == 4:
        if not _opaque(pixels):
            raise OutputError(f"cannot write {path}: JPEG has no transparency; name the file .png")
        pixels, channels = pixels[..., :3], 3
    if channels in (3, 4):
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR if channels == 3 else cv2.COLOR_RGBA2BGRA)
    encoded = _encoded(path, pixels, kind, beside)
    if kind == "TIFF":
        encoded = put_into_tiff(encoded, beside, fourth=channels == 4)
    with writing_file(path) as temporary:
        temporary.write_bytes(put_back(encoded, beside))


def _opaque(pixels: NDArray[Any]) -> bool:
    most = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "iu" else 1
    return bool(pixels[..., 3].min() >= most)


def _encoded(path: Path, pixels: NDArray[Any], kind: Format, beside: Beside) -> bytes:
    settings = []
    if kind == "JPEG":
        settings = [cv2.IMWRITE_JPEG_QUALITY, 95]
        if beside.sampling and pixels.ndim == 3:
            settings += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, beside.sampling]
    elif kind == "AVIF":
        # Chroma is sampled as 4:2:0 unless nothing at all is lost.
        settings = [cv2.IMWRITE_AVIF_QUALITY, 100 if beside.sampling == 0x111111 else 95]
    try:
        if kind == "AVIF" and any(beside.parts):
            kinds, parts = zip(*[pair for pair in zip(_AVIF_PARTS, beside.parts, strict=True) if pair[1]], strict=True)
            blocks = [np.frombuffer(part, np.uint8)[None] for part in parts]
            done, data = cv2.imencodeWithMetadata(_ENCODERS[kind], pixels, kinds, blocks, settings)
        else:
            done, data = cv2.imencode(_ENCODERS[kind], pixels, settings)
    except cv2.error:
        done, data = False, np.empty(0, np.uint8)
    if not done:
        size = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise OutputError(f"cannot write {path}: the {kind} encoder refused {size} pixels of {pixels.dtype}")
    encoded: bytes = data.tobytes()
    return encoded


def _as_depth(pixels: NDArray[Any], deepest: type[np.uint8] | type[np.uint16]) -> NDArray[Any]:
    """``pixels`` in a dtype that holds no more than ``deepest``; each keeps its share of the full scale."""
    most = np.iinfo(deepest).max
    if pixels.dtype.kind == "f":
        return np.rint(np.clip(pixels, 0, 1) * most).astype(deepest)
    if pixels.dtype == np.uint16 and deepest is np.uint8:
        return np.rint(pixels / np.float32(257)).astype(np.uint8)
    return pixels


def _content(path: Path, max_pixels: int) -> tuple[bytes, Format]:
    try:
        data = existing(path, kind="file").read_bytes()
    except MissingFileError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    kind, size = format_of(data), pixel_size(data[: 2**20]) or pixel_size(data)
    if kind is None:
        if other := foreign(data):
            raise InputError(f"{path} is a {other}, which cannot be restored; save it in another format")
        raise InputError(f"{path} is not a JPEG, PNG, TIFF, WebP, AVIF, GIF or BMP image")
    if size is None:
        raise InputError(f"{path} is a {kind} image that is damaged or cut short")
    stated, limit = f"{path} states {size[0]}x{size[1]} pixels", min(max_pixels, _MAX_DECODED)
    if size[0] * size[1] > limit:
        raise InputError(f"{stated}, more than the limit of {limit / 1e6:.0f} megapixels")
    if max(size) > _MAX_SIDE:
        raise InputError(f"{stated}; a side of more than {_MAX_SIDE} cannot be decoded")
    if kind == "TIFF":
        try:
            check_decodable(data)
        except Unkept as why:
            raise InputError(f"{path} {why}") from None
    return data, kind


def _decoded(path: Path, data: bytes, kind: Format, flags: int) -> NDArray[Any]:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except (cv2.error, MemoryError):
        image = None
    if image is None or not image.size:
        raise _undecodable(path, kind)
    pixels: NDArray[Any] = image
    return pixels


_AVIF_PARTS = tuple(getattr(cv2, f"IMAGE_METADATA_{name}", -1) for name in ("ICCP", "EXIF"))


def _decoded_avif(path: Path, data: bytes, beside: Beside) -> tuple[NDArray[Any], Beside]:
    """With the EXIF block behind the profile, since boxes hold offsets into the whole file that OpenCV follows."""
    try:
        image, kinds, blocks = cv2.imdecodeWithMetadata(np.frombuffer(data, np.uint8), flags=cv2.IMREAD_UNCHANGED)
    except (cv2.error, MemoryError, AttributeError):
        image = None
    if image is None or not image.size:
        raise _undecodable(path, "AVIF")
    found = dict(zip(np.ravel(kinds).tolist() if len(blocks) else [], (b.tobytes() for b in blocks), strict=True))
    return image, replace(beside, parts=(*beside.parts, found.get(_AVIF_PARTS[1], b"")))


def _undecodable(path: Path, kind: Format) -> InputError:
    if kind in ("AVIF", "GIF") and not cv2.haveImageWriter(f".{kind.lower()}"):
        return InputError(f"this OpenCV reads no {kind}, as {path} is; pip install --upgrade opencv-python-headless")
    return InputError(f"{path} is not a {kind} image that can be read; it may be damaged or of an unsupported kind")
