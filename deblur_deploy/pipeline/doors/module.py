"""Somebody's torch module: built by their function, run as it is for reference, exported as what it computes."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from onnx import ModelProto
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deblur_deploy.errors import InputError, ModelError, one_line
from deblur_deploy.files import existing
from deblur_deploy.pipeline.body import to_onnx
from deblur_deploy.pipeline.convention import SPANS, Array, Convention
from deblur_deploy.pipeline.nodes import OnnxRunner

_IMAGE = "image_in"


def load_module(name: str, weights: Path | None = None) -> nn.Module:
    """What ``package.module:build`` returns when it is called, in fp32 and eval mode, with ``weights`` in it.

    ``weights``: a state dict as safetensors.  The working folder is searched too.  Raises InputError that says what is
    missing.
    """
    place, colon, builder = name.partition(":")
    if not (place and colon and builder):
        raise InputError(f"--model is {name!r}; allowed: package.module:build, a function that returns the network")
    here = os.getcwd()  # noqa: PTH109
    sys.path.insert(0, here)
    try:
        model = getattr(importlib.import_module(place), builder)()
    except ImportError as error:
        raise InputError(f"--model {name}: cannot import {place} ({error})") from None
    except (Exception, SystemExit) as error:  # it is somebody else's code, and may fail with anything
        if isinstance(error, TypeError) and error.__traceback__ and not error.__traceback__.tb_next:  # by the call
            raise InputError(f"--model {name}: {builder} must work without arguments ({error})") from None
        raise InputError(f"--model {name}: {type(error).__name__}: {one_line(error)}{_hint(error)}") from None
    finally:
        with suppress(ValueError):  # their code may change the path, too
            sys.path.remove(here)
    if not isinstance(model, nn.Module):
        raise InputError(f"--model {name} gave {type(model).__name__}; a torch.nn.Module is needed")
    if weights:
        try:
            model.load_state_dict(load_file(existing(weights, kind="file")))
        except (SafetensorError, RuntimeError) as error:
            raise InputError(f"{weights} does not hold the weights of {name}: {one_line(error)}") from None
    return ready(model, f"--model {name}")


def ready(model: nn.Module, name: str) -> nn.Module:
    """``model`` in fp32 and eval mode; raises InputError if a weight is not a number."""
    model = model.float().eval().requires_grad_()
    for key, value in model.state_dict().items():
        if value.is_floating_point() and torch.isnan(value).any():
            raise InputError(f"{name} holds weights that are NaN ({key}); it cannot restore anything")
    return model


def _hint(error: BaseException) -> str:
    return "; build it on the CPU: an export needs no GPU" if "cuda" in str(error).lower() else ""


class ModuleRunner:
    """Runs a module on the CPU; its outputs are called by their place in what it returns."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, batch: Array) -> Mapping[str, Array]:
        try:
            given = self.model(torch.from_numpy(np.ascontiguousarray(batch)))
        except (Exception, SystemExit) as error:
            raise RuntimeError(one_line(error) + _hint(error)) from None
        return {name: value.numpy() for name, value in _leaves(given).items()}


def _leaves(given: Any) -> dict[str, Tensor]:
    """The tensors of what a network returned: by key, by number, or ``output`` if it is one tensor alone."""
    if isinstance(given, Tensor):
        return {"output": given}
    paths, _ = pytree.tree_flatten_with_path(given)
    named = {".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): leaf for path, leaf in paths}
    return {name: leaf for name, leaf in named.items() if isinstance(leaf, Tensor)}


class Standard(nn.Module):
    """A module whose images are float NCHW RGB in [0, 1], around one of another convention."""

    def __init__(self, model: nn.Module, convention: Convention) -> None:
        super().__init__()
        self.model, self.how = model, convention

    def forward(self, image: Tensor) -> Tensor:
        factor, offset = SPANS[self.how.range]
        raw = (image.flip(1) if self.how.colour == "bgr" else image) * factor + offset
        nhwc = self.how.layout == "nhwc"
        given = _leaves(self.model(raw.permute(0, 2, 3, 1) if nhwc else raw))[self.how.output]
        planes = ((given.permute(0, 3, 1, 2) if nhwc else given) - offset) / factor
        return planes.flip(1) if self.how.colour == "bgr" else planes


def standard(model: nn.Module, convention: Convention) -> tuple[nn.Module, Convention]:
    """``model`` as one that takes and gives float NCHW RGB in [0, 1], and how it then takes images."""
    how = msgspec.structs.replace(convention, layout="nchw", range="1", colour="rgb", output="output")
    return (model if how == convention else Standard(model, convention)), how


class _Chosen(nn.Module):
    """One output of a module."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, image: Tensor) -> Tensor:
        return _leaves(self.model(image))[self.output]


def exported(model: nn.Module, name: str, convention: Convention) -> ModelProto:
    """``model`` in ONNX, in its own convention, with free sizes; its output is called as in ``convention``.

    Raises InputError with torch's whole message if torch cannot export it, or not for all sizes.
    """
    divisor = convention.divisor
    tall, wide = (divisor * max(blocks, -(-pixels // divisor)) for blocks, pixels in ((3, 72), (5, 104)))
    tall, wide = max(tall, convention.least_px), max(wide, convention.least_px + divisor)
    sizes = free_sizes(convention)
    if convention.any_batch:
        sizes[0] = torch.export.Dim("batch")
    chosen = _Chosen(model, convention.output).eval()
    example = _noise(2 if convention.any_batch else 1, tall, wide, convention)
    low = max(tall // 3 // divisor * divisor, convention.least_px)
    other = _noise(1, low + divisor, low, convention)
    # Traced as it runs, a size that the network computes as int(h / 2) becomes a constant; in its bytecode it does not.
    for strict, free in ((False, sizes), (True, dict.fromkeys(sizes, torch.export.Dim.AUTO))):
        try:
            found = to_onnx(chosen, example, free, _IMAGE, convention.output, strict=strict)
        except Exception as error:  # torch names what it cannot follow in many kinds of errors
            if strict:
                break
            reason = one_line(error.__cause__ or error)
            raise InputError(f"torch cannot export {name}: {reason}") from None
        if _agrees(found, chosen, other):
            return found
    raise InputError(
        f"torch cannot export {name} for all sizes: what it wrote differs from the network on "
        f"{'x'.join(map(str, other.shape))}; compute sizes from x.shape with whole numbers (h // 2, not int(h / 2))"
    )


def _noise(count: int, tall: int, wide: int, convention: Convention) -> Tensor:
    shape = (3, tall, wide) if convention.layout == "nchw" else (tall, wide, 3)
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _agrees(model: ModelProto, module: nn.Module, image: Tensor) -> bool:
    """Whether both give about the same; what is not about sizes is compared more strictly later."""
    expected = module(image).numpy()
    try:
        (found,) = OnnxRunner(model, "the graph")(image.numpy()).values()
    except ModelError:
        return False
    with np.errstate(invalid="ignore"):  # whoever gives what is no number is told so later
        return found.shape == expected.shape and not np.any(np.abs(found - expected) > 2e-3 * np.ptp(expected) + 1e-5)


def free_sizes(how: Convention) -> dict[int, Any]:
    """Heights and widths of what a network takes, as torch's export names them, by axis."""
    axes = zip((2, 3) if how.layout == "nchw" else (1, 2), map(torch.export.Dim, ("h", "w")), strict=True)
    return {axis: how.divisor * dim if how.divisor > 1 else dim for axis, dim in axes}
