"""How far a network sees, and whether cutting an image into tiles is exact: tried, on the graph that will run.

A network that pools over the image, lets channels attend to each other or normalizes over the image sees everything.
So does, for our purpose, one that cuts the image by its size, or pads it in a way of its own: what counts is whether a
tile's middle equals the same place of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deblur_deploy.pipeline.network import EVERYTHING_PX
from deblur_deploy.runtime.tiling import up

Body = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""A batch of planar images to a batch of the same size."""

_SIDES = (64, 128, 256, 512)
_GRIDS = (1, 2, 4, 8, 16, 32, 64, 128)
_IMAGES = 4
"""What does not pass through one image, for a ReLU or for rounding, may pass through another."""
_SAME = 1e-4
"""Of the range [0, 1]: kernels add up in another order for another size."""


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far a network sees."""

    radius_px: int
    grid: int
    """Tiles begin on multiples of this."""

    @property
    def everything(self) -> bool:
        """Whether no cut is exact."""
        return self.radius_px >= EVERYTHING_PX


def reach(body: Body, divisor: int, least_px: int = 1) -> Reach:
    """How far ``body``, which takes multiples of ``divisor`` from ``least_px``, sees."""
    radius = _radius(body, divisor, least_px)
    if radius < EVERYTHING_PX:
        for factor in _GRIDS:
            grid = divisor * factor
            if grid > max(_GRIDS[-1], divisor):
                break
            # A larger block can change what lies farther away from some of its pixels.
            if _tiles_are_exact(body, grid, radius + grid - divisor, max(least_px, grid)):
                ragged = divisor == grid or _pads_with_edges(body, grid, divisor, least_px)
                if ragged:
                    return Reach(radius_px=radius + grid - divisor, grid=grid)
                break
    return Reach(radius_px=EVERYTHING_PX, grid=divisor)


def _noise(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((1, 3, *shape), np.float32)


def _radius(body: Body, divisor: int, least_px: int) -> int:
    """How far a block of pixels changes the result; ``EVERYTHING_PX`` if to the border of any image that is tried."""
    for side in (up(max(px, least_px), divisor) for px in _SIDES):
        middle = side // 2 // divisor * divisor
        radius = 0
        for seed in range(_IMAGES):
            image = _noise(side, side, seed=seed)
            before = body(image)
            image[..., middle : middle + divisor, middle : middle + divisor] = seed % 2
            seen: NDArray[Any] = (body(image) != before).any(axis=(0, 1))
            places = np.concatenate([np.flatnonzero(seen.any(axis=axis)) for axis in (0, 1)])
            if len(places):
                radius = max(radius, middle + divisor - 1 - int(places.min()), int(places.max()) - middle)
            if radius >= middle - divisor:  # to the border: other images can only say the same
                break
        else:
            return radius
    return EVERYTHING_PX


def _tiles_are_exact(body: Body, grid: int, radius: int, least_px: int) -> bool:
    """Whether what is far enough from a cut is the same in a tile as in the whole."""
    margin = up(radius, grid)
    piece = up(max(margin + 2 * grid, least_px, 24), grid)
    # An odd number of blocks, so that a network that halves the image does so elsewhere than a tile of it.
    tall, wide = piece + 3 * grid, piece + 5 * grid
    image = _noise(tall, wide, seed=3)
    whole, first = body(image), body(image[..., :piece, :piece])
    last = body(np.ascontiguousarray(image[..., tall - piece :, wide - piece :]))
    keep = piece - margin
    one = np.abs(whole[..., :keep, :keep] - first[..., :keep, :keep]).max()
    two = np.abs(whole[..., -keep:, -keep:] - last[..., -keep:, -keep:]).max()
    return bool(max(one, two) < _SAME)


def _pads_with_edges(body: Body, grid: int, divisor: int, least_px: int) -> bool:
    """Whether the network's own padding is ours, so that padding before it changes nothing."""
    tall, wide = (up(max(blocks * grid, least_px + divisor), grid) - divisor for blocks in (3, 5))
    image = _noise(tall, wide, seed=4)
    padded = np.pad(image, ((0, 0), (0, 0), (0, -tall % grid), (0, -wide % grid)), mode="edge")
    return bool(np.abs(body(padded)[..., :tall, :wide] - body(image)).max() < _SAME)
