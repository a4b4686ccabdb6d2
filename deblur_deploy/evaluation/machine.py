"""Which machine, and with what: the part of a measurement that makes it worth keeping."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from deblur_deploy.system.cgroups import read
from deblur_deploy.system.hardware import instructions, processor
from deblur_deploy.system.threads import usable_cores
from deblur_deploy.wheels import ONNXRUNTIMES, versions

_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "avx_vnni")
_PACKAGES = (
    "deblur-deploy", "numpy", "onnx", *ONNXRUNTIMES, "onnxruntime-ep-openvino", "openvino", "torch", "nncf", "ncnn",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """Processor, usable cores, the instructions that matter here, memory in GiB, system, and GPUs if there are any."""
    flags = instructions() or ()
    memory = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal:")), 0)
    found: dict[str, Any] = {
        "processor": processor(),
        "cores": usable_cores(),
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "memory_gib": round(int(memory) / 2**20),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return found | ({"gpus": gpus} if (gpus := _gpus()) else {})


this_machine = cache(machine)
"""The same, asked once: it asks other programs."""


def package_versions() -> dict[str, str]:
    """Versions of Python and of every installed package that takes part in a measurement."""
    return {"python": platform.python_version(), **versions(*_PACKAGES)}


def commit() -> str | None:
    """The source checkout's commit, with ``+`` where files differ from it; None outside of one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    name = _output("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--", "deblur_deploy")
    return f"{name}+" if changed else name or None


def stolen_s() -> tuple[float, float] | None:
    """Seconds that the host kept virtual cores from running, and seconds of all cores, since the start; or None."""
    ticks = next((line.split()[1:9] for line in _lines("/proc/stat") if line.startswith("cpu ")), [])
    if len(ticks) < 8:
        return None
    values = [int(tick) / os.sysconf("SC_CLK_TCK") for tick in ticks]
    return values[7], sum(values)


def gpu_memory_mb() -> float | None:
    """Memory in use on all NVIDIA GPUs together, by everybody, in MB; None without ``nvidia-smi``."""
    lines = _output("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits").splitlines()
    used = [int(line) for line in lines if line.strip().isdecimal()]
    return sum(used) * 2**20 / 1e6 if used else None


def _gpus() -> list[str]:
    query = "--query-gpu=name,memory.total,driver_version"
    return [line for line in _output("nvidia-smi", query, "--format=csv,noheader").splitlines() if line]


def _output(program: str, *arguments: str) -> str:
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _lines(path: str) -> list[str]:
    return read(Path(path)).splitlines()
