"""The graph built for deployment: the network's body from torch, everything around it written here, in ONNX text.

The body is rewritten before export, exactly equal in function:

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

import logging
import warnings

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import ModelProto, numpy_helper, parser
from torch import Tensor, nn

from deblur_deploy.contract import BATCH_DIM, HEIGHT_DIM, INPUT, OUTPUT, WIDTH_DIM, Io
from deblur_deploy.pipeline.config import Layout
from deblur_deploy.training.unet import UNet, UNetConfig

OPSET, IR_VERSION = 18, 8
"""As old as the graph allows: contract.OLDEST_ONNXRUNTIME reads them, with the same result as the newest."""

BLOCKS, CORRECTION = "blocks", "correction"
"""The body's input, float (N, 3 stem^2, h, w) in [0, 1] with channels (row, column, colour), and its output."""

BYTE_SCALE = 0.003921568859368563
"""float32(1 / 255): what one level of a byte stands for."""


class Upsample(nn.Module):
    """A 2x2 transposed convolution of stride 2, as a 1x1 convolution and a rearrangement."""

    def __init__(self, source: nn.Module, layout: Layout) -> None:
        super().__init__()
        assert isinstance(source, nn.ConvTranspose2d)
        channels, self.width = source.weight.shape[:2]
        self.layout = layout
        self.conv = nn.Conv2d(channels, 4 * self.width, 1, dtype=source.weight.dtype)
        assert source.bias is not None
        assert self.conv.bias is not None
        # planes: output channels (channel, row, column), as pixel_shuffle wants them; rows: (row, column, channel).
        order = (1, 2, 3, 0) if layout == "planes" else (2, 3, 1, 0)
        bias = source.bias.repeat_interleave(4) if layout == "planes" else source.bias.repeat(4)
        self.conv.weight.data = source.weight.detach().permute(order).reshape(4 * self.width, channels, 1, 1)
        self.conv.bias.data = bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.layout == "planes":
            return F.pixel_shuffle(x, 2)
        batch, _, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(batch, height, width, 2, 2 * self.width).permute(0, 1, 3, 2, 4)
        return rows.reshape(batch, 2 * height, 2 * width, self.width).permute(0, 3, 1, 2)


class Body(nn.Module):
    """``UNet`` from blocks to correction, rewritten for one layout."""

    def __init__(self, unet: UNet, layout: Layout) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = unet.encoder, unet.decoder, unet.head
        self.up = nn.ModuleList(Upsample(up, layout) for up in unet.up)
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


def export_body(unet: UNet, layout: Layout) -> ModelProto:
    """The fp32 body of ``unet`` in ONNX, with free batch, height and width.  ``unet`` is not changed."""
    copy = UNet(unet.config)
    copy.load_state_dict(unet.state_dict())
    body = Body(copy, layout).eval()
    side = 2 ** (len(unet.config.encoder) - 1)
    dim = torch.export.Dim
    example = torch.zeros(2, 3 * unet.config.stem**2, 4 * side, 6 * side)
    # Torch's own deprecations, and its remark that torchvision is absent: nothing a caller could do anything about.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            body,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: dim("batch"), 2: side * dim("h"), 3: side * dim("w")},),
            input_names=[BLOCKS],
            output_names=[CORRECTION],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    model: ModelProto = program.model_proto
    for node in model.graph.node:
        # The exporter's notes name source files of the machine that exported.
        del node.metadata_props[:]
        node.doc_string = ""
    return model


def in_half_precision(body: ModelProto) -> ModelProto:
    """``body`` with fp16 weights and arithmetic: it has no operation that would have to stay fp32."""
    half = ModelProto()
    half.CopyFrom(body)
    del half.graph.value_info[:]
    for value in half.graph.initializer:
        if value.data_type == onnx.TensorProto.FLOAT:
            value.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value).astype(np.float16), value.name))
    for end in (*half.graph.input, *half.graph.output):
        end.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    return half


