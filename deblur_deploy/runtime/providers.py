"""Execution providers: which are really there, what each must be told, and what arithmetic it then does.

ONNX Runtime answers a provider that is missing, misspelt or broken by quietly computing on the CPU.  Here a provider
either is there and gets options that it is known to read, or there is a ProviderError that says what to do.
"""

from __future__ import annotations

import io
import json
import platform
import re
import shlex
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import onnxruntime as ort

from deblur_deploy import wheels
from deblur_deploy.contract import Precision
from deblur_deploy.errors import InputError, MissingExtraError, ProviderError
from deblur_deploy.system.forks import ForkedLock
from deblur_deploy.system.hardware import gpu_models, native_bf16, processor

NAMES = {
    "cpu": "CPUExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
}
"""Short names; any other provider goes by the name that ONNX Runtime gives it."""

OLDEST_FOR_ENGINES = (1, 24)

AUTO = ("cuda", "openvino", "cpu")
"""What ``auto`` tries, best first.  TensorRT is not among them because it compiles for minutes."""

_PLUGINS = {
    "OpenVINOExecutionProvider": "onnxruntime_ep_openvino",
    "NvTensorRTRTXExecutionProvider": "onnxruntime_ep_nv_tensorrt_rtx",
}
_PACKAGES = {
    "openvino": ("onnxruntime-ep-openvino",),
    "cuda": ("onnxruntime-gpu[cuda,cudnn]",),
    "tensorrt": ("onnxruntime-gpu[cuda,cudnn]", "tensorrt"),
}
_OPENVINO_OPTIONS = ("cache_dir", "enable_qdq_optimizer", "load_config", "num_streams")
_INSTEAD = {
    ("openvino", "device_type"): "name the device, as in provider='openvino:gpu'",
    ("openvino", "num_of_threads"): "use threads",
    ("cuda", "use_tf32"): "use precision",
    ("cuda", "device_id"): "name the device, as in provider='cuda:1'",
    ("tensorrt", "device_id"): "name the device, as in provider='tensorrt:1'",
}
# What the receipt tells is asked for in one way only, so that it stays true.
_NUMBERED = ("cuda", "tensorrt")
_registering = ForkedLock()


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One execution provider that is present on this machine."""

    name: str
    """Short name: ``cpu``, ``openvino``, ``cuda``, ... or ONNX Runtime's own."""
    ort_name: str
    device: str
    """What it computes on, in words."""
    kind: str = "CPU"
    """``CPU``, ``GPU`` or ``NPU``."""
    native_bf16: bool = False
    """Whether it can run fp32 graphs in bfloat16."""
    version: str = ""
    device_id: int = 0
    """Which of several GPUs, by CUDA's number."""
    plugin_device: Any = field(default=None, repr=False, compare=False)
    """The plugin's device, or None for a provider that is compiled into ONNX Runtime."""

    @property
    def recorded_as(self) -> tuple[str, ...]:
        """How a bundle may call what it measured on this device, the more exact name first."""
        if self.name in _NUMBERED:
            return f"{self.name}:{self.device_id}", self.name
        exact = f"{self.name}:{self.kind.lower()}"
        # Without a device OpenVINO computes on the processor.
        return (exact,) if self.name == "openvino" and self.kind != "CPU" else (exact, self.name)

    def arithmetic(self, model: Precision, asked: str) -> str:
        """The precision that convolutions really run in, for a file of precision ``model`` and the user's wish."""
        if self.name not in AUTO:
            return "unknown"  # None of them tells, and some choose by themselves.
        if model == "int8" and self.name != "cuda":
            return "int8"
        if self.name == "openvino" and self.kind == "CPU":
            return "bf16" if self.native_bf16 and asked != "fp32" else "fp32"
        if self.name == "openvino":
            return "fp32" if asked == "fp32" else "fp16"
        # CUDA has no kernels for int8 convolutions: it expands them to float.
        if self.name == "cuda" and model in ("fp32", "int8"):
            return "fp32" if asked == "fp32" else "tf32"
        # ONNX Runtime's own CPU kernels convert half precision to single, except on 64-bit ARM.
        halves = platform.machine().lower() in ("arm64", "aarch64")
        return "fp32" if self.name == "cpu" and model == "fp16" and not halves else model

    def configure(
        self, options: ort.SessionOptions, *, precision: str, threads: int, fixed: bool, extra: Mapping[str, str]
    ) -> list[tuple[str, dict[str, str]]]:
        """Set what this provider needs in ``options``; returns the ``providers`` argument for the session.

        ``precision`` is what :meth:`arithmetic` answered, ``fixed`` says that all shapes are known.
        """
        chosen: dict[str, str] = {}
        if self.name == "openvino":
            # What an int8 graph leaves in float stays float: the input would lose bits to the residual sum in bf16.
            hint = {"bf16": "bf16", "fp16": "f16"}.get(precision, "f32")
            chosen = {"num_of_threads": str(threads)} if self.kind == "CPU" else {}
            # The option called `precision` is accepted and ignored by the plugin (1.8); this one is obeyed.
            config = json.loads(extra.get("load_config", "{}"))
            config.setdefault(self.kind, {})["INFERENCE_PRECISION_HINT"] = hint
            extra = {**extra, "load_config": json.dumps(config)}
        elif self.name == "cuda":
            chosen = {
                "cudnn_conv_algo_search": "EXHAUSTIVE" if fixed else "HEURISTIC",
                "cudnn_conv_use_max_workspace": "1",
                "enable_cuda_graph": str(int(fixed)),
                "use_tf32": str(int(precision != "fp32")),
            }
        if self.name in _NUMBERED:
            chosen["device_id"] = str(self.device_id)
        chosen |= extra
        if self.plugin_device is not None:
            options.add_provider_for_devices([self.plugin_device], chosen)
            return []
        return [(self.ort_name, chosen)]


