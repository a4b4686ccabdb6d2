"""deblur-run --doctor: what this machine offers for deblurring, what is missing, and the one command that mends it.

It is a command of its own, so that it runs where images cannot be read for want of a whole OpenCV.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import onnxruntime as ort
from rich.console import Console

from deblur_deploy import wheels
from deblur_deploy.bundles import names
from deblur_deploy.cli.arguments import parse_arguments
from deblur_deploy.cli.common import OK, SOME_FAILED, guarded
from deblur_deploy.cli.run_config import RunConfig
from deblur_deploy.errors import DeblurError, ProviderError, one_line
from deblur_deploy.runtime import providers
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.system import folders, memory, threads
from deblur_deploy.system.hardware import processor


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fact about this machine."""

    topic: str
    text: str
    mend: str | None = None
    """What to do about it, a command where there is one; None if all is well."""


def examine(model: str | Path | None = None) -> list[Finding]:
    """Look at the processor, the libraries, every provider and the model; never raises for what it finds."""
    return [*_machine(), *_libraries(), *_providers(model), _bundles(), *_model(model)]


def _machine() -> list[Finding]:
    cores, quota = threads.usable_cores(), threads.cpu_quota()
    limit = "no quota" if quota is None else f"quota of {quota:g} cores"
    found = [Finding(topic="processor", text=f"{processor()}, {cores} of {os.cpu_count()} cores, {limit}")]
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > cores:
        found.append(
            Finding(
                topic="threads",
                text=f"OMP_NUM_THREADS is {asked}, this process may use {cores} cores",
                mend=f"export OMP_NUM_THREADS={cores}",
            )
        )
    free = memory.available_bytes()
    if free is not None:
        mend = "free memory, or give --max-memory-mb" if free < 2**29 else None
        found.append(Finding(topic="memory", text=f"{free / 2**30:.1f} GiB free", mend=mend))
    return found


def _libraries() -> list[Finding]:
    found = [Finding(topic="python", text=f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    number = tuple(int(part) for part in ort.__version__.split(".")[:2])
    old = number < providers.OLDEST_FOR_ENGINES
    found.append(
        Finding(
            topic="onnxruntime",
            text=ort.__version__ + (", too old for models of this version" if old else ""),
            mend="pip install --upgrade onnxruntime" if old else None,
        )
    )
    clashes = [family for family in wheels.FAMILIES if wheels.clash(family)]
    found += [Finding(topic="wheels", text=wheels.clash(family), mend=wheels.mend(family)) for family in clashes]
    commands = {"cv2": wheels.mend("opencv"), "av": "pip install 'deblur-deploy[video]'"}
    for module, use in (("cv2", "images"), ("av", "videos")):
        text = _unusable(module)
        # One command mends both.
        if text and not (module == "cv2" and "opencv" in clashes):
            found.append(Finding(topic=use, text=text, mend=commands[module]))
    return found


def _unusable(module: str) -> str:
    """Why a library cannot be used; empty if it can."""
    if find_spec(module) is None:
        return f"{module} is not installed"
    try:
        import_module("deblur_deploy.media.opencv" if module == "cv2" else module)
    except Exception as error:  # a library of which files are missing or another's fails with anything
        return f"{module} cannot be used: {one_line(error)}"
    return ""


def _providers(model: str | Path | None) -> list[Finding]:
    found = []
    for name in providers.AUTO:
        try:
            provider = providers.find(name)
            present = "present" if _runs(model, name) else "installed, not tried for want of a model"
        except ProviderError as error:
            text, _, advice = str(error).partition("; install it: ")
            if name == "cuda":
                # Where there is no such hardware there is nothing to mend; where there is, its libraries are absent.
                advice = providers.install("cuda") if _nvidia_driver() else ""
            found.append(Finding(topic=name, text=text, mend=advice or None))
        else:
            bf16 = ", bf16" if provider.native_bf16 else ""
            version = f", plugin {provider.version}" if provider.plugin_device is not None else ""
            found.append(Finding(topic=name, text=f"{present}: {provider.device}{bf16}{version}"))
    return found


def _nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


def _runs(model: str | Path | None, provider: str) -> bool:
    """Whether the model ran; raises ProviderError if the provider would not have it."""
    try:
        DeblurEngine(model, provider).close()
    except ProviderError:
        raise
    except DeblurError:
        return False
    return True


def _bundles() -> Finding:
    folder = folders.data_folder()
    more = f"; further ones are looked for in {folder}" if folder else ""
    return Finding(topic="bundles", text=f"{', '.join(names.bundles()) or 'none has a name'}{more}")


def _model(model: str | Path | None) -> list[Finding]:
    try:
        with DeblurEngine(model) as engine:
            found = [Finding(topic="model", text=str(engine.receipt))]
            macs = engine.receipt.macs
            share = macs.get(engine.receipt.provider, 0.0) if macs else 1.0
    except DeblurError as error:
        return [Finding(topic="model", text=str(error), mend=_model_mend(str(error)))]
    if share < 1:
        elsewhere = f"{1 - share:.0%} of the multiply-accumulates run elsewhere; compare with --provider cpu"
        found.append(Finding(topic="model", text=elsewhere))
    return found


def _model_mend(message: str) -> str:
    if "ir version" in message.lower() or "ir_version" in message.lower() or "opset" in message.lower():
        return "pip install --upgrade onnxruntime"
    return "deblur-export --out bundle, then deblur-run --model bundle"


def tell(config: RunConfig, console: Console) -> int:
    """Print the findings; returns SOME_FAILED if no engine can be made here."""
    findings = examine(config.model)
    for finding in findings:
        console.print(f"{finding.topic:12} {finding.text}", highlight=False, markup=False, soft_wrap=True)
        if finding.mend:
            console.print(f"{'':12} -> {finding.mend}", highlight=False, markup=False, soft_wrap=True)
    return SOME_FAILED if findings[-1].mend else OK


def command(argv: Sequence[str] | None) -> int:
    """Parse and look."""
    return tell(parse_arguments(RunConfig, "deblur-run", argv), Console())


main = guarded("deblur-run", command)
