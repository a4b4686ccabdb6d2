"""How many threads this process may really use: its affinity mask and its container's CPU quota, not the machine."""

from __future__ import annotations

import os
from math import ceil
from pathlib import Path

from deblur_deploy.system.cgroups import SYSTEM, levels, read


def usable_cores() -> int:
    """Cores that a computation in this process can keep busy, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return max(1, allowed if quota is None else min(allowed, ceil(quota)))


def cpu_quota(system: Path = SYSTEM) -> float | None:
    """Cores that the container's quota allows, the tightest level; None if unlimited."""
    quotas = (_quota(version, folder) for version, folder in levels("cpu", system))
    return min((quota for quota in quotas if quota is not None), default=None)


_FILES = {1: ("cpu.cfs_quota_us", "cpu.cfs_period_us"), 2: ("cpu.max",)}


def _quota(version: int, folder: Path) -> float | None:
    limit, period, *_ = *" ".join(read(folder / name) for name in _FILES[version]).split(), "", ""
    return int(limit) / int(period) if limit.isdigit() and period.isdigit() and int(period) else None