def find(name: str, extra: Mapping[str, str] | None = None) -> Provider:
    """The provider called ``name`` (``openvino:gpu`` picks a device of a plugin).

    Raises InputError if there is no such provider at all, ProviderError if it is not present on this machine.
    """
    given, _, wanted = name.partition(":")
    known = {full.lower(): full for full in (*ort.get_all_providers(), *NAMES.values())}
    ort_name = NAMES.get(given.lower()) or known.get(given.lower())
    if ort_name is None:
        # "auto" is no provider, where one must be named.
        known_here = ", ".join(NAMES if name == "auto" else ("auto", *NAMES))
        raise InputError(f"no provider is called {name!r}; use {known_here} or a name of ONNX Runtime's")
    short = {value: key for key, value in NAMES.items()}.get(ort_name, ort_name)
    _check_options(short, extra or {})
    if wanted and short in _NUMBERED:
        if not wanted.isdecimal():
            raise InputError(f"{name!r} names no device of {short}; give a number, as in {short}:0")
    elif wanted and ort_name not in _PLUGINS:
        raise InputError(f"{short} has no devices to choose from; give provider {short!r}, not {name!r}")
    if short in _NUMBERED and hasattr(ort, "preload_dlls"):
        # It prints what it does not find, and two threads that hide that at once would hide all that follows.
        with _registering, redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    # A registered plugin is listed as available too, but asking for it by name alone then quietly gives the CPU.
    if ort_name in _PLUGINS and find_spec(_PLUGINS[ort_name]):
        return _plugin(short, ort_name, wanted.upper())
    if ort_name in ort.get_available_providers():
        if wanted and short not in _NUMBERED:
            raise InputError(f"{short} has no devices to choose from in this build of onnxruntime; give {short!r}")
        kind = {"cpu": "CPU", "openvino": "CPU"}.get(short, "GPU")
        number = int(wanted or 0)
        device = processor() if kind == "CPU" else _nvidia(number) if short in _NUMBERED else short.upper()
        return Provider(
            name=short, ort_name=ort_name, device=device, kind=kind, version=ort.__version__, device_id=number
        )
    command = install(short)
    mend = f"install it: {command}" if command else "it needs another build of onnxruntime"
    raise ProviderError(f"provider {short} is not installed; {mend}")


def short_name(name: str) -> str:
    """The provider called ``name`` as records call it: ``cpu`` for ``CPUExecutionProvider``; a device stays behind it.

    Raises as :func:`find` does.
    """
    device = name.partition(":")[2].lower()
    return find(name).name + (f":{device}" if device else "")


