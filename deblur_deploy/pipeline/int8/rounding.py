"""Weights rounded one after another, each making up for what rounding those before it did to the result.

Rounded to the nearest, the weights of a filter err independently of each other, while the values they multiply hardly
differ: neighbouring pixels are nearly the same, so the errors add up to one that follows the brightness.  Which values
go together is known from the calibration tiles.

Source: Frantar et al., GPTQ (2023), here for convolutions and 8 bits; the columns in the order of their energy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from deblur_deploy.pipeline.int8.calibrate import run_body
from deblur_deploy.runtime.media import Image

Weights = Mapping[str, NDArray[np.float32]]
"""By the name of the constant."""

_MOST = 127
_DAMPING = 0.01
"""Added to the diagonal of the moments, as a share of its mean: what the tiles do not show may still occur."""
_PLACES = 256
"""Places of a tile that are looked at; all tiles together show several times more than a filter has weights."""


def rounded_weights(body: ModelProto, tiles: Sequence[Image], stem: int) -> Weights:
    """The weights of the convolutions of ``body`` (fp32) on the int8 grid."""
    constants = {value.name: numpy_helper.to_array(value) for value in body.graph.initializer}
    inputs = {node.input[1]: node.input[0] for node in body.graph.node if node.op_type == "Conv"}
    moments = dict.fromkeys(inputs, np.zeros((), np.float64))
    for seen in run_body(body, tiles, stem, set(inputs.values())):
        for name, source in inputs.items():
            side = constants[name].shape[-1]
            places = F.unfold(torch.from_numpy(seen[source]), side, padding=side // 2)[0]
            # An odd stride, or all places might lie in the same column of the image.
            places = places[:, :: places.shape[1] // _PLACES | 1]
            moments[name] = moments[name] + (places @ places.T).numpy()
    return {name: round_weights(constants[name], moment) for name, moment in moments.items()}


def with_weights(body: ModelProto, weights: Weights) -> ModelProto:
    """``body`` with other values for the constants that ``weights`` names."""
    result = ModelProto()
    result.CopyFrom(body)
    for value in result.graph.initializer:
        if value.name in weights:
            value.CopyFrom(numpy_helper.from_array(weights[value.name], value.name))
    return result


def round_weights(weights: NDArray[np.float32], moments: NDArray[np.float64]) -> NDArray[np.float32]:
    """``weights`` (outputs, ...) on the grid that each output's largest one spans in 127 steps.

    ``moments`` (inputs, inputs): sums of the products of the values that the weights of an output multiply.  The
    largest weights stay as they are, so whoever quantizes the result finds the same grid, and rounds nothing.
    """
    rows = weights.reshape(len(weights), -1)
    step = np.abs(rows).max(1) / np.float32(_MOST)
    step[step == 0] = 1
    largest = np.abs(rows).argmax(1)
    damping = _DAMPING * np.diag(moments).mean() + np.finfo(np.float32).tiny
    order = np.argsort(-np.diag(moments), kind="stable")
    inverse = np.linalg.inv(moments[np.ix_(order, order)] + damping * np.eye(len(order)))
    # Row i tells how the weights from i on make up for an error in weight i.
    shares = np.linalg.cholesky(inverse).T
    left, whole = rows[:, order].astype(np.float64), np.empty_like(rows)
    for i, column in enumerate(order):
        nearest = np.clip(np.rint(left[:, i] / step), -_MOST, _MOST)
        whole[:, column] = np.where(largest == column, np.rint(rows[:, column] / step), nearest)
        error = (left[:, i] - whole[:, column] * step) / shares[i, i]
        left[:, i:] -= np.outer(error, shares[i, i:])
    return (whole * step[:, None]).reshape(weights.shape)
