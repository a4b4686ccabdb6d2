"""A body whose upsampling moves whole runs of interleaved channels: the layout ``rows`` of what is inside.

ONNX Runtime's channels-last int8 convolutions then meet without transposing anything.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from deblur_deploy.pipeline.graph import BLOCKS
from deblur_deploy.pipeline.nodes import attributes, constants_of, makers_of, names_read, replace_nodes


def in_rows(body: ModelProto, multiple: int) -> tuple[ModelProto, dict[str, NDArray[np.intp]]]:
    """``body`` with upsampling by whole runs of channels, and the new order of outputs by the name of the weights.

    A convolution in front of a DepthToSpace gives (row, column, channel) instead of (channel, row, column).
    ``multiple``: what heights and widths of the body's input are multiples of; where that does not make the size at an
    upsampling a whole number, the size is not known in advance, and it stays as it is.
    """
    scales = _scales(body)
    makers = makers_of(body)
    readers = Counter(name for node in body.graph.node for name in names_read(node))
    constants = constants_of(body)
    orders: dict[str, NDArray[np.intp]] = {}
    added: dict[str, NDArray[Any]] = {}
    nodes: list[NodeProto] = []
    for node in body.graph.node:
        maker = makers.get(node.input[0]) if node.input else None
        suits = (
            node.op_type == "DepthToSpace"
            and maker is not None
            and maker.op_type == "Conv"
            and readers[node.input[0]] == 1
            and maker.input[1] not in orders
            and attributes(maker).get("group", 1) == 1
            and all(name in constants for name in maker.input[1:] if name)
            and node.input[0] in scales
            and multiple % scales[node.input[0]][1] == 0
        )
        if not suits or maker is None:
            nodes.append(node)
            continue
        about = attributes(node)
        side, outputs = about["blocksize"], len(constants[maker.input[1]])
        width = outputs // side**2
        order = np.arange(outputs)
        if about.get("mode", b"DCR") == b"CRD":
            order = order.reshape(width, side, side).transpose(1, 2, 0).ravel()
        orders[maker.input[1]] = order
        for name in filter(None, maker.input[1:]):
            added[name] = constants[name][order]
        nodes += _runs(node, scales[node.input[0]], side, width, added)
    result = copy.deepcopy(body)
    replace_nodes(result, nodes, added)
    return result, orders


def _runs(
    node: NodeProto, scale: tuple[int, int], side: int, width: int, added: dict[str, NDArray[Any]]
) -> list[NodeProto]:
    """What a DepthToSpace of (row, column, channel) does, by runs of channels."""
    name, (times, parts) = node.output[0], scale
    for key, value in (("times", times), ("parts", parts), ("side", side), ("run", side * width), ("width", width)):
        added[f"rows_{key}_{value}"] = np.array([value], np.int64)

    def make(kind: str, inputs: list[str], output: str, **about: Any) -> NodeProto:
        return helper.make_node(kind, inputs, [f"{name}_{output}"], name=f"{name}_{output}", **about)

    nodes = [make("Shape", [BLOCKS], "batch", start=0, end=1)]
    for axis, at in (("h", 2), ("w", 3)):
        # From the body's own input, whose size a session may fix.
        nodes += [
            make("Shape", [BLOCKS], f"{axis}_blocks", start=at, end=at + 1),
            make("Mul", [f"{name}_{axis}_blocks", f"rows_times_{times}"], f"{axis}_times"),
            make("Div", [f"{name}_{axis}_times", f"rows_parts_{parts}"], axis),
            make("Mul", [f"{name}_{axis}", f"rows_side_{side}"], f"{axis}_full"),
        ]
    runs = [f"{name}_batch", f"{name}_h", f"{name}_w", f"rows_side_{side}", f"rows_run_{side * width}"]
    full = [f"{name}_batch", f"{name}_h_full", f"{name}_w_full", f"rows_width_{width}"]
    return [
        *nodes,
        make("Concat", runs, "by_runs", axis=0),
        make("Concat", full, "by_pixels", axis=0),
        make("Transpose", [node.input[0]], "last", perm=[0, 2, 3, 1]),
        make("Reshape", [f"{name}_last", f"{name}_by_runs"], "runs"),
        make("Transpose", [f"{name}_runs"], "gathered", perm=[0, 1, 3, 2, 4]),
        make("Reshape", [f"{name}_gathered", f"{name}_by_pixels"], "pixels"),
        helper.make_node("Transpose", [f"{name}_pixels"], [name], name=f"{name}_first", perm=[0, 3, 1, 2]),
    ]


_PROBE_PX = 1024


def _scales(body: ModelProto) -> dict[str, tuple[int, int]]:
    """Height of every image in ``body`` relative to its input's, as (times, parts), where that is a plain ratio."""
    fixed = copy.deepcopy(body)
    for dim, value in zip(fixed.graph.input[0].type.tensor_type.shape.dim[2:], (_PROBE_PX, 2 * _PROBE_PX), strict=True):
        dim.dim_value = value
    fixed.graph.output[0].type.tensor_type.ClearField("shape")
    found = {}
    for value in onnx.shape_inference.infer_shapes(fixed).graph.value_info:
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if len(sizes) == 4 and sizes[2] and sizes[3] == 2 * sizes[2]:
            common = int(np.gcd(sizes[2], _PROBE_PX))
            found[value.name] = sizes[2] // common, _PROBE_PX // common
    return found
