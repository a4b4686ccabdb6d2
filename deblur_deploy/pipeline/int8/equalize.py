"""The channels of an activation are given like ranges before it is quantized, which changes nothing but rounding.

An activation has one scale for all of its channels, so a channel that is a hundred times smaller than another is left
with two or three of the 256 levels.  Behind a ReLU, and behind a linear upsampling, a channel may be divided by any
positive number if all that reads it multiplies by it: max-pooling, concatenation and rearrangement pass that on, and a
sum or a gate does not.  Weights have a scale for each output channel, and what a channel contributes is what their
rounding should be measured by.

Source: Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction (2019); here the ranges are
those of activations on photographs, as in Xiao et al., SmoothQuant (2023), with all of the migration that ``_FLOOR``
allows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper

from deblur_deploy.media.images import Image
from deblur_deploy.pipeline.int8.calibrate import run_body
from deblur_deploy.pipeline.int8.quantize import layer_name
from deblur_deploy.pipeline.nodes import attributes, names_read, replace_nodes

Scales = dict[str, NDArray[np.float32]]
"""Range of each channel, by layer."""

_SHARE = 0.8
"""Share of the tiles whose values a channel's range holds."""
_FLOOR = 0.2
"""Smallest range, as a share of the largest channel's: what hardly fires here may fire elsewhere."""

_PASSES = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool")
"""What keeps channels apart, and gives half of half."""


@dataclass(frozen=True, kw_only=True)
class Scalable:
    """A layer whose channels may be scaled."""

    layer: str
    activation: str
    """Whose range counts: behind the ReLU, or the rearrangement."""
    copies: NDArray[np.intp]
    """The channel of the activation that each output of the layer goes to."""
    readers: tuple[tuple[str, int], ...]
    """Layers that read it, and the first of their input channels."""


class _Graph:
    """A body's nodes by what they make and read."""

    def __init__(self, body: ModelProto) -> None:
        self.constants = {value.name: value for value in body.graph.initializer}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in body.graph.node:
            for name in sorted(names_read(node)):
                self.readers.setdefault(name, []).append(node)
        self.ends = {value.name for value in body.graph.output}
        self.channels = _channels(body)
        self.layers = [node for node in body.graph.node if self.is_layer(node)]

    def is_layer(self, node: NodeProto) -> bool:
        if node.op_type != "Conv" or any(name not in self.constants for name in node.input[1:]):
            return False
        return len(self.constants[node.input[1]].dims) == 4

    def depthwise(self, node: NodeProto) -> bool:
        shape = self.constants[node.input[1]].dims
        return bool(shape[1] == 1 and shape[0] == attributes(node).get("group", 1))

    def reached(self, name: str, first: int) -> list[tuple[str, int]] | None:
        """The layers that read ``name``, whose channels begin at ``first``; None if anything else does."""
        if name in self.ends or name not in self.readers:
            return None
        found = []
        for node in self.readers[name]:
            more: list[tuple[str, int]] | None = None
            about, inputs = attributes(node), list(node.input)
            if self.is_layer(node) and inputs[0] == name and name not in inputs[1:]:
                if about.get("group", 1) == 1 or self.depthwise(node):
                    more = [(layer_name(node.input[1]), first)]
            elif node.op_type in _PASSES:
                more = self.reached(node.output[0], first)
            elif node.op_type == "Concat" and about.get("axis", 0) == 1 and inputs.count(name) == 1:
                before = [self.channels.get(other) for other in inputs[: inputs.index(name)]]
                if None not in before:
                    more = self.reached(node.output[0], first + sum(count or 0 for count in before))
            if more is None:
                return None
            found += more
        return found


def scalable(body: ModelProto) -> list[Scalable]:
    """The layers of ``body`` whose channels may be scaled without changing what it computes."""
    graph, found = _Graph(body), []
    for node in graph.layers:
        name = node.output[0]
        copies = np.arange(graph.constants[node.input[1]].dims[0])
        while len(graph.readers.get(name, ())) == 1:
            (reader,) = graph.readers[name]
            if reader.op_type == "DepthToSpace":
                size = attributes(reader).get("blocksize", 1) ** 2
                width = len(copies) // size
                together = attributes(reader).get("mode", b"DCR") == b"CRD"
                copies = np.repeat(np.arange(width), size) if together else np.tile(np.arange(width), size)
            elif reader.op_type not in ("Relu", "LeakyRelu"):
                break
            name = reader.output[0]
        readers = graph.reached(name, 0)
        if readers:
            found.append(
                Scalable(layer=layer_name(node.input[1]), activation=name, copies=copies, readers=tuple(readers))
            )
    return found


def _channels(body: ModelProto) -> dict[str, int]:
    """Number of channels of every activation of four dimensions, where it is known."""
    found = {}
    for value in onnx.shape_inference.infer_shapes(body).graph.value_info:
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 4 and dims[1].dim_value:
            found[value.name] = int(dims[1].dim_value)
    return found


def channel_ranges(body: ModelProto, tiles: Sequence[Image], stem: int) -> Scales:
    """The range of each channel behind every layer of ``body`` that is :func:`scalable`, on ``tiles``."""
    chosen = scalable(body)
    seen: dict[str, list[NDArray[np.float32]]] = {one.activation: [] for one in chosen}
    for values in run_body(body, tiles, stem, seen):
        for name in seen.keys() & values.keys():
            seen[name].append(np.abs(values[name]).max((0, 2, 3)))
    ranges = {one.layer: np.quantile(seen[one.activation], _SHARE, axis=0).astype(np.float32) for one in chosen}
    return {
        # A layer that never fires has nothing to equalize.
        name: np.maximum(values, _FLOOR * values.max()) if values.max() > 0 else np.ones_like(values)
        for name, values in ranges.items()
    }


def equalized(body: ModelProto, ranges: Mapping[str, NDArray[np.float32]]) -> ModelProto:
    """``body`` (fp32) with every channel divided by its range, and multiplied by it where it is read."""
    result = copy.deepcopy(body)
    graph = _Graph(result)
    layers = {layer_name(node.input[1]): node for node in graph.layers}
    # The exporter leaves out a bias of zeros.
    weights, biases = (
        {
            layer: numpy_helper.to_array(graph.constants[node.input[place]]).copy()
            for layer, node in layers.items()
            if place < len(node.input)
        }
        for place in (1, 2)
    )
    for one in scalable(body):
        scale = ranges[one.layer]
        weights[one.layer] /= scale[one.copies][:, None, None, None]
        if one.layer in biases:
            biases[one.layer] /= scale[one.copies]
        for reader, first in one.readers:
            if graph.depthwise(layers[reader]):
                weights[reader][first : first + len(scale)] *= scale[:, None, None, None]
            else:
                weights[reader][:, first : first + len(scale)] *= scale[:, None, None]
    # Each has constants of its own, since the exporter shares those that are equal.
    constants: dict[str, NDArray[np.float32]] = {}
    for layer, node in layers.items():
        mine = {f"{layer}.{kind}": of[layer] for kind, of in (("weight", weights), ("bias", biases)) if layer in of}
        node.input[1:] = list(mine)
        constants |= mine
    replace_nodes(result, result.graph.node, constants)
    return result
