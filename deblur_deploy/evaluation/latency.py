"""Latency that can be trusted: candidates take turns, so that what else the machine does falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Wall-clock milliseconds of one call."""

    median_ms: float
    p95_ms: float
    best_ms: float
    calls: int


def take_turns(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 10, warm_up: int = 2, budget_s: float = 60
) -> dict[str, Timing]:
    """Time every call ``rounds`` times, in turn (A B C A B C ...), after ``warm_up`` untimed calls of each.

    At least three rounds are run, then no new one once ``budget_s`` seconds have passed.
    """
    for call in calls.values():
        for _ in range(warm_up):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > budget_s:
            break
        for name, call in calls.items():
            before = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - before))
    return {
        name: Timing(
            median_ms=float(np.median(values)),
            p95_ms=float(np.percentile(values, 95)),
            best_ms=min(values),
            calls=len(values),
        )
        for name, values in times.items()
    }
