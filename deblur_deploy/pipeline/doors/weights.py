"""A file of somebody's weights: spandrel recognises the architecture from their names and shapes.

Pickles are never unpickled: of a ``.pth`` only tensors in plain containers are read, which is what torch calls
``weights_only``.
"""

from __future__ import annotations

import importlib
import pickle
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from deblur_deploy.errors import InputError, MissingExtraError, ModelError, one_line
from deblur_deploy.pipeline.doors.module import ready

SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")

_WRAPPERS = ("params_ema", "params", "state_dict", "model_state_dict", "model", "net", "weights")
_PREFIXES = ("module.", "_orig_mod.")
_MORE_PREFIXES = (*_PREFIXES, "model.", "netG.", "generator.")
"""Some architectures have such names themselves."""


def load_weights(path: Path) -> tuple[nn.Module, list[str]]:
    """The network whose weights ``path`` holds, in fp32 and eval mode; and what was found, for people.

    Raises ModelError, or MissingExtraError without spandrel.
    """
    state, notes = unwrapped(_tensors(path))
    if not state:
        raise ModelError(f"{path} holds no weights that have names")
    spandrel = _spandrel(path)
    load = spandrel.ModelLoader().load_from_state_dict
    try:
        while True:
            try:
                found = load(state)
                break
            except spandrel.UnsupportedModelError:
                if not (prefix := _common(state, _MORE_PREFIXES)):
                    raise
                state = _without(prefix, state, notes)
    except spandrel.UnsupportedModelError:
        first = ", ".join(list(state)[:3])
        raise ModelError(
            f"{path} holds no deblur_deploy U-Net, and none of the architectures that spandrel {spandrel.__version__} "
            f"knows (its weights begin with {first}); give its code with --model package.module:build"
            + ("" if _extra() else f", or, of Restormer, MPRNet or MIRNet, pip install {_EXTRA} (mind their licences)")
        ) from None
    except Exception as error:  # an architecture that was recognised, and does not fit its weights
        raise ModelError(f"{path} cannot be loaded by spandrel: {one_line(error)}") from None
    if found.scale != 1:
        raise InputError(
            f"{path} is {found.architecture.name}, which makes images {found.scale} times as large; only networks that "
            "keep the size are exported"
        )
    if not isinstance(found, spandrel.ImageModelDescriptor):
        raise InputError(f"{path} is {found.architecture.name}, which takes more than an image")
    notes.append(f"{path.name} is {found.architecture.name}, by spandrel {spandrel.__version__}")
    return ready(_Called(found), str(path)), notes


def _spandrel(path: Path) -> Any:
    """The package; raises MissingExtraError that says what to install."""
    said = f"{path} holds no deblur_deploy U-Net, and to recognise other networks "
    try:
        return import_spandrel()
    except ImportError as error:
        missing = (error.name or "spandrel").partition(".")[0]
        raise MissingExtraError(
            f"{said}{missing} is needed: pip install 'deblur-deploy[networks]'; or give the code with --model "
            "package.module:build"
        ) from None
    except RuntimeError as error:
        raise MissingExtraError(
            f"{said}spandrel is needed, which does not load here ({one_line(error)}); install the torchvision that "
            "was built for this torch"
        ) from None


def import_spandrel() -> Any:
    """The package, also beside a torchvision for CUDA where torch has none: it lacks its compiled operations then,
    which no network here needs, and only asks for their names.

    Raises ImportError where something is not installed, RuntimeError where it does not load.
    """
    while True:
        try:
            spandrel = importlib.import_module("spandrel")
            if extra := _extra():
                extra.install(ignore_duplicates=True)
            return spandrel
        except RuntimeError as error:
            absent = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if not absent:
                raise
        if not _KEPT:
            _KEPT.append(torch.library.Library("torchvision", "DEF"))  # type: ignore[no-untyped-call]
        _KEPT[0].define(f"{absent[1]}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "spandrel")]:
            del sys.modules[name]


def _extra() -> Any:
    """spandrel's architectures whose licences are restrictive: whoever has installed them wants them; None else."""
    with suppress(ImportError), catch_warnings(action="ignore", category=DeprecationWarning):
        return importlib.import_module(_EXTRA)
    return None


_EXTRA = "spandrel_extra_arches"
_KEPT: list[Any] = []
"""Torch forgets operations with the library that has defined them."""


class _Called(nn.Module):
    """A network as spandrel calls it: some take more than the image, which it knows to give."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.model, self._call = found.model, found._call_fn

    def forward(self, image: Tensor) -> Tensor:
        restored: Tensor = self._call(self.model, image)
        return restored


def _tensors(path: Path) -> Any:
    """What the file holds, with nothing in it run."""
    if path.suffix.lower() == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ModelError(f"{path} is not a whole safetensors file ({error}); train or copy it again") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} is a pickle that holds more than weights, and would run code of whoever made it "
            f'({_reason(error)}); if you trust it, convert it: python -c "import torch, safetensors.torch as s; '
            f"m = torch.load('{path}', weights_only=False); s.save_file(getattr(m, 'state_dict', lambda: m)(), "
            f"'{path.stem}.safetensors')\""
        ) from None
    except Exception as error:  # zip, pickle and torch fail in many ways on what is cut short or is none
        raise ModelError(f"{path} is not a whole file of weights: {one_line(error)}") from None


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split())
    _, _, what = words.partition("WeightsUnpickler error: ")
    return (what or words).partition(" Please")[0].partition(" Check")[0].rstrip(". ")


def unwrapped(content: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in ``content`` by their plain names, and what had to be taken off."""
    notes = []
    while isinstance(content, dict):
        wrapper = next((name for name in _WRAPPERS if isinstance(content.get(name), dict)), None)
        if wrapper is None:
            break
        content = content[wrapper]
        notes.append(f"the weights were inside of {wrapper!r}")
    if not isinstance(content, dict):
        return {}, notes
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    while prefix := _common(state, _PREFIXES):
        state = _without(prefix, state, notes)
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}, notes


def _common(state: dict[str, Tensor], prefixes: Sequence[str]) -> str:
    """Which of ``prefixes`` all names begin with; empty if none."""
    return next((prefix for prefix in prefixes if state and all(name.startswith(prefix) for name in state)), "")


def _without(prefix: str, state: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    notes.append(f"the prefix {prefix!r} was taken off their names")
    return {name.removeprefix(prefix): value for name, value in state.items()}
