"""Times many candidates in turn: every variant on every provider, each in a process of its own (``worker``).

A combination that fails is a row that says so; the others stand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean
from time import perf_counter, sleep
from typing import Any, cast

import cv2
import numpy as np

from deblur_deploy.bundles.manifest import Bundle
from deblur_deploy.bundles.names import located
from deblur_deploy.errors import DeblurError, InputError, MissingFileError
from deblur_deploy.evaluation.clock import Lap, own_clock
from deblur_deploy.evaluation.latency import STABLE, Timing, at_size, take_turns
from deblur_deploy.evaluation.machine import gpu_memory_mb, stolen_s
from deblur_deploy.evaluation.record import Row
from deblur_deploy.evaluation.worker import Worker
from deblur_deploy.media.images import Image

REFERENCE = "reference"
_SLOW_MS = 2000
_SETTLE_S, _SETTLE_BLAS_S = 0.005, 0.05
"""Pauses after a turn, in which threads that look for more work give up and leave the cores to the next one: ONNX
Runtime's within a millisecond, OpenBLAS's (the reference computation) after 2**26 clock ticks."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One candidate: how its process makes it, and what its rows are called."""

    model: str
    variant: str
    provider: str
    factory: str
    """``module:function``, which answers a :class:`worker.Candidate`."""
    arguments: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that its libraries must find when they are loaded."""

    @property
    def name(self) -> str:
        """Unique among the entries of a run."""
        return f"{self.model}/{self.variant} on {self.provider}"

    def start(self) -> Worker:
        """Its process; raises ProviderError."""
        return Worker(self.factory, self.arguments, environment=self.environment)

    def row(self, size: str, **values: Any) -> Row:
        """A row of this entry."""
        return Row(model=self.model, variant=self.variant, provider=self.provider, size=size, **values)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how thoroughly to measure."""

    sizes: tuple[tuple[int, int], ...] = ((640, 360), (1280, 720), (1920, 1080), (3840, 2160))
    """Width and height in pixels."""
    budget_s: float = 90
    """Seconds of timed calls, all sizes together; each candidate is timed at least three times nevertheless."""
    rounds: int = 40
    """Timed calls of each candidate at most."""
    stable: float = STABLE
    """Noise of the medians below which no more calls are needed."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run found out."""

    rows: list[Row]
    reference_ms: dict[str, float]
    """Steady median of the reference computation, by size."""
    reference_noise: float = 0.0
    """The largest noise of these medians."""
    stolen: float | None = None
    """Share of the processor time that a virtual machine's host took meanwhile; None if unknown."""

    @property
    def machine_noise(self) -> float | None:
        """By how much the reference's medians differ from their mean, or how uncertain one of them is, at most."""
        values = list(self.reference_ms.values())
        return max([self.reference_noise, *(abs(value / fmean(values) - 1) for value in values)]) if values else None


Progress = Callable[[str], None]
"""Is told what is being done, step by step."""


def silent(what: str) -> None:
    """Progress for nobody."""


def entries_of(
    model: Path, providers: Sequence[str], *, variants: Sequence[str] = (), threads: int | None = None
) -> list[Entry]:
    """Every variant of a bundle (by path or name), or one ``.onnx`` file, on every provider.

    Raises MissingFileError, ModelError, or InputError for a variant that the bundle does not have.
    """
    model = located(model)
    if model.is_dir():
        found = {name: variant.path for name, variant in Bundle.read(model).variants.items()}
    elif model.exists():
        found = {model.stem: model}
    else:
        raise MissingFileError(f"no such model: {model}; give a bundle folder or an .onnx file of deblur-export")
    if unknown := sorted(set(variants) - set(found)):
        raise InputError(f"{model} has no variant {unknown[0]!r}; it has {', '.join(found)}")
    return [
        Entry(
            model=model.resolve().name if model.is_dir() else model.resolve().parent.name,
            variant=name,
            provider=provider,
            factory="deblur_deploy.evaluation.worker:engine",
            arguments={"model": str(path), "provider": provider, "threads": threads},
        )
        for provider in providers
        for name, path in found.items()
        if not variants or name in variants
    ]