def assemble(body: ModelProto, config: UNetConfig, *, layout: Layout, io: Io) -> ModelProto:
    """The whole graph that the contract describes, around ``body`` (fp32, fp16 or quantized)."""
    if io == "float32" and layout == "rows":
        raise ValueError("float32 images are planar, so only the layout 'planes' serves them")
    half = body.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    before, after = _ENDS[io, layout if config.stem > 1 else "plain"]
    through = (
        "half = Cast<to = 10>(blocks) half_out = Body(half) correction = Cast<to = 1>(half_out)"
        if half
        else "correction = Body(blocks)"
    )
    sum_ = "result = Add(blocks, correction)" if config.residual else "result = Identity(correction)"
    whole = _parse("\n".join((before, through, sum_, after)), config, io)
    nodes = list(whole.graph.node)
    place = next(i for i, node in enumerate(nodes) if node.op_type == "Body")
    inside = _connected(body, nodes[place].input[0], nodes[place].output[0])
    if any("bytes" in node.output for node in nodes[:place]):
        inside = _fed_with_bytes(inside)
    del whole.graph.node[:]
    whole.graph.node.extend([*nodes[:place], *inside, *nodes[place + 1 :]])
    whole.graph.initializer.extend(body.graph.initializer)
    _drop_unread(whole)
    return whole


def _connected(body: ModelProto, source: str, target: str) -> list[onnx.NodeProto]:
    """Copies of the body's nodes, its input and output renamed to ``source`` and ``target``."""
    names = {BLOCKS: source, CORRECTION: target}
    nodes = []
    for node in body.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for values in (copy.input, copy.output):
            values[:] = [names.get(value, value) for value in values]
        nodes.append(copy)
    return nodes


def _fed_with_bytes(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Let a quantized body read the image's bytes: its first scale is theirs, so quantizing them again is idle."""
    idle = {node.output[0] for node in nodes if node.op_type == "QuantizeLinear" and node.input[0] == BLOCKS}
    kept = [node for node in nodes if node.output[0] not in idle]
    for node in kept:
        node.input[:] = ["bytes" if value in idle else value for value in node.input]
    return kept


def _drop_unread(model: ModelProto) -> None:
    read = {name for node in model.graph.node for name in node.input}
    kept = [value for value in model.graph.initializer if value.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _parse(nodes: str, config: UNetConfig, io: Io) -> ModelProto:
    stem = config.stem
    tensor = "uint8[{b},{h},{w},3]" if io == "uint8" else "float[{b},3,{h},{w}]"
    tensor = tensor.format(b=BATCH_DIM, h=HEIGHT_DIM, w=WIDTH_DIM)
    return parser.parse_model(
        f"""<ir_version: {IR_VERSION}, opset_import: ["" : {OPSET}]>
        deblur ({tensor} {INPUT}) => ({tensor} {OUTPUT})
        <int64[1] divisor = {{{config.size_divisor}}}, int64[1] none = {{0}}, int64[2] origin = {{0, 0}},
         int64[2] axes = {{{"1, 2" if io == "uint8" else "2, 3"}}}, int64[1] stem = {{{stem}}},
         int64[1] stem_row = {{{3 * stem}}}, int64[1] channels = {{{3 * stem**2}}},
         float byte_scale = {{{BYTE_SCALE}}}, uint8 byte_zero = {{0}}, float low = {{0.0}}, float high = {{1.0}}>
        {{ {nodes.replace("STEM", str(stem))} }}"""
    )


_PAD_BYTES = """
    size = Shape<start = 1, end = 3>(image)
    missing = Neg(size)
    pad = Mod(missing, divisor)
    pads = Concat<axis = 0>(none, none, none, none, none, pad, none)
    padded = Pad<mode = "edge">(image, pads)
"""

_PAD_FLOATS = """
    size = Shape<start = 2, end = 4>(image)
    missing = Neg(size)
    pad = Mod(missing, divisor)
    pads = Concat<axis = 0>(none, none, none, none, none, none, pad)
    padded = Pad<mode = "edge">(image, pads)
"""

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
