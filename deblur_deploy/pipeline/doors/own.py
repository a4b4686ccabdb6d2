"""A file that deblur-export made, come back: the body is in it, whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from deblur_deploy.contract import BATCH_DIM, HEIGHT_DIM, KEY, OUTPUT, WIDTH_DIM, ModelContract
from deblur_deploy.errors import ModelError
from deblur_deploy.pipeline.convention import Convention
from deblur_deploy.pipeline.graph import BLOCKS, CORRECTION
from deblur_deploy.pipeline.network import Network
from deblur_deploy.pipeline.nodes import attributes, constants_of, drop_dead, makers_of, set_nodes

_FIRST, _LAST = "encoder.0.0.weight", "head.weight"


def own_body(model: ModelProto, path: Path) -> tuple[ModelProto, Network, Convention] | None:
    """The body of one of our files with its facts, and how the file takes images; None if it is somebody else's.

    Raises ModelError for a file that is not in fp32.
    """
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if KEY not in metadata:
        return None
    contract = ModelContract.from_metadata(metadata, path)
    if contract.precision != "fp32":
        raise ModelError(f"{path} is {contract.precision}, which would be rounded twice; give the fp32.onnx beside it")
    makers = makers_of(model)
    if not {BLOCKS, CORRECTION} <= {*makers} or "result" not in makers:
        raise ModelError(f"{path} carries our contract, but not our graph; give the file as deblur-export wrote it")
    constants = constants_of(model)
    maker = makers[BLOCKS]
    stem = int(attributes(maker)["blocksize"]) if maker.op_type == "SpaceToDepth" else 1
    first = model.graph.input[0].type.tensor_type.shape.dim[0]
    batch: Any = BATCH_DIM if first.dim_param else 1
    channels = 3 * stem**2
    body = copy.deepcopy(model)
    del body.graph.input[:], body.graph.output[:], body.metadata_props[:], body.graph.value_info[:]
    sizes = [batch, channels, HEIGHT_DIM, WIDTH_DIM]
    body.graph.input.append(helper.make_tensor_value_info(BLOCKS, TensorProto.FLOAT, sizes))
    body.graph.output.append(helper.make_tensor_value_info(CORRECTION, TensorProto.FLOAT, sizes))
    set_nodes(body, (node for node in model.graph.node if BLOCKS not in node.output))
    drop_dead(body)
    network = Network(
        size_divisor=contract.size_divisor,
        receptive_radius_px=contract.receptive_radius_px,
        macs_per_pixel=contract.macs_per_pixel,
        parameters=parameters_of(body),
        stem=stem,
        residual=makers["result"].op_type == "Add",
        least_px=int(constants["least"][0]) if "least" in constants else 1,
        sees_everything=contract.sees_everything,
        any_batch=batch == BATCH_DIM,
        ours={_FIRST, _LAST} <= constants.keys(),
    )
    planar = contract.io == "float32"
    how = Convention(
        layout="nchw" if planar else "nhwc",
        range="1" if planar else "255",
        input_bytes=not planar,
        output=OUTPUT,
        any_batch=network.any_batch,
    )
    return body, network, how


def parameters_of(body: ModelProto) -> int:
    """Number of weights of a body."""
    floats = [numpy_helper.to_array(v) for v in body.graph.initializer if v.data_type == onnx.TensorProto.FLOAT]
    return sum(value.size for value in floats if value.ndim)
