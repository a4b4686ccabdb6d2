"""The graph built for deployment: the network's body, and everything around it written here, in ONNX text.

A U-Net of ours is rewritten before export, exactly equal in function (``pipeline.rewrite`` does the like for others):

* The pixel-unshuffle stem and its inverse leave the network and become one rearrangement of bytes at either end, done
  while the image is still uint8, which is a quarter of the memory traffic of floats.
* A 2x2 transposed convolution becomes a 1x1 convolution and a rearrangement: ONNX Runtime's CPU provider has no int8
  transposed convolution.
* Scaling is the scale of the first DequantizeLinear; rounding, clamping and the cast to uint8 are the last
  QuantizeLinear.  In the int8 graph both vanish into the arithmetic.

There are two layouts of the rearrangements, since no single one is fastest everywhere.  ``planes`` uses SpaceToDepth
and DepthToSpace, which OpenVINO and GPUs have kernels for.  ``rows`` moves whole runs of interleaved channels, so that
ONNX Runtime's channels-last int8 convolutions meet without transposing anything.  The measured difference is in
``benchmarks/results``.
"""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import ModelProto, numpy_helper, parser
from torch import Tensor, nn

from deblur_deploy.contract import BATCH_DIM, HEIGHT_DIM, INPUT, OUTPUT, WIDTH_DIM, Io
from deblur_deploy.pipeline.config import Layout
from deblur_deploy.pipeline.network import Network
from deblur_deploy.pipeline.nodes import drop_constants, names_read, renamed
from deblur_deploy.training.unet import UNet

OPSET, IR_VERSION = 18, 8
"""As old as the graph allows: contract.OLDEST_ONNXRUNTIME reads them, with the same result as the newest."""

BLOCKS, CORRECTION = "blocks", "correction"
"""The body's input, float (N, 3 stem^2, h, w) in [0, 1] with channels (row, column, colour), and its output."""

BYTE_SCALE = 0.003921568859368563
"""float32(1 / 255): what one level of a byte stands for."""


