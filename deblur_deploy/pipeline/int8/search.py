"""Ranges chosen by what they do to the result: as wide as needed, as narrow as possible.

A few photographs drive an activation ten times further than most do.  A range that holds them leaves coarse levels to
all others, and one that does not ruins them; which is worse depends on what the network makes of it, so it is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import TensorsData

from deblur_deploy.pipeline.graph import BLOCKS
from deblur_deploy.pipeline.int8.calibrate import run_body, spanning
from deblur_deploy.pipeline.int8.quantize import quantize_body
from deblur_deploy.pipeline.int8.rounding import Weights, with_weights
from deblur_deploy.runtime.media import Image

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the tiles, whose values a range may have to hold."""
_LEVEL = 1 / 255
_REARRANGES = ("Transpose", "Reshape", "DepthToSpace")


def shares_by_result(
    body: ModelProto,
    weights: Weights,
    each: Sequence[TensorsData],
    tiles: Sequence[Image],
    stem: int,
    op_types: Sequence[str],
    *,
    residual: bool,
) -> dict[str, float]:
    """Of each activation the one of ``SHARES`` with which int8 comes nearest to ``body`` (fp32) on ``tiles``.

    The best that is the same for all, then each in turn a step up or down, as long as that helps.  ``weights``: those
    that int8 will have; ``each``: ranges on each of the tiles; ``residual``: whether the body gives what is to be added
    to the image, and not the image.
    """
    exact, energies = [], []
    for result, blocks in _results(body, tiles, stem):
        exact.append(result)
        # What is lost counts as a share of what the network does to a tile, or of a level where it does nothing.
        energies.append(np.mean(np.square(result if residual else result - blocks)) + _LEVEL**2)

    on_grid, steps = with_weights(body, weights), {name: of.step for name, of in weights.items()}

    def quantized(places: Mapping[str, int]) -> ModelProto:
        ranges = spanning(each, {name: SHARES[place] for name, place in places.items()})
        return quantize_body(on_grid, joined(body, ranges), op_types, steps=steps)

    def error(places: Mapping[str, int]) -> float:
        rounded = _results(quantized(places), tiles, stem)
        noise = [np.mean(np.square(a - b)) for (a, _), b in zip(rounded, exact, strict=True)]
        return float(np.mean(np.divide(noise, energies)))

    names = list(each[0])
    least, best = min((error(dict.fromkeys(names, place)), place) for place in range(len(SHARES)))
    places = dict.fromkeys(names, best)
    for name in _with_own_range(quantized(places), names):
        for step in (1, -1):
            while 0 <= (place := places[name] + step) < len(SHARES):
                if (found := error({**places, name: place})) >= least:
                    break
                least, places[name] = found, place
            if places[name] != best:
                break
    return {name: SHARES[place] for name, place in places.items()}


def _with_own_range(quantized: ModelProto, names: Sequence[str]) -> list[str]:
    """Those of the activations ``names`` whose range ``quantized`` heeds, in the order of the graph."""
    scales = [node.input[1] for node in quantized.graph.node if node.op_type == "QuantizeLinear"]
    return [name for name in dict.fromkeys(scale.removesuffix("_scale") for scale in scales) if name in names]


def joined(body: ModelProto, ranges: TensorsData) -> TensorsData:
    """``ranges``, but what a convolution gives to a concatenation, without a ReLU, has the range of the whole.

    It is then rounded once and not twice: in two grids that are nearly the same, the errors would add up to a bias.
    """
    makers = {node.output[0]: node for node in body.graph.node if node.output}
    result = dict(ranges.items())
    for node in body.graph.node:
        if node.op_type != "Concat" or node.output[0] not in result:
            continue
        for name in node.input:
            chain = [name]
            while chain[-1] in makers and makers[chain[-1]].op_type in _REARRANGES:
                chain.append(makers[chain[-1]].input[0])
            if chain[-1] in makers and makers[chain[-1]].op_type == "Conv":
                result.update(dict.fromkeys(chain, result[node.output[0]]))
    return TensorsData(CalibrationMethod.MinMax, {name: value.range_value for name, value in result.items()})


def _results(
    body: ModelProto, tiles: Sequence[Image], stem: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """What ``body`` gives for each tile, and the tile."""
    (name,) = (value.name for value in body.graph.output)
    for seen in run_body(body, tiles, stem, {name}):
        yield seen[name], seen[BLOCKS]
