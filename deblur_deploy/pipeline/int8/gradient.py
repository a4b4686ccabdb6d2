"""ONNX operations in torch, so that a graph has a gradient: those that images pass through, and no others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from onnx import NodeProto
from torch import Tensor

from deblur_deploy.pipeline.nodes import attributes

_PLAIN: dict[str, Callable[..., Tensor]] = {
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Sqrt": torch.sqrt,
    "Exp": torch.exp,
    "Erf": torch.erf,
    "Abs": torch.abs,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "HardSwish": F.hardswish,
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": torch.div,
    "Pow": torch.pow,
    "Max": torch.maximum,
    "MatMul": torch.matmul,
}


def computed(node: NodeProto, inputs: Sequence[Tensor | None]) -> Tensor | tuple[Tensor, ...]:
    """What ``node`` gives for ``inputs``; raises NotImplementedError for one that has no place here."""
    about, x = attributes(node), inputs[0]
    given = [value for value in inputs if value is not None]
    if x is None:
        raise NotImplementedError(node.op_type)
    match node.op_type:
        case "Conv":
            weight = given[1]
            if weight.ndim != 4 or about.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
                raise NotImplementedError("Conv of another shape")
            bias = inputs[2] if len(inputs) > 2 else None
            strides, dilations = (tuple(about.get(name, (1, 1))) for name in ("strides", "dilations"))
            pads = tuple(about.get("pads", (0, 0, 0, 0)))
            if pads[:2] != pads[2:]:
                x, pads = _padded(x, pads, 0.0), (0, 0)
            return F.conv2d(x, weight, bias, strides, pads[:2], dilations, about.get("group", 1))
        case "MaxPool" | "AveragePool" if not about.get("ceil_mode"):
            if node.op_type == "AveragePool" and any(about.get("pads", ())):
                raise NotImplementedError("AveragePool with padding")
            if about.get("auto_pad", b"NOTSET") != b"NOTSET" or set(about.get("dilations", [1])) != {1}:
                raise NotImplementedError("a pool of another shape")
            x = _padded(x, about.get("pads", (0, 0, 0, 0)), float("-inf"))
            size, strides = about["kernel_shape"], about.get("strides", (1, 1))
            return F.max_pool2d(x, size, strides) if node.op_type == "MaxPool" else F.avg_pool2d(x, size, strides)
        case "GlobalAveragePool":
            return x.mean((2, 3), keepdim=True)
        case "LeakyRelu":
            return F.leaky_relu(x, about.get("alpha", 0.01))
        case "PRelu":
            return torch.where(x < 0, x * given[1], x)
        case "Clip" if len(given) == 3:
            return x.clamp(given[1], given[2])
        case "Concat":
            return torch.cat(given, dim=about["axis"])
        case "Split" if len(given) == 2:
            return torch.split(x, given[1].tolist(), about.get("axis", 0))
        case "Split" if "num_outputs" in about:
            return torch.chunk(x, about["num_outputs"], about.get("axis", 0))
        case "Transpose":
            return x.permute(about["perm"])
        case "Softmax":
            return x.softmax(about.get("axis", -1))
        case "ReduceMean" if len(given) == 2:
            return x.mean(given[1].tolist(), keepdim=bool(about.get("keepdims", 1)))
        case "DepthToSpace" if about.get("mode", b"DCR") == b"CRD":
            return F.pixel_shuffle(x, about["blocksize"])
        case "Identity" | "Dropout":
            return x
        case "Pow" if given[1].numel() == 1:
            return x ** given[1].item()  # of a number, squares and roots are not taken by logarithms
    if node.op_type in _PLAIN and len(given) == len(inputs):
        return _PLAIN[node.op_type](*given)
    raise NotImplementedError(node.op_type)


def _padded(x: Tensor, pads: Sequence[int], value: float) -> Tensor:
    """ONNX has all beginnings first, torch the last axis first."""
    top, left, bottom, right = pads
    return F.pad(x, (left, right, top, bottom), value=value) if any(pads) else x
