"""Rewritings of a float body that change nothing in what it computes, each for a reason of speed or of int8.

What is only equal for a network that behaves (a residual behind the network's own padding) is believed after both were
run at several sizes, and left out otherwise.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, parser

from deblur_deploy.contract import BATCH_DIM, HEIGHT_DIM, WIDTH_DIM
from deblur_deploy.pipeline.convention import SPANS, Convention
from deblur_deploy.pipeline.graph import BLOCKS, CORRECTION, insert_body
from deblur_deploy.pipeline.nodes import (
    OnnxRunner,
    attributes,
    constants_of,
    drop_dead,
    drop_notes,
    makers_of,
    renamed,
    replace_nodes,
)

LAYERS = ("Conv", "ConvTranspose", "MatMul")
"""Operations with weights that are called as these."""


def body_of(model: ModelProto, convention: Convention) -> ModelProto:
    """``model``, somebody's graph in its own ``convention``, as a body: float planar RGB in [0, 1] in and out."""
    how, out = convention, next(value for value in model.graph.output if value.name == convention.output)
    out_bytes = out.type.tensor_type.elem_type == TensorProto.UINT8
    (factor, offset), (out_factor, out_offset) = SPANS[how.range], SPANS["255" if out_bytes else how.range]
    steps = [
        ("Gather<axis = 1>(VALUE, swapped)", how.colour == "bgr"),
        ("Mul(VALUE, factor)", factor != 1),
        ("Add(VALUE, offset)", offset != 0),
        ("Transpose<perm = [0, 2, 3, 1]>(VALUE)", how.layout == "nhwc"),
        ("Round(VALUE)", how.input_bytes),
        (f"Cast<to = {TensorProto.UINT8}>(VALUE)", how.input_bytes),
        ("Body(VALUE)", True),
        (f"Cast<to = {TensorProto.FLOAT}>(VALUE)", out_bytes),
        ("Transpose<perm = [0, 3, 1, 2]>(VALUE)", how.layout == "nhwc"),
        ("Sub(VALUE, out_offset)", out_offset != 0),
        ("Mul(VALUE, out_share)", out_factor != 1),
        ("Gather<axis = 1>(VALUE, swapped)", how.colour == "bgr"),
    ]
    needed = [step for step, wanted in steps if wanted]
    values = [BLOCKS, *(f"door_{number}" for number in range(1, len(needed))), CORRECTION]
    ends = zip(needed, pairwise(values), strict=True)
    nodes = (f"{given} = {step.replace('VALUE', value)}" for step, (value, given) in ends)
    tensor = f"float[{BATCH_DIM if how.any_batch else 1}, 3, {HEIGHT_DIM}, {WIDTH_DIM}]"
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    ir_version = max(8, helper.find_min_ir_version_for(list(model.opset_import)))
    body: ModelProto = parser.parse_model(
        f"""<ir_version: {ir_version}, opset_import: ["" : {opset}]>
        body ({tensor} {BLOCKS}) => ({tensor} {CORRECTION})
        <int64[3] swapped = {{2, 1, 0}}, float factor = {{{factor}}}, float offset = {{{offset}}},
         float out_share = {{{1 / out_factor!r}}}, float out_offset = {{{out_offset}}}>
        {{ {" ".join(nodes)} }}"""
    )
    insert_body(body, model, model.graph.input[0].name, how.output)
    drop_dead(body)
    return body


