"""What an image file is and how large, from its first bytes, so that a decompression bomb is refused undecoded."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Literal

Format = Literal["AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WebP"]

FORMATS: dict[str, Format] = {
    ".avif": "AVIF",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".jfif": "JPEG",
    ".jpe": "JPEG",
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".png": "PNG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WebP",
}
"""By the suffix of a file's name."""

JPEG_FRAMES = {0xC0 + i for i in range(16)} - {0xC4, 0xC8, 0xCC}
_JPEG_SCAN = 0xDA


def format_of(data: bytes) -> Format | None:
    """The format that a file's first bytes say, whatever its name says; None if it is none that is read."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "TIFF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if data[4:8] == b"ftyp":
        brands = data[8 : int.from_bytes(data[:4], "big")]
        return "AVIF" if b"avif" in brands or b"avis" in brands else None
    return "BMP" if data.startswith(b"BM") else None


def foreign(data: bytes) -> str | None:
    """The name of a format that is known but not read; None if it is unknown too."""
    if data[:4] in (b"II+\0", b"MM\0+"):
        return "BigTIFF"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"msf1"):
        return "HEIC"
    if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL"
    return None


def pixel_size(data: bytes) -> tuple[int, int] | None:
    """Width and height that an image file states; None if it is of no format that is read, or cut short."""
    size = {
        "AVIF": _avif,
        "BMP": _bmp,
        "GIF": lambda start: struct.unpack_from("<HH", start, 6),
        "JPEG": _jpeg,
        "PNG": lambda start: struct.unpack_from(">II", start, 16) if start[12:16] == b"IHDR" else None,
        "TIFF": _tiff,
        "WebP": _webp,
    }
    with suppress(struct.error, IndexError):
        if kind := format_of(data):
            return size[kind](data)
    return None


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment up to the first scan's header, or to where the file is damaged."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:
            at += 2
        else:
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            if not at + 4 <= end <= len(data):
                return
            yield marker, at, end
            if marker == _JPEG_SCAN:
                return
            at = end


def _jpeg(data: bytes) -> tuple[int, int] | None:
    for marker, start, _ in jpeg_segments(data):
        if marker in JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, start + 5)
            return width, height
    return None


def _bmp(data: bytes) -> tuple[int, int]:
    old = struct.unpack_from("<I", data, 14)[0] == 12
    width, height = struct.unpack_from("<HH" if old else "<ii", data, 18)
    return abs(width), abs(height)


def _tiff(data: bytes) -> tuple[int, int] | None:
    order = "<" if data.startswith(b"II") else ">"
    (at,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, at)
    found = {}
    for entry in range(count):
        tag, kind = struct.unpack_from(order + "HH", data, at + 2 + 12 * entry)
        if tag in (256, 257):
            (found[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, at + 10 + 12 * entry)
    return (found[256], found[257]) if len(found) == 2 else None


def _webp(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _avif(data: bytes) -> tuple[int, int] | None:
    """The largest of the sizes stated: a picture in cells states those of its cells too."""
    sizes, at = [], data.find(b"ispe")
    while at >= 0:
        sizes.append(struct.unpack_from(">II", data, at + 8))
        at = data.find(b"ispe", at + 12)
    return max(sizes, key=lambda size: size[0] * size[1], default=None)
