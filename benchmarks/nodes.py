"""What every node of a variant takes, by ONNX Runtime's own profiler, beside what the machine can do.

``latency.py --profile VARIANT`` measures and prints it.  A provider that runs its part of the graph as one node, as
OpenVINO does, is one line here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from deblur_deploy.contract import BATCH_DIM, HEIGHT_DIM, INPUT, OUTPUT, WIDTH_DIM
from deblur_deploy.runtime.assignment import kernels_run, macs_of_run, shapes_of
from deblur_deploy.runtime.providers import Provider, find

Event = tuple[str, dict[str, Any]]
"""A kernel that ran: its node's name, and its profile."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node of the graph as it runs."""

    name: str
    type: str
    provider: str
    output: tuple[int, ...]
    """Shape of what it gives first."""
    ms: float
    """Median of the runs."""
    share: float
    """Of all nodes' time."""
    giga_macs: float | None = None
    """Multiply-accumulates of one run; None but for convolutions."""
    giga_macs_per_s: float | None = None
    of_ceiling: float | None = None
    """Share of the machine's measured rate."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a convolution of the file costs."""

    macs: float
    output: tuple[int, ...]
    """NCHW."""


def profiled(
    data: bytes,
    provider: Provider,
    image: NDArray[Any],
    *,
    precision: str,
    threads: int,
    runs: int,
    optimised: bool = True,
) -> list[Event]:
    """Name and profile of every kernel of ``runs`` runs of a model (an ``.onnx`` file's content) whose sizes are fixed.

    ``image`` is HxWx3 uint8, ``precision`` the arithmetic.  The session is told what the engine's own is told.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for name, size in zip((BATCH_DIM, HEIGHT_DIM, WIDTH_DIM), (1, *image.shape[:2]), strict=True):
        options.add_free_dimension_override_by_name(name, size)
    options.enable_profiling = True
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "run")
        # A CUDA graph is one piece, in which no node has a time.
        extra = {"enable_cuda_graph": "0"} if provider.name == "cuda" else {}
        providers = provider.configure(options, precision=precision, threads=threads, fixed=True, extra=extra)
        session = ort.InferenceSession(data, options, providers or None, enable_fallback=0)
        for _ in range(runs):
            session.run([OUTPUT], {INPUT: image[None]})
        return kernels_run(session)


def costs_of(events: Sequence[Event]) -> list[Cost]:
    """What each convolution of a graph that was not optimised costs, in order."""
    found: dict[str, Cost] = {}
    for name, about in events:
        if about["op_name"] == "Conv":
            found.setdefault(name, Cost(macs=macs_of_run(about), output=shapes_of(about, "output")[0]))
    return list(found.values())


def nodes_of(events: Sequence[Event], costs: Sequence[Cost], ceiling: float | None) -> list[Node]:
    """Every node in the order of its first run; the first run of each is warm-up and counts only where it is alone.

    ``costs`` are those of the file's convolutions in order, ``ceiling`` is in multiply-accumulates a second.
    Optimisation renames nodes and drops their weights' shapes, so convolutions are matched by their place; by nothing
    where their number or what they give is another.
    """
    times: dict[tuple[str, str], list[float]] = {}
    first: dict[tuple[str, str], Mapping[str, Any]] = {}
    for name, about in events:
        # Some optimised nodes share a name, but not their number in the graph.
        key = name, about.get("node_index", "")
        times.setdefault(key, []).append(about["ms"])
        first.setdefault(key, about)
    medians = {key: median(values[1:] or values) for key, values in times.items()}
    total = sum(medians.values())
    convolutions = [key for key in first if "Conv" in first[key]["op_name"]]
    matched = dict(zip(convolutions, costs, strict=False)) if len(convolutions) == len(costs) else {}
    if not all(_gives(shapes_of(first[key], "output")[0], cost.output) for key, cost in matched.items()):
        matched = {}
    nodes = []
    for key, ms in medians.items():
        cost = matched.get(key)
        rate = cost.macs / ms * 1e3 if cost and ms else None
        nodes.append(
            Node(
                name=key[0],
                type=first[key]["op_name"],
                provider=first[key]["provider"],
                output=shapes_of(first[key], "output")[0],
                ms=ms,
                share=ms / total if total else 0.0,
                giga_macs=cost.macs / 1e9 if cost else None,
                giga_macs_per_s=rate / 1e9 if rate else None,
                of_ceiling=rate / ceiling if rate and ceiling else None,
            )
        )
    return nodes


def _gives(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether ``shape`` is ``wanted`` (NCHW), with channels last or filled up to a block of at most 16."""
    batch, channels, *sides = wanted
    return any(
        rest == (batch, *sides) and channels <= shape[place] < channels + 16
        for place in (1, len(shape) - 1)
        for rest in ((*shape[:place], *shape[place + 1 :]),)
    )


