"""Latency that can be trusted: candidates take turns, so that what else the machine does falls on all of them.

Every candidate is a function that returns when its result is in ordinary memory, so nothing is left running on a
device when the clock stops.

On a machine that does other things too, threads that are ready to run wait for a core.  Linux counts that time for
each thread (schedstat, in ns), so beside the median of the wall clock stands the *steady* one: the median of each
call's time less what its threads waited on average.  On an idle machine the two agree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import cv2
import numpy as np

from deblur_deploy.evaluation.clock import Clock, Lap, own_clock
from deblur_deploy.media.images import Image

STABLE = 0.02
"""A median is stable when its confidence interval reaches no further than this share to either side."""

_MIN_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one call: of the wall clock, but for ``steady_ms``."""

    median_ms: float
    p95_ms: float
    best_ms: float
    calls: int
    noise: float = 0.0
    """Half the width of the median's 95 % confidence interval, as a share of the median; of less than six calls, whose
    range holds the median less often than that, half their range."""
    steady_ms: float
    """Median of the calls' times without waiting for a core; ``median_ms`` where that is unknown."""
    steady_noise: float = 0.0
    """As ``noise``, of ``steady_ms``."""
    waited: float | None = None
    """Share of its time that a call waited for a core, on average; None if unknown."""

    @classmethod
    def of(cls, times: Sequence[Lap | float]) -> Timing:
        """Summary of repeated calls (at least one), laps or plain milliseconds."""
        laps = [time if isinstance(time, Lap) else Lap(time) for time in times]
        times_ms, steady = [lap.ms for lap in laps], [lap.steady_ms for lap in laps]
        known = [lap.waited_ms / lap.ms for lap in laps if lap.waited_ms is not None]
        return cls(
            median_ms=float(np.median(times_ms)),
            # Of few calls the slowest, not a place below it that nobody saw.
            p95_ms=float(np.percentile(times_ms, 95, method="higher")),
            best_ms=min(times_ms),
            calls=len(times_ms),
            noise=median_noise(times_ms),
            steady_ms=float(np.median(steady)),
            steady_noise=median_noise(steady),
            waited=fmean(known) if known else None,
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
    middle = float(np.median(ordered))
    return (ordered[high] - ordered[low]) / 2 / middle if middle else 0.0


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 10,
    warm_up: int = 2,
    budget_s: float = 60,
    stable: float = 0.0,
    clock: Clock | None = None,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, Timing]:
    """Time every call ``rounds`` times in turn, after ``warm_up`` untimed calls of each.

    The order is drawn anew each round, so that nobody always comes after the same neighbour.  At least three rounds
    are run; then no new one once ``budget_s`` seconds have passed, or once the noise of every candidate's two medians
    is at most ``stable``.  ``clock`` makes one call, for candidates that time themselves; ``on_round`` is told how
    many rounds are done.
    """
    clock = clock or own_clock
    for call in calls.values():
        for _ in range(warm_up):
            call()
    laps: dict[str, list[Lap]] = {name: [] for name in calls}
    order, rng = list(calls), np.random.default_rng(0)
    start = time.perf_counter()
    for count in range(rounds):
        if count >= _MIN_ROUNDS and (
            time.perf_counter() - start > budget_s
            or all(max(timing.noise, timing.steady_noise) <= stable for timing in _sound(laps))
        ):
            break
        rng.shuffle(order)
        for name in order:
            laps[name].append(clock(calls[name]))
        on_round(count + 1)
    return {name: Timing.of(done) for name, done in laps.items()}


def _sound(laps: Mapping[str, Sequence[Lap]]) -> Iterator[Timing]:
    """Timings of the candidates that have not failed: the clock gives NaN for those that have."""
    for timing in map(Timing.of, laps.values()):
        if not math.isnan(timing.median_ms):
            yield timing


def at_size(image: Image, width: int, height: int) -> Image:
    """``image`` scaled and cropped to ``width`` x ``height``, for timing: never time on zeros or constants."""
    scale = max(width / image.shape[1], height / image.shape[0])
    size = max(width, round(image.shape[1] * scale)), max(height, round(image.shape[0] * scale))
    scaled = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(scaled[:height, :width]).astype(np.uint8, copy=False)
