"""How much memory an image may take: what was asked for, or a part of what is free in this container."""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT_MB = 400
"""Enough that tiles of a light model waste little on their margins."""

_MIN_MB = 32


def budget_bytes(max_memory_mb: float | None) -> int:
    """Bytes that one run may take for activations; by default at most a third of what is free."""
    if max_memory_mb is not None:
        return int(max_memory_mb * 2**20)
    free = available_bytes()
    return DEFAULT_MB * 2**20 if free is None else max(_MIN_MB * 2**20, min(DEFAULT_MB * 2**20, free // 3))


def resident_bytes() -> int | None:
    """Memory that this process holds now; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int | None:
    """Memory that this process can still get: the machine's or the container's, whichever is less; None if unknown."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        root = Path("/sys/fs/cgroup")
        limit = (root / "memory.max").read_text(encoding="ascii").strip()
        if limit.isdigit():
            found.append(max(0, int(limit) - int((root / "memory.current").read_text(encoding="ascii"))))
    except (OSError, ValueError):
        pass
    if not found and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)
