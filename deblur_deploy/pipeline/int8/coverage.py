"""What share of the multiplications really runs in int8: read from what a provider made of the graph, not hoped.

ONNX Runtime writes down the graph that it optimized and, in its profile, what every kernel took.  A plugin compiles its
part of the graph out of sight; for OpenVINO the ``openvino`` package, where it is installed, tells what it makes of the
same file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto

from deblur_deploy.contract import HEIGHT_DIM, INPUT, WIDTH_DIM, ModelContract
from deblur_deploy.pipeline.int8.quantize import layer_name
from deblur_deploy.pipeline.nodes import makers_of
from deblur_deploy.runtime.assignment import kernels_run, macs_of_run
from deblur_deploy.runtime.providers import Provider

_SIDE = 96
"""Of the image that files are run on, or the next multiple that the network works on."""

_MULTIPLIES = ("Conv", "ConvTranspose", "MatMul", "Gemm")
"""Operations that multiply and accumulate."""


class Kernel(NamedTuple):
    """What ONNX Runtime's CPU provider ran for one layer."""

    int8: bool
    """Whether it multiplied int8 values."""
    ms: float
    """Median time."""


def macs_of(path: Path) -> dict[str, float]:
    """Multiply-accumulate operations per pixel of every layer of a file (fp32, fp16 or QDQ), by layer.

    A layer is called as its weights, in every file made of one network; a product of two activations as its node.  The
    file is run once as it was written: only that gives the sizes that it computes by itself.
    """
    with tempfile.TemporaryDirectory(prefix="deblur-macs-") as folder:
        side = _side(path)
        events = _profile(path, Path(folder), optimized=None, side_px=side, runs=1)
    (nodes, _), found = _layers(path), {}
    for name, args in events:
        if args["op_name"] in _MULTIPLIES and name in nodes:
            found[nodes[name]] = macs_of_run(args) / side**2
    return found


def cost_of_body(body: ModelProto, divisor: int) -> tuple[float, float]:
    """Multiply-accumulate operations, and floats that operations give, per pixel of a float body without a stem, which
    takes multiples of ``divisor``."""
    side = -(-_SIDE // divisor) * divisor
    with tempfile.TemporaryDirectory(prefix="deblur-macs-") as folder:
        path = Path(folder, "body.onnx")
        onnx.save(body, path)
        events = [args for _, args in _profile(path, Path(folder), optimized=None, side_px=side, runs=1)]
    macs = sum(macs_of_run(args) for args in events if args["op_name"] in _MULTIPLIES)
    values = sum(prod(given["float"]) for args in events for given in args["output_type_shape"] if "float" in given)
    return macs / side**2, values / side**2


def _contract(path: Path) -> ModelContract:
    model = onnx.load(path, load_external_data=False)
    return ModelContract.from_metadata({entry.key: entry.value for entry in model.metadata_props}, path)


def _side(path: Path) -> int:
    """Height and width of an image that the network of a file of ours takes without padding."""
    divisor = _contract(path).size_divisor
    return -(-_SIDE // divisor) * divisor


def kernels_of(path: Path, side_px: int = 256, runs: int = 5) -> dict[str, Kernel]:
    """What ONNX Runtime's CPU provider runs for every layer of a file, by layer."""
    _, layers = _layers(path)
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
        marks = (*node.input[1:], *node.output, node.name.removesuffix("_nchwc").removesuffix("_pre_q"))
        layer = next((layers[mark] for mark in marks if mark in layers), None)
        kind = node.op_type
        if any(one in kind for one in ("Conv", "MatMul", "Gemm")) and layer is not None and node.name in times:
            int8 = kind.startswith(("QLinear", "QGemm")) or "Integer" in kind
            found[layer] = Kernel(int8, median(times[node.name][len(times[node.name]) > 1 :]))
    return found


def int8_share(path: Path, provider: Provider, macs: Mapping[str, float] | None = None) -> float | None:
    """Share of the multiplications of a file that ``provider`` runs in int8; None where that cannot be found out."""
    macs = macs or macs_of(path)
    if provider.name == "cpu":
        run = {name for name, kernel in kernels_of(path, _side(path), 1).items() if kernel.int8}
    elif provider.name == "openvino" and provider.kind == "CPU":
        nodes = _openvino(path)
        if nodes is None:
            return None
        run = {layer for node, layer in _layers(path)[0].items() if node in nodes}
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
    side = _side(path)
    model.reshape({INPUT: [1, side, side, 3] if _contract(path).io == "uint8" else [1, 3, side, side]})
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = set()
    for op in compiled.get_runtime_model().get_ordered_ops():
        about = {key: op.rt_info[key].astype(str) for key in ("primitiveType", "originalLayersNames")
                 if key in op.rt_info}  # fmt: skip
        if about.get("primitiveType", "").upper().endswith("_I8"):
            found |= set(about["originalLayersNames"].split(","))
    return found


def _layers(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The layers of a file that multiply: by the name of their node, and by what survives of them in an optimized
    graph, which is their constants, or the name of what they give."""
    model = onnx.load(path)
    makers, constants = makers_of(model), {value.name for value in model.graph.initializer}
    activations = {node.input[0]: node.output for node in model.graph.node if node.op_type == "Relu"}
    nodes, marks = dict[str, str](), dict[str, str]()
    for node in model.graph.node:
        if node.op_type not in _MULTIPLIES:
            continue
        names = []
        for name in node.input[1:]:
            while name not in constants and name in makers and makers[name].op_type == "DequantizeLinear":
                name = makers[name].input[0]
            if name in constants:
                names.append(name)
        # The weights come first.
        nodes[node.name] = layer_name(names[0]) if names else node.name
        given = node.output[0]
        marks |= dict.fromkeys((*names, given, *activations.get(given, ())), nodes[node.name])
    return nodes, marks


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
    (given,) = session.get_inputs()
    if given.type == "tensor(float)":
        image = image.transpose(0, 3, 1, 2).astype(np.float32) / 255
    for _ in range(runs):
        session.run(None, {given.name: image})
    return kernels_run(session)
