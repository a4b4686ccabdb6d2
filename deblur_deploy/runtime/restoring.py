"""One image through one model: whole where it fits, else in tiles, and in smaller ones where memory was misjudged."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deblur_deploy.errors import MemoryLimitError
from deblur_deploy.runtime.pixels import from_graph, to_graph
from deblur_deploy.runtime.sessions import SURELY_FITS_BYTES_PER_PIXEL, Sessions
from deblur_deploy.runtime.tiling import Plan, Span, plan_tiles

Array = NDArray[Any]


def restore(
    sessions: Sessions, rgb: Array, dtype: np.dtype[Any], *, budget: int, tile_pixels: int | None = None
) -> Array:
    """Restore HxWx3 ``rgb`` as ``dtype``; ``budget`` is the bytes that activations may take, ``tile_pixels`` the
    largest tile.

    Raises MemoryLimitError if not even a tile of a quarter of the plan's fits, and what ``Sessions.run`` does.
    """
    plan = plan_for(sessions, rgb, budget=budget, tile_pixels=tile_pixels)
    try:
        return _run(sessions, plan, dtype, rgb)
    except MemoryError:
        smaller = _plan(sessions, rgb, plan.height * plan.width // 4)
        if smaller.height * smaller.width >= plan.height * plan.width:
            raise
    try:
        return _run(sessions, smaller, dtype, rgb)
    except MemoryError:
        raise MemoryLimitError(
            f"too little memory even for a tile of {smaller.width}x{smaller.height} pixels; "
            "free some, or set max_memory_mb lower"
        ) from None


def plan_for(sessions: Sessions, rgb: Array, *, budget: int, tile_pixels: int | None = None) -> Plan:
    """How ``rgb`` is cut."""
    pixels = rgb.shape[0] * rgb.shape[1]
    # Small images are not worth the measurement of what a pixel takes.
    fits = pixels * SURELY_FITS_BYTES_PER_PIXEL <= budget
    most = budget if fits else max(1, budget // sessions.bytes_per_pixel)
    return _plan(sessions, rgb, min(most, tile_pixels or most))


def _plan(sessions: Sessions, rgb: Array, max_pixels: int) -> Plan:
    divisor, radius_px = sessions.contract.size_divisor, sessions.contract.receptive_radius_px
    return plan_tiles(*rgb.shape[:2], divisor=divisor, radius_px=radius_px, max_pixels=max_pixels)


def _run(sessions: Sessions, plan: Plan, dtype: np.dtype[Any], rgb: Array) -> Array:
    io = sessions.contract.io
    if len(plan.rows) == len(plan.columns) == 1:
        return from_graph(sessions.run(to_graph(rgb, io)), io, dtype)
    result = np.empty(rgb.shape, dtype)
    for row, column, restored in each_tile(sessions, plan, dtype, rgb):
        result[row.place, column.place] = restored[row.keep, column.keep]
    return result


def each_tile(sessions: Sessions, plan: Plan, dtype: np.dtype[Any], rgb: Array) -> Iterator[tuple[Span, Span, Array]]:
    """What every tile becomes; below and right of ``rgb`` it is filled with the edge pixels."""
    io = sessions.contract.io
    for row, column in product(plan.rows, plan.columns):
        tile = rgb[row.start : row.start + plan.height, column.start : column.start + plan.width]
        below, right = plan.height - tile.shape[0], plan.width - tile.shape[1]
        if below or right:
            tile = np.pad(tile, ((0, below), (0, right), (0, 0)), mode="edge")
        yield row, column, from_graph(sessions.run(to_graph(tile, io), often=True), io, dtype)
