"""Tiny models that keep the export contract, made with ``onnx.helper`` and random weights: no torch needed.

A small U-Net (pixel-unshuffle 2, one max-pool, skip concatenation, residual) with padding, scaling, clamping and
rounding inside the graph and the free dimensions named as in ``contract.py``: what the exporter writes, in miniature.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from deblur_deploy.bundles.manifest import MANIFEST, SCHEMA
from deblur_deploy.contract import BATCH_DIM, HEIGHT_DIM, INPUT, OUTPUT, WIDTH_DIM, Io, ModelContract, Precision
from deblur_deploy.files import sha256

CONTRACT = ModelContract(
    size_divisor=4,
    receptive_radius_px=2 * (1 + 2 + 1) + 4 - 1,
    macs_per_pixel=(9 * 12 * 8 + 9 * 16 * 8 + 8 * 12) / 4 + (9 * 8 * 12 + 12 * 32) / 16,
    parent_sha256="0" * 64,
    library_version="0.1.0",
)


class _Graph:
    """Collects nodes; calling it adds one and returns the name of its output."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: Any, dtype: str = "i8") -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), f"constant{len(self.constants)}"))
        return self.constants[-1].name

    def __call__(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output or name], name=name, **attributes))
        return output or name

    def conv(self, x: str, a: int, b: int, size: int, dtype: str, gain: float = 1.4) -> str:
        weight = self.random.normal(0, gain / (a * size * size) ** 0.5, (b, a, size, size))
        bias = self.random.normal(0, 0.05, b)
        parameters = self.constant(weight, dtype), self.constant(bias, dtype)
        return self("Conv", x, *parameters, kernel_shape=[size, size], pads=[size // 2] * 4)


@cache
def _model_bytes(io: Io, precision: Precision) -> bytes:
    contract = replace(CONTRACT, io=io, precision=precision)
    g, dtype = _Graph(), "f2" if precision == "fp16" else "f4"
    element = TensorProto.UINT8 if io == "uint8" else TensorProto.FLOAT
    axes = [BATCH_DIM, HEIGHT_DIM, WIDTH_DIM, 3] if io == "uint8" else [BATCH_DIM, 3, HEIGHT_DIM, WIDTH_DIM]
    x = INPUT
    if io == "uint8":
        x = g("Cast", g("Transpose", x, perm=[0, 3, 1, 2]), to=TensorProto.FLOAT)
        x = g("Mul", x, g.constant(1 / 255, "f4"))
    size = g("Slice", g("Shape", x), g.constant([2]), g.constant([4]))
    short = g("Mod", g("Neg", size), g.constant([contract.size_divisor] * 2))
    padded = g("Pad", x, g("Concat", g.constant([0] * 6), short, axis=0), mode="edge")
    y = g("Cast", padded, to=TensorProto.FLOAT16) if dtype == "f2" else padded
    skip = g("Relu", g.conv(g("SpaceToDepth", y, blocksize=2), 12, 8, 3, dtype))
    deep = g("Relu", g.conv(g("MaxPool", skip, kernel_shape=[2, 2], strides=[2, 2]), 8, 12, 3, dtype))
    up = g("DepthToSpace", g.conv(deep, 12, 32, 1, dtype), blocksize=2)
    y = g("Relu", g.conv(g("Concat", up, skip, axis=1), 16, 8, 3, dtype))
    y = g("DepthToSpace", g.conv(y, 8, 12, 1, dtype, gain=0.3), blocksize=2)
    y = g("Add", padded, g("Cast", y, to=TensorProto.FLOAT) if dtype == "f2" else y)
    y = g("Slice", y, g.constant([0, 0]), size, g.constant([2, 3]))
    y = g("Clip", y, g.constant(0, "f4"), g.constant(1, "f4"), output=OUTPUT if io == "float32" else "")
    if io == "uint8":
        y = g("Cast", g("Round", g("Mul", y, g.constant(255, "f4"))), to=TensorProto.UINT8)
        g("Transpose", y, perm=[0, 2, 3, 1], output=OUTPUT)
    graph = helper.make_graph(
        g.nodes,
        "tiny",
        [helper.make_tensor_value_info(INPUT, element, axes)],
        [helper.make_tensor_value_info(OUTPUT, element, axes)],
        g.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, contract.to_metadata())
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def write_model(path: Path, *, io: Io = "uint8", precision: Precision = "fp32", contract: bool = True) -> Path:
    """Write one model; ``contract=False`` leaves the metadata out, as any stranger's ONNX file would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if precision == "int8":
        _quantize(write_model(path.with_suffix(".fp32")), path)
    else:
        path.write_bytes(_model_bytes(io, precision))
    if not contract:
        model = onnx.load(path)
        del model.metadata_props[:]
        onnx.save(model, path)
    return path


def _quantize(source: Path, target: Path) -> None:
    class Noise(CalibrationDataReader):
        batches = iter([np.random.default_rng(1).integers(0, 256, (1, 64, 64, 3), np.uint8)] * 2)

        def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]
            image = next(self.batches, None)
            return None if image is None else {INPUT: image}

    quantize_static(
        source,
        target,
        Noise(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["Conv"],
    )
    source.unlink()
    model = onnx.load(target)
    helper.set_model_props(model, replace(CONTRACT, precision="int8").to_metadata())
    onnx.save(model, target)


def write_bundle(folder: Path) -> Path:
    """Write a bundle with all four variants, as ``deblur-export`` would, with invented measurements."""
    rows = []
    variants: tuple[tuple[str, Io, Precision, float], ...] = (
        ("fp32", "uint8", "fp32", 4.0),
        ("fp16", "uint8", "fp16", 3.0),
        ("int8", "uint8", "int8", 1.0),
        ("float", "float32", "fp32", 5.0),
    )
    for name, io, precision, latency_ms in variants:
        path = write_model(folder / f"{name}.onnx", io=io, precision=precision)
        rows.append(
            {
                "name": name,
                "file": path.name,
                "sha256": sha256(path),
                "precision": precision,
                "io": io,
                "drop_db": 0.01 if name == "int8" else 0.0,
                "latency_ms": {"cpu": latency_ms},
            }
        )
    (folder / MANIFEST).write_text(json.dumps({"schema": SCHEMA, "name": "tiny", "variants": rows}), encoding="utf-8")
    return folder
