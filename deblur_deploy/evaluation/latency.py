"""Latency that can be trusted: candidates take turns, so that what else the machine does falls on all of them.

Every candidate is a function that returns when its result is in ordinary memory, so nothing is left running on a
device when the clock stops.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from deblur_deploy.runtime.media import Image

STABLE = 0.02
"""A median is stable when its confidence interval reaches no further than this share to either side."""

_MIN_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Wall-clock milliseconds of one call."""

    median_ms: float
    p95_ms: float
    best_ms: float
    calls: int
    noise: float = 0.0
    """Half the width of the median's 95 % confidence interval, as a share of the median."""

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Timing:
        """Summary of repeated calls (at least one)."""
        return cls(
            median_ms=float(np.median(times_ms)),
            p95_ms=float(np.percentile(times_ms, 95)),
            best_ms=min(times_ms),
            calls=len(times_ms),
            noise=median_noise(times_ms),
        )


def median_noise(times: Sequence[float]) -> float:
    """Half the 95 % confidence interval of the median, relative to it, from order statistics.

    That interval assumes no distribution (Conover, Practical Nonparametric Statistics, 3.2).  With fewer than six
    values it is all of their range.
    """
    ordered, n = sorted(times), len(times)
    spread = 1.96 * math.sqrt(n)
    low = max(0, math.floor((n - spread) / 2))
    high = min(n - 1, math.ceil((n + spread) / 2))
    return (ordered[high] - ordered[low]) / 2 / float(np.median(ordered))


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 10,
    warm_up: int = 2,
    budget_s: float = 60,
    stable: float = 0.0,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, Timing]:
    """Time every call ``rounds`` times in turn, after ``warm_up`` untimed calls of each.

    The order is drawn anew each round, so that nobody always comes after the same neighbour.  At least three rounds
    are run; then no new one once ``budget_s`` seconds have passed, or once the noise of every candidate is at most
    ``stable``.  ``clock`` answers the milliseconds of one call, for candidates that time themselves.
    """
    clock = clock or _wall_clock
    for call in calls.values():
        for _ in range(warm_up):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, rng = list(calls), np.random.default_rng(0)
    start = time.perf_counter()
    for done in range(rounds):
        if done >= _MIN_ROUNDS and (
            time.perf_counter() - start > budget_s or all(median_noise(values) <= stable for values in times.values())
        ):
            break
        rng.shuffle(order)
        for name in order:
            times[name].append(clock(calls[name]))
    return {name: Timing.of(values) for name, values in times.items()}


def at_size(image: Image, width: int, height: int) -> Image:
    """``image`` scaled and cropped to ``width`` x ``height``, for timing: never time on zeros or constants."""
    scale = max(width / image.shape[1], height / image.shape[0])
    size = max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale))
    scaled = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(scaled[:height, :width]).astype(np.uint8, copy=False)


def _wall_clock(call: Callable[[], object]) -> float:
    before = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - before)
