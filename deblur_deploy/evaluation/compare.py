"""The regression guard: what got slower or worse from one record to the next, beyond the noise of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deblur_deploy.evaluation.record import Record, Row

LATENCY_TOLERANCE = 0.05
"""Medians of two runs on an idle machine agree within this."""
MEMORY_TOLERANCE = 0.1
PSNR_TOLERANCE_DB = 0.01
SSIM_TOLERANCE = 0.0005


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure of one row that differs by more than it may."""

    row: str
    what: str
    old: float | None
    new: float | None
    text: str
    worse: bool


def compare_records(old: Record, new: Record) -> list[Change]:
    """Changes beyond the noise, the worse ones first.

    A row that fails now and did not, or that is gone, is worse.  Quality is compared where both runs used the same
    image pairs.  Where either record holds one model only, the models' names need not agree.
    """
    single = any(len({row.model for row in record.rows}) == 1 for record in (old, new))

    def key(row: Row) -> tuple[str, ...]:
        return row.key[1:] if single else row.key

    now = {key(row): row for row in new.rows}
    changes = []
    for before in old.rows:
        name = " ".join(key(before))
        after = now.get(key(before))
        if before.error is not None:
            continue
        if after is None:
            changes.append(Change(row=name, what="row", old=None, new=None, text="not measured any more", worse=True))
        elif after.error is not None:
            changes.append(Change(row=name, what="row", old=None, new=None, text=f"fails: {after.error}", worse=True))
        else:
            changes += _latency_and_memory(name, before, after, old, new)
            if old.settings.get("pairs") == new.settings.get("pairs"):
                changes += _quality(name, before, after)
    return sorted(changes, key=lambda change: not change.worse)


def caveats(old: Record, new: Record) -> list[str]:
    """Why the two records may not be comparable, in lines for people."""
    lines = []
    if old.machine != new.machine:
        lines.append(f"the machines differ: {old.machine.get('processor')} and {new.machine.get('processor')}")
    if old.settings.get("pairs") != new.settings.get("pairs"):
        lines.append("the image pairs differ, so quality is not compared")
    if old.settings.get("threads") != new.settings.get("threads"):
        lines.append(f"the threads differ: {old.settings.get('threads')} and {new.settings.get('threads')}")
    lines += [
        f"{name}: {old.versions[name]} -> {new.versions[name]}"
        for name in old.versions
        if name in new.versions and old.versions[name] != new.versions[name]
    ]
    if drifts := [_drift(old, new, size) for size in old.reference_ms if size in new.reference_ms]:
        worst = max(drifts, key=abs)
        if abs(worst) > LATENCY_TOLERANCE:
            lines.append(f"the machine itself changed: the reference computation took {worst:+.0%}, which is allowed")
    return lines


def _drift(old: Record, new: Record, size: str) -> float:
    if size not in old.reference_ms or size not in new.reference_ms:
        return 0.0
    return new.reference_ms[size] / old.reference_ms[size] - 1


def _latency_and_memory(name: str, before: Row, after: Row, old: Record, new: Record) -> Iterator[Change]:
    # Waiting for cores that other processes had is no slowness of ours, where both records know of it.
    steady = before.steady_ms is not None and after.steady_ms is not None
    latency, noises = ("steady_ms", "steady_noise") if steady else ("median_ms", "noise")
    noise = (getattr(before, noises) or 0) + (getattr(after, noises) or 0) + abs(_drift(old, new, before.size))
    for what, allowed in (
        (latency, max(LATENCY_TOLERANCE, noise)),
        ("peak_mb", MEMORY_TOLERANCE),
        ("gpu_mb", MEMORY_TOLERANCE),
    ):
        was, is_ = getattr(before, what), getattr(after, what)
        if was and is_ and abs(is_ / was - 1) > allowed:
            text = f"{was:.4g} -> {is_:.4g} ({is_ / was - 1:+.1%}, allowed {allowed:.1%})"
            yield Change(row=name, what=what, old=was, new=is_, text=text, worse=is_ > was)


def _quality(name: str, before: Row, after: Row) -> Iterator[Change]:
    for what, allowed in (("psnr", PSNR_TOLERANCE_DB), ("ssim", SSIM_TOLERANCE)):
        was, is_ = getattr(before, what), getattr(after, what)
        if was is not None and is_ is not None and abs(is_ - was) > allowed:
            text = f"{was:.6g} -> {is_:.6g} ({is_ - was:+.4f}, allowed {allowed})"
            yield Change(row=name, what=what, old=was, new=is_, text=text, worse=is_ < was)
