"""How long a video file says that it is, in bytes: what tells a whole one from one that was cut off."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

_BOXES = frozenset(b"ftyp styp moov mdat free skip wide uuid moof mfra sidx meta udta".split())


def missing_bytes(path: Path) -> int:
    """Bytes that a cut MP4, MOV, Matroska, WebM or AVI file lacks by its own word; 0 if it is whole or does not say."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(12)
        file.seek(0)
        if head[:4] == b"\x1a\x45\xdf\xa3":
            end = _end_of_matroska(file, size)
        elif head[:4] == b"RIFF":
            end = _end_of_riff(file, size)
        else:
            end = _end_of_boxes(file, size)
    return max(0, end - size)


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    place = 0
    while place < size:
        file.seek(place)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4]), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16])
        # 0 is a box up to the end; what is no box is somebody's appendix.
        if kind not in _BOXES or length < 8:
            break
        place += length
    return place


def _end_of_matroska(file: BinaryIO, size: int) -> int:
    place = 0
    for name in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        file.seek(min(place, size))
        head = file.read(12)
        # As many bytes follow as the first one begins with zero bits.
        count = 9 - head[4].bit_length() if len(head) == 12 else 9
        if head[:4] != name or count == 9:
            return 0
        bits = (1 << 7 * count) - 1
        length = int.from_bytes(head[4 : 4 + count]) & bits
        if length == bits:  # unknown, as in a live stream
            return 0
        place += 4 + count + length
    return place


def _end_of_riff(file: BinaryIO, size: int) -> int:
    place = 0
    while place < size:
        file.seek(place)
        head = file.read(8)
        if head[:4] != b"RIFF" or len(head) < 8:
            break
        place += 8 + int.from_bytes(head[4:], "little")
    return place
