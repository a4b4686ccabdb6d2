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

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from deblur_deploy.media.images import Image
from deblur_deploy.pipeline.int8.calibrate import run_body
from deblur_deploy.pipeline.int8.quantize import layer_name
from deblur_deploy.pipeline.nodes import attributes, constants_of


@dataclass(frozen=True, kw_only=True)
class OnGrid:
    """Weights that are whole multiples of a step."""

    values: NDArray[np.float32]
    """(outputs, inputs, height, width), or (inputs, outputs) of a matrix."""
    step: NDArray[np.float32]
    """(outputs,)."""


Weights = Mapping[str, OnGrid]
"""By the name of the constant."""
Moments = Mapping[str, NDArray[np.floating[Any]]]
"""By layer: mean products of the values that the weights of one output multiply, two by two; (inputs, inputs), or
(groups, inputs, inputs) where outputs in different groups read different inputs."""

_MOST, _MOST_OF_PAIR = 127, 128
"""Of the absolute values of a weight, and of two: 128 times the largest uint8 fits into 16 bits."""
_DAMPING = 0.01
"""Added to the diagonal of the moments, as a share of its mean: what the tiles do not show may still occur."""
_PLACES, _PLACES_PER_INPUT = 256, 4
"""How many places of a tile are looked at, at least, and of all tiles together for each weight of an output."""


_LARGE = 2304
"""Inputs of an output beyond which moments are held and looked at more sparingly."""


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """How one layer reads its input."""

    source: str
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    matrix: bool = False

    @classmethod
    def of(cls, node: NodeProto, kernel: tuple[int, int]) -> _Reading:
        if node.op_type == "MatMul":
            return cls(source=node.input[0], matrix=True)
        about = attributes(node)
        return cls(
            source=node.input[0],
            groups=about.get("group", 1),
            kernel=kernel,
            strides=tuple(about.get("strides", (1, 1))),
            dilations=tuple(about.get("dilations", (1, 1))),
            pads=tuple(about.get("pads", (0, 0, 0, 0))),
        )


def input_moments(body: ModelProto, tiles: Sequence[Image], stem: int) -> Moments:
    """The moments of what each layer of ``body`` (fp32) reads, at random places of ``tiles``."""
    weights, readings = _weights(body), _readings(body)
    sizes = {name: values[0].size for name, values in weights.items()}
    moments = {
        name: np.zeros((readings[name].groups, size, size), np.float32 if size > _LARGE else np.float64)
        for name, size in sizes.items()
    }
    rng = np.random.default_rng(0)
    for seen in run_body(body, tiles, stem, {reading.source for reading in readings.values()}):
        for name, reading in readings.items():
            count = -(-_PLACES_PER_INPUT * sizes[name] // len(tiles))
            if sizes[name] <= _LARGE:
                count = max(_PLACES, count)
            columns = _columns(seen[reading.source], reading, count, rng)
            moments[name] += columns @ columns.transpose(0, 2, 1) / (columns.shape[2] * len(tiles))
    return {layer_name(name): moment[0] if len(moment) == 1 else moment for name, moment in moments.items()}


def _columns(batch: NDArray[np.float32], how: _Reading, count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """(groups, channels x height x width, at most ``count``): what a layer reads at random places of (1, C, H, W)."""
    if how.matrix:
        rows = batch.reshape(-1, batch.shape[-1])
        return np.ascontiguousarray(rows[rng.permutation(len(rows))[:count]].T)[None]
    values, (high, wide), pads = batch[0], how.kernel, how.pads
    padded = np.pad(values, ((0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    # Places of the output, as the kernel steps over the padded input.
    spans = [(side - 1) * step + 1 for side, step in zip(how.kernel, how.dilations, strict=True)]
    tall, broad = (
        (size - span) // stride + 1 for size, span, stride in zip(padded.shape[1:], spans, how.strides, strict=True)
    )
    chosen = rng.permutation(tall * broad)[:count]
    y, x = np.divmod(chosen, broad)
    y, x = y * how.strides[0], x * how.strides[1]
    taps = [padded[:, y + i * how.dilations[0], x + j * how.dilations[1]] for i in range(high) for j in range(wide)]
    return np.stack(taps, axis=1).reshape(how.groups, -1, len(chosen))


def _readings(body: ModelProto) -> dict[str, _Reading]:
    """How each layer reads, by the name of its weights."""
    shapes = {value.name: tuple(value.dims) for value in body.graph.initializer}
    found = {}
    for node in body.graph.node:
        if node.op_type in ("Conv", "MatMul") and node.input[1] in shapes and layered(node, shapes):
            found[node.input[1]] = _Reading.of(node, shapes[node.input[1]][2:] or (1, 1))
    return found


def layered(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether weights of such a shape are rounded here: those of plain convolutions and matrices."""
    rank = 2 if node.op_type == "MatMul" else 4
    return len(shapes[node.input[1]]) == rank and attributes(node).get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")


def _weights(body: ModelProto) -> dict[str, NDArray[np.float32]]:
    """(outputs, inputs, height, width) of every layer, by the name of the constant."""
    constants = constants_of(body)
    return {
        name: constants[name].T[:, :, None, None] if reading.matrix else constants[name]
        for name, reading in _readings(body).items()
    }


def rounded_weights(body: ModelProto, moments: Moments | None) -> Weights:
    """The weights of the layers of ``body`` (fp32) on the int8 grid; each to the nearest without ``moments``."""
    readings, found = _readings(body), {}
    for name, values in _weights(body).items():
        seen = np.eye(values[0].size) if moments is None else moments[layer_name(name)]
        parts = np.split(values, len(seen)) if seen.ndim == 3 else [values]
        rounded = [round_weights(part, of) for part, of in zip(parts, seen if seen.ndim == 3 else [seen], strict=True)]
        whole, step = (np.concatenate([getattr(one, key) for one in rounded]) for key in ("values", "step"))
        found[name] = OnGrid(values=whole[:, :, 0, 0].T.copy() if readings[name].matrix else whole, step=step)
    return found


def with_weights(body: ModelProto, weights: Weights) -> ModelProto:
    """``body`` with other values for the constants that ``weights`` names."""
    result = copy.deepcopy(body)
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


def round_weights(weights: NDArray[np.float32], moments: NDArray[np.floating[Any]]) -> OnGrid:
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