class Upsample(nn.Module):
    """A 2x2 transposed convolution of stride 2, as a 1x1 convolution and a rearrangement."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        assert isinstance(source, nn.ConvTranspose2d)
        channels, width = source.weight.shape[:2]
        self.conv = nn.Conv2d(channels, 4 * width, 1, dtype=source.weight.dtype)
        assert source.bias is not None
        assert self.conv.bias is not None
        # Output channels (channel, row, column), as pixel_shuffle wants them; rows.in_rows orders them anew.
        self.conv.weight.data = source.weight.detach().permute(1, 2, 3, 0).reshape(4 * width, channels, 1, 1)
        self.conv.bias.data = source.bias.detach().repeat_interleave(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)


class Body(nn.Module):
    """``UNet`` from blocks to correction."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = unet.encoder, unet.decoder, unet.head
        self.up = nn.ModuleList(Upsample(up) for up in unet.up)
        stem = unet.config.stem
        order = torch.arange(3 * stem**2).reshape(3, stem, stem).permute(1, 2, 0).flatten()
        unet.first.weight.data = unet.first.weight.data[:, order]
        for parameter in self.head.parameters():
            parameter.data = parameter.data[order]

    def forward(self, blocks: Tensor) -> Tensor:
        x, skips = blocks, []
        for level, convolutions in enumerate(self.encoder):
            x = convolutions(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        x = skips.pop()
        for up, convolutions in zip(self.up, self.decoder, strict=True):
            x = convolutions(torch.cat([up(x), skips.pop()], dim=1))
        return self.head(x)


def export_body(unet: UNet) -> ModelProto:
    """The fp32 body of ``unet`` in ONNX, with free batch, height and width.  ``unet`` is not changed."""
    twin = UNet(unet.config)
    twin.load_state_dict(unet.state_dict())
    side = 2 ** (len(unet.config.encoder) - 1)
    dim = torch.export.Dim
    example = torch.zeros(2, 3 * unet.config.stem**2, 4 * side, 6 * side)
    sizes = {0: dim("batch"), 2: side * dim("h"), 3: side * dim("w")}
    return to_onnx(Body(twin).eval(), example, sizes, BLOCKS, CORRECTION)


def to_onnx(
    module: nn.Module, example: Tensor, sizes: dict[int, Any], source: str, target: str, *, strict: bool = False
) -> ModelProto:
    """``module`` in ONNX, its input called ``source`` and its output ``target``; ``sizes``: its free dimensions.

    ``strict`` follows its bytecode, which takes longer.  Raises what torch raises.
    """
    # Torch's own deprecations, and its remark that torchvision is absent: nothing a caller could do anything about.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.export.export(module, (example,), dynamic_shapes=(sizes,), strict=True) if strict else module
        how: dict[str, Any] = {"input_names": [source], "output_names": [target], "opset_version": OPSET}
        program = torch.onnx.export(traced, (example,), dynamo=True, dynamic_shapes=(sizes,), verbose=False, **how)
    assert program is not None
    model: ModelProto = program.model_proto
    del model.graph.value_info[:]
    for node in model.graph.node:
        # The exporter's notes name source files of the machine that exported.
        del node.metadata_props[:]
        node.doc_string = ""
    return model


_PLAIN_OPS = {"Conv", "Relu", "MaxPool", "Concat", "DepthToSpace"}
"""Of our U-Nets: they have no operation that would have to stay fp32."""


def in_half_precision(body: ModelProto) -> ModelProto:
    """``body`` with fp16 weights and arithmetic, but for operations that ONNX has in fp32 only."""
    if not {node.op_type for node in body.graph.node} <= _PLAIN_OPS:
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
    half = copy.deepcopy(body)
    for value in half.graph.initializer:
        if value.data_type == onnx.TensorProto.FLOAT:
            value.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value).astype(np.float16), value.name))
    for end in (*half.graph.input, *half.graph.output):
        end.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    return half


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
    opset = next(entry.version for entry in body.opset_import if entry.domain in ("", "ai.onnx"))
    whole = _parse("\n".join((before, through, sum_, after)), network, io, max(OPSET, opset))
    whole.ir_version = max(IR_VERSION, body.ir_version if opset > OPSET else 0)
    nodes = list(whole.graph.node)
    place = next(i for i, node in enumerate(nodes) if node.op_type == "Body")
    # Somebody else's graph may call its values as we do.
    taken = {name for node in nodes for name in (*node.input, *node.output)}
    taken |= {value.name for value in (*whole.graph.initializer, *whole.graph.input, *whole.graph.output)}
    made = {name for node in body.graph.node for name in node.output if name}
    made |= {value.name for value in body.graph.initializer}
    names = {name: f"{name}_of_body" for name in made & taken}
    names |= {BLOCKS: nodes[place].input[0], CORRECTION: nodes[place].output[0]}
    inside = [renamed(node, names) for node in body.graph.node]
    if any("bytes" in node.output for node in nodes[:place]):
        inside = _fed_with_bytes(inside)
    del whole.graph.node[:]
    whole.graph.node.extend([*nodes[:place], *inside, *nodes[place + 1 :]])
    whole.graph.initializer.extend(body.graph.initializer)
    for value in whole.graph.initializer[-len(body.graph.initializer) :] if body.graph.initializer else ():
        value.name = names.get(value.name, value.name)
    whole.opset_import.extend(entry for entry in body.opset_import if entry.domain not in ("", "ai.onnx"))
    drop_constants(whole, {name for node in whole.graph.node for name in names_read(node)})
    return whole


def _fed_with_bytes(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Let a quantized body read the image's bytes: its first scale is theirs, so quantizing them again is idle."""
    idle = {node.output[0] for node in nodes if node.op_type == "QuantizeLinear" and node.input[0] == BLOCKS}
    kept = [node for node in nodes if node.output[0] not in idle]
    for node in kept:
        node.input[:] = ["bytes" if value in idle else value for value in node.input]
    return kept


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
