"""Rewritings of a float body that change nothing in what it computes, each for a reason of speed or of int8.

What is only equal for a network that behaves (a residual behind the network's own padding) is believed after both were
run at several sizes, and left out otherwise.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deblur_deploy.contract import BATCH_DIM, HEIGHT_DIM, WIDTH_DIM
from deblur_deploy.pipeline.convention import SPANS, Convention
from deblur_deploy.pipeline.graph import BLOCKS, CORRECTION
from deblur_deploy.pipeline.nodes import (
    OnnxRunner,
    attributes,
    constants_of,
    drop_dead,
    makers_of,
    renamed,
    replace_nodes,
)

LAYERS = ("Conv", "ConvTranspose", "MatMul")
"""Operations with weights that are called as these."""


def body_of(model: ModelProto, convention: Convention) -> ModelProto:
    """``model``, somebody's graph in its own ``convention``, as a body: float planar RGB in [0, 1] in and out."""
    body, how = ModelProto(), convention
    body.CopyFrom(model)
    graph, source = body.graph, model.graph.input[0].name
    factor, offset = (np.float32(value) for value in SPANS[how.range])
    out_kind = _output_kind(model, how.output)
    given = SPANS["255" if out_kind == TensorProto.UINT8 else how.range]
    constants = {
        "rgb_order": np.array([2, 1, 0], np.int64),
        "in_factor": factor,
        "in_offset": offset,
        "out_factor": np.float32(1 / given[0]),
        "out_offset": np.float32(given[1]),
    }
    before: list[tuple[str, list[str], dict[str, Any]]] = []
    after: list[tuple[str, list[str], dict[str, Any]]] = []
    if how.colour == "bgr":
        before.append(("Gather", ["rgb_order"], {"axis": 1}))
    if factor != 1:
        before.append(("Mul", ["in_factor"], {}))
    if offset:
        before.append(("Add", ["in_offset"], {}))
    if how.layout == "nhwc":
        before.append(("Transpose", [], {"perm": [0, 2, 3, 1]}))
    if how.input_bytes:
        before += [("Round", [], {}), ("Cast", [], {"to": TensorProto.UINT8})]
    if out_kind == TensorProto.UINT8:
        after.append(("Cast", [], {"to": TensorProto.FLOAT}))
    if how.layout == "nhwc":
        after.append(("Transpose", [], {"perm": [0, 3, 1, 2]}))
    if given[1]:
        after.append(("Sub", ["out_offset"], {}))
    if given[0] != 1:
        after.append(("Mul", ["out_factor"], {}))
    if how.colour == "bgr":
        after.append(("Gather", ["rgb_order"], {"axis": 1}))
    taken = {name for node in graph.node for name in (*node.input, *node.output)} | {v.name for v in graph.initializer}
    # Somebody's graph may call its own values as bodies call their ends.
    theirs = {name: _free(f"{name}_", taken) for name in (BLOCKS, CORRECTION) if name in taken}
    for value in graph.initializer:
        value.name = theirs.get(value.name, value.name)
    source, target = theirs.get(source, source), theirs.get(how.output, how.output)
    constants = {_free(name, taken): value for name, value in constants.items()}
    names = {name.rstrip("_"): name for name in constants}
    first, given_to = _chain(before, BLOCKS, names, "door_in")
    last, _ = _chain(after, target, names, "door_out", end=CORRECTION)
    ends = {source: given_to} | ({} if last else {target: CORRECTION})
    inside = [renamed(renamed(node, theirs), ends) for node in graph.node]
    nodes = [*first, *inside, *last]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.input.append(_planar(BLOCKS, how.any_batch))
    graph.output.append(_planar(CORRECTION, how.any_batch))
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())
    drop_dead(body)
    body.ir_version = max(8, helper.find_min_ir_version_for(list(body.opset_import)))
    return body


def _output_kind(model: ModelProto, name: str) -> int:
    return next(int(value.type.tensor_type.elem_type) for value in model.graph.output if value.name == name)


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _chain(
    steps: Sequence[tuple[str, list[str], dict[str, Any]]],
    source: str,
    names: Mapping[str, str],
    prefix: str,
    end: str | None = None,
) -> tuple[list[NodeProto], str]:
    """Nodes one behind the other, and the name of what the last one gives."""
    nodes, value = [], source
    for number, (kind, extra, about) in enumerate(steps):
        result = end if end and number == len(steps) - 1 else f"{prefix}_{number}"
        inputs = [value, *(names[name] for name in extra)]
        nodes.append(helper.make_node(kind, inputs, [result], name=f"{prefix}_{kind}_{number}", **about))
        value = result
    return nodes, value


def _planar(name: str, any_batch: bool) -> onnx.ValueInfoProto:
    shape = [BATCH_DIM if any_batch else 1, 3, HEIGHT_DIM, WIDTH_DIM]
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def prepared(body: ModelProto, divisor: int, least_px: int = 1) -> tuple[ModelProto, bool]:
    """``body`` in the form that int8 and engines like best, and whether it now gives what is added to the image.

    ``divisor``, ``least_px``: what sizes it takes are multiples of, and the least.
    """
    sizes = [
        [divisor * max(blocks, -(-max(16 * blocks, least_px) // divisor)) for blocks in pair]
        for pair in ((3, 2), (4, 5))
    ]
    body = _simplified(body, sizes)
    _split_upsampling(body)
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
    del folded.graph.value_info[:], folded.metadata_props[:]
    for node in folded.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
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


def _split_upsampling(body: ModelProto) -> None:
    """Transposed convolutions without overlap become 1x1 convolutions and a rearrangement, in place.

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
        layer = _layer(node.input[1]) or f"up_{number}"
        inputs = [node.input[0], f"{layer}.conv{number}.weight"]
        # Outputs in the order (channel, row, column), as DepthToSpace wants them.
        added[inputs[1]] = weight.transpose(1, 2, 3, 0).reshape(-1, weight.shape[0], 1, 1)
        if len(node.input) > 2 and node.input[2]:
            inputs.append(f"{layer}.conv{number}.bias")
            added[inputs[2]] = constants[node.input[2]].repeat(side**2)
        nodes.append(helper.make_node("Conv", inputs, [f"{node.output[0]}_conv"], kernel_shape=[1, 1]))
        shuffle = {"blocksize": side, "mode": "CRD"}
        nodes.append(helper.make_node("DepthToSpace", [f"{node.output[0]}_conv"], [node.output[0]], **shuffle))
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
