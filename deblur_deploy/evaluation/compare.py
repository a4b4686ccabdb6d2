"""The regression guard: what got slower or worse from one record to the next, beyond the noise of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deblur_deploy.evaluation.record import Record, Row

LATENCY_TOLERANCE = 0.05
"""Medians of two runs on an idle machine agree within this."""
RARE_TOLERANCE = 0.5
"""For what a run sees once or seldom: loading, the first image, the slowest calls."""
MEMORY_TOLERANCE = 0.1
PSNR_TOLERANCE_DB = 0.01
TO_FP32_TOLERANCE_DB = 1.0
SSIM_TOLERANCE = 0.0005


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure of one row that differs by more than it may."""

    row: str
    what: str
    text: str
    worse: bool


def compare_records(old: Record, new: Record) -> list[Change]:
    """Changes beyond the noise, the worse ones first.

    A row that fails now and did not, or that is gone, is worse.  Quality is compared where both runs used the same
    image pairs.  Where each record holds one model only, the models' names need not agree.
    """
    changes: list[Change] = []
    quality: dict[tuple[str, ...], tuple[Row, Row]] = {}
    for key, before, after in matched(old, new):
        name = " ".join(key)
        if after is None:
            changes.append(Change(row=name, what="row", text="not measured any more", worse=True))
        elif after.error is not None:
            changes.append(Change(row=name, what="row", text=f"fails: {after.error}", worse=True))
        else:
            changes += _costs(name, before, after, old, new)
            quality.setdefault((*key[:-1], before.data), (before, after))
    if old.settings.get("pairs") == new.settings.get("pairs"):
        for key, (before, after) in quality.items():
            changes += _quality(" ".join(filter(None, key)), before, after)
    return sorted(changes, key=lambda change: not change.worse)


def matched(old: Record, new: Record) -> Iterator[tuple[tuple[str, ...], Row, Row | None]]:
    """What a row is called, and it in both records, for every row of ``old`` that did not fail."""
    single = all(len({row.model for row in record.rows}) == 1 for record in (old, new))

    def key(row: Row) -> tuple[str, ...]:
        return row.key[1:] if single else row.key

    now = {key(row): row for row in new.rows}
    for before in old.rows:
        if before.error is None:
            yield key(before), before, now.get(key(before))


def caveats(old: Record, new: Record) -> list[str]:
    """Why the two records may not be comparable, in lines for people."""
    lines = []
    if old.machine != new.machine:
        lines.append(f"the machines differ: {old.machine.get('processor')} and {new.machine.get('processor')}")
    if old.settings.get("pairs") != new.settings.get("pairs"):
        lines.append("the image pairs differ, so quality is not compared")
    if old.settings.get("threads") != new.settings.get("threads"):
        lines.append(f"the threads differ: {old.settings.get('threads')} and {new.settings.get('threads')}")
    ran = {" ".join(key[:-1]): (was.ran, now.ran) for key, was, now in matched(old, new) if now and not now.error}
    lines += [f"{name}: ran on {before}, now on {after}" for name, (before, after) in ran.items() if before != after]
    lines += [
        f"{name}: {old.versions[name]} -> {new.versions[name]}"
        for name in old.versions
        if name in new.versions and old.versions[name] != new.versions[name]
    ]
    worst = max((_drift(old, new, size) for size in old.reference_ms), key=abs, default=0.0)
    if abs(worst) > LATENCY_TOLERANCE:
        lines.append(f"the machine itself changed: the reference computation took {worst:+.0%}, which is allowed")
    return lines


def _drift(old: Record, new: Record, size: str) -> float:
    before, after = old.reference_ms.get(size), new.reference_ms.get(size)
    return after / before - 1 if before and after else 0.0


def _costs(name: str, before: Row, after: Row, old: Record, new: Record) -> Iterator[Change]:
    # Waiting for cores that other processes had is no slowness of ours, where both records know of it.
    steady = before.steady_ms is not None and after.steady_ms is not None
    latency, noises = ("steady_ms", "steady_noise") if steady else ("median_ms", "noise")
    noise, drift = (getattr(before, noises) or 0) + (getattr(after, noises) or 0), _drift(old, new, before.size)
    for what, usual in (
        (latency, LATENCY_TOLERANCE),
        ("p95_ms", RARE_TOLERANCE),
        ("load_ms", RARE_TOLERANCE),
        ("first_ms", RARE_TOLERANCE),
        ("peak_mb", MEMORY_TOLERANCE),
        ("gpu_mb", MEMORY_TOLERANCE),
    ):
        was, is_ = getattr(before, what), getattr(after, what)
        if not was or not is_:
            continue
        change, allowed = is_ / was - 1, usual
        if what.endswith("_ms"):
            # A slower machine excuses what is slower, and a faster one explains what is faster.
            allowed = max(usual, noise + max(drift if change > 0 else -drift, 0))
        if abs(change) > allowed:
            text = f"{was:.4g} -> {is_:.4g} ({change:+.1%}, allowed {allowed:.1%})"
            yield Change(row=name, what=what, text=text, worse=is_ > was)


def _quality(name: str, before: Row, after: Row) -> Iterator[Change]:
    for what, allowed, sign in (
        ("psnr", PSNR_TOLERANCE_DB, 1),
        ("ssim", SSIM_TOLERANCE, 1),
        ("psnr_to_fp32", TO_FP32_TOLERANCE_DB, 1),
        ("worst_drop_db", PSNR_TOLERANCE_DB, -1),
    ):
        was, is_ = getattr(before, what), getattr(after, what)
        if was is not None and is_ is not None and abs(is_ - was) > allowed:
            text = f"{was:.6g} -> {is_:.6g} ({is_ - was:+.4f}, allowed {allowed})"
            yield Change(row=name, what=what, text=text, worse=sign * (is_ - was) < 0)
