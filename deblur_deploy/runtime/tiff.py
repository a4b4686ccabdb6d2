"""The ICC profile and the number of pages of TIFF files, which OpenCV neither reads out nor writes.

The profile is the first directory's; the tags to keep are written into a copy of it at the end of the file.  The
orientation is not among them: OpenCV always turns the pixels of a TIFF file as it says.
"""

from __future__ import annotations

import struct

KEPT = (34675,)
"""ICC profile."""

_BYTES = (1, 2, 7)

Entry = tuple[int, int, bytes]
"""Type, count and value of one tag."""


def read_tags(data: bytes) -> dict[int, Entry]:
    """The kept tags of a TIFF file; empty for anything else, or if it is damaged."""
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return {}
    order = "<" if data.startswith(b"II") else ">"
    found = {}
    try:
        for at in _entries(data, order):
            tag, kind, count = struct.unpack_from(order + "HHI", data, at)
            if tag in KEPT and kind in _BYTES and count > 4:
                (start,) = struct.unpack_from(order + "I", data, at + 8)
                value = data[start : start + count]
                if len(value) == count:
                    found[tag] = kind, count, value
    except struct.error:
        return {}
    return found


def page_count(data: bytes) -> int:
    """Pages of a TIFF file, previews not counted; 1 for anything else."""
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return 1
    order = "<" if data.startswith(b"II") else ">"
    pages, seen = 0, {0}
    try:
        (start,) = struct.unpack_from(order + "I", data, 4)
        while start not in seen:
            seen.add(start)
            entries = _entries(data, order, start)
            kinds = [struct.unpack_from(order + "I", data, at + 8)[0] for at in entries if _tag(data, order, at) == 254]
            pages += not (kinds and kinds[0] & 1)
            (start,) = struct.unpack_from(order + "I", data, entries.stop)
    except struct.error:
        pass
    return max(1, pages)


def with_tags(data: bytes, tags: dict[int, Entry]) -> bytes:
    """A little-endian TIFF file with ``tags`` added, or replaced, in its first directory."""
    if not tags or not data.startswith(b"II*\0"):
        return data
    entries = {struct.unpack_from("<H", data, at)[0]: data[at : at + 12] for at in _entries(data, "<")}
    body = bytearray(data + b"\0" * (len(data) % 2))
    for tag, (kind, count, value) in tags.items():
        entries[tag] = struct.pack("<HHII", tag, kind, count, len(body))
        body += value + b"\0" * (len(value) % 2)
    directory = struct.pack("<H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries)) + b"\0" * 4
    struct.pack_into("<I", body, 4, len(body))
    return bytes(body + directory)


def _tag(data: bytes, order: str, at: int) -> int:
    tag: int = struct.unpack_from(order + "H", data, at)[0]
    return tag


def _entries(data: bytes, order: str, start: int | None = None) -> range:
    if start is None:
        (start,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    return range(start + 2, start + 2 + 12 * count, 12)
