"""Cutting an image too large for memory into tiles whose results join to exactly the whole image's result.

Two things make a tile's middle equal to the same place of the whole image.  Its margin is at least the receptive
radius, so that no pixel of the middle sees the cut; and its origin is a multiple of the size divisor, so that pooling
and pixel-unshuffle fall on the same grid.  At the image's own borders there is no margin, since there the network's
zero padding must be the whole image's.  All tiles have one shape, so one compiled session serves them all; where the
last tile reaches below or right of the image it is filled with the edge pixels, as the graph itself does.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, kw_only=True)
class Span:
    """One tile along one axis, in pixels."""

    start: int
    """Where the tile begins in the image; it ends ``size`` later, maybe past the image."""
    keep: slice
    """What of the tile's result is right."""
    place: slice
    """Where that goes in the image."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Tiles of one shape that cover an image: every combination of a row span and a column span."""

    height: int
    width: int
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]

    @property
    def pixels(self) -> int:
        """Pixels that are computed in all, margins included."""
        return self.height * self.width * len(self.rows) * len(self.columns)


def plan_tiles(height: int, width: int, *, divisor: int, radius_px: int, max_pixels: int) -> Plan:
    """The plan that computes the fewest pixels with tiles of at most ``max_pixels``.

    An image that fits is one tile.  If ``max_pixels`` is too small for a tile that has anything but margin, the
    smallest possible tile is taken instead.
    """
    margin = up(radius_px, divisor)
    # Pixels in all, then size and tiles along both axes; spans are made for the winner alone, there may be many.
    best: tuple[int, int, int, int, int] | None = None
    tall, wide = up(height, divisor), up(width, divisor)
    for across in range(1, max(1, wide // divisor) + 1):
        columns_px, columns = _tiles(wide, across, divisor, margin)
        most = max_pixels // columns_px // divisor * divisor
        if most >= tall:
            rows_px, rows = tall, 1
        elif most >= 2 * margin + divisor:
            # The fewest rows of tiles that fit, then the tiles no taller than these need.
            rows_px, rows = _tiles(tall, ceil((tall - 2 * margin) / (most - 2 * margin)), divisor, margin)
        else:
            continue
        pixels = rows_px * columns_px * rows * columns
        if rows_px * columns_px <= max_pixels and (best is None or pixels < best[0]):
            best = pixels, rows_px, columns_px, rows, columns
        if columns_px <= 2 * margin + divisor or (best and across > 4 * best[4] + 8):
            break
    if best:
        _, rows_px, columns_px, _, _ = best
    else:
        rows_px, columns_px = (_tiles(padded, padded // divisor, divisor, margin)[0] for padded in (tall, wide))
    return Plan(
        height=rows_px,
        width=columns_px,
        rows=_spans(height, tall, rows_px, margin),
        columns=_spans(width, wide, columns_px, margin),
    )


def up(value: int, divisor: int) -> int:
    """The next multiple of ``divisor``."""
    return -(-value // divisor) * divisor


def _tiles(padded: int, count: int, divisor: int, margin: int) -> tuple[int, int]:
    """Size, a multiple of the divisor, and number of at most ``count`` tiles over ``padded``."""
    # Inner borders cost a margin on both of their sides, outer ones none.
    size = max(up(ceil((padded + 2 * margin * (count - 1)) / count), divisor), 2 * margin + divisor)
    return (size, 1 + ceil((padded - size) / (size - 2 * margin))) if size < padded else (padded, 1)


def _spans(length: int, padded: int, size: int, margin: int) -> tuple[Span, ...]:
    spans = []
    done = 0
    while done < length:
        start = min(max(0, done - margin), padded - size)
        end = length if start + size >= padded else start + size - margin
        spans.append(Span(start=start, keep=slice(done - start, end - start), place=slice(done, end)))
        done = end
    return tuple(spans)
