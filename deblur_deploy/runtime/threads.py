"""How many threads this process may really use: its affinity mask and its container's CPU quota, not the machine."""

from __future__ import annotations

import os
from math import ceil
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that a computation in this process can keep busy, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return max(1, allowed if quota is None else min(allowed, ceil(quota)))


def cpu_quota(root: Path = _CGROUP, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores that the container's quota allows (control groups v1 and v2), the tightest level; None if unlimited."""
    quotas = []
    for line in _read(own).splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root
        folder = base / name.lstrip("/")
        # Inside a container the own name may be that of the host, so the root of the mount is looked at as well.
        for level in (folder, *folder.parents):
            quotas.append(_v1_quota(level) if controllers else _v2_quota(level))
            if level == base:
                break
    return min((quota for quota in quotas if quota is not None), default=None)


def _v2_quota(folder: Path) -> float | None:
    limit, _, period = _read(folder / "cpu.max").strip().partition(" ")
    return int(limit) / int(period) if limit.isdigit() and period.isdigit() and int(period) else None


def _v1_quota(folder: Path) -> float | None:
    limit, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
    return int(limit) / int(period) if limit.isdigit() and period.isdigit() and int(period) else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
