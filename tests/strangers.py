"""Small networks as other people write them, and ONNX files as other people save them: written here, in ONNX text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions, and the image added: works in [0, 1] at any size."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return image + 0.1 * self.last(torch.relu(self.first(image)))


class Attention(nn.Module):
    """A gate that pools over the image, behind a layer norm over channels; pads with zeros to a multiple of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(4, 12, 1)
        self.wide = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1))

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        padded = nn.functional.pad(image, (0, -width % 4, 0, -height % 4))
        x = self.first(padded)
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        a, b = self.wide(x).chunk(2, 1)
        x = self.last(nn.functional.avg_pool2d(a * b * self.gate(a * b), 2))
        return (padded + 0.1 * nn.functional.pixel_shuffle(x, 2))[..., :height, :width]


class Windows(nn.Module):
    """A linear layer over windows of 8x8: takes multiples of 8 only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(64, 64)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(image)
        batch, channels, height, width = x.shape
        parts = x.view(batch, channels, height // 8, 8, width // 8, 8).permute(0, 2, 4, 1, 3, 5)
        parts = self.mix(parts.reshape(-1, channels, 64))
        parts = parts.view(batch, height // 8, width // 8, channels, 8, 8).permute(0, 3, 1, 4, 2, 5)
        return image + 0.1 * self.last(x + parts.reshape(batch, channels, height, width))


class Many(Residual):
    """Gives a small image first, then two of the size."""

    def forward(self, image: Tensor) -> Any:
        restored = super().forward(image)
        return {"small": nn.functional.interpolate(restored, scale_factor=0.5), "full": [restored, restored + 0.5]}


class Halves(Residual):
    """Takes the two halves of an image one by one, at a place that it computes as MPRNet does."""

    def forward(self, image: Tensor) -> Tensor:
        middle = int(image.size(2) / 2)
        return torch.cat(
            [super(Halves, self).forward(part) for part in (image[:, :, :middle], image[:, :, middle:])], 2
        )


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def weights(*shape: int, seed: int = 0, gain: float = 0.5) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=shape) * gain / np.prod(shape[1:]) ** 0.5).astype(np.float32)


def graph(nodes: str, ends: str, constants: dict[str, NDArray[Any]], opset: int = 18) -> ModelProto:
    """A model of ``nodes`` in ONNX text, with ``ends`` such as ``float[1,3,h,w] x => (float[1,3,h,w] y)``."""
    source, _, target = ends.partition(" => ")
    model: ModelProto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> net ({source}) => {target} {{ {nodes} }}'
    )
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(of), name) for name, of in constants.items())
    return model


RESIDUAL = """
    c1 = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(IN, w1, b1)
    r1 = Relu(c1)
    c2 = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(r1, w2)
    OUT = Add(IN, c2)
"""


def residual_constants() -> dict[str, NDArray[Any]]:
    bias = np.linspace(-0.1, 0.1, 8, dtype=np.float32)
    return {"w1": weights(8, 3, 3, 3), "b1": bias, "w2": weights(3, 8, 3, 3, seed=1, gain=0.2)}


def residual(ends: str = "float[n,3,h,w] x => (float[n,3,h,w] y)") -> ModelProto:
    """Two convolutions, and the image added: float planar RGB in [0, 1]."""
    return graph(RESIDUAL.replace("IN", "x").replace("OUT", "y"), ends, residual_constants())


def converted(layout: str, span: str, colour: str, kind: str) -> ModelProto:
    """:func:`residual` in somebody's convention."""
    before, after, x, y = "", "", "x", "z"
    constants = residual_constants()
    if kind == "uint8":
        before += "xf = Cast<to = 1>(x)\n"
        x = "xf"
    if layout == "nhwc":
        before += f"xp = Transpose<perm = [0, 3, 1, 2]>({x})\n"
        x = "xp"
    factor, offset = {"1": (1, 0), "255": (255, 0), "-1": (2, -1)}[span]
    constants |= {"factor": np.float32(factor), "offset": np.float32(offset), "bgr": np.array([2, 1, 0])}
    before += f"x0 = Sub({x}, offset)\nx1 = Div(x0, factor)\n"
    order = "Gather<axis = 1>({}, bgr)" if colour == "bgr" else "Identity({})"
    before += f"x2 = {order.format('x1')}\n"
    after += f"y0 = {order.format(y)}\ny1 = Mul(y0, factor)\ny2 = Add(y1, offset)\n"
    y = "y2"
    if layout == "nhwc":
        after += f"yp = Transpose<perm = [0, 2, 3, 1]>({y})\n"
        y = "yp"
    if kind == "uint8":
        constants |= {"low": np.float32(0), "high": np.float32(255)}
        after += f"yc = Clip({y}, low, high)\nyr = Round(yc)\nyu = Cast<to = 2>(yr)\n"
        y = "yu"
    nodes = before + RESIDUAL.replace("IN", "x2").replace("OUT", "z") + after + f"out = Identity({y})"
    shape = "[n,h,w,3]" if layout == "nhwc" else "[n,3,h,w]"
    return graph(nodes, f"{kind}{shape} x => ({kind}{shape} out)", constants)


def saved(model: ModelProto, path: Path, **how: Any) -> Path:
    onnx.save(model, path, **how)
    return path


def branching() -> ModelProto:
    """:func:`residual` in one branch of two, its weights in there with it."""
    image, nodes = "float[n, 3, h, w]", RESIDUAL.replace("IN", "x").replace("OUT", "restored")
    model: ModelProto = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 18]> net ({image} x) => ({image} y) <bool yes = {{1}}> {{
            y = If (yes) <
                then_branch = one () => ({image} restored) {{ {nodes} }},
                else_branch = two () => ({image} same) {{ same = Identity(x) }} > }}"""
    )
    inside = next(one.g for one in model.graph.node[0].attribute if one.name == "then_branch")
    inside.initializer.extend(numpy_helper.from_array(of, name) for name, of in residual_constants().items())
    return model


def half(model: ModelProto) -> ModelProto:
    """``model`` with fp16 weights, ends and arithmetic, its branches too."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for graph in (copy.graph, *(one.g for node in copy.graph.node for one in node.attribute if one.HasField("g"))):
        for value in graph.initializer:
            if value.data_type == TensorProto.FLOAT:
                value.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value).astype(np.float16), value.name))
        for end in (*graph.input, *graph.output):
            end.type.tensor_type.elem_type = TensorProto.FLOAT16
    return copy


def custom(model: ModelProto, kind: str, domain: str = "") -> ModelProto:
    """``model`` with its ReLU replaced by an operation ``kind``."""
    copy = ModelProto()
    copy.CopyFrom(model)
    node = next(node for node in copy.graph.node if node.op_type == "Relu")
    node.op_type, node.domain = kind, domain
    if domain:
        copy.opset_import.append(helper.make_opsetid(domain, 1))
    return copy
