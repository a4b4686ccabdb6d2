"""Which variant on which provider: every combination in a process of its own, measured in turn.

Quality belongs to a variant on a provider, latency and memory also to a size.  A combination that fails is a row that
says so; the others stand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import msgspec
import numpy as np

from deblur_deploy.errors import DeblurError, InputError, MissingFileError
from deblur_deploy.evaluation.latency import STABLE, Timing, at_size, take_turns
from deblur_deploy.evaluation.quality import Pair, compare, mean_quality, psnr
from deblur_deploy.evaluation.record import Row
from deblur_deploy.evaluation.worker import Worker
from deblur_deploy.runtime.bundle import Bundle
from deblur_deploy.runtime.media import Image, list_images, read_image

REFERENCE = "reference"
_SLOW_MS = 2000


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
    """Median of the reference computation, by size."""
    reference_noise: float = 0.0
    """The largest noise of these medians."""

    @property
    def machine_noise(self) -> float | None:
        """By how much the reference's medians differ from their mean, or how uncertain one of them is, at most."""
        values = list(self.reference_ms.values())
        return max([self.reference_noise, *(abs(value / fmean(values) - 1) for value in values)]) if values else None


Progress = Callable[[str], None]


def entries_of(
    model: Path, providers: Sequence[str], *, variants: Sequence[str] = (), threads: int | None = None
) -> list[Entry]:
    """Every variant of a bundle, or one ``.onnx`` file, on every provider.

    Raises MissingFileError, ModelError, or InputError for a variant that the bundle does not have.
    """
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
            model=model.name if model.is_dir() else model.parent.name,
            variant=name,
            provider=provider,
            factory="deblur_deploy.evaluation.worker:engine",
            arguments={"model": str(path), "provider": provider, "threads": threads},
        )
        for provider in providers
        for name, path in found.items()
        if not variants or name in variants
    ]


def readable_pairs(folder: Path) -> tuple[list[Pair], list[str]]:
    """Pairs of ``folder`` (``blur/NAME`` and ``sharp/NAME``), and one line for each that cannot be used.

    Raises MissingFileError or InputError if there is none at all.
    """
    pairs, failed = [], []
    for path in list_images(folder / "blur"):
        try:
            blurred, sharp = read_image(path), read_image(folder / "sharp" / path.name)
            if blurred.shape != sharp.shape:
                sizes = " and ".join(f"{image.shape[1]}x{image.shape[0]}" for image in (blurred, sharp))
                raise InputError(f"{path} and its sharp image differ in size: {sizes}")
            if min(blurred.shape[:2]) < 11:
                raise InputError(f"{path} is smaller than the 11x11 pixels that SSIM needs")
            pairs.append(Pair(name=path.name, blurred=blurred, sharp=sharp))
        except DeblurError as error:
            failed.append(str(error))
    if not pairs:
        reason = failed[0] if failed else f"{folder}/blur holds no images"
        raise InputError(f"no pair can be used ({reason}); pairs are {folder}/blur/NAME and {folder}/sharp/NAME")
    return pairs, failed


def steps(entries: Sequence[Entry], plan: Plan) -> int:
    """How often ``measure`` reports progress."""
    return len(entries) * (1 + len(plan.sizes)) + len(plan.sizes)


def measure(
    entries: Sequence[Entry], pairs: Sequence[Pair], photo: Image, plan: Plan, on_progress: Progress = lambda _: None
) -> Outcome:
    """Quality on ``pairs`` and latency at each size on ``photo`` scaled to it; one row an entry and size."""
    quality = measure_quality(entries, pairs, on_progress)
    outcome = measure_latency(entries, photo, plan, on_progress)
    by_key = {(entry.model, entry.variant, entry.provider): quality[entry.name] for entry in entries}
    return replace(outcome, rows=[msgspec.structs.replace(row, **by_key[row.key[:3]]) for row in outcome.rows])


def measure_latency(
    entries: Sequence[Entry], photo: Image, plan: Plan, on_progress: Progress = lambda _: None
) -> Outcome:
    """Latency, memory, load and first image at each size, on ``photo`` scaled to it."""
    rows: list[Row] = []
    references: dict[str, Timing] = {}
    left = plan.budget_s
    for done, (width, height) in enumerate(sorted(plan.sizes, key=math.prod)):
        share = left / (len(plan.sizes) - done)
        size = f"{width}x{height}"
        timed, references[size], spent = _latency(entries, at_size(photo, width, height), plan, share, on_progress)
        left -= spent
        rows += [entry.row(size, **timed[entry.name]) for entry in entries]
    return Outcome(
        rows=rows,
        reference_ms={size: timing.median_ms for size, timing in references.items()},
        reference_noise=max((timing.noise for timing in references.values()), default=0.0),
    )


