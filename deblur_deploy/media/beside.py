"""What an image file carries beside its pixels, byte for byte as the source has it.

A file is cut into its segments, chunks or blocks; those that describe how the pixels are *encoded* are the encoder's,
all others are put back into what OpenCV encoded from the restored pixels.  OpenCV's own idea of metadata is EXIF, XMP
and ICC profile only, and it glues segments together that are none of a profile's.  Pillow keeps a few more, but no
IPTC, no cICP and no RGB of 16 bits.  Previews of the unrestored picture that MPF points at, behind it, are left out;
one inside EXIF stays as it was.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from deblur_deploy.media.headers import JPEG_FRAMES, Format, jpeg_segments, pixel_size

Entry = tuple[int, int, bytes]
"""Type, count and little-endian value of one TIFF tag."""
Tags = Mapping[int, Entry | Mapping[int, Entry]]
"""By number; a directory for EXIF and GPS."""


class Unkept(Exception):  # noqa: N818, since it never leaves this package
    """Why a file cannot be restored and stay what it is; it goes on where a sentence began with the file's name."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """All of a file but its pixels."""

    format: Format
    """Of the file, or of the result where the file's cannot hold restored pixels."""
    parts: tuple[bytes, ...] = ()
    """Segments, chunks or blocks, in their order."""
    tags: Tags = field(default_factory=dict)
    """The same of a TIFF file."""
    sampling: int | None = None
    """How a JPEG or AVIF samples its chroma, one hexadecimal digit a factor: 0x221111 is 4:2:0."""
    gray: bool = False
    """Gray with transparency, which OpenCV has as RGBA only."""
    key: int | None = None
    """The gray level that stands for transparency."""
    inverted: bool = False
    """Pixels of more than 8 bits count from white down to black."""
    opaque: bool = False
    """What OpenCV takes for alpha is nothing."""
    fourth: Literal["alpha", "premultiplied", "other"] = "alpha"
    """What a fourth sample is."""
    lost: tuple[str, ...] = ()
    """What cannot be kept, though it changes how the picture looks."""


ANIMATION = "is an animation, of which only one picture could be kept; save its pictures as files of their own"


def check_profile(profile: bytes) -> bool:
    """Whether an ICC profile is of gray; raises Unkept if it is of neither gray nor RGB: so are the pixels then."""
    space = profile[16:20]
    if space in (b"CMYK", b"CMY ", b"Lab ", b"Luv ", b"XYZ ", b"YCbr", b"Yxy ", b"HSV ", b"HLS "):
        raise Unkept(f"has colours in {space.decode().strip()}; convert it to RGB first")
    return space == b"GRAY"


_COMMENT, _MPF, _ADOBE = 0xFE, (0xE2, b"MPF\0"), (0xEE, b"Adobe")
_GAIN_MAPS = (b"hdrgm:Version", b"HDRGainMap", b"urn:iso:std:iso:ts:21496")
_SAMPLINGS = (0x111111, 0x121111, 0x211111, 0x221111, 0x411111)


def read_jpeg(data: bytes) -> Beside:
    """APP segments and comments, without those that point at what follows or say how the colours are encoded."""
    parts, sampling, end = [], None, 2
    for marker, start, end in jpeg_segments(data):
        body = data[start + 4 : end]
        if marker in JPEG_FRAMES:
            sampling = _sampling(body)
        if marker == 0xE2 and body.startswith(b"ICC_PROFILE\0\1"):
            check_profile(body[14:])
        is_kept = 0xE0 <= marker <= 0xEF or marker == _COMMENT
        if is_kept and not any(marker == of and body.startswith(sign) for of, sign in (_MPF, _ADOBE)):
            parts.append(data[start:end])
    picture_end = data.find(b"\xff\xd9", end)
    behind = data[picture_end + 2 :] if picture_end >= 0 else b""
    lost = []
    if b"\xff\xd8\xff" in behind and any(sign in data for sign in _GAIN_MAPS):
        lost.append("its HDR gain map")
    if b"ftyp" in behind:
        lost.append("the video in it")
    return Beside(format="JPEG", parts=tuple(parts), sampling=sampling, lost=tuple(lost))