def measure_latency(
    entries: Sequence[Entry],
    photo: Image,
    plan: Plan,
    on_progress: Progress = silent,
    on_round: Progress = silent,
) -> Outcome:
    """Latency, memory, load and first image at each size, on ``photo`` scaled to it.

    ``on_round`` hears of every round of the timed calls, of which nobody knows how many there will be.
    """
    rows: list[Row] = []
    references: dict[str, Timing] = {}
    left, before = plan.budget_s, stolen_s()
    for done, (width, height) in enumerate(sorted(plan.sizes, key=math.prod)):
        share = left / (len(plan.sizes) - done)
        size = f"{width}x{height}"
        try:
            image = at_size(photo, width, height)
        except (MemoryError, cv2.error):
            rows += [entry.row(size, error=f"an image of {size} does not fit into memory") for entry in entries]
            continue
        timed, references[size], spent = _latency(entries, image, plan, share, on_progress, on_round)
        left -= spent
        rows += [entry.row(size, **timed[entry.name]) for entry in entries]
    after = stolen_s()
    return Outcome(
        rows=rows,
        reference_ms={size: timing.steady_ms for size, timing in references.items()},
        reference_noise=max((timing.steady_noise for timing in references.values()), default=0.0),
        stolen=(after[0] - before[0]) / max(after[1] - before[1], 1e-9) if before and after else None,
    )


def _latency(
    entries: Sequence[Entry], image: Image, plan: Plan, budget_s: float, on_progress: Progress, on_round: Progress
) -> tuple[dict[str, dict[str, Any]], Timing, float]:
    """Values by entry, the reference's timing, and the seconds that the timed calls took."""
    size = f"{image.shape[1]}x{image.shape[0]}"
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for entry in entries:
            on_progress(f"{size}: starting {entry.name}")
            used = gpu_memory_mb()
            try:
                worker = stack.enter_context(entry.start())
                worker.keep(image)
                first_ms = worker.run().ms
                # The second call of a size compiles it, from the third on nothing changes.
                for _ in range(2 if first_ms < _SLOW_MS else 1):
                    worker.run()
            except DeblurError as error:
                found[entry.name] = {"error": str(error)}
                continue
            workers[entry.name] = worker
            found[entry.name] = {"load_ms": worker.load_ms, "first_ms": first_ms, "facts": worker.facts}
            # By difference: inside a container the driver does not know processes by their own numbers.
            if used is not None and (grown := (gpu_memory_mb() or used) - used) > 0:
                found[entry.name]["gpu_mb"] = grown
        start = perf_counter()
        on_progress(f"{size}: taking turns")
        timings, reference = _turns(workers, found, plan, budget_s, lambda count: on_round(f"{size}: round {count}"))
        spent = perf_counter() - start
        for name, timing in timings.items():
            values = {field.name: getattr(timing, field.name) for field in fields(timing)}
            try:
                found[name] |= {**values, "peak_mb": workers[name].peak_mb()}
            except DeblurError as error:  # it ended after its last turn
                found[name]["error"] = str(error)
    return found, reference, spent


def _turns(
    workers: Mapping[str, Worker],
    found: dict[str, dict[str, Any]],
    plan: Plan,
    budget_s: float,
    on_round: Callable[[int], None],
) -> tuple[dict[str, Timing], Timing]:
    """Timings of the workers that hold out, and the reference's; the others get an ``error``."""

    def call_of(name: str) -> Callable[[], Lap]:
        def call() -> Lap:
            if "error" not in found[name]:
                try:
                    lap = workers[name].run()
                    sleep(_SETTLE_S)
                    return lap
                except DeblurError as error:
                    found[name]["error"] = str(error)
            return Lap(math.nan)

        return call

    job = _reference()

    def reference_call() -> Lap:
        lap = own_clock(job)
        sleep(_SETTLE_BLAS_S)
        return lap

    calls = {name: call_of(name) for name in workers} | {REFERENCE: reference_call}
    timings = take_turns(
        calls,
        rounds=plan.rounds,
        warm_up=0,
        budget_s=budget_s,
        stable=plan.stable,
        clock=lambda call: cast("Lap", call()),
        on_round=on_round,
    )
    of_machine = timings.pop(REFERENCE)
    return {name: timing for name, timing in timings.items() if "error" not in found[name]}, of_machine


def _reference() -> Callable[[], None]:
    """A fixed computation on all cores, some milliseconds long."""
    matrix = np.random.default_rng(0).random((1024, 1024), dtype=np.float32)
    target = np.empty((8, *matrix.shape), np.float32)

    def job() -> None:
        target[:] = matrix @ matrix

    job()
    sleep(_SETTLE_BLAS_S)
    return job
