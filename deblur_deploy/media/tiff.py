"""What TIFF files carry beside pixels, which OpenCV neither reads out nor writes.

Read are the descriptive tags of the first directory, and the EXIF and GPS directories that it points to.  They are
written into a copy of the first directory at the end of a file, little-endian and at new offsets; so a maker's note
that holds offsets of its own, which nobody but the maker knows, may not be understood afterwards.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Mapping

ORIENTATION = 274
KEPT = frozenset(
    {
        269, 270, 271, 272, ORIENTATION, 285,  # document, description, make, model, orientation, page's name
        282, 283, 296,  # resolution and its unit
        305, 306, 315, 316, 33432,  # software, date, artist, computer, copyright
        700, 33723, 34377, 34675,  # XMP, IPTC, Photoshop, ICC profile
    }
)  # fmt: skip
_DIRECTORIES = (34665, 34853)
"""EXIF and GPS."""
_INTEROPERABILITY = 40965

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
_SWAPPED = {**_SIZES, 5: 4, 10: 4}
"""Bytes that change their order together; a fraction is two numbers."""

Entry = tuple[int, int, bytes]
"""Type, count and little-endian value of one tag."""
Tags = Mapping[int, Entry | Mapping[int, Entry]]
"""By number; a directory for EXIF and GPS."""

_EMPTY = b"II*\0" + struct.pack("<IHI", 8, 0, 0)


def read_tags(data: bytes) -> dict[int, Entry | Mapping[int, Entry]]:
    """The kept tags of a TIFF file; none for anything else, and without what is damaged."""
    order = _order(data)
    if order is None:
        return {}
    found: dict[int, Entry | Mapping[int, Entry]] = dict(_values(data, order, None, KEPT))
    for tag, (kind, _, value) in _values(data, order, None, _DIRECTORIES).items():
        if kind == 4 and (inside := _values(data, order, int.from_bytes(value[:4], "little"), None)):
            # A pointer would point to where nothing is any more.
            found[tag] = {inner: entry for inner, entry in inside.items() if inner != _INTEROPERABILITY}
    return found


def unturned(data: bytes) -> bytes:
    """The file with its orientation overwritten, because OpenCV turns the pixels of a TIFF file as it says."""
    order = _order(data)
    if order is None:
        return data
    try:
        for at in _entries(data, order):
            if _tag(data, order, at) == ORIENTATION:
                changed = bytearray(data)
                struct.pack_into(order + "HIHH", changed, at + 2, 3, 1, 1, 0)
                return bytes(changed)
    except struct.error:
        pass
    return data


def page_count(data: bytes) -> int:
    """Pages of a TIFF file, previews not counted; 1 for anything else."""
    order = _order(data)
    if order is None:
        return 1
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


def with_tags(data: bytes, tags: Tags) -> bytes:
    """A little-endian TIFF file with ``tags`` added, or replaced, in its first directory."""
    if not tags or not data.startswith(b"II*\0"):
        return data
    entries = {_tag(data, "<", at): data[at : at + 12] for at in _entries(data, "<")}
    body = bytearray(data)
    for tag, content in tags.items():
        entries[tag] = _appended(body, tag, content)
    struct.pack_into("<I", body, 4, _write_directory(body, entries))
    return bytes(body)


def as_exif(tags: Tags) -> bytes:
    """The same tags as the EXIF block of a JPEG, PNG or WebP file, which is a TIFF file without pixels."""
    return with_tags(_EMPTY, {tag: content for tag, content in tags.items() if tag not in (700, 34675)})


def _appended(body: bytearray, tag: int, content: Entry | Mapping[int, Entry]) -> bytes:
    """The directory entry of a tag; what it does not hold itself goes to the end of ``body``."""
    if isinstance(content, Mapping):
        inside = {number: _appended(body, number, entry) for number, entry in content.items()}
        return struct.pack("<HHII", tag, 4, 1, _write_directory(body, inside))
    kind, count, value = content
    if len(value) <= 4:
        return struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
    body += b"\0" * (len(body) % 2)
    at = len(body)
    body += value
    return struct.pack("<HHII", tag, kind, count, at)


def _write_directory(body: bytearray, entries: Mapping[int, bytes]) -> int:
    body += b"\0" * (len(body) % 2)
    at = len(body)
    body += struct.pack("<H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries)) + b"\0" * 4
    return at


def _entry(data: bytes, order: str, at: int) -> Entry | None:
    kind, count = struct.unpack_from(order + "HI", data, at + 2)
    size = _SIZES.get(kind, 0) * count
    start = at + 8 if size <= 4 else struct.unpack_from(order + "I", data, at + 8)[0]
    value = data[start : start + size]
    if not size or len(value) < size:
        return None
    if order == ">" and (step := _SWAPPED[kind]) > 1:
        value = b"".join(value[i : i + step][::-1] for i in range(0, size, step))
    return kind, count, value


def _values(data: bytes, order: str, start: int | None, wanted: Container[int] | None) -> dict[int, Entry]:
    """The wanted entries of one directory, up to the first that is damaged."""
    found, left = {}, len(data)
    try:
        for at in _entries(data, order, start):
            tag = _tag(data, order, at)
            if (wanted is None or tag in wanted) and (entry := _entry(data, order, at)):
                found[tag] = entry
                left -= len(entry[2])
                # Thousands of entries for the same bytes would fill the memory.
                if left < 0:
                    return {}
    except struct.error:
        pass
    return found


def _order(data: bytes) -> str | None:
    return {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])


def _tag(data: bytes, order: str, at: int) -> int:
    tag: int = struct.unpack_from(order + "H", data, at)[0]
    return tag


def _entries(data: bytes, order: str, start: int | None = None) -> range:
    if start is None:
        (start,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    return range(start + 2, start + 2 + 12 * count, 12)
