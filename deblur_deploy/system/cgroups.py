"""What this process's container may use: control groups of version 1 and 2, at every level up to the root."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

SYSTEM = Path("/")
"""Where ``proc`` and ``sys`` lie."""


def levels(controller: str, system: Path = SYSTEM) -> Iterator[tuple[int, Path]]:
    """Version and folder of every group that limits ``controller`` ("cpu" or "memory"), from the inside out.

    Folders need not exist: inside a container the process's own path may be that of the host, and only the root of the
    mount is there.
    """
    root = system / "sys/fs/cgroup"
    seen = set()
    for line in [*read(system / "proc/self/cgroup").splitlines(), "0::/", f"0:{controller}:/"]:
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        version, base = (1, root / controller) if controllers else (2, root)
        folder = base / name.lstrip("/")
        for level in (folder, *folder.parents):
            if level not in seen:
                seen.add(level)
                yield version, level
            if level == base:
                break


def read(path: Path) -> str:
    """The text of a small file of the system; empty if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
