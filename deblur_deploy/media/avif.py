"""Which AVIF files OpenCV gives back as they were: still, of 8 bits, in sRGB, and not turned or cut by their boxes."""

from __future__ import annotations

import struct

from deblur_deploy.media.beside import ANIMATION, Beside, Unkept, check_profile

_UNKEPT = {
    b"irot": "a rotation",
    b"imir": "a reflection",
    b"clap": "a crop",
    b"prem": "premultiplied alpha",
    b"tmap": "an HDR gain map",
}
_CONVERT = "that would be lost; convert it to PNG first"
_DEEP, _CHROMA = 0x40, 0x0C


def read_avif(data: bytes) -> Beside:
    """The ICC profile, and what the boxes say; raises Unkept for what would be lost."""
    if b"avis" in data[8 : int.from_bytes(data[:4], "big")]:
        raise Unkept(ANIMATION)
    meta = _meta(data)
    for box, what in _UNKEPT.items():
        if box in meta:
            raise Unkept(f"has {what} {_CONVERT}")
    # The configuration of the codec, of the picture and of its alpha.
    configured = [part[2] for part in meta.split(b"av1C")[1:] if len(part) > 2]
    if any(flags & _DEEP for flags in configured):
        raise Unkept(f"has more than 8 bits {_CONVERT}")
    at = meta.find(b"colrnclx")
    if 0 <= at <= len(meta) - 12:
        primaries, transfer = struct.unpack_from(">HH", meta, at + 8)
        # BT.709 or not said; and its curve, not said, BT.601's or sRGB's.
        if primaries not in (1, 2) or transfer not in (1, 2, 6, 13):
            raise Unkept(f"has wide or HDR colours {_CONVERT}")
    whole = any(not flags & _CHROMA for flags in configured)
    profile, at = b"", meta.find(b"colrprof")
    if at >= 4:
        profile = meta[at + 8 : at - 4 + int.from_bytes(meta[at - 4 : at], "big")]
        check_profile(profile)
    return Beside(
        format="AVIF",
        parts=(profile,),
        sampling=0x111111 if whole else None,
        lost=("its XMP",) if b"application/rdf+xml" in meta else (),
    )


def _meta(data: bytes) -> bytes:
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"meta":
            return data[at : at + size]
        if size < 8:
            break
        at += size
    return b""
