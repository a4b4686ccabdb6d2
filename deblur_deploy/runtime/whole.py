"""Networks that see everything: an image runs whole, or is refused; cut only by wish, and then blended.

Pooling, attention or normalization over the image make each tile's result depend on what the tile shows, so tiles of
such a network do not join to the image's result, however wide their margins are.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deblur_deploy.errors import MemoryLimitError
from deblur_deploy.runtime.pixels import from_graph, to_graph
from deblur_deploy.runtime.restoring import each_tile
from deblur_deploy.runtime.sessions import Sessions
from deblur_deploy.runtime.tiling import Span, plan_tiles
from deblur_deploy.system.memory import available_bytes

Array = NDArray[Any]
Tiles = Literal["exact", "approximate"]
"""Cut an image only if that changes nothing, or in any case where memory demands it."""

_SMALL_PX = 384 * 384
"""Images that are not worth the measurement of what a pixel takes."""
_MARGIN_PX = 32
_MB = 2**20


def restore_whole(
    sessions: Sessions, rgb: Array, dtype: np.dtype[Any], *, budget: int, asked: bool, approximate: bool
) -> Array:
    """Restore HxWx3 ``rgb`` as ``dtype`` by a network that sees everything.

    ``budget``: bytes that activations may take; unless it was ``asked`` for, three quarters of what is free may be.
    Raises MemoryLimitError with both figures if the image takes more, unless ``approximate``.
    """
    height, width, _ = rgb.shape
    allowed = budget if asked else max(budget, 3 * (available_bytes() or 0) // 4)
    io, each = sessions.contract.io, 0 if height * width <= _SMALL_PX else sessions.bytes_per_pixel
    if height * width * each <= allowed:
        return from_graph(sessions.run(to_graph(rgb, io)), io, dtype)
    if not approximate:
        raise MemoryLimitError(
            f"an image of {width}x{height} takes about {height * width * each / _MB:.0f} MB, "
            f"{allowed / _MB:.0f} MB are allowed, and this network sees the whole image, so that tiles would change "
            "its result; give a smaller image, raise max_memory_mb, or ask for tiles='approximate'"
        )
    return _blended(sessions, rgb, dtype, max(1, allowed // each))


def _blended(sessions: Sessions, rgb: Array, dtype: np.dtype[Any], max_pixels: int) -> Array:
    """Overlapping tiles, each fading out towards its inner borders."""
    height, width, _ = rgb.shape
    divisor = sessions.contract.size_divisor
    plan = plan_tiles(height, width, divisor=divisor, radius_px=_MARGIN_PX, max_pixels=max_pixels)
    total, weight = np.zeros(rgb.shape, np.float32), np.zeros((height, width, 1), np.float32)
    for row, column, restored in each_tile(sessions, plan, dtype, rgb):
        tall, wide = min(plan.height, height - row.start), min(plan.width, width - column.start)
        ramps = _ramp(row, tall, height)[:, None, None] * _ramp(column, wide, width)[None, :, None]
        place = slice(row.start, row.start + tall), slice(column.start, column.start + wide)
        total[place] += ramps * restored[:tall, :wide]
        weight[place] += ramps
    total /= weight
    return np.rint(total).astype(dtype) if dtype.kind == "u" else total.astype(dtype)


def _ramp(span: Span, size: int, length: int) -> NDArray[np.float32]:
    """Weight of a tile along one axis: 1, but 0 next to an inner border, and rising where its neighbour fades."""
    rising = (np.arange(size, dtype=np.float32) + 0.5 - _MARGIN_PX / 2) / _MARGIN_PX
    ramp = np.ones(size, np.float32)
    if span.start > 0:
        ramp = np.minimum(ramp, rising.clip(0))
    if span.start + size < length:
        ramp = np.minimum(ramp, rising[::-1].clip(0))
    return ramp
