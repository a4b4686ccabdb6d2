"""What a picture costs as pixels, threads, batch and parallel streams grow, for the variant that ``auto`` would run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from common import Options, pairs, present, progress, save, script

from deblur_deploy.bundles.manifest import Bundle
from deblur_deploy.errors import DeblurError
from deblur_deploy.evaluation.bench import Entry, Plan, measure_latency
from deblur_deploy.evaluation.clock import Lap
from deblur_deploy.evaluation.latency import at_size, take_turns
from deblur_deploy.evaluation.record import Row, new_record
from deblur_deploy.media.images import Image
from deblur_deploy.runtime.providers import find
from deblur_deploy.runtime.variants import choose_variant

SIZE = (1280, 720)
SIZES = ((608, 416), (1280, 800), (2448, 1632), (4896, 3264), (8160, 6144), (12240, 8160))
"""0.25 to 100 megapixels."""


@dataclass(frozen=True, kw_only=True)
class Scaling(Options):
    """Vary one of pixels, threads, batch and streams at a time; some minutes on two cores."""

    provider: str = ""
    """Provider to measure; by default the best that is present."""


def run(options: Scaling) -> int:
    """Measure and save."""
    notes: list[str] = []
    names = [options.provider] if options.provider else present(("cuda", "openvino", "cpu"), notes)[:1]
    provider = find(names[0])
    variant = choose_variant(Bundle.read(options.model), provider, "auto")
    photo = pairs(options)[0].blurred
    on_progress = progress()
    entry = Entry(
        model=options.model.name,
        variant=variant.name,
        provider=provider.name,
        factory="deblur_deploy.evaluation.worker:engine",
        arguments={"model": str(variant.path), "provider": provider.name, "threads": options.threads},
    )
    quick = options.quick
    plan = Plan(sizes=SIZES[:3] if quick else SIZES, budget_s=10 if quick else 75, rounds=10)
    outcome = measure_latency([entry], photo, plan, on_progress)
    rows = list(outcome.rows)
    found: dict[str, Any] = {"pixels": [_figures(row) for row in rows]}
    plan = replace(plan, sizes=(SIZE,), budget_s=5 if quick else 30)

    counts = sorted({2**k for k in range(10) if 2**k <= options.threads} | {options.threads})
    by_threads = [
        replace(entry, variant=f"{variant.name}, {n} threads", arguments={**entry.arguments, "threads": n})
        for n in counts
    ]
    rows += (threaded := measure_latency(by_threads, photo, plan, on_progress).rows)
    found["threads"] = [{"threads": n, **_figures(row)} for n, row in zip(counts, threaded, strict=True)]

    many = sorted({1, 2, 4, *counts})
    by_streams = [
        replace(
            entry,
            variant=f"{variant.name}, {n} streams of {max(1, options.threads // n)} threads",
            factory="streams:load",
            arguments={
                "model": str(variant.path),
                "provider": provider.name,
                "streams": n,
                # On fewer cores than streams they share them.
                "threads": max(1, options.threads // n),
            },
        )
        for n in many
    ]
    rows += (streamed := measure_latency(by_streams, photo, plan, on_progress).rows)
    found["streams"] = [
        {"streams": n, "images_per_s": 1e3 * n / row.median_ms if row.median_ms else None, **_figures(row)}
        for n, row in zip(many, streamed, strict=True)
    ]
    on_progress("batches")
    found["batch"] = _batches(entry, at_size(photo, *SIZE), (1, 2, 4) if quick else (1, 2, 4, 8), plan.budget_s)
    failed = [f"batches: {row['error']}" for row in found["batch"] if "error" in row]
    record = new_record(
        "scaling",
        options.settings(provider=provider.name, variant=variant.name),
        reference_ms=outcome.reference_ms,
        machine_noise=outcome.machine_noise,
        stolen=outcome.stolen,
        notes=[*notes, *failed],
        rows=rows,
        found=found,
    )
    return save(record, options, failed)


def _figures(row: Row) -> dict[str, Any]:
    per_megapixel = row.median_ms / row.pixels * 1e6 if row.median_ms else None
    return {
        "size": row.size,
        "ms": row.median_ms,
        "steady_ms": row.steady_ms,
        "ms_per_megapixel": per_megapixel,
        "peak_mb": row.peak_mb,
        "noise": row.noise,
    }


def _batches(entry: Entry, image: Image, batches: tuple[int, ...], budget_s: float) -> list[dict[str, Any]]:
    """Milliseconds an image when this many are handed over in one call."""
    try:
        with ExitStack() as stack:
            calls: dict[str, Callable[[], Lap]] = {}
            for batch in batches:
                worker = stack.enter_context(entry.start())
                worker.keep(np.stack([image] * batch))
                calls[str(batch)] = worker.run
            timings = take_turns(calls, rounds=10, budget_s=budget_s, clock=lambda call: cast("Lap", call()))
    except DeblurError as error:
        return [{"error": str(error)}]
    return [
        {
            "batch": batch,
            "ms_per_image": (timing := timings[str(batch)]).median_ms / batch,
            "steady_ms_per_image": timing.steady_ms / batch,
            "noise": timing.noise,
        }
        for batch in batches
    ]


if __name__ == "__main__":
    script(Scaling, run)
