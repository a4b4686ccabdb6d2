"""How much memory an image may take: what was asked for, or a part of what is free; and giving back what is unused."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from deblur_deploy.system.cgroups import SYSTEM, levels, read

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
    pages = read(Path("/proc/self/statm")).split()[1:2]
    return int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else None


def give_back() -> None:
    """Return freed memory to the system.

    glibc keeps what is free between blocks that are in use, and images of changing sizes leave ever more of that; other
    C libraries need no word.
    """
    if trim := _trim():
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no such thing as the program itself, as on Windows
        return None


def available_bytes(system: Path = SYSTEM) -> int | None:
    """Memory that this process can still get: the machine's or a container's, whichever is least; None if unknown."""
    found = []
    for line in read(system / "proc/meminfo").splitlines():
        name, *value = line.split()[:2] or [""]
        if name == "MemAvailable:" and value and value[0].isdigit():
            found.append(int(value[0]) * 1024)
    left = (_left(version, folder) for version, folder in levels("memory", system))
    found += [value for value in left if value is not None]
    if not found and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
"""By version: the limit, what is used, and the entry of ``memory.stat`` for pages of files that go when memory is
wanted."""


def _left(version: int, folder: Path) -> int | None:
    """What a control group has left; None without a limit."""
    *files, cache = _FILES[version]
    limit, used = (read(folder / name).strip() for name in files)
    # Version 1 writes what no machine has for no limit.
    if not (limit.isdigit() and used.isdigit()) or int(limit) >= 2**62:
        return None
    stat = dict(line.split(" ", 1) for line in read(folder / "memory.stat").splitlines() if " " in line)
    reclaimable = stat.get(cache, "").strip()
    in_use = int(used) - (int(reclaimable) if reclaimable.isdigit() else 0)
    return max(0, int(limit) - max(0, in_use))
