"""int8 after training: static scales, uint8 activations, int8 weights per channel, in QDQ form.

Only the body is quantized, and in it only what has an int8 kernel.  The residual sum stays exact: it is formed from
the image's own bytes.  (U8S8, since OpenVINO refuses S8S8 and VNNI instructions multiply u8 by s8.)
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from deblur_deploy.errors import InputError
from deblur_deploy.media.images import Image
from deblur_deploy.pipeline.graph import BLOCKS, BYTE_SCALE, CORRECTION
from deblur_deploy.pipeline.int8.calibrate import to_blocks
from deblur_deploy.pipeline.nodes import set_nodes
from deblur_deploy.pipeline.rewrite import LAYERS

_BYTES = {"scale": np.array(BYTE_SCALE, dtype=np.float32), "zero_point": np.array(0, dtype=np.uint8)}
_SIGNED_BYTES = _BYTES | {"zero_point": np.array(128, dtype=np.uint8)}
"""Steps of one level: added to an image and rounded, such a correction gives what an exact one would have given."""

_ZERO = np.array(0, dtype=np.int8)


def layer_name(weight: str) -> str:
    """What a convolution is called: as its weights in torch, also where they are quantized."""
    name = weight.removeprefix("q_output_")
    return name.rpartition(".weight")[0] or name


def layers(body: ModelProto) -> dict[str, str]:
    """The names of the nodes of the layers of ``body``, by :func:`layer_name`, in order."""
    constants = {value.name for value in body.graph.initializer}
    return {
        layer_name(node.input[1]): node.name
        for node in body.graph.node
        if node.op_type in LAYERS and node.input[1] in constants
    }


def quantize_body(
    body: ModelProto,
    ranges: TensorsData,
    op_types: Sequence[str],
    *,
    steps: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
    in_float: Collection[str] = (),
    only: Collection[str] | None = None,
    residual: bool = True,
) -> ModelProto:
    """``body`` (fp32) with Q/DQ pairs around its ``op_types``, activations in ``ranges``, weights in ``steps``.

    ``steps``: of each output, by the name of the weights; those that are not there span 127 steps.
    The layers in ``in_float`` (names of :func:`layers`) stay as they are, with what lies between them; ``only``
    quantizes some, each with the ReLU behind it, and nothing else.  ``residual``: whether the body gives what is to be
    added to the image, and not the image.
    """
    nodes = layers(body)
    chosen = []
    if only is not None:
        names = {nodes[name] for name in only}
        made = {name for node in body.graph.node if node.name in names for name in node.output}
        chosen = [
            node.name
            for node in body.graph.node
            if node.name in names or (node.op_type == "Relu" and node.input[0] in made)
        ]
    axes = {node.input[1]: 1 for node in body.graph.node if node.op_type == "MatMul"}
    ends = {BLOCKS: _BYTES, CORRECTION: _SIGNED_BYTES if residual else _BYTES}
    overrides = {name: [{"quant_type": QuantType.QUInt8, **of}] for name, of in ends.items()}
    for name, step in steps.items():
        axis = axes.get(name, 0)
        kind = {"axis": axis, "quant_type": QuantType.QInt8, "zero_point": _ZERO}
        overrides[name] = [{**kind, "scale": of} for of in step]
    quantizer = QDQQuantizer(
        copy.deepcopy(body),
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=ranges,
        nodes_to_quantize=chosen,
        nodes_to_exclude=_in_float(body, {nodes[name] for name in in_float}),
        op_types_to_quantize=list(op_types),
        extra_options={"TensorQuantOverrides": overrides},
    )
    with quiet():
        quantizer.quantize_model()
    quantizer.model.topological_sort()
    result: ModelProto = quantizer.model.model
    _shield(result, {nodes[name] for name in in_float})
    return result


def _in_float(body: ModelProto, convolutions: Collection[str]) -> list[str]:
    """The nodes called ``convolutions``, and all that only passes on what these give: rounding that would be idle."""
    found, tensors = [], set[str]()
    for node in body.graph.node:
        inputs = node.input if node.op_type == "Concat" else node.input[:1]
        passes = node.op_type not in LAYERS and inputs and tensors.issuperset(inputs)
        if node.name in convolutions or passes:
            found.append(node.name)
            tensors.update(node.output)
    return found


def _shield(model: ModelProto, names: Collection[str]) -> None:
    """Keep the convolutions called ``names`` in float.

    ONNX Runtime quantizes the weights of a convolution that it finds between DequantizeLinear and QuantizeLinear by
    itself (1.32).  The maximum of one value is that value, and stands between.
    """
    # The whole graph dequantizes the image's bytes in front of the body.
    dequantized = {BLOCKS, *(node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear")}
    kept = []
    for node in model.graph.node:
        if node.name in names and node.input[0] in dequantized:
            shield = f"{node.name}_float_input"
            kept.append(helper.make_node("Max", [node.input[0]], [shield], name=shield))
            node.input[0] = shield
        kept.append(node)
    set_nodes(model, kept)


def quantize_with_nncf(body: ModelProto, tiles: Sequence[Image], stem: int) -> ModelProto:
    """``body`` as NNCF's post-training quantization makes it (it corrects biases, too), with weights of half the range.

    Two products of such weights fit into the 16 bits in which processors without VNNI add them up.
    Raises InputError if NNCF is not installed, or with what it fails with.
    """
    try:
        import nncf
    except ImportError:
        raise InputError("int8.nncf needs NNCF: pip install 'deblur-deploy[peers]'") from None
    dataset = nncf.Dataset([{BLOCKS: to_blocks(tile, stem)} for tile in tiles])
    careful = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
    with quiet(), redirect_stdout(sys.stderr):
        result: ModelProto = nncf.quantize(
            copy.deepcopy(body), dataset, subset_size=len(tiles), advanced_parameters=careful
        )
    # The input is bytes: their own scale is exact, and the graph around the body relies on it.
    values = {value.name: value for value in result.graph.initializer}
    for node in result.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] == BLOCKS:
            for name, array in zip(node.input[1:3], _BYTES.values(), strict=True):
                values[name].CopyFrom(numpy_helper.from_array(array, name))
    return result


@contextmanager
def quiet() -> Iterator[None]:
    """Without the advice that quantizers log: nothing a caller could do anything about."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(level)
