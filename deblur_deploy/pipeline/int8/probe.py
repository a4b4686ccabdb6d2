"""Which operations really have an int8 kernel: asked of the installed ONNX Runtime, with models of one operation.

A list would be right for one version and one platform.  An operation between DequantizeLinear and QuantizeLinear has
an int8 kernel exactly when the optimizer makes both vanish; where it does not, quantizing only adds their cost.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deblur_deploy.pipeline.graph import BLOCKS
from deblur_deploy.pipeline.nodes import constants_of, observing

PROBE_SIDE = 16
"""Height and width of the input that a body is tried with, in blocks: enough for five levels."""


def int8_ops(body: ModelProto, side: int = PROBE_SIDE) -> dict[str, bool]:
    """Whether ONNX Runtime's CPU provider has an int8 kernel, for every type of operation on floats in ``body``.

    ``side`` is the height and width of the body's input that the operations are tried at.
    """
    values = _values(body, side)
    found: dict[str, bool] = {}
    for node in body.graph.node:
        floats = [name for name in node.input if name in values and values[name].dtype == np.float32]
        made = values.get(node.output[0])
        if floats and made is not None and made.dtype == np.float32 and node.op_type not in found:
            found[node.op_type] = _runs_in_int8(_one_op(node, values, body).SerializeToString(deterministic=True))
    return found


def _values(body: ModelProto, side: int) -> dict[str, NDArray[np.generic]]:
    """Every activation of ``body`` on an input of zeros, by name: their shapes, and the shapes that it computes."""
    names = [name for node in body.graph.node for name in node.output if name]
    session = observing(body, names)
    channels = body.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    blocks = np.zeros((1, channels, side, side), np.float32)
    given = zip(names, session.run(names, {BLOCKS: blocks}), strict=True)
    # A node may also give a sequence.
    return {BLOCKS: blocks, **{name: value for name, value in given if isinstance(value, np.ndarray)}}


def _one_op(node: NodeProto, values: dict[str, NDArray[np.generic]], body: ModelProto) -> ModelProto:
    """uint8 -> DequantizeLinear -> the operation -> QuantizeLinear -> uint8, all with one scale and zero point 0.

    Each of the operation's outputs is quantized.
    """
    weights = constants_of(body)
    constants: dict[str, NDArray[np.generic]] = {"scale": np.array(1, np.float32), "zero": np.array(0, np.uint8)}
    inputs, nodes, names = [], [], []
    for place, name in enumerate(node.input):
        weight, value = weights.get(name), values.get(name)
        if value is not None and value.dtype == np.float32:
            inputs.append(helper.make_tensor_value_info(f"q{place}", TensorProto.UINT8, value.shape))
            nodes.append(helper.make_node("DequantizeLinear", [f"q{place}", "scale", "zero"], [f"x{place}"]))
        elif weight is not None and weight.dtype == np.float32:
            kind = np.int32 if weight.ndim == 1 else np.int8
            constants |= {f"q{place}": np.zeros(weight.shape, kind), f"zero{place}": np.array(0, kind)}
            nodes.append(helper.make_node("DequantizeLinear", [f"q{place}", "scale", f"zero{place}"], [f"x{place}"]))
        elif name:
            constants[f"x{place}"] = value if value is not None else weights[name]
        names.append(f"x{place}" if name else "")
    given = {f"y{place}" if name else "": name for place, name in enumerate(node.output)}
    tried = helper.make_node(node.op_type, names, [*given])
    tried.attribute.extend(node.attribute)
    nodes.append(tried)
    results = []
    for mine, name in given.items():
        if name in values:
            nodes.append(helper.make_node("QuantizeLinear", [mine, "scale", "zero"], [f"{mine}_result"]))
            results.append(helper.make_tensor_value_info(f"{mine}_result", TensorProto.UINT8, values[name].shape))
    kept = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "one", inputs, results, kept)
    return helper.make_model(graph, opset_imports=body.opset_import, ir_version=body.ir_version)


@cache
def _runs_in_int8(model: bytes) -> bool:
    with tempfile.TemporaryDirectory(prefix="deblur-probe-") as folder:
        path = Path(folder, "optimized.onnx")
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(path)
        try:
            ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception:  # ONNX Runtime's; a loop reads values around it, and cannot be tried alone
            return False
        left = {node.op_type for node in onnx.load(path).graph.node}
    return not left & {"QuantizeLinear", "DequantizeLinear"}
