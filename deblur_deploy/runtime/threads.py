"""How many threads this process may really use: its affinity mask and its container's CPU quota, not the machine."""

from __future__ import annotations

import os
from math import ceil
from pathlib import Path

from deblur_deploy.runtime.cgroups import SYSTEM, levels, read


def usable_cores() -> int:
    """Cores that a computation in this process can keep busy, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return max(1, allowed if quota is None else min(allowed, ceil(quota)))


def cpu_quota(system: Path = SYSTEM) -> float | None:
    """Cores that the container's quota allows, the tightest level; None if unlimited."""
    quotas = (_v1(folder) if version == 1 else _v2(folder) for version, folder in levels("cpu", system))
    return min((quota for quota in quotas if quota is not None), default=None)


def _v2(folder: Path) -> float | None:
    limit, _, period = read(folder / "cpu.max").strip().partition(" ")
    return _quota(limit, period)


def _v1(folder: Path) -> float | None:
    return _quota(*(read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")))


def _quota(limit: str, period: str) -> float | None:
    return int(limit) / int(period) if limit.isdigit() and period.isdigit() and int(period) else None
