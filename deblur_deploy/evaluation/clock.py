"""The clock of one call: how long it took, and how long its threads only waited for a core.

A module of its own because a candidate's process imports it, whose memory and start are to be the candidate's alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from deblur_deploy.runtime.threads import usable_cores


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
    """Time a call in this process, which runs on ``threads`` threads (by default as many as there are cores)."""
    waited, before = waited_ms(), time.perf_counter()
    call()
    took, after = 1e3 * (time.perf_counter() - before), waited_ms()
    if waited is None or after is None:
        return Lap(took)
    # Threads that ended in between took their count with them, and idle ones may have waited beyond the call.
    return Lap(took, min(max((after - waited) / (threads or usable_cores()), 0.0), took))


def waited_ms() -> float | None:
    """How long the threads of this process have been ready to run while others had the core; None but on Linux."""
    total = 0
    try:
        for thread in os.scandir("/proc/self/task"):
            with open(f"{thread.path}/schedstat", "rb") as file:
                total += int(file.read().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return total / 1e6
