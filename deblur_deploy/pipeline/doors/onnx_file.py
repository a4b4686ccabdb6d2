"""Somebody's ONNX file as a plain float graph that can be rewritten."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, ValueInfoProto, inliner, numpy_helper, version_converter

from deblur_deploy.contract import KEY
from deblur_deploy.errors import InputError, ModelError, one_line
from deblur_deploy.files import existing
from deblur_deploy.pipeline.convention import PlaneOrder
from deblur_deploy.pipeline.graph import OPSET
from deblur_deploy.pipeline.nodes import drop_notes, graphs_of, set_nodes

_FLOATS = {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
_QUANTIZED = ("QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")


def read_onnx(path: Path) -> ModelProto:
    """The model in ``path``, with what it keeps in other files; raises MissingFileError or ModelError."""
    existing(path, kind="file")
    try:
        return onnx.load(path)
    except FileNotFoundError as error:
        raise ModelError(f"{path} keeps weights in another file that is not there: {one_line(error)}") from None
    except Exception as error:  # protobuf and onnx have many kinds for a file that is none, or is cut short
        raise ModelError(f"{path} is not a whole ONNX file: {one_line(error)}") from None


def plain(model: ModelProto, name: str) -> tuple[ModelProto, list[str]]:
    """``model``, which messages call ``name``, in float32, without functions, sizes left free; and what was done to it.

    Raises ModelError that says what is wrong with it.
    """
    if not model.graph.node:
        raise ModelError(f"{name} holds no network; give an ONNX file")
    if any(entry.key == KEY for entry in model.metadata_props):
        raise ModelError(
            f"{name} was made by deblur-export already; its fp32.onnx, or what it was made from, can be exported again"
        )
    notes = []
    if model.functions:
        try:
            model = inliner.inline_local_functions(model)
        except Exception as error:  # of C++, as below
            raise ModelError(f"{name} has functions that cannot be inlined: {one_line(error)}") from None
    _refuse(model, name)
    if widened := _in_single(model):
        notes.append(f"{widened} weights are widened to fp32")
    _constants_to_initializers(model)
    _refuse_nan(model, name)
    version = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    if version < OPSET:
        try:
            model = version_converter.convert_version(model, OPSET)
        except Exception as error:  # the converter throws bare RuntimeErrors of C++
            raise ModelError(
                f"{name} is of opset {version}, which cannot be brought to {OPSET}: {one_line(error)}"
            ) from None
    _tidy(model)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"{name} is not a valid ONNX graph: {one_line(error)}") from None
    return model, notes


def _refuse(model: ModelProto, name: str) -> None:
    """Raise ModelError for what no stage behind the doors can work on."""
    nodes = [node for graph in graphs_of(model.graph) for node in graph.node]
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in nodes if node.domain not in ("", "ai.onnx")})
    if foreign:
        raise ModelError(f"{name} has operations that are not ONNX's own: {', '.join(foreign)}; export it without them")
    if quantized := sorted({node.op_type for node in nodes} & {*_QUANTIZED}):
        raise ModelError(f"{name} is quantized already ({', '.join(quantized)}); give the float file")
    for node in nodes:
        if not onnx.defs.has(node.op_type):
            raise ModelError(f"{name} has an operation that ONNX does not know: {node.op_type}")


def _refuse_nan(model: ModelProto, name: str) -> None:
    for value in (one for graph in graphs_of(model.graph) for one in graph.initializer):
        if value.data_type == TensorProto.FLOAT and np.isnan(numpy_helper.to_array(value)).any():
            raise ModelError(f"{name} holds weights that are NaN ({value.name}); it cannot restore anything")


def _in_single(model: ModelProto) -> str:
    """Turn every other float type into float32, in place; the type that the weights had, if it was another."""
    found = set()
    for graph in graphs_of(model.graph):
        for value in graph.initializer:
            if value.data_type in _FLOATS:
                found.add(TensorProto.DataType.Name(value.data_type).lower())
                value.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value).astype(np.float32), value.name))
        for attribute in (one for node in graph.node for one in node.attribute):
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in _FLOATS:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float32)))
            elif attribute.name in ("to", "dtype") and attribute.i in _FLOATS:
                attribute.i = TensorProto.FLOAT
        for end in (*graph.input, *graph.output):
            if end.type.tensor_type.elem_type in _FLOATS:
                end.type.tensor_type.elem_type = TensorProto.FLOAT
    return " and ".join(sorted(found))


def _constants_to_initializers(model: ModelProto) -> None:
    kept = []
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            value = node.attribute[0].t
            value.name = node.output[0]
            model.graph.initializer.append(value)
        else:
            kept.append(node)
    set_nodes(model, kept)


def _tidy(model: ModelProto) -> None:
    """Free the sizes, and drop what is only for people or says what need not hold any longer; in place."""
    # What functions and tools were of; nothing is left of theirs.
    domains = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    del model.opset_import[:]
    model.opset_import.extend(domains)
    # Before 4 every initializer was an input, too.
    model.ir_version = max(model.ir_version, 8)
    constants = {value.name for value in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    drop_notes(model)
    for end in model.graph.output:
        _free_sizes(end)
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"  # profiles and quantizers know nodes by their names


def image_input(model: ModelProto, name: str) -> tuple[list[PlaneOrder], bool]:
    """The layouts that the only input may have, and whether it takes bytes; its sizes become free.

    Raises InputError if it is no image.
    """
    if len(model.graph.input) != 1:
        listed = ", ".join(map(_said, model.graph.input))
        raise InputError(f"{name} takes {len(model.graph.input)} inputs ({listed}); one image is needed")
    (value,) = model.graph.input
    kind, shape = value.type.tensor_type.elem_type, value.type.tensor_type.shape
    dims = [dim.dim_value for dim in shape.dim]
    if kind not in (TensorProto.FLOAT, TensorProto.UINT8) or (dims and len(dims) != 4):
        raise InputError(f"{name} takes {_said(value)}; an image of four dimensions, float or uint8, is needed")
    known: tuple[tuple[PlaneOrder, int, int], ...] = (("nchw", 1, 3), ("nhwc", 3, 1))
    # Where the other end is a few channels, that is where the channels are.
    layouts = [order for order, at, end in known if not dims or (dims[at] in (0, 3) and dims[end] not in (1, 2, 4))]
    if not layouts:
        raise InputError(f"{name} takes {_said(value)}; an image of three channels is needed")
    if len(layouts) == 2 and dims and (dims[1] == 3) != (dims[3] == 3):
        layouts = ["nchw"] if dims[1] == 3 else ["nhwc"]
    _free_sizes(value)
    return layouts, kind == TensorProto.UINT8


def _free_sizes(value: ValueInfoProto) -> None:
    """Let every dimension be of any size; where not even their number is said, they are taken to be an image's."""
    shape = value.type.tensor_type.shape
    for _ in range(0 if shape.dim else 4):
        shape.dim.add()
    for dim in shape.dim:
        dim.Clear()


def _said(value: ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    kind = TensorProto.DataType.Name(tensor.elem_type).lower() if tensor.elem_type else "no tensor"
    shape = "x".join(dim.dim_param or str(dim.dim_value or "?") for dim in tensor.shape.dim)
    return f"{value.name}: {kind} {shape}".strip()
