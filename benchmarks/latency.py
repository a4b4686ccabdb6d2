"""Latency, memory, load time and first image of every variant on every provider and size.

It measures twice, one pass after the other and with new processes, as two runs would, and records by how much the two
disagree: in the medians of the wall clock, which agree within 5 % on an idle machine; in the steady ones, without the
time that threads waited for a core; and in the ratio of these to a fixed computation that took turns with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

from common import Options, pairs, product, progress, save, script

from deblur_deploy.evaluation.bench import Outcome, Plan, measure_latency
from deblur_deploy.evaluation.compare import LATENCY_TOLERANCE
from deblur_deploy.evaluation.record import new_record

TIMES = ("median_ms", "steady_ms", "waited", "noise", "calls")


@dataclass(frozen=True, kw_only=True)
class Latency(Options):
    """Time every variant on every provider and size, twice."""

    budget_s: float = 240
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
    found = {
        "second_pass": disagreement(first, second, "median_ms"),
        "second_pass_steady": disagreement(first, second, "steady_ms"),
        "second_pass_to_reference": disagreement(first, second, "steady_ms", to_reference=True),
    }
    worst = found["second_pass"].get("worst", 0.0)
    if worst > LATENCY_TOLERANCE:
        notes.append(f"the two passes differ by up to {worst:.1%}: this was no idle machine, measure again")
    record = new_record(
        "latency",
        options.settings(sizes=[f"{w}x{h}" for w, h in sizes], budget_s=plan.budget_s, photo=photo.name),
        reference_ms=first.reference_ms,
        machine_noise=max(first.machine_noise or 0, second.machine_noise or 0),
        stolen=first.stolen,
        notes=notes,
        rows=first.rows,
        found={
            **found,
            "second_rows": [
                {name: getattr(row, name) for name in ("variant", "provider", "size", *TIMES)} for row in second.rows
            ],
        },
    )
    return save(record, options)


def disagreement(first: Outcome, second: Outcome, time: str, *, to_reference: bool = False) -> dict[str, Any]:
    """The largest relative difference between two passes' ``time``, where it is, and the median difference.

    ``to_reference``: of ratios to the reference computation of the same pass and size, so that what slows the whole
    machine in one of them counts for nothing.
    """
    again = {row.key: getattr(row, time) for row in second.rows}
    differences: dict[str, float] = {}
    for row in first.rows:
        if (before := getattr(row, time)) and (after := again[row.key]):
            drift = second.reference_ms[row.size] / first.reference_ms[row.size] if to_reference else 1.0
            differences[" ".join(row.key)] = abs(after / before / drift - 1)
    if not differences:
        return {}
    worst = max(differences, key=differences.__getitem__)
    return {"worst": differences[worst], "where": worst, "median": median(differences.values())}


if __name__ == "__main__":
    script(Latency, run)