def measure_quality(
    entries: Sequence[Entry], pairs: Sequence[Pair], on_progress: Progress = lambda _: None
) -> dict[str, dict[str, Any]]:
    """Mean quality on ``pairs`` (at least one) by entry: fields of a row, or its ``error``.

    PSNR to fp32 is taken against the first entry of the same model whose variant is called ``fp32``.
    """
    fp32: dict[str, list[Image]] = {}
    found: dict[str, dict[str, Any]] = {}
    # fp32 first, so that the others can be compared with it.
    for entry in sorted(entries, key=lambda entry: entry.variant != "fp32"):
        on_progress(f"quality of {entry.name}")
        try:
            with entry.start() as worker:
                restored = [worker.restore(pair.blurred) for pair in pairs]
                facts = worker.facts
        except DeblurError as error:
            found[entry.name] = {"error": str(error)}
            continue
        mean = mean_quality(compare(image, pair) for image, pair in zip(restored, pairs, strict=True))
        values = {"psnr_blurred": mean.psnr_blurred, "psnr": mean.psnr, "ssim": mean.ssim, "facts": facts}
        if entry.variant == "fp32":
            fp32.setdefault(entry.model, restored)
        if (exact := fp32.get(entry.model)) and exact is not restored:
            values["psnr_to_fp32"] = _finite(fmean(map(psnr, restored, exact)))
        found[entry.name] = values
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _latency(
    entries: Sequence[Entry], image: Image, plan: Plan, budget_s: float, on_progress: Progress
) -> tuple[dict[str, dict[str, Any]], Timing, float]:
    """Values by entry, the reference's timing, and the seconds that the timed calls took."""
    size = f"{image.shape[1]}x{image.shape[0]}"
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for entry in entries:
            on_progress(f"{size}: {entry.name}")
            try:
                worker = stack.enter_context(entry.start())
                worker.keep(image)
                first_ms = worker.run()
                # The second call of a size compiles it, from the third on nothing changes.
                for _ in range(2 if first_ms < _SLOW_MS else 1):
                    worker.run()
            except DeblurError as error:
                found[entry.name] = {"error": str(error)}
                continue
            workers[entry.name] = worker
            found[entry.name] = {"load_ms": worker.load_ms, "first_ms": first_ms, "facts": worker.facts}
        on_progress(f"{size}: taking turns")
        timings, reference = _turns(workers, found, plan, budget_s)
        for name, timing in timings.items():
            found[name] |= {
                "median_ms": timing.median_ms,
                "p95_ms": timing.p95_ms,
                "best_ms": timing.best_ms,
                "calls": timing.calls,
                "noise": timing.noise,
                "peak_mb": workers[name].peak_mb(),
            }
    spent = sum(timing.median_ms * timing.calls for timing in timings.values()) / 1e3
    return found, reference, spent


def _turns(
    workers: Mapping[str, Worker], found: dict[str, dict[str, Any]], plan: Plan, budget_s: float
) -> tuple[dict[str, Timing], Timing]:
    """Timings of the workers that hold out, and the reference's; the others get an ``error``."""

    def clock(call: Callable[[], object]) -> float:
        return float(call())  # type: ignore[arg-type]

    def call_of(name: str) -> Callable[[], float]:
        def call() -> float:
            if "error" not in found[name]:
                try:
                    return workers[name].run()
                except DeblurError as error:
                    found[name]["error"] = str(error)
            return math.nan

        return call

    calls = {name: call_of(name) for name in workers} | {REFERENCE: _reference()}
    timings = take_turns(calls, rounds=plan.rounds, warm_up=0, budget_s=budget_s, stable=plan.stable, clock=clock)
    reference = timings.pop(REFERENCE)
    return {name: timing for name, timing in timings.items() if "error" not in found[name]}, reference


def _reference() -> Callable[[], float]:
    """A fixed computation on all cores, some milliseconds long, that answers the milliseconds it took."""
    matrix = np.random.default_rng(0).random((1024, 1024), dtype=np.float32)
    target = np.empty((8, *matrix.shape), np.float32)

    def job() -> float:
        start = perf_counter()
        target[:] = matrix @ matrix
        return 1e3 * (perf_counter() - start)

    job()
    return job
