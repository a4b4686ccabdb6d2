"""What the operating system tells of processor and GPUs."""

from __future__ import annotations

import platform
from pathlib import Path

from deblur_deploy.system.cgroups import read


def _cpuinfo() -> dict[str, str]:
    first = read(Path("/proc/cpuinfo")).split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def processor() -> str:
    """The processor's name, as well as this platform tells it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def gpu_models() -> list[str]:
    """Names of the NVIDIA GPUs of this machine, as their driver tells them."""
    models = []
    for about in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        lines = read(about).splitlines()
        models += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return models


def instructions() -> set[str] | None:
    """Extensions of the processor as Linux calls them; None where the system does not tell."""
    flags = _cpuinfo().get("flags")
    return None if flags is None else set(flags.split())


def native_bf16() -> bool | None:
    """Whether the processor computes in bf16 natively; None where the system does not tell."""
    flags = instructions()
    return None if flags is None else bool({"amx_bf16", "avx512_bf16"} & flags)