def _sampling(frame: bytes) -> int | None:
    components = frame[5] if len(frame) > 5 else 0
    if components == 4:
        raise Unkept("has colours in CMYK; convert it to RGB first")
    if components != 3 or len(frame) < 15:
        return None
    across, down = ((frame[7] >> s & 15) // max(frame[10] >> s & 15, frame[13] >> s & 15, 1) for s in (4, 0))
    factors = across << 20 | down << 16 | 0x1111
    return factors if factors in _SAMPLINGS else 0x111111


def _put_into_jpeg(encoded: bytes, beside: Beside) -> bytes:
    rest = next(start for marker, start, _ in jpeg_segments(encoded) if not 0xE0 <= marker <= 0xEF)
    return encoded[:2] + b"".join(beside.parts) + encoded[rest:]


# These may not be copied by who does not know them, as their names say; but they hold for restored pixels too.
_PNG_KEPT = {b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"cICP", b"mDCV", b"cLLI", b"tIME", b"sCAL", b"pCAL", b"sTER"}


def read_png(data: bytes) -> Beside:
    """Ancillary chunks that may be copied into a changed picture."""
    bits, colours = data[24], data[25]
    chunks = list(_png_chunks(data))
    names = {name for name, _, _ in chunks}
    if b"fdAT" in names:
        raise Unkept(ANIMATION)
    gray = colours == 4 or (colours == 0 and b"tRNS" in names)
    parts, lost, key = [], [], None
    for name, start, end in chunks:
        body = data[start + 8 : end - 4]
        if name == b"tRNS" and colours == 0:
            # As OpenCV spreads fewer bits over eight.
            key = int.from_bytes(body[:2], "big") * {1: 255, 2: 85, 4: 17}.get(bits, 1)
        if name == b"iCCP" and check_profile(_inflated(body)) and gray:
            lost.append("its gray profile, which does not fit gray with alpha as RGBA")
        elif name in _PNG_KEPT or (name[0] & name[3] & 32) or (name == b"bKGD" and colours in (2, 6)):
            parts.append(data[start:end])
    return Beside(format="PNG", parts=tuple(parts), gray=gray, key=key, lost=tuple(lost))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    at = 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            return
        yield data[at + 4 : at + 8], at, end
        at = end


def _inflated(profile: bytes) -> bytes:
    """The head of a named and compressed profile."""
    try:
        return zlib.decompressobj().decompress(profile.partition(b"\0")[2][1:], 128)
    except zlib.error:
        return b""


def _put_into_png(encoded: bytes, beside: Beside) -> bytes:
    return encoded[:33] + b"".join(beside.parts) + encoded[33:]


_WEBP_PICTURE = (b"VP8 ", b"VP8L", b"ALPH")
_WEBP_FLAGS = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}


def read_webp(data: bytes) -> Beside:
    """Chunks that are not of the picture."""
    chunks = list(_webp_chunks(data))
    for chunk in chunks:
        if chunk[:4] in (b"ANIM", b"ANMF"):
            raise Unkept(ANIMATION)
        if chunk[:4] == b"ICCP":
            check_profile(chunk[8:])
    kept = (chunk for chunk in chunks if chunk[:4] not in (b"VP8X", *_WEBP_PICTURE))
    return Beside(format="WebP", parts=tuple(kept))


def _webp_chunks(data: bytes) -> Iterator[bytes]:
    at = 12
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        if end > len(data):
            return
        yield data[at:end] + b"\0" * (end & 1)
        at = end + (end & 1)


def _put_into_webp(encoded: bytes, beside: Beside) -> bytes:
    picture = [chunk for chunk in _webp_chunks(encoded) if chunk[:4] in _WEBP_PICTURE]
    flags = sum({_WEBP_FLAGS.get(part[:4], 0) for part in beside.parts})
    if any(chunk[:4] == b"ALPH" or (chunk[:4] == b"VP8L" and chunk[12] & 0x10) for chunk in picture):
        flags |= 0x10
    width, height = pixel_size(encoded) or (1, 1)
    head = b"VP8X" + struct.pack("<II", 10, flags) + b"".join((n - 1).to_bytes(3, "little") for n in (width, height))
    # A profile stands before the picture, all else behind it.
    profile = [part for part in beside.parts if part[:4] == b"ICCP"]
    others = [part for part in beside.parts if part[:4] != b"ICCP"]
    body = b"WEBP" + head + b"".join([*profile, *picture, *others])
    return b"RIFF" + struct.pack("<I", len(body)) + body


def read_gif(data: bytes) -> Beside:
    """Comments, as text chunks: the result is a PNG, since 256 colours cannot hold a restored picture."""
    at, pictures, parts, lost = 13 + _palette(data[10]), 0, [], []
    while at < len(data) and data[at] in b"!,":
        picture, label = data[at] == 0x2C, data[at + 1]
        at += 11 + _palette(data[at + 9]) if picture else 2
        blocks = []
        while size := data[at]:
            blocks.append(data[at + 1 : at + 1 + size])
            at += 1 + size
        at += 1
        pictures += picture
        if pictures > 1:
            raise Unkept(ANIMATION)
        if not picture and label == 0xFE:
            body = b"tEXt" + b"Comment\0" + b"".join(blocks)
            parts.append(struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)))
        elif not picture and label == 0xFF and blocks and blocks[0] == b"ICCRGBG1012":
            lost.append("its colour profile")
    return Beside(format="PNG", parts=tuple(parts), lost=tuple(lost))


def _palette(flags: int) -> int:
    return 3 * (2 << (flags & 7)) if flags & 0x80 else 0


_BMP_MASKS = 3
"""The kind of compression that says which bits are red, green, blue and, in later versions, alpha."""


def read_bmp(data: bytes) -> Beside:
    """The resolution, and whether the fourth byte of a pixel is alpha."""
    size, bits, kind = (int.from_bytes(data[at:end], "little") for at, end in ((14, 18), (28, 30), (30, 34)))
    alpha = size >= 56 and any(data[66:70])
    embedded = size >= 124 and data[70:74] in (b"DEBM", b"KNIL")
    return Beside(
        format="BMP",
        parts=(data[38:46],) if size >= 40 else (),
        opaque=(bits, kind, alpha) == (32, _BMP_MASKS, False),
        lost=("its colour profile",) if embedded else (),
    )


def _put_into_bmp(encoded: bytes, beside: Beside) -> bytes:
    return encoded[:38] + beside.parts[0] + encoded[46:]


def put_back(encoded: bytes, beside: Beside) -> bytes:
    """A file of ``beside.format`` that was encoded from new pixels, with the old parts in it."""
    put = {"JPEG": _put_into_jpeg, "PNG": _put_into_png, "WebP": _put_into_webp, "BMP": _put_into_bmp}
    return put[beside.format](encoded, beside) if beside.parts and beside.format in put else encoded