def by_type(nodes: Sequence[Node]) -> list[dict[str, Any]]:
    """Number, milliseconds and share of each type of node, the slowest first."""
    found: dict[str, dict[str, Any]] = {}
    for node in nodes:
        line = found.setdefault(node.type, {"type": node.type, "nodes": 0, "ms": 0.0, "share": 0.0})
        line["nodes"] += 1
        line["ms"] += node.ms
        line["share"] += node.share
    return sorted(found.values(), key=lambda line: -line["ms"])


def profile(
    data: bytes, provider: Provider, image: NDArray[Any], *, precision: str, threads: int, runs: int, ceiling: float
) -> dict[str, Any]:
    """Nodes, types and totals for a record; ``ceiling`` is in multiply-accumulates a second."""
    plain = profiled(data, find("cpu"), image, precision="fp32", threads=threads, runs=1, optimised=False)
    costs = costs_of(plain)
    events = profiled(data, provider, image, precision=precision, threads=threads, runs=runs)
    nodes = nodes_of(events, costs, ceiling)
    counted = [node for node in nodes if node.giga_macs]
    return {
        "nodes_ms": sum(node.ms for node in nodes),
        "giga_macs": sum(cost.macs for cost in costs) / 1e9,
        "convolutions_ms": sum(node.ms for node in counted) if counted else None,
        "ceiling_giga_macs_per_s": ceiling / 1e9,
        "by_type": by_type(nodes),
        "nodes": [asdict(node) for node in nodes],
    }


def as_table(found: Mapping[str, Any], title: str, least: float = 0.005) -> Table:
    """Types, then the nodes that take at least this share."""
    rate = f"{found['ceiling_giga_macs_per_s']:.0f} GMAC/s"
    ceiling = f"Ceiling: {rate}, the best of large matrix products and of a wide convolution"
    grid = Table(title=title, caption=f"{ceiling}; a shape may do better.", box=SIMPLE_HEAD, pad_edge=False)
    grid.add_column("node")
    for heading in ("type", "gives"):
        grid.add_column(heading)
    for heading in ("ms", "share", "GMAC", "GMAC/s", "of ceiling"):
        grid.add_column(heading, justify="right")
    for line in found["by_type"]:
        grid.add_row(f"all {line['nodes']}", line["type"], "", f"{line['ms']:.2f}", f"{line['share']:.1%}", "", "", "")
    grid.add_section()
    for node in found["nodes"]:
        if node["share"] >= least:
            costs = [("giga_macs", ".3f"), ("giga_macs_per_s", ".0f"), ("of_ceiling", ".0%")]
            grid.add_row(
                node["name"],
                node["type"],
                "x".join(map(str, node["output"])),
                f"{node['ms']:.2f}",
                f"{node['share']:.1%}",
                *(format(node[key], how) if node[key] else "" for key, how in costs),
            )
    return grid


def seeded(width: int, height: int) -> NDArray[np.uint8]:
    """An image whose content does not matter."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
