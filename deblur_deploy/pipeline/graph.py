"""The graph built for deployment: the network's body, and everything around it written here, in ONNX text.

* The pixel-unshuffle stem of a U-Net of ours and its inverse leave the network and become one rearrangement of bytes at
  either end, done while the image is still uint8, which is a quarter of the memory traffic of floats.
* Scaling is the scale of the first DequantizeLinear; rounding, clamping and the cast to uint8 are the last
  QuantizeLinear.  In the int8 graph both vanish into the arithmetic.

There are two layouts of the rearrangements, since no single one is fastest everywhere.  ``planes`` uses SpaceToDepth
and DepthToSpace, which OpenVINO and GPUs have kernels for.  ``rows`` moves whole runs of interleaved channels, so that
ONNX Runtime's channels-last int8 convolutions meet without transposing anything.  The measured difference is in
``benchmarks/results``.
"""

from __future__ import annotations

import copy
import warnings

import onnx
import onnxruntime as ort
from onnx import ModelProto, parser

from deblur_deploy.contract import BATCH_DIM, HEIGHT_DIM, INPUT, OLDEST_ONNXRUNTIME, OUTPUT, WIDTH_DIM, Io
from deblur_deploy.pipeline.config import Layout
from deblur_deploy.pipeline.network import Network
from deblur_deploy.pipeline.nodes import drop_constants, names_made, names_read, renamed, set_nodes

OPSET, IR_VERSION = 18, 8
"""As old as the graph allows: OLDEST_ONNXRUNTIME reads them, with the same result as the newest."""

BLOCKS, CORRECTION = "blocks", "correction"
"""The body's input, float (N, 3 stem^2, h, w) in [0, 1] with channels (row, column, colour), and its output."""

BYTE_SCALE = 0.003921568859368563
"""float32(1 / 255): what one level of a byte stands for."""


def in_half_precision(body: ModelProto) -> ModelProto:
    """``body`` with fp16 weights and arithmetic, but for operations that ONNX has in fp32 only."""
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted: ModelProto = convert_float_to_float16(copy.deepcopy(body), keep_io_types=False)
    del converted.graph.value_info[:]
    ordered = ONNXModel(converted)  # its casts are at the end
    ordered.topological_sort()
    result: ModelProto = ordered.model
    return result


def assemble(body: ModelProto, network: Network, *, layout: Layout, io: Io) -> ModelProto:
    """The whole graph that the contract describes, around ``body`` (fp32, fp16 or quantized)."""
    if io == "float32" and layout == "rows":
        raise ValueError("float32 images are planar, so only the layout 'planes' serves them")
    half = body.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    before, after = _ENDS[io, layout if network.stem > 1 else "plain"]
    through = (
        "half = Cast<to = 10>(blocks) half_out = Body(half) correction = Cast<to = 1>(half_out)"
        if half
        else "correction = Body(blocks)"
    )
    sum_ = "result = Add(blocks, correction)" if network.residual else "result = Identity(correction)"
    opset = _opset(body)
    whole = _parse("\n".join((before, through, sum_, after)), network, io, max(OPSET, opset))
    whole.ir_version = max(IR_VERSION, body.ir_version if opset > OPSET else 0)
    insert_body(whole, body, BLOCKS, CORRECTION)
    if any("bytes" in node.output for node in whole.graph.node):
        _feed_with_bytes(whole)
    drop_constants(whole, {name for node in whole.graph.node for name in names_read(node)})
    return whole


def oldest_onnxruntime(body: ModelProto) -> str:
    """The first ONNX Runtime that knows the operators of the graph around ``body``; this one, where that is not known
    here."""
    known = {20: "1.17", 21: "1.18"}
    opset = _opset(body)
    return OLDEST_ONNXRUNTIME if opset < min(known) else known.get(opset, ort.__version__)


def _opset(model: ModelProto) -> int:
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def insert_body(whole: ModelProto, body: ModelProto, source: str, target: str) -> None:
    """Put the nodes of ``body``, from ``source`` to ``target``, in the place of the node ``Body`` of ``whole``."""
    nodes = list(whole.graph.node)
    place = next(number for number, node in enumerate(nodes) if node.op_type == "Body")
    # Somebody else's graph may call its values as we do.
    taken = {name for node in nodes for name in (*node.input, *node.output)}
    taken |= {value.name for value in (*whole.graph.initializer, *whole.graph.input, *whole.graph.output)}
    made = {value.name for value in body.graph.initializer}.union(*map(names_made, body.graph.node))
    suffix = "_of_body"
    while any(name + suffix in made for name in taken):
        suffix += "_"
    names = {name: name + suffix for name in made & taken}
    names |= {source: nodes[place].input[0], target: nodes[place].output[0]}
    inside = [renamed(node, names) for node in body.graph.node]
    set_nodes(whole, [*nodes[:place], *inside, *nodes[place + 1 :]])
    for value in body.graph.initializer:
        whole.graph.initializer.add().CopyFrom(value)
        whole.graph.initializer[-1].name = names.get(value.name, value.name)
    whole.opset_import.extend(entry for entry in body.opset_import if entry.domain not in ("", "ai.onnx"))


