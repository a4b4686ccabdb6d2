"""Weights rounded one after another, each making up for what rounding those before it did to the result.

Rounded to the nearest, the weights of a filter err independently of each other, while the values they multiply hardly
differ: neighbouring pixels are nearly the same, so the errors add up to one that follows the brightness.  Which values
go together is known from the calibration tiles.

x86 processors without VNNI add the products of two neighbouring inputs in 16 bits before they add the rest in 32, and
what does not fit is cut off: with weights that use all of their 8 bits, photographs come out worse than they went in.
So the weights of two such inputs are kept from exceeding 16 bits together, and the same file is exact everywhere.

Source: Frantar et al., GPTQ (2023), here for convolutions and 8 bits; the columns in the order of their energy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from deblur_deploy.media.images import Image
from deblur_deploy.pipeline.int8.calibrate import run_body
from deblur_deploy.pipeline.int8.quantize import layer_name


@dataclass(frozen=True, kw_only=True)
class OnGrid:
    """Weights that are whole multiples of a step."""

    values: NDArray[np.float32]
    """(outputs, inputs, height, width)."""
    step: NDArray[np.float32]
    """(outputs,)."""


Weights = Mapping[str, OnGrid]
"""By the name of the constant."""
Moments = Mapping[str, NDArray[np.float64]]
"""By layer: mean products of the values that the weights of one output multiply, two by two; (inputs, inputs)."""

_MOST, _MOST_OF_PAIR = 127, 128
"""Of the absolute values of a weight, and of two: 128 times the largest uint8 fits into 16 bits."""
_DAMPING = 0.01
"""Added to the diagonal of the moments, as a share of its mean: what the tiles do not show may still occur."""
_PLACES, _PLACES_PER_INPUT = 256, 4
"""How many places of a tile are looked at, at least, and of all tiles together for each weight of an output."""


def input_moments(body: ModelProto, tiles: Sequence[Image], stem: int) -> Moments:
    """The moments of what each convolution of ``body`` (fp32) reads, at random places of ``tiles``."""
    weights = _weights(body)
    inputs = {node.input[1]: node.input[0] for node in body.graph.node if node.op_type == "Conv"}
    sizes = {name: values[0].size for name, values in weights.items()}
    moments = {name: np.zeros((size, size)) for name, size in sizes.items()}
    rng = np.random.default_rng(0)
    for seen in run_body(body, tiles, stem, set(inputs.values())):
        for name, source in inputs.items():
            count = max(_PLACES, -(-_PLACES_PER_INPUT * sizes[name] // len(tiles)))
            columns = _columns(seen[source][0], weights[name].shape[-1], count, rng)
            moments[name] += columns @ columns.T / (columns.shape[1] * len(tiles))
    return {layer_name(name): moment for name, moment in moments.items()}


def _columns(values: NDArray[np.float32], side: int, count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(channels x side x side, at most ``count``): what a padded convolution reads at random places of (C, H, W)."""
    channels, height, width = values.shape
    chosen = rng.permutation(height * width)[:count]
    y, x = np.divmod(chosen, width)
    padded = np.pad(values, ((0, 0), (side // 2,) * 2, (side // 2,) * 2))
    taps = [padded[:, y + i, x + j] for i in range(side) for j in range(side)]
    return np.stack(taps, axis=1).reshape(channels * side**2, len(chosen))


def _weights(body: ModelProto) -> dict[str, NDArray[np.float32]]:
    constants = {value.name: value for value in body.graph.initializer}
    names = [node.input[1] for node in body.graph.node if node.op_type == "Conv"]
    return {name: numpy_helper.to_array(constants[name]) for name in names}


def rounded_weights(body: ModelProto, moments: Moments | None) -> Weights:
    """The weights of the convolutions of ``body`` (fp32) on the int8 grid; each to the nearest without ``moments``."""
    return {
        name: round_weights(values, np.eye(values[0].size) if moments is None else moments[layer_name(name)])
        for name, values in _weights(body).items()
    }


def with_weights(body: ModelProto, weights: Weights) -> ModelProto:
    """``body`` with other values for the constants that ``weights`` names."""
    result = ModelProto()
    result.CopyFrom(body)
    for value in result.graph.initializer:
        if value.name in weights:
            value.CopyFrom(numpy_helper.from_array(weights[value.name].values, value.name))
    return result


def partners(shape: tuple[int, ...]) -> NDArray[np.intp]:
    """With which weight of an output each is multiplied together, as flat indices; one without a partner is its own.

    ``shape``: (inputs, height, width).  Kernels read channels last, two by two.
    """
    last = np.arange(np.prod(shape)).reshape(shape).transpose(1, 2, 0).ravel()
    result = np.empty_like(last)
    result[last] = last
    even = len(last) // 2 * 2
    result[last[:even]] = last[:even].reshape(-1, 2)[:, ::-1].ravel()
    return result


def round_weights(weights: NDArray[np.float32], moments: NDArray[np.float64]) -> OnGrid:
    """``weights`` (outputs, inputs, height, width) on the grid that each output's largest ones span.

    ``moments``: see ``Moments``.
    """
    rows = weights.reshape(len(weights), -1)
    partner = partners(weights.shape[1:])
    alone = partner == np.arange(len(partner))
    pairs = np.abs(rows) + np.where(alone, 0, np.abs(rows[:, partner]))
    step = np.maximum(np.abs(rows).max(1) / np.float32(_MOST), pairs.max(1) / np.float32(_MOST_OF_PAIR))
    step[step == 0] = 1
    damping = _DAMPING * np.diag(moments).mean() + np.finfo(np.float32).tiny
    order = np.argsort(-np.diag(moments), kind="stable")
    inverse = np.linalg.inv(moments[np.ix_(order, order)] + damping * np.eye(len(order)))
    # Row i tells how the weights from i on make up for an error in weight i.
    shares = np.linalg.cholesky(inverse).T
    left, whole = rows[:, order].astype(np.float64), np.zeros_like(rows)
    for i, column in enumerate(order):
        taken = 0 if alone[column] else np.abs(whole[:, partner[column]])
        most = np.minimum(_MOST, _MOST_OF_PAIR - taken)
        whole[:, column] = np.clip(np.rint(left[:, i] / step), -most, most)
        error = (left[:, i] - whole[:, column] * step) / shares[i, i]
        left[:, i:] -= np.outer(error, shares[i, i:])
    return OnGrid(values=(whole * step[:, None]).reshape(weights.shape), step=step)
