"""Latency, memory, load time and first image of every variant on every provider and size.

It measures twice, one pass after the other and with new processes, as two runs would, and records by how much the two
disagree: in the medians of the wall clock, which agree within 5 % on an idle machine; in the steady ones, without the
time that threads waited for a core; and in the ratio of these to a fixed computation that took turns with them.

A third pass has one thread for everyone, and says whether what the engine would take by itself is then the fastest too.
``--profile VARIANT`` measures nothing of all this, but what each node of one variant takes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import nodes
from common import Sized, pairs, product, progress, save, script, text_of
from rich.console import Console

from deblur_deploy.bundles.manifest import Bundle
from deblur_deploy.errors import InputError
from deblur_deploy.evaluation.bench import Outcome, Plan, measure_latency
from deblur_deploy.evaluation.compare import LATENCY_TOLERANCE
from deblur_deploy.evaluation.record import Row, new_record
from deblur_deploy.runtime.providers import find
from deblur_deploy.runtime.variants import choose_variant, within_budget

SIZE = (1280, 720)
TIMES = ("median_ms", "steady_ms", "waited", "noise", "calls")


@dataclass(frozen=True, kw_only=True)
class Latency(Sized):
    """Time every variant on every provider and size, twice."""

    budget_s: float = 240
    """Seconds of timed calls in each pass; a fourth of it in that with one thread."""
    profile: str = ""
    """Only time each node of this variant, such as 'int8', at the first of --sizes (1280x720) on the first of
    --providers; written to nodes_VARIANT_PROVIDER.json."""
    passes: int = 2
    """1 leaves out what says by how much two disagree."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.passes not in (1, 2) or not self.providers:
            raise ValueError(f"passes is {self.passes}, providers {self.providers}; allowed: 1 or 2, and one or more")


def run(options: Latency) -> int:
    """Measure and save."""
    if options.profile:
        return profile_variant(options)
    notes: list[str] = []
    entries = product(options, notes)
    sizes = options.sizes_or(Plan().sizes[:2] if options.quick else Plan().sizes)
    plan = Plan(sizes=sizes, budget_s=options.budget_s / 12 if options.quick else options.budget_s)
    photo = pairs(options)[0]
    on_progress = progress()
    first, *others = (measure_latency(entries, photo.blurred, plan, on_progress) for _ in range(options.passes))
    found: dict[str, Any] = {}
    for second in others:
        found = two_passes(first, second)
        if (worst := found["second_pass"].get("worst", 0.0)) > LATENCY_TOLERANCE:
            notes.append(f"the two passes differ by up to {worst:.1%}: this was no idle machine, measure again")
    # Where a GPU computes there is no thread to spare.
    on_cores = [entry for entry in entries if find(entry.provider).kind == "CPU"]
    if on_cores:
        alone = [replace(entry, arguments={**entry.arguments, "threads": 1}) for entry in on_cores]
        once = replace(plan, sizes=(SIZE,), budget_s=plan.budget_s / 4)
        found["one_thread"] = one_thread(options, measure_latency(alone, photo.blurred, once, on_progress).rows)
    record = new_record(
        "latency",
        options.settings(sizes=text_of(sizes), budget_s=plan.budget_s, photo=photo.name),
        reference_ms=first.reference_ms,
        machine_noise=max(outcome.machine_noise or 0 for outcome in (first, *others)),
        stolen=first.stolen,
        notes=notes,
        rows=first.rows,
        found=found,
    )
    return save(record, options)


def two_passes(first: Outcome, second: Outcome) -> dict[str, Any]:
    """By how much the second disagrees, and its rows."""
    times = ("variant", "provider", "size", *TIMES)
    return {
        "second_pass": disagreement(first, second, "median_ms"),
        "second_pass_steady": disagreement(first, second, "steady_ms"),
        "second_pass_to_reference": disagreement(first, second, "steady_ms", to_reference=True),
        "second_rows": [{name: getattr(row, name) for name in times} for row in second.rows],
    }


def one_thread(options: Latency, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What a record keeps of rows with one thread; ``chosen`` by the engine, ``fastest`` of what it may choose."""
    bundle, lines = Bundle.read(options.model), list[dict[str, Any]]()
    for provider in dict.fromkeys(row.provider for row in rows):
        theirs = [row for row in rows if row.provider == provider]
        chosen = choose_variant(bundle, find(provider), "auto").name
        allowed = {variant.name for variant in within_budget(bundle, find(provider))}
        timed = {row.variant: row.median_ms for row in theirs if row.median_ms and row.variant in allowed}
        fastest = min(timed, key=timed.__getitem__, default=None)
        lines += [
            {name: getattr(row, name) for name in ("variant", "provider", "size", *TIMES, "error")}
            | {"chosen": row.variant == chosen, "fastest": row.variant == fastest}
            for row in theirs
        ]
    return lines


def profile_variant(options: Latency) -> int:
    """Time each node, print the table and save."""
    from limits import cpu_ceilings, gpu_ceilings

    provider, on_progress = find(options.providers[0]), progress()
    (size, *_) = options.sizes_or(((320, 180),) if options.quick else (SIZE,))
    variants = Bundle.read(options.model).variants
    if options.profile not in variants or variants[options.profile].io != "uint8":
        known = ", ".join(name for name, variant in variants.items() if variant.io == "uint8")
        raise InputError(f"profile is {options.profile!r}; allowed: {known}")
    variant, quick = variants[options.profile], options.quick
    arithmetic, runs = provider.arithmetic(variant.precision, "auto"), 3 if quick else 20
    on_progress("the machine's ceilings")
    if provider.kind == "CPU":
        ceilings = cpu_ceilings(512 if quick else 2048, options.threads, 1 if quick else 10, (arithmetic,))
    else:
        ceilings = gpu_ceilings(8192)
    on_progress(f"every node of {variant.name} on {provider.name}")
    found = nodes.profile(
        variant.path.read_bytes(),
        provider,
        nodes.seeded(*size),
        precision=arithmetic,
        threads=options.threads,
        runs=runs,
        # A multiply-accumulate is two operations.
        ceiling=1e12 * ceilings.get(f"{arithmetic}_tops", {"rate": 0.0})["rate"] / 2,
    )
    title = f"{options.model.name}/{variant.name} on {provider.name} in {arithmetic}, {options.threads} threads"
    Console(width=None if sys.stdout.isatty() else 160).print(nodes.as_table(found, title))
    settings = options.settings(
        variant=variant.name, provider=provider.name, arithmetic=arithmetic, runs=runs, size=text_of([size])[0]
    )
    record = new_record(f"nodes_{variant.name}_{provider.name}", settings, found={**found, "ceilings": ceilings})
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
