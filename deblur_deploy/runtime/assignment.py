"""Who computes what: shares of a loaded graph by provider, in nodes and in multiply-accumulates.

ONNX Runtime names the nodes that each provider took.  What a convolution costs it tells only of a run: so where the
convolutions are not all in one place, the file is run once on the CPU with the profiler on, which writes the shapes of
every node.  Where one provider has them all, its share is 1 and nothing is run.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from deblur_deploy.contract import INPUT, OUTPUT
from deblur_deploy.runtime.providers import NAMES

_EVENT = "_kernel_time"


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Shares of the graph by provider, by our short names; each sums to 1."""

    nodes: dict[str, float]
    macs: dict[str, float]
    """Of the multiply-accumulates of all convolutions.  A convolution that graph optimisation renamed before the
    providers chose counts as an average one."""


def assignment(session: ort.InferenceSession, data: bytes, image: NDArray[Any]) -> Assignment:
    """What runs where in ``session``, which was made of ``data`` and records its assignment.

    ``image`` is a batch that the model takes; it only matters if several providers share the convolutions.
    """
    short = {value: key for key, value in NAMES.items()}
    nodes: Counter[str] = Counter()
    convolutions: list[tuple[str, str]] = []
    for part in session.get_provider_graph_assignment_info():
        name = short.get(part.ep_name, part.ep_name)
        for node in part.get_nodes():
            nodes[name] += 1
            if "Conv" in node.op_type:
                convolutions.append((name, node.name))
    alone = len({provider for provider, _ in convolutions}) < 2
    return Assignment(
        nodes=_shares(nodes), macs=shares_of_macs(convolutions, {} if alone else macs_by_node(data, image))
    )


def shares_of_macs(convolutions: Iterable[tuple[str, str]], macs: Mapping[str, float]) -> dict[str, float]:
    """Shares by provider of ``convolutions``, pairs of provider and node name, that cost ``macs`` by node name."""
    average = sum(macs.values()) / len(macs) if macs else 1.0
    costs: dict[str, float] = {}
    for provider, node in convolutions:
        costs[provider] = costs.get(provider, 0.0) + macs.get(node, average)
    return _shares(costs)


def macs_by_node(data: bytes, image: NDArray[Any]) -> dict[str, float]:
    """Multiply-accumulates of every convolution of the file, by node name, for one run of ``image`` on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "run")
        session = ort.InferenceSession(data, options, [NAMES["cpu"]], enable_fallback=0, read_config_from_model=0)
        session.run([OUTPUT], {INPUT: np.ascontiguousarray(image)})
        return {name: macs_of_run(about) for name, about in kernels_run(session) if about["op_name"] == "Conv"}


def kernels_run(session: ort.InferenceSession) -> list[tuple[str, dict[str, Any]]]:
    """Node name and profile of every kernel that ran in ``session``, whose profiling this ends; ``ms`` is its time."""
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [
        (event["name"].removesuffix(_EVENT), {**event["args"], "ms": event["dur"] / 1e3})
        for event in events
        if event["name"].endswith(_EVENT)
    ]


def shapes_of(about: Mapping[str, Any], which: Literal["input", "output"]) -> list[tuple[int, ...]]:
    """The shapes of what a kernel read or gave, by its profile."""
    return [tuple(shape) for entry in about[f"{which}_type_shape"] for shape in entry.values()] or [()]


def macs_of_run(about: Mapping[str, Any]) -> float:
    """Multiply-accumulates of one run of a Conv, ConvTranspose, MatMul or Gemm, by its profile."""
    (first, *more), (given, *_) = shapes_of(about, "input"), shapes_of(about, "output")
    if about["op_name"] in ("MatMul", "Gemm"):  # whose packed weights a profile does not have
        return float(prod(given) * first[-1])
    # Each output value takes one multiplication a weight of its channel; each input value, if transposed.
    return float(prod(first if about["op_name"] == "ConvTranspose" else given) * prod(more[0][1:]))


def _shares(counts: Mapping[str, float]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items() if count}
