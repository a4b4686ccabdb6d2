"""The clock of one call: how long it took, and how long its threads only waited for a core.

A module of its own because a candidate's process imports it, whose memory and start are to be the candidate's alone.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from deblur_deploy.system.threads import usable_cores


@dataclass(frozen=True)
class Lap:
    """One timed call."""

    ms: float
    """Wall clock."""
    waited_ms: float | None = None
    """How long each of its threads was ready to run but another process had the core, on average; None if unknown."""

    @property
    def steady_ms(self) -> float:
        """The time that is left without waiting; all of it where that is unknown."""
        return max(self.ms - (self.waited_ms or 0.0), 0.0)


Clock = Callable[[Callable[[], object]], Lap]


def own_clock(call: Callable[[], object], threads: int | None = None) -> Lap:
    """Time a call in this process, whose work ``threads`` threads share (by default as many as there are cores)."""
    before, start = thread_times(), time.perf_counter()
    call()
    took, after = 1e3 * (time.perf_counter() - start), thread_times()
    if before is None or after is None:
        return Lap(took)
    none = 0, 0
    spent = [tuple(b - a for a, b in zip(before.get(thread, none), now, strict=True)) for thread, now in after.items()]
    # Those that ran most did the work; what else lives in this process may wait without holding anything up.
    busiest = sorted(spent, reverse=True)[: threads or usable_cores()]
    waited = sum(waited for _, waited in busiest) / len(busiest) / 1e6
    # However the waiting of several threads fell together, no call takes less than its busiest thread has run, nor than
    # all of them need on the cores there are: threads that wait for each other's core wait for nobody else.
    least = max(busiest[0][0], sum(ran for ran, _ in spent) / usable_cores()) / 1e6
    return Lap(took, max(min(waited, took - least), 0.0))


def thread_times() -> dict[str, tuple[int, int]] | None:
    """Nanoseconds that each thread of this process has run, and has waited for a core; None but on Linux."""
    found = {}
    try:
        with os.scandir("/proc/self/task") as threads:
            for thread in threads:
                # One that ended since it was listed has no time of its own any more.
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    with open(f"{thread.path}/schedstat", "rb") as file:
                        ran, waited, _ = file.read().split()
                    found[thread.name] = int(ran), int(waited)
    except (OSError, ValueError):
        return None
    return found or None