def prepared(body: ModelProto, divisor: int, least_px: int = 1) -> tuple[ModelProto, bool]:
    """``body`` in the form that int8 and engines like best, and whether it now gives what is added to the image.

    ``divisor``, ``least_px``: what sizes it takes are multiples of, and the least.
    """
    sizes = [
        [divisor * max(blocks, -(-max(16 * blocks, least_px) // divisor)) for blocks in pair]
        for pair in ((3, 2), (4, 5))
    ]
    body = _simplified(body, sizes)
    split_upsampling(body)
    lifted = _without_residual(body)
    residual = lifted is not None and _equal(body, lifted, sizes, residual=True)
    if residual and lifted is not None:
        body = lifted
    _name_layers(body)
    _name_nodes(body)
    onnx.checker.check_model(body)
    return body, residual


def _simplified(body: ModelProto, sizes: Sequence[Sequence[int]]) -> ModelProto:
    """``body`` with its constants folded, if that works; a graph of somebody else's may be too odd for it."""
    from onnxscript import optimizer

    copy = ModelProto()
    copy.CopyFrom(body)
    try:
        folded: ModelProto = optimizer.optimize(copy)
        kept = [value.name for value in folded.graph.input] == [BLOCKS]
        kept &= [value.name for value in folded.graph.output] == [CORRECTION]
        if not (kept and _equal(body, folded, sizes)):
            return body
    except Exception:  # whatever it meets: nothing is lost but a little speed
        return body
    drop_notes(folded)
    drop_dead(folded)
    return folded


def _equal(before: ModelProto, after: ModelProto, sizes: Sequence[Sequence[int]], *, residual: bool = False) -> bool:
    """Whether both give the same for noise of these sizes; ``residual``: if the image is added to the second."""
    run = [OnnxRunner(model, "a rewritten graph") for model in (before, after)]
    rng = np.random.default_rng(0)
    for sides in sizes:
        image = rng.random((1, 3, *sides), np.float32)
        expected, found = (one(image)[CORRECTION] for one in run)
        found = found + image if residual else found
        if expected.shape != found.shape or not np.allclose(expected, found, rtol=1e-4, atol=2e-5):
            return False
    return True


def split_upsampling(body: ModelProto) -> None:
    """Transposed convolutions without overlap become 1x1 convolutions and a rearrangement, in place: exactly the same.

    ONNX Runtime's CPU provider has no int8 transposed convolution.
    """
    constants = constants_of(body)
    nodes, added = [], dict[str, NDArray[Any]]()
    for number, node in enumerate(body.graph.node):
        about = attributes(node)
        weight = constants.get(node.input[1]) if node.op_type == "ConvTranspose" else None
        side = weight.shape[-1] if weight is not None else 0
        if (
            weight is None
            or weight.shape[2:] != (side, side)
            or about.get("strides") != [side, side]
            or any(about.get("pads", ()))
            or any(about.get("output_padding", ()))
            or about.get("group", 1) != 1
            or about.get("output_shape")
            or set(about.get("dilations", [1])) != {1}
            or (len(node.input) > 2 and node.input[2] and node.input[2] not in constants)
        ):
            nodes.append(node)
            continue
        layer = f"{_layer(node.input[1]) or f'up_{number}'}.conv"
        layer += f"_{number}" if f"{layer}.weight" in added else ""
        inputs = [node.input[0], f"{layer}.weight"]
        # Outputs in the order (channel, row, column), as DepthToSpace wants them.
        added[inputs[1]] = weight.transpose(1, 2, 3, 0).reshape(-1, weight.shape[0], 1, 1)
        if len(node.input) > 2 and node.input[2]:
            inputs.append(f"{layer}.bias")
            added[inputs[2]] = constants[node.input[2]].repeat(side**2)
        result, between = node.output[0], f"{node.output[0]}_conv"
        nodes += [
            helper.make_node("Conv", inputs, [between], name=between, kernel_shape=[1, 1]),
            helper.make_node("DepthToSpace", [between], [result], name=f"{result}_up", blocksize=side, mode="CRD"),
        ]
    if added:
        replace_nodes(body, nodes, added)


def _without_residual(body: ModelProto) -> ModelProto | None:
    """``body`` without the sum with its own input at its end, or None if there is none.

    The sum is then formed from the image's bytes and stays exact in int8.  A crop may lie behind the sum, and the
    network's own padding before it.
    """
    makers = makers_of(body)
    constants = constants_of(body)
    node, crops = makers[CORRECTION], []
    while node.op_type in ("Identity", "Slice") or (node.op_type == "Clip" and _is_range(node, constants)):
        if node.op_type == "Slice":
            crops.append(node)
        if node.input[0] not in makers:
            return None
        node = makers[node.input[0]]
    if node.op_type != "Add":
        return None
    padded = {name for name, maker in makers.items() if maker.op_type == "Pad" and maker.input[0] == BLOCKS}
    images = [place for place, name in enumerate(node.input) if name in {BLOCKS, *padded}]
    if not images:
        return None
    value = node.input[1 - images[0]]
    lifted, kept = ModelProto(), list[NodeProto]()
    lifted.CopyFrom(body)
    for number, crop in enumerate(reversed(crops)):
        copy = renamed(crop, {})
        copy.input[0], copy.output[0] = value, f"cropped_{number}"
        kept.append(copy)
        value = copy.output[0]
    kept.append(helper.make_node("Identity", [value], [CORRECTION], name="correction_of"))
    replace_nodes(lifted, [one for one in body.graph.node if CORRECTION not in one.output] + kept, {})
    if not crops and value in makers:
        # What gives the correction is called so: int8 knows the end of a body by its name.
        del lifted.graph.node[-1]
        nodes = [renamed(one, {value: CORRECTION}) for one in lifted.graph.node]
        replace_nodes(lifted, nodes, {})
    return lifted


def _is_range(clip: NodeProto, constants: Mapping[str, NDArray[Any]]) -> bool:
    """Whether ``clip`` does no more than what the graph's end does anyway."""
    low, high = (constants.get(name) for name in (*clip.input[1:3], "", "")[:2])
    return low is not None and high is not None and float(low) == 0 and float(high) == 1


def _layer(weight: str) -> str:
    """What a layer is called by its weights, if they have a name that says it."""
    return weight.removesuffix(".weight") if weight.endswith(".weight") else ""


def _name_layers(body: ModelProto) -> None:
    """Give every layer weights of its own, called ``LAYER.weight`` and ``LAYER.bias``, in place."""
    constants = constants_of(body)
    seen: Counter[str] = Counter()
    nodes, added = [], {}
    for node in body.graph.node:
        copy = renamed(node, {})
        nodes.append(copy)
        if node.op_type not in LAYERS or node.input[1] not in constants:
            continue
        layer = _layer(node.input[1]) or re.sub(r"\W+", "_", node.output[0]).strip("_") or node.op_type.lower()
        seen[layer] += 1
        layer += f"~{seen[layer]}" if seen[layer] > 1 else ""
        for place, kind in ((1, "weight"), (2, "bias")):
            if place < len(node.input) and node.input[place] in constants:
                copy.input[place] = f"{layer}.{kind}"
                added[copy.input[place]] = constants[node.input[place]]
    replace_nodes(body, nodes, added)


def _name_nodes(body: ModelProto) -> None:
    """Quantizers and profiles know nodes by their names."""
    for number, node in enumerate(body.graph.node):
        node.name = f"node_{number}_{node.op_type}"