def _check_options(short: str, extra: Mapping[str, str]) -> None:
    for option in sorted(extra):
        if (short, option) in _INSTEAD:
            raise InputError(f"option {option!r} of {short} is not given here; {_INSTEAD[short, option]}")
        if short == "cpu":
            raise InputError(f"cpu has no option {option!r}; it takes none")
        if short == "openvino" and option not in _OPENVINO_OPTIONS:
            # The plugin would swallow it.
            raise InputError(f"openvino has no option {option!r}; use one of {', '.join(_OPENVINO_OPTIONS)}")
    if short == "openvino" and "load_config" in extra:
        try:
            devices = json.loads(extra["load_config"])
            found = {key for settings in devices.values() for key, _ in settings.items()}
        except (ValueError, AttributeError, RecursionError):
            raise InputError("load_config of openvino must be JSON: {device: {property: value}}") from None
        for key, instead in (("INFERENCE_PRECISION_HINT", "precision"), ("INFERENCE_NUM_THREADS", "threads")):
            if key in found:
                raise InputError(f"{key} in load_config of openvino is not given here; use {instead}")


def candidates(skipped: dict[str, str]) -> list[Provider]:
    """What ``auto`` may use here, best first; why the others are absent is written to ``skipped``."""
    found = []
    for name in AUTO:
        try:
            found.append(find(name))
        except ProviderError as error:
            skipped[name] = str(error)
    return found


def _plugin(short: str, ort_name: str, wanted: str) -> Provider:
    module = _PLUGINS[ort_name]
    with _registering:
        if not any(device.ep_name == ort_name for device in ort.get_ep_devices()):
            try:
                library = import_module(module).get_library_path()
                ort.register_execution_provider_library(f"deblur_deploy.{short}", library)
            except Exception as error:
                message = first_line(error)
                # Registered by an earlier look that found no device.
                if "already" not in message:
                    raise ProviderError(f"provider {short} cannot be loaded: {message}") from None
    devices = [
        device
        for device in ort.get_ep_devices()
        if device.ep_name == ort_name and device.device.metadata.get("is_virtual") != "1"
    ]
    chosen = next((d for d in devices if d.device.type.name == (wanted or d.device.type.name)), None)
    if chosen is None:
        there = ", ".join(d.device.type.name.lower() for d in devices) or "none"
        why = (
            "it only offers itself on Intel hardware; use cpu"
            if short == "openvino" and not devices
            else "pick another"
        )
        raise ProviderError(f"provider {short} finds no {wanted or 'usable'} device here (there are: {there}); {why}")
    about = chosen.ep_metadata
    able = about.get("OPTIMIZATION_CAPABILITIES", "").split()
    kind = chosen.device.type.name
    return Provider(
        name=short,
        ort_name=ort_name,
        device=processor() if kind == "CPU" else about.get("FULL_DEVICE_NAME", kind),
        kind=kind,
        # It lists BF16 for processors that only emulate it, too, and uses it by itself only where it is native.
        native_bf16=kind == "CPU" and "BF16" in able and native_bf16() is not False,
        version=about.get("version", ""),
        plugin_device=chosen,
    )


def install(short: str) -> str:
    """The command that installs a provider; empty where there is none."""
    packages = _PACKAGES.get(short, ())
    return shlex.join(["pip", "install", *packages]) if packages else ""


def _nvidia(number: int) -> str:
    # CUDA's order of several models is not the driver's, so only a model that all of them are is told.
    models = set(gpu_models())
    return models.pop() if len(models) == 1 else f"GPU {number}"


def check_onnxruntime() -> None:
    """Raise MissingExtraError if the installed onnxruntime is too old for engines, which ask it what really ran."""
    if tuple(int(part) for part in ort.__version__.split(".")[:2]) < OLDEST_FOR_ENGINES:
        oldest = ".".join(map(str, OLDEST_FOR_ENGINES))
        raise MissingExtraError(
            f"onnxruntime {ort.__version__} is installed, {oldest} or later is needed; pip install -U onnxruntime"
        )


def versions(provider: Provider) -> dict[str, str]:
    """Versions of what takes part in an answer."""
    found = {"onnxruntime": ort.__version__, "python": platform.python_version(), "deblur-deploy": "source"}
    found |= wheels.versions("numpy", "deblur-deploy")
    if provider.plugin_device is not None:
        found[provider.name] = provider.version
    return found


def first_line(error: BaseException) -> str:
    """The first line of somebody else's message, without ONNX Runtime's number for it."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", line)
