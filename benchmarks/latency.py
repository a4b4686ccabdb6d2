"""Latency, memory, load time and first image of every variant on every provider and size.

It measures twice, with new processes, and records by how much the two passes disagree at most: medians of an idle
machine agree within 5 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from common import Options, pairs, product, progress, save, script

from deblur_deploy.evaluation.bench import Outcome, Plan, measure_latency
from deblur_deploy.evaluation.record import new_record


@dataclass(frozen=True, kw_only=True)
class Latency(Options):
    """Time every variant on every provider and size, twice."""

    budget_s: float = 180
    """Seconds of timed calls in each pass."""


def run(options: Latency) -> int:
    """Measure and save."""
    notes: list[str] = []
    entries = product(options, notes)
    sizes = Plan().sizes[:2] if options.quick else Plan().sizes
    plan = Plan(sizes=sizes, budget_s=options.budget_s / 12 if options.quick else options.budget_s)
    photo = pairs(options)[0]
    on_progress = progress()
    first, second = (measure_latency(entries, photo.blurred, plan, on_progress) for _ in range(2))
    record = new_record(
        "latency",
        options.settings(sizes=[f"{w}x{h}" for w, h in sizes], budget_s=plan.budget_s, photo=photo.name),
        reference_ms=first.reference_ms,
        machine_noise=max(first.machine_noise or 0, second.machine_noise or 0),
        notes=notes,
        rows=first.rows,
        found={"second_pass": disagreement(first, second)},
    )
    return save(record, options)


def disagreement(first: Outcome, second: Outcome) -> dict[str, float | str]:
    """The largest relative difference between two passes' medians, where it is, and the median difference."""
    again = {row.key: row.median_ms for row in second.rows}
    differences = {
        " ".join(row.key): abs(other / row.median_ms - 1)
        for row in first.rows
        if row.median_ms and (other := again[row.key])
    }
    if not differences:
        return {}
    worst = max(differences, key=differences.__getitem__)
    return {
        "worst": differences[worst],
        "where": worst,
        "median": sorted(differences.values())[len(differences) // 2],
    }


if __name__ == "__main__":
    script(Latency, run)
