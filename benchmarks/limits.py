"""How far from what the machine can do: its measured ceilings, and the share of them that each variant reaches.

The ceilings are the best that installed libraries get out of this machine: large matrix products in fp32, bf16 and
int8 (fp16 too on a GPU), for int8 on the CPU a wide convolution too, and copying memory.  For each variant the
operations are those of its convolutions, and the bytes are what moves when each convolution reads its input and writes
its output once and nothing stays in a cache.  Such an image cannot take less time than either of them allows, but for
what caches save.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import torch
from common import Sized, pairs, product, progress, save, script
from onnx import GraphProto, TensorProto, helper, numpy_helper

from deblur_deploy.bundles.manifest import MANIFEST
from deblur_deploy.errors import InputError
from deblur_deploy.evaluation.bench import Outcome, Plan, Progress, measure_latency
from deblur_deploy.evaluation.latency import Timing, take_turns
from deblur_deploy.evaluation.record import Row, new_record, read_record
from deblur_deploy.training.unet import UNetConfig

SIZE = (1280, 720)
_BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class Limits(Sized):
    """Measure the machine's ceilings, and each variant's share of them."""

    side: int = 2048
    """Height and width of the matrices."""
    rows: Path | None = None
    """Take the latencies from this record of latency.py instead of measuring them."""


def run(options: Limits) -> int:
    """Measure and save."""
    notes: list[str] = []
    on_progress = progress()
    config = msgspec.convert(json.loads((options.model / MANIFEST).read_text(encoding="utf-8"))["network"], UNetConfig)
    on_progress("ceilings of the CPU")
    side, seconds = (1024, 2) if options.quick else (options.side, 10)
    before = cpu_ceilings(side, options.threads, seconds)
    if torch.cuda.is_available():
        on_progress("ceilings of the GPU")
        gpu = gpu_ceilings(4 * options.side)
    else:
        gpu = {}
        notes.append("GPU skipped: torch finds no CUDA device")
    plan = Plan(sizes=options.sizes_or([SIZE]), budget_s=10 if options.quick else 60)
    outcome = _timed(options, plan, notes, on_progress)
    on_progress("ceilings of the CPU again")
    after = cpu_ceilings(side, options.threads, seconds)
    # The better of two moments: on a machine that others use too, one alone may be too low.
    ceilings = {
        "cpu": {key: max(before[key], after[key], key=lambda found: found["rate"]) for key in before},
        "cuda": gpu,
    }
    shares = []
    for row in outcome.rows:
        if row.median_ms is not None:
            try:
                shares.append(share(row, config, ceilings))
            except KeyError as error:
                notes.append(f"share of {row.variant} on {row.provider} skipped: no ceiling {error} was measured")
    record = new_record(
        "limits",
        options.settings(matrix_side=side, size=", ".join(dict.fromkeys(row.size for row in outcome.rows))),
        reference_ms=outcome.reference_ms,
        stolen=outcome.stolen,
        notes=notes,
        rows=outcome.rows,
        found={"ceilings": ceilings, "shares": shares},
    )
    return save(record, options)


def _timed(options: Limits, plan: Plan, notes: list[str], on_progress: Progress) -> Outcome:
    """What the variants take, measured or from the record; raises InputError if that is of other files."""
    if options.rows is None:
        return measure_latency(product(options, notes), pairs(options)[0].blurred, plan, on_progress)
    record = read_record(options.rows)
    if record.settings.get("files") != options.settings()["files"]:
        raise InputError(f"{options.rows} is of other files than {options.model}; measure again")
    return Outcome(rows=record.rows, reference_ms=record.reference_ms, stolen=record.stolen)


def cpu_ceilings(
    side: int, threads: int, seconds: float, kinds: Collection[str] = ("fp32", "bf16", "int8", "copy")
) -> dict[str, Any]:
    """Tera-operations a second (a multiply-add is two) by precision, each the best of several libraries, and GB/s.

    ``kinds`` are those to measure: where a processor has no instructions for one, such as bf16, that takes minutes.
    """
    torch.set_num_threads(threads)
    floats = torch.randn(side, side)
    halves = floats.to(torch.bfloat16)
    source = torch.zeros(2**26, dtype=torch.float32)
    target = torch.empty_like(source)
    activations = np.random.default_rng(0).integers(0, 256, (side, side), np.uint8)
    fp32, int8 = _ort_product(side, threads, "fp32"), _ort_product(side, threads, "int8")
    convolution = _ort_convolution(side, threads)
    image = activations.reshape(1, _WIDE, -1, 64)
    calls: dict[str, Callable[[], object]] = {
        "fp32 torch": lambda: floats @ floats,
        "fp32 onnxruntime": lambda: fp32.run(None, {"a": floats.numpy()}),
        "bf16 torch": lambda: halves @ halves,
        "int8 onnxruntime": lambda: int8.run(None, {"a": activations}),
        "int8 onnxruntime, convolution": lambda: convolution.run(None, {"a": image}),
        "copy torch": lambda: target.copy_(source),
    }
    operations = {"int8 onnxruntime, convolution": 2 * 9 * _WIDE * image.size}
    calls = {name: call for name, call in calls.items() if name.partition(" ")[0] in kinds}
    return _best(take_turns(calls, rounds=20, budget_s=seconds), side, source.nbytes, operations)


def gpu_ceilings(side: int, device: str = "cuda", copied: int = 2**30) -> dict[str, Any]:
    """The same on the first GPU, by torch; ``copied`` is the number of bytes that a copy reads."""
    floats = torch.randn(side, side, device=device)
    fp16, bf16 = floats.half(), floats.bfloat16()
    bytes_ = torch.randint(-128, 128, (side, side), dtype=torch.int8, device=device)
    source = torch.zeros(copied // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def done(work: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            work()
            # Calls only queue their work; without this the clock would stop before it is done.
            torch.cuda.synchronize()

        return call

    def single(precision: str) -> None:
        torch.set_float32_matmul_precision(precision)
        torch.mm(floats, floats)

    calls: dict[str, Callable[[], object]] = {
        "fp32 torch": done(lambda: single("highest")),
        "tf32 torch": done(lambda: single("high")),
        "fp16 torch": done(lambda: fp16 @ fp16),
        "bf16 torch": done(lambda: bf16 @ bf16),
        # The second factor by columns, as the tensor cores want their int8.
        "int8 torch": done(lambda: torch._int_mm(bytes_, bytes_.t())),
        "copy torch": done(lambda: target.copy_(source)),
    }
    timings = take_turns(calls, rounds=20, budget_s=30)
    torch.set_float32_matmul_precision("highest")
    return _best(timings, side, source.nbytes)


def _best(
    timings: dict[str, Timing], side: int, copied: int, operations: Mapping[str, int] = MappingProxyType({})
) -> dict[str, Any]:
    """The best by kind; ``operations`` of those that are no product of two squares of ``side``."""
    ceilings: dict[str, Any] = {}
    for name, timing in timings.items():
        kind, _, library = name.partition(" ")
        # A copy reads and writes.
        work = 2 * copied / 1e9 if kind == "copy" else operations.get(name, 2 * side**3) / 1e12
        rate = work / (timing.best_ms / 1e3)
        key = "copy_gb_per_s" if kind == "copy" else f"{kind}_tops"
        if rate > ceilings.get(key, {"rate": 0})["rate"]:
            ceilings[key] = {"rate": rate, "library": library}
    return ceilings


def _ort_product(side: int, threads: int, precision: str) -> ort.InferenceSession:
    """A matrix product whose second factor is constant, as weights are."""
    weights = np.random.default_rng(1).integers(-127, 128, (side, side)).astype(np.int8)
    if precision == "int8":
        kind, out, operator = TensorProto.UINT8, TensorProto.INT32, "MatMulInteger"
    else:
        kind, out, operator, weights = TensorProto.FLOAT, TensorProto.FLOAT, "MatMul", weights.astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", kind, [side, side])],
        [helper.make_tensor_value_info("c", out, [side, side])],
        [
            helper.make_tensor(
                "b", helper.np_dtype_to_tensor_dtype(weights.dtype), weights.shape, weights.tobytes(), True
            )
        ],
    )
    return _session(graph, threads)


_WIDE = 512
"""Channels of the convolution: enough that its kernels have nothing to wait for."""


def _ort_convolution(side: int, threads: int) -> ort.InferenceSession:
    """A 3x3 convolution of ``_WIDE`` channels, of an image with as many values as a square of ``side``."""
    weights = np.random.default_rng(1).integers(-63, 64, (_WIDE, _WIDE, 3, 3)).astype(np.int8)
    scalars = {"scale": np.float32(0.1), "zero_u8": np.uint8(0), "zero_s8": np.int8(0)}
    shape = [1, _WIDE, side * side // _WIDE // 64, 64]
    inputs = ["a", "scale", "zero_u8", "w", "scale", "zero_s8", "scale", "zero_u8"]
    graph = helper.make_graph(
        [helper.make_node("QLinearConv", inputs, ["c"], pads=[1, 1, 1, 1])],
        "convolution",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("c", TensorProto.UINT8, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in {"w": weights, **scalars}.items()],
    )
    return _session(graph, threads)


def _session(graph: GraphProto, threads: int) -> ort.InferenceSession:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def values_per_pixel(config: UNetConfig) -> float:
    """Activations that all convolutions read and write, per pixel of the image."""
    total, channels, skips = 0.0, 3 * config.stem**2, []
    for level, block in enumerate(config.encoder):
        area = (config.stem * 2**level) ** 2
        total += sum(a + b for a, b in pairwise((channels, *block))) / area
        channels = block[-1]
        skips.append(channels)
    for i, (up, block) in enumerate(zip(config.up, config.decoder, strict=True)):
        level = len(config.encoder) - 2 - i
        area = (config.stem * 2**level) ** 2
        total += (channels / 4 + up) / area
        total += sum(a + b for a, b in pairwise((up + skips[level], *block))) / area
        channels = block[-1]
    return total + (channels + 3 * config.stem**2) / config.stem**2


def share(row: Row, config: UNetConfig, ceilings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What of its ceilings a variant reaches on one provider."""
    width, height = map(int, row.size.split("x"))
    pixels = ceil(width / config.size_divisor) * ceil(height / config.size_divisor) * config.size_divisor**2
    arithmetic = row.facts["receipt"]["effective_precision"]
    device = ceilings["cpu" if row.provider in ("cpu", "openvino") else row.provider]
    operations = 2 * config.macs_per_pixel * pixels
    # The image comes in and goes out as three values a pixel.
    image = 6 * width * height * (_BYTES["fp32"] if row.variant == "float" else 1)
    moved = values_per_pixel(config) * pixels * _BYTES[arithmetic] + image
    # The ceilings are the best that was ever seen, so what waited for a core does not count here either.
    milliseconds = row.steady_ms or row.median_ms
    assert milliseconds is not None
    seconds = milliseconds / 1e3
    compute = operations / 1e12 / device[f"{arithmetic}_tops"]["rate"] / seconds
    bandwidth = moved / 1e9 / device["copy_gb_per_s"]["rate"] / seconds
    return {
        "variant": row.variant,
        "provider": row.provider,
        "size": row.size,
        "device": row.facts["receipt"]["device"],
        "arithmetic": arithmetic,
        "ms": milliseconds,
        "giga_operations": operations / 1e9,
        "mega_bytes": moved / 1e6,
        "tops": operations / 1e12 / seconds,
        "share_of_compute": compute,
        "share_of_bandwidth": bandwidth,
        "nearest": "compute" if compute >= bandwidth else "bandwidth",
    }


if __name__ == "__main__":
    script(Limits, run)