def _feed_with_bytes(whole: ModelProto) -> None:
    """Let a quantized body read the image's bytes: its first scale is theirs, so quantizing them again is idle."""
    nodes = whole.graph.node
    idle = {node.output[0]: "bytes" for node in nodes if node.op_type == "QuantizeLinear" and node.input[0] == BLOCKS}
    set_nodes(whole, [renamed(node, idle) for node in nodes if node.output[0] not in idle])


def _parse(nodes: str, network: Network, io: Io, opset: int) -> ModelProto:
    stem, batch = network.stem, BATCH_DIM if network.any_batch else 1
    tensor = "uint8[{b},{h},{w},3]" if io == "uint8" else "float[{b},3,{h},{w}]"
    tensor = tensor.format(b=batch, h=HEIGHT_DIM, w=WIDTH_DIM)
    if network.least_px > network.size_divisor:
        nodes = nodes.replace(_PAD, _PAD_TO_LEAST)
    return parser.parse_model(
        f"""<ir_version: {IR_VERSION}, opset_import: ["" : {opset}]>
        deblur ({tensor} {INPUT}) => ({tensor} {OUTPUT})
        <int64[1] divisor = {{{network.size_divisor}}}, int64[1] none = {{0}}, int64[2] origin = {{0, 0}},
         int64[2] axes = {{{"1, 2" if io == "uint8" else "2, 3"}}}, int64[1] stem = {{{stem}}},
         int64[1] stem_row = {{{3 * stem}}}, int64[1] channels = {{{3 * stem**2}}},
         int64[1] least = {{{network.least_px}}},
         float byte_scale = {{{BYTE_SCALE}}}, uint8 byte_zero = {{0}}, float low = {{0.0}}, float high = {{1.0}}>
        {{ {nodes.replace("STEM", str(stem))} }}"""
    )


_PAD = "pad = Mod(missing, divisor)"
_PAD_TO_LEAST = """rest = Mod(missing, divisor)
    short = Add(missing, least)
    pad = Max(rest, short)"""

_PAD_BYTES, _PAD_FLOATS = (
    f"""
    size = Shape<start = {rows}, end = {rows + 2}>(image)
    missing = Neg(size)
    {_PAD}
    pads = Concat<axis = 0>(none, none, none, none, none, {ends})
    padded = Pad<mode = "edge">(image, pads)
    """
    for rows, ends in ((1, "pad, none"), (2, "none, pad"))
)

_ENDS: dict[tuple[Io, str], tuple[str, str]] = {
    ("uint8", "rows"): (
        f"""{_PAD_BYTES}
        whole = Shape(padded)
        batch_ = Shape<start = 0, end = 1>(padded)
        rows = Shape<start = 1, end = 2>(padded)
        columns = Shape<start = 2, end = 3>(padded)
        block_rows = Div(rows, stem)
        block_columns = Div(columns, stem)
        by_rows = Concat<axis = 0>(batch_, block_rows, stem, block_columns, stem_row)
        by_blocks = Concat<axis = 0>(batch_, block_rows, block_columns, channels)
        runs = Reshape(padded, by_rows)
        gathered = Transpose<perm = [0, 1, 3, 2, 4]>(runs)
        pixels = Reshape(gathered, by_blocks)
        bytes = Transpose<perm = [0, 3, 1, 2]>(pixels)
        blocks = DequantizeLinear(bytes, byte_scale, byte_zero)
        """,
        """
        rounded = QuantizeLinear(result, byte_scale, byte_zero)
        last = Transpose<perm = [0, 2, 3, 1]>(rounded)
        by_columns = Concat<axis = 0>(batch_, block_rows, block_columns, stem, stem_row)
        runs_out = Reshape(last, by_columns)
        spread = Transpose<perm = [0, 1, 3, 2, 4]>(runs_out)
        full = Reshape(spread, whole)
        restored = Slice(full, origin, size, axes)
        """,
    ),
    ("uint8", "planes"): (
        f"""{_PAD_BYTES}
        planar = Transpose<perm = [0, 3, 1, 2]>(padded)
        unit = DequantizeLinear(planar, byte_scale, byte_zero)
        blocks = SpaceToDepth<blocksize = STEM>(unit)
        """,
        """
        full = DepthToSpace<blocksize = STEM, mode = "DCR">(result)
        rounded = QuantizeLinear(full, byte_scale, byte_zero)
        last = Transpose<perm = [0, 2, 3, 1]>(rounded)
        restored = Slice(last, origin, size, axes)
        """,
    ),
    ("uint8", "plain"): (
        f"""{_PAD_BYTES}
        bytes = Transpose<perm = [0, 3, 1, 2]>(padded)
        blocks = DequantizeLinear(bytes, byte_scale, byte_zero)
        """,
        """
        rounded = QuantizeLinear(result, byte_scale, byte_zero)
        last = Transpose<perm = [0, 2, 3, 1]>(rounded)
        restored = Slice(last, origin, size, axes)
        """,
    ),
    ("float32", "planes"): (
        f"{_PAD_FLOATS} blocks = SpaceToDepth<blocksize = STEM>(padded)",
        """
        full = DepthToSpace<blocksize = STEM, mode = "DCR">(result)
        clamped = Clip(full, low, high)
        restored = Slice(clamped, origin, size, axes)
        """,
    ),
    ("float32", "plain"): (
        f"{_PAD_FLOATS} blocks = Identity(padded)",
        "clamped = Clip(result, low, high) \n restored = Slice(clamped, origin, size, axes)",
    ),
}
