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
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

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
_BLOCK = 64
"""Columns that are rounded before all others hear of it."""
_DAMPING = 0.01
"""Added to the diagonal of the moments, as a share of its mean: what the tiles do not show may still occur."""
_PLACES, _PLACES_PER_INPUT = 256, 4
"""How many places of a tile are looked at, at least, and of all tiles together for each weight of an output."""


_LARGE = 2304
"""Inputs of an output beyond which moments are held and looked at more sparingly."""


def input_moments(body: ModelProto, tiles: Sequence[Image], stem: int) -> Moments:
    """The moments of what each layer of ``body`` (fp32) reads, at random places of ``tiles``, where it is told."""
    weights = _weights(body)
    readers = {name: reader for name, reader in _readers(body).items() if _is_told(reader, body)}
    sizes = {name: weights[name][0].size for name in readers}
    moments = {
        name: np.zeros((_groups(readers[name]), size, size), np.float32 if size > _LARGE else np.float64)
        for name, size in sizes.items()
    }
    rng = np.random.default_rng(0)
    for seen in run_body(body, tiles, stem, {reader.input[0] for reader in readers.values()}):
        for name, reader in readers.items():
            if reader.input[0] not in seen:
                continue
            count = -(-_PLACES_PER_INPUT * sizes[name] // len(tiles))
            if sizes[name] <= _LARGE:
                count = max(_PLACES, count)
            columns = _columns(seen[reader.input[0]], reader, weights[name].shape[2:], count, rng)
            moments[name] += columns @ columns.transpose(0, 2, 1) / (columns.shape[2] * len(tiles))
    return {layer_name(name): moment[0] if len(moment) == 1 else moment for name, moment in moments.items()}


def _groups(node: NodeProto) -> int:
    return int(attributes(node).get("group", 1))


def _columns(
    batch: NDArray[np.float32], node: NodeProto, kernel: tuple[int, ...], count: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """(groups, channels x height x width, at most ``count``): what ``node`` reads at random places of (1, C, H, W)."""
    if node.op_type == "MatMul":
        rows = batch.reshape(-1, batch.shape[-1])
        return np.ascontiguousarray(rows[rng.permutation(len(rows))[:count]].T)[None]
    about = attributes(node)
    (down, right), (tall, wide) = about.get("strides", (1, 1)), about.get("dilations", (1, 1))
    top, left, bottom, end = about.get("pads", (0, 0, 0, 0))
    padded = np.pad(batch[0], ((0, 0), (top, bottom), (left, end)))
    height, width = ((size - 1) * gap + 1 for size, gap in zip(kernel, (tall, wide), strict=True))
    windows = sliding_window_view(padded, (height, width), axis=(1, 2))[:, ::down, ::right, ::tall, ::wide]
    y, x = np.divmod(rng.permutation(windows.shape[1] * windows.shape[2])[:count], windows.shape[2])
    return windows[:, y, x].transpose(0, 2, 3, 1).reshape(_groups(node), -1, len(y))


def _readers(body: ModelProto) -> dict[str, NodeProto]:
    """The layers whose weights are rounded here, by the name of the weights."""
    ranks = {value.name: len(value.dims) for value in body.graph.initializer}
    wanted = {"Conv": (3, 4, 5), "MatMul": (2,)}
    return {
        node.input[1]: node
        for node in body.graph.node
        if node.op_type in wanted and ranks.get(node.input[1]) in wanted[node.op_type]
    }


def _is_told(node: NodeProto, body: ModelProto) -> bool:
    """Whether it is known here which values a layer's weights multiply; if not, they are rounded to the nearest."""
    rank = next(len(value.dims) for value in body.graph.initializer if value.name == node.input[1])
    return rank in (2, 4) and attributes(node).get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")


def _weights(body: ModelProto) -> dict[str, NDArray[np.float32]]:
    """(outputs, inputs, height, width) of every layer, by the name of the constant."""
    constants = constants_of(body)
    return {
        name: constants[name].T[:, :, None, None]
        if reader.op_type == "MatMul"
        else constants[name].reshape(*constants[name].shape[:2], -1, constants[name].shape[-1])
        for name, reader in _readers(body).items()
    }


def rounded_weights(body: ModelProto, moments: Moments | None) -> Weights:
    """The weights of the layers of ``body`` (fp32) on the int8 grid; each to the nearest without ``moments``."""
    shapes, found = {value.name: tuple(value.dims) for value in body.graph.initializer}, {}
    for name, values in _weights(body).items():
        seen = (moments or {}).get(layer_name(name), np.eye(values[0].size))
        parts = np.split(values, len(seen)) if seen.ndim == 3 else [values]
        rounded = [round_weights(part, of) for part, of in zip(parts, seen if seen.ndim == 3 else [seen], strict=True)]
        whole, step = (np.concatenate([getattr(one, key) for one in rounded]) for key in ("values", "step"))
        matrix = len(shapes[name]) == 2
        found[name] = OnGrid(values=whole[:, :, 0, 0].T.copy() if matrix else whole.reshape(shapes[name]), step=step)
    return found


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
    seen = torch.from_numpy(moments[np.ix_(order, order)] + damping * np.eye(len(order)))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(seen))
    # Row i tells how the weights from i on make up for an error in weight i.
    shares = torch.linalg.cholesky(inverse, upper=True).numpy()
    left, whole = rows[:, order].astype(np.float64), np.zeros_like(rows)
    for first in range(0, len(order), _BLOCK):
        # What lies behind a block hears of its errors all at once: the same sums, as one product of matrices.
        last = min(first + _BLOCK, len(order))
        errors = np.empty((len(rows), last - first))
        for i in range(first, last):
            column = order[i]
            taken = 0 if alone[column] else np.abs(whole[:, partner[column]])
            most = np.minimum(_MOST, _MOST_OF_PAIR - taken)
            whole[:, column] = np.clip(np.rint(left[:, i] / step), -most, most)
            error = errors[:, i - first] = (left[:, i] - whole[:, column] * step) / shares[i, i]
            left[:, i:last] -= np.outer(error, shares[i, i:last])
        left[:, last:] -= errors @ shares[first:last, last:]
    return OnGrid(values=(whole * step[:, None]).reshape(weights.shape), step=step)
