"""Ranges chosen by what they do to the result: as wide as needed, as narrow as possible.

A few photographs drive an activation ten times further than most do.  A range that holds them leaves coarse levels to
all others, and one that does not ruins them; which is worse depends on what the network makes of it, so it is measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime.quantization.calibrate import TensorsData

from deblur_deploy.pipeline.int8.calibrate import ranges_of_each, run_body, spanning
from deblur_deploy.pipeline.int8.quantize import quantize_body
from deblur_deploy.runtime.media import Image

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the tiles, whose values a range may have to hold."""
_LEVEL = 1 / 255


def ranges_by_result(
    body: ModelProto, on_grid: ModelProto, tiles: Sequence[Image], stem: int, op_types: Sequence[str]
) -> TensorsData:
    """The ranges that hold that share of the tiles with which int8 comes nearest to ``body`` (fp32).

    ``on_grid``: the same with the weights that int8 will have.
    """
    each = ranges_of_each(body, tiles, stem, op_types)
    exact = _results(body, tiles, stem)
    # What is lost counts as a share of what the network does to a tile, or of a level where it does nothing.
    energies = [np.mean(np.square(result)) + _LEVEL**2 for result in exact]

    def error(ranges: TensorsData) -> float:
        rounded = _results(quantize_body(on_grid, ranges, op_types), tiles, stem)
        noise = [np.mean(np.square(a - b)) for a, b in zip(rounded, exact, strict=True)]
        return float(np.mean(np.divide(noise, energies)))

    return min((spanning(each, share) for share in SHARES), key=error)


def _results(body: ModelProto, tiles: Sequence[Image], stem: int) -> list[NDArray[np.float32]]:
    (name,) = (value.name for value in body.graph.output)
    return [seen[name] for seen in run_body(body, tiles, stem, {name})]
