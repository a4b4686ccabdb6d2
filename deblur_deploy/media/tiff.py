"""What TIFF files carry beside pixels, which OpenCV neither reads out nor writes.

Read are all tags of the first directory that do not say how its pixels are encoded, those of makers and of maps
included, and the EXIF and GPS directories that it points to.  They are written into a copy of the first directory at
the end of a file, little-endian and at new offsets; so a maker's note that holds offsets of its own, which nobody but
the maker knows, may not be understood afterwards.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Mapping

from deblur_deploy.media.beside import Beside, Entry, Tags, Unkept, check_profile

ORIENTATION = 274
_KIND, _BITS, _COLOURS, _SAMPLES, _PLANES, _EXTRA, _NUMBERS = 254, 258, 262, 277, 284, 338, 339
_PROFILE, _LAYERS, _RAW = 34675, 37724, 50706
_POINTERS = {330, 400, 34665, 34853, 40965}
_ENCODING = (
    {_KIND, 255, 256, 257, _BITS, 259, _COLOURS, 263, 264, 265, 266, 273, _SAMPLES, 278, 279, 280, 281, _PLANES, 288}
    | {289, 290, 291, 292, 293, 317, 320, 321, *range(322, 329), *range(332, 335), 336, _EXTRA, _NUMBERS, 340, 341}
    | {*range(343, 348), 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532, _LAYERS}
    | _POINTERS
)
_DIRECTORIES = (34665, 34853)
"""EXIF and GPS."""
_INTEROPERABILITY = 40965

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_SWAPPED = {**_SIZES, 5: 4, 10: 4}
"""Bytes that change their order together; a fraction is two numbers."""

_INKS = {5: "CMYK", 8: "Lab", 9: "Lab", 10: "Lab", 32803: "raw mosaic", 32844: "LogLuv", 32845: "LogLuv"}


def read_tiff(data: bytes) -> Beside:
    """Tags, and what the pixels are; raises Unkept for several pages, and for pixels that are not gray, RGB or RGBA."""
    if (pages := page_count(data)) > 1:
        raise Unkept(f"has {pages} pages, of which only one could be kept; save each as its own file")
    facts = _facts(data)
    colours, samples, extra = facts.get(_COLOURS, 1), facts.get(_SAMPLES, 1), facts.get(_EXTRA, 0)
    if colours not in (0, 1, 2, 3, 6):
        raise Unkept(f"has colours in {_INKS.get(colours, f'a space numbered {colours}')}; convert it to RGB first")
    if samples not in {2: (3, 4), 6: (3,)}.get(colours, (1,)):
        raise Unkept(f"has {samples} samples a pixel; only gray, RGB and RGBA can be restored")
    tags = read_tags(data)
    profile = tags.get(_PROFILE)
    if isinstance(profile, tuple):
        check_profile(profile[2])
    return Beside(
        format="TIFF",
        tags=tags,
        inverted=colours == 0 and facts.get(_BITS, 1) > 8,
        fourth="premultiplied" if extra == 1 else "alpha" if extra == 2 else "other",
        lost=("its Photoshop layers",) if _LAYERS in facts else (),
    )


def check_decodable(data: bytes) -> None:
    """Raises Unkept for a TIFF file of which OpenCV would make other pixels, or those of another picture."""
    facts, pages = _facts(data), _directories(data)
    if _RAW in facts:
        raise Unkept("is a DNG, whose raw pixels cannot be restored; develop it first")
    if pages[:1] == [False] and True in pages:
        raise Unkept("begins with a preview, which alone could be read; save the picture without it")
    if facts.get(_PLANES) == 2 and facts.get(_SAMPLES, 1) > 1 and facts.get(_BITS, 1) > 8:
        raise Unkept("keeps each colour in a plane of its own; save it with the colours of a pixel together")
    if facts.get(_COLOURS) == 0 and facts.get(_NUMBERS) == 3:
        raise Unkept("has floats that count from white down to black; save it with black as 0")


def _facts(data: bytes) -> dict[int, int]:
    """How the pixels of the first picture are kept, by tag."""
    wanted = {_KIND, _BITS, _COLOURS, _SAMPLES, _PLANES, _EXTRA, _NUMBERS, _LAYERS, _RAW}
    entries = _values(data, _order(data) or "<", None, wanted) if _order(data) else {}
    return {tag: int.from_bytes(value[:2], "little") for tag, (_, _, value) in entries.items()}


def put_into_tiff(encoded: bytes, beside: Beside, *, fourth: bool) -> bytes:
    """What OpenCV encoded, with the old tags, and with what a ``fourth`` sample is, which it does not say."""
    extra = {_EXTRA: (3, 1, bytes([{"other": 0, "premultiplied": 1, "alpha": 2}[beside.fourth], 0]))}
    return with_tags(encoded, {**beside.tags, **(extra if fourth else {})})


def read_tags(data: bytes) -> dict[int, Entry | Mapping[int, Entry]]:
    """The kept tags of a TIFF file; none for anything else, and without what is damaged."""
    order = _order(data)
    if order is None:
        return {}
    found: dict[int, Entry | Mapping[int, Entry]] = dict(_values(data, order, None, None, _ENCODING))
    for tag, (kind, _, value) in _values(data, order, None, _DIRECTORIES).items():
        if kind in (4, 13) and (inside := _values(data, order, int.from_bytes(value[:4], "little"), None)):
            # A pointer would point to where nothing is any more.
            found[tag] = {inner: entry for inner, entry in inside.items() if inner != _INTEROPERABILITY}
    return found


def neutral(data: bytes) -> bytes:
    """The file with its orientation and the kind of its alpha overwritten.

    OpenCV turns the pixels as the one says, and multiplies them by alpha where the other says that they are not.
    """
    order = _order(data)
    if order is None:
        return data
    changed = bytearray(data)
    try:
        for at in _entries(data, order):
            if _tag(data, order, at) == ORIENTATION:
                struct.pack_into(order + "HIHH", changed, at + 2, 3, 1, 1, 0)
            elif _tag(data, order, at) == _EXTRA:
                struct.pack_into(order + "HIHH", changed, at + 2, 3, 1, 0, 0)
    except struct.error:
        pass
    return bytes(changed)


def page_count(data: bytes) -> int:
    """Pages of a TIFF file, previews not counted; 1 for anything else."""
    return max(1, sum(_directories(data)))


def _directories(data: bytes) -> list[bool]:
    """Whether each picture of a TIFF file is a page, and no preview of one."""
    order, pages, seen = _order(data), list[bool](), {0}
    if order is None:
        return pages
    try:
        (start,) = struct.unpack_from(order + "I", data, 4)
        while start not in seen:
            seen.add(start)
            entries = _entries(data, order, start)
            kinds = [
                struct.unpack_from(order + "I", data, at + 8)[0] for at in entries if _tag(data, order, at) == _KIND
            ]
            pages.append(not (kinds and kinds[0] & 1))
            (start,) = struct.unpack_from(order + "I", data, entries.stop)
    except struct.error:
        pass
    return pages


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


def _values(
    data: bytes, order: str, start: int | None, wanted: Container[int] | None, unwanted: Container[int] = ()
) -> dict[int, Entry]:
    """The wanted entries of one directory, or all, up to the first that is damaged."""
    found, left = {}, len(data)
    try:
        for at in _entries(data, order, start):
            tag = _tag(data, order, at)
            asked = tag not in unwanted if wanted is None else tag in wanted
            if asked and (entry := _entry(data, order, at)):
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
