"""What share of the multiplications really runs in int8: read from what a provider made of the graph, not hoped.

ONNX Runtime writes down the graph that it optimized and, in its profile, what every kernel took.  A plugin compiles its
part of the graph out of sight; for OpenVINO the ``openvino`` package, where it is installed, tells what it makes of the
same file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import NodeProto

from deblur_deploy.contract import HEIGHT_DIM, INPUT, WIDTH_DIM
from deblur_deploy.pipeline.int8.quantize import layer_name
from deblur_deploy.runtime.providers import Provider

_SIDE = 96
"""Of the image that files are run on: without padding for most networks."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """What ONNX Runtime's CPU provider ran for one convolution."""

    op: str
    """Type of the operation in the optimized graph."""
    ms: float
    """Median time of the kernel."""

    @property
    def int8(self) -> bool:
        """Whether it multiplied int8 values."""
        return self.op.startswith("QLinear") or self.op.endswith("Integer")


def macs_of(path: Path) -> dict[str, float]:
    """Multiply-accumulate operations per pixel of every convolution of a file (fp32, fp16 or QDQ), by layer.

    A layer is called as its weights, in every file made of one network.  The file is run once as it was written: only
    that gives the sizes that it computes by itself.
    """
    with tempfile.TemporaryDirectory(prefix="deblur-macs-") as folder:
        events = _profile(path, Path(folder), optimized=None, side_px=_SIDE, runs=1)
    nodes, found = _nodes(path), {}
    for name, args in events:
        if args["op_name"] in ("Conv", "ConvTranspose"):
            (values,), weight = args["input_type_shape"][0].values(), _shape(args["input_type_shape"][1])
            if args["op_name"] == "Conv":
                values = _shape(args["output_type_shape"][0])
            # Each output value takes one multiplication a weight of its channel; each input value, if transposed.
            found[nodes[name]] = prod(values) * prod(weight[1:]) / _SIDE**2
    return found


def kernels_of(path: Path, side_px: int = 256, runs: int = 5) -> dict[str, Kernel]:
    """What ONNX Runtime's CPU provider runs for every convolution of a file, by layer."""
    layers = _marks(path)
    with tempfile.TemporaryDirectory(prefix="deblur-kernels-") as folder:
        optimized = Path(folder, "optimized.onnx")
        events = _profile(path, Path(folder), optimized=optimized, side_px=side_px, runs=runs)
        graph = onnx.load(optimized).graph
    times: dict[str, list[float]] = {}
    for name, args in events:
        times.setdefault(name, []).append(args["ms"])
    found = {}
    for node in graph.node:
        # A float kernel that blocks channels has other constants, and is called after what it gives, or gave before
        # the quantization behind it was moved.
        marks = (*node.input[1:], node.name.removesuffix("_nchwc").removesuffix("_pre_q"))
        layer = next((layers[mark] for mark in marks if mark in layers), None)
        if "Conv" in node.op_type and layer is not None:
            found[layer] = Kernel(op=node.op_type, ms=median(times[node.name][len(times[node.name]) > 1 :]))
    return found


def int8_share(path: Path, provider: Provider, macs: Mapping[str, float] | None = None) -> float | None:
    """Share of the multiplications of a file that ``provider`` runs in int8; None where that cannot be found out."""
    macs = macs or macs_of(path)
    if provider.name == "cpu":
        run = {name for name, kernel in kernels_of(path, _SIDE, 1).items() if kernel.int8}
    elif provider.name == "openvino" and provider.kind == "CPU":
        nodes = _openvino(path)
        if nodes is None:
            return None
        run = {layer for node, layer in _nodes(path).items() if node in nodes}
    elif provider.name == "cuda":
        run = set()  # It has no kernels for int8 convolutions: it expands them to float.
    else:
        return None
    return sum(count for name, count in macs.items() if name in run) / sum(macs.values())


def _openvino(path: Path) -> set[str] | None:
    """Nodes that OpenVINO multiplies in int8, by what its compiled model says of itself."""
    try:
        import openvino
    except ImportError:
        return None
    model = openvino.Core().read_model(path)
    model.reshape({INPUT: [1, _SIDE, _SIDE, 3] if _is_bytes(path) else [1, 3, _SIDE, _SIDE]})
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = set()
    for op in compiled.get_runtime_model().get_ordered_ops():
        about = {key: op.rt_info[key].astype(str) for key in ("primitiveType", "originalLayersNames")
                 if key in op.rt_info}  # fmt: skip
        if about.get("primitiveType", "").upper().endswith("_I8"):
            found |= set(about["originalLayersNames"].split(","))
    return found


def _is_bytes(path: Path) -> bool:
    model = onnx.load(path, load_external_data=False)
    return bool(model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8)


def _convolutions(path: Path) -> Iterator[tuple[NodeProto, list[str]]]:
    """The convolutions of a file, each with the names of its constants (weights first), through what dequantizes."""
    graph = onnx.load(path).graph
    makers = {node.output[0]: node for node in graph.node}
    constants = {value.name for value in graph.initializer}
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose"):
            names = list(node.input[1:])
            while waiting := [name for name in names if name not in constants]:
                names = [makers[name].input[0] if name in waiting else name for name in names]
            yield node, names


def _nodes(path: Path) -> dict[str, str]:
    """Layers by the name of their node."""
    return {node.name: layer_name(names[0]) for node, names in _convolutions(path)}


def _marks(path: Path) -> dict[str, str]:
    """Layers by what survives of them in an optimized graph: their constants, or the name of what they give."""
    found, activations = {}, {node.input[0]: node for node in onnx.load(path).graph.node if node.op_type == "Relu"}
    for node, names in _convolutions(path):
        given = node.output[0]
        for mark in (*names, given, *(activations[given].output if given in activations else ())):
            found[mark] = layer_name(names[0])
    return found


def _profile(
    path: Path, folder: Path, *, optimized: Path | None, side_px: int, runs: int
) -> list[tuple[str, dict[str, Any]]]:
    """Name and profile of every kernel that ran, on the CPU, on ``runs`` square images of noise."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    for name in (HEIGHT_DIM, WIDTH_DIM):
        options.add_free_dimension_override_by_name(name, side_px)
    if optimized is None:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.optimized_model_filepath = str(optimized)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).integers(0, 256, (1, side_px, side_px, 3), np.uint8)
    if session.get_inputs()[0].type == "tensor(float)":
        image = image.transpose(0, 3, 1, 2).astype(np.float32) / 255
    for _ in range(runs):
        session.run(None, {INPUT: image})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [
        (event["name"].removesuffix("_kernel_time"), {**event["args"], "ms": event["dur"] / 1e3})
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]


def _shape(entry: Mapping[str, list[int]]) -> list[int]:
    return next(iter(entry.values()))
