"""Ranges chosen by what they do to the result: as wide as needed, as narrow as possible.

A few photographs drive an activation ten times further than most do.  A range that holds them leaves coarse levels to
all others, and one that does not ruins them; which is worse depends on what the network makes of it, so it is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime.quantization.calibrate import TensorsData

from deblur_deploy.pipeline.graph import BLOCKS
from deblur_deploy.pipeline.int8.calibrate import run_body, spanning
from deblur_deploy.pipeline.int8.quantize import quantize_body
from deblur_deploy.runtime.media import Image

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the tiles, whose values a range may have to hold."""
_LEVEL = 1 / 255


def share_by_result(
    body: ModelProto,
    on_grid: ModelProto,
    each: Sequence[TensorsData],
    tiles: Sequence[Image],
    stem: int,
    op_types: Sequence[str],
    *,
    residual: bool,
) -> float:
    """The one of ``SHARES`` with which int8 comes nearest to ``body`` (fp32) on ``tiles``.

    ``on_grid``: the same with the weights that int8 will have; ``each``: ranges on each of the tiles; ``residual``:
    whether the body gives what is to be added to the image, and not the image.
    """
    exact, energies = [], []
    for result, blocks in _results(body, tiles, stem):
        exact.append(result)
        # What is lost counts as a share of what the network does to a tile, or of a level where it does nothing.
        energies.append(np.mean(np.square(result if residual else result - blocks)) + _LEVEL**2)

    def error(share: float) -> float:
        rounded = _results(quantize_body(on_grid, spanning(each, share), op_types), tiles, stem)
        noise = [np.mean(np.square(a - b)) for (a, _), b in zip(rounded, exact, strict=True)]
        return float(np.mean(np.divide(noise, energies)))

    return min(SHARES, key=error)


def _results(
    body: ModelProto, tiles: Sequence[Image], stem: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """What ``body`` gives for each tile, and the tile."""
    (name,) = (value.name for value in body.graph.output)
    for seen in run_body(body, tiles, stem, {name}):
        yield seen[name], seen[BLOCKS]
