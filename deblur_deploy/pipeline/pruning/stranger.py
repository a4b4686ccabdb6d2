"""Pruning of somebody else's network: any ``nn.Module`` from images to images of the same size.

Its shape is no ``UNetConfig``, so the result travels as what torch exported (``module.pt2``, which runs without the
code that built it) and as ONNX that keeps the contract: ``fp32.onnx`` and ``float.onnx``, which every engine runs.
Recovery knows no features and does not resume (see ``finetune``), and there is no int8 for it here: a latency that is
asked for is that of ``fp32.onnx``.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import msgspec
import numpy as np
import onnx
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from deblur_deploy import __version__
from deblur_deploy.contract import Io, ModelContract
from deblur_deploy.errors import DeblurError, InputError, VerificationError
from deblur_deploy.evaluation.machine import machine, package_versions
from deblur_deploy.evaluation.quality import psnr
from deblur_deploy.files import existing, refuse_existing, sha256, writing_folder
from deblur_deploy.media.images import Image
from deblur_deploy.pipeline.graph import BLOCKS, CORRECTION, OPSET, assemble
from deblur_deploy.pipeline.photos import builtin_pairs
from deblur_deploy.pipeline.pruning.channels import Channels
from deblur_deploy.pipeline.pruning.config import WEAK, PruneConfig
from deblur_deploy.pipeline.pruning.finetune import finetune
from deblur_deploy.pipeline.pruning.fit import fit, time_files
from deblur_deploy.pipeline.pruning.prune import Plan
from deblur_deploy.pipeline.pruning.recover import samples_for
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.training.unet import UNetConfig, pad_to_multiple, parameter_count


def load_module(name: str, weights: Path | None = None) -> nn.Module:
    """What ``package.module:build`` returns when it is called, in eval mode, with ``weights`` (safetensors) in it.

    The working folder is searched too.  Raises InputError that says what is missing.
    """
    place, colon, builder = name.partition(":")
    if not (place and colon and builder):
        raise InputError(f"--model is {name!r}; allowed: package.module:build, a function that returns the network")
    sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        model = getattr(importlib.import_module(place), builder)()
    except ImportError as error:
        raise InputError(f"--model {name}: cannot import {place} ({error})") from None
    except TypeError as error:
        raise InputError(f"--model {name}: {builder} must work without arguments ({error})") from None
    except Exception as error:  # it is somebody else's code, and may fail with anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"--model {name}: {reason}") from None
    finally:
        sys.path.pop(0)
    if not isinstance(model, nn.Module):
        raise InputError(f"--model {name} gave {type(model).__name__}; a torch.nn.Module is needed")
    if weights:
        try:
            model.load_state_dict(load_file(existing(weights, kind="file")))
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"{weights} does not hold the weights of {name}: {reason}") from None
    return model.eval().requires_grad_()


def prune_stranger(
    model: nn.Module,
    config: PruneConfig,
    out: Path,
    *,
    divisor: int,
    force: bool,
    on_progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Prune ``model`` to a share of its cost or to a latency, write the folder ``out``; returns its ``pruning.json``.

    ``divisor``: the sizes that the network takes are multiples of this power of two; the ONNX files pad to it.
    Raises InputError for a network that cannot be pruned or a target that is out of reach.
    """
    refuse_existing(out, force=force)
    shape = _shape(divisor)
    if config.rounds > 1:
        raise InputError(f"rounds is {config.rounds}; allowed for a network of your own: 1")
    side = 64 * -(-divisor // 64)
    example = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    channels = Channels(model, example, probe=True)
    with TemporaryDirectory(prefix="deblur-prune-") as unpacked:
        samples = samples_for(config.recover, Path(unpacked), count=4)
    plan, pairs, notes = Plan(channels, config, samples), builtin_pairs(), list[str]()

    def write(net: nn.Module, widths: Mapping[str, int], folder: Path, *, whole: bool = True) -> None:
        _write(net, example, shape, channels.cost(widths)[0] / side**2, folder, whole=whole)

    def timed(*several: Mapping[str, int]) -> list[float]:
        with TemporaryDirectory(prefix="deblur-fit-") as name:
            folders = [Path(name, str(number)) for number in range(len(several))]
            for widths, folder in zip(several, folders, strict=True):
                folder.mkdir()
                write(plan.network(widths), widths, folder, whole=False)
            files = [folder / "fp32.onnx" for folder in folders]
            took = [timing.median_ms for timing in time_files(files, config, pairs[0].blurred)]
        on_progress(f"timed at {config.at}, ms: " + ", ".join(f"{ms:.1f}" for ms in took))
        return took

    share = config.macs or config.parameters or 1.0
    if config.target_ms is not None:
        found = fit(plan, config.target_ms, lambda widths: timed(widths)[0], Plan.widths)
        share, notes = found.share, [found.note] if found.note else []
    chosen = plan.widths(share)
    latency = None
    try:
        dense_ms, ms = timed({}, chosen)
        latency = {"dense_ms": dense_ms, "ms": ms, "provider": config.provider, "at": config.at}
        notes += config.missed(ms)
    except DeblurError as error:
        if config.target_ms is not None:
            raise
        notes.append(f"not timed: {error}")
    nets = {"dense": model, "pruned": plan.network(chosen)}
    recover = config.recover
    if chosen and (recover.steps or recover.minutes):
        notes += [WEAK] if recover.weak else []

        def watch(step: int, loss: float) -> None:
            if step % _TOLD == 0:
                on_progress(f"recovery, step {step}, loss {loss:.4f}")

        with TemporaryDirectory(prefix="deblur-prune-") as unpacked:
            nets["recovered"] = finetune(nets["pruned"], model, recover, divisor, Path(unpacked), watch)
    quality = {
        name: sum(psnr(_restored(net, pair.blurred, divisor), pair.sharp) for pair in pairs) / len(pairs)
        for name, net in nets.items()
    }
    best = max(list(nets)[1:], key=quality.__getitem__)
    if best != list(nets)[-1]:
        notes.append("recovery only made it worse; what is written is the pruned network as it was before")
    small = nets[best]
    with writing_folder(out, force=force) as folder:
        write(small, chosen, folder)
        _check(folder / "fp32.onnx", small, pairs[0].blurred, divisor)
        record = {
            "macs_per_pixel": [channels.cost(widths)[0] / side**2 for widths in ({}, chosen)],
            "parameters": [parameter_count(model), parameter_count(small)],
            "latency": latency,
            "widths": {
                part.layer: [channels.costs[part.layer].outputs, chosen.get(name, group.width)]
                for name, group in channels.groups.items()
                for part in group.slices
                if part.of_outputs
            },
            "left": channels.left,
            "psnr": quality,
            "notes": notes,
            "config": msgspec.to_builtins(config),
            "machine": machine(),
            "versions": package_versions(),
        }
        (folder / "pruning.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


_TOLD = 50
"""Steps of recovery between two lines about it."""


def _write(
    net: nn.Module, example: Tensor, shape: UNetConfig, macs_per_pixel: float, folder: Path, *, whole: bool
) -> None:
    """``net`` as an exported program and as ONNX, or only what is timed of it; raises InputError if torch cannot."""
    divisor, side_dim = shape.size_divisor, torch.export.Dim
    sizes = {0: side_dim("batch"), 2: divisor * side_dim("h"), 3: divisor * side_dim("w")}
    try:
        program = torch.export.export(net, (torch.cat([example] * 2),), dynamic_shapes=(sizes,))
    except Exception as error:  # torch.export names what it cannot follow in many kinds of errors
        raise InputError(f"torch cannot export the network: {' '.join(str(error).split())[:200]}") from None
    torch.export.save(program, folder / "module.pt2")
    body, parent = _body(program), sha256(folder / "module.pt2")
    radius = reach(net, divisor) if whole else _EVERYTHING
    ios: tuple[tuple[str, Io], ...] = (("fp32", "uint8"), ("float", "float32"))
    for name, io in ios if whole else ios[:1]:
        graph = assemble(body, shape, layout="planes", io=io)
        contract = ModelContract(
            io=io,
            precision="fp32",
            size_divisor=divisor,
            receptive_radius_px=radius,
            macs_per_pixel=macs_per_pixel,
            parent_sha256=parent,
            library_version=__version__,
        )
        onnx.helper.set_model_props(graph, contract.to_metadata())
        onnx.save(graph, folder / f"{name}.onnx")


_EVERYTHING = 1 << 20
"""Radius in pixels that no image exceeds."""


def reach(model: nn.Module, divisor: int) -> int:
    """How far away an input pixel can change an output pixel, in pixels, as gradients on noise show it.

    A network that sees all of any image has no such radius; it gets one that no image exceeds.
    """
    for side in (divisor * -(-pixels // divisor) for pixels in (64, 128, 256, 512)):
        image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1), requires_grad=True)
        middle = side // 2 // divisor * divisor
        with torch.enable_grad():
            # One block of the grid, since pooling and rearrangements treat the pixels of a block differently.
            model(image)[..., middle : middle + divisor, middle : middle + divisor].sum().backward()
        assert image.grad is not None
        seen = image.grad.abs().amax(dim=(0, 1))
        places = torch.cat([seen.amax(dim=axis).nonzero().flatten() for axis in (0, 1)])
        radius = int(max(middle + divisor - 1 - places.min(), places.max() - middle))
        if radius < middle - divisor:
            return radius
    return _EVERYTHING


def _shape(divisor: int) -> UNetConfig:
    """What the graph around the body has to know: no stem, nothing added, and the divisor."""
    levels = divisor.bit_length()
    if divisor < 1 or divisor & (divisor - 1) or levels > 8:
        raise InputError(f"--divisor is {divisor}; allowed: 1, 2, 4 ... 128")
    inner = ((1,),) * (levels - 1)
    return UNetConfig(encoder=(*inner, (1,)), up=(1,) * (levels - 1), decoder=inner, residual=False)


def _body(program: torch.export.ExportedProgram) -> onnx.ModelProto:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in graph.export_body
        try:
            exported = torch.onnx.export(
                program,
                input_names=[BLOCKS],
                output_names=[CORRECTION],
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # what it cannot convert, it names in the middle of many lines
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            raise InputError(f"torch cannot write the network as ONNX: {reason}") from None
    assert exported is not None
    model = cast("onnx.ModelProto", exported.model_proto)
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    return model


@torch.no_grad()
def _restored(model: nn.Module, image: Image, divisor: int) -> Image:
    batch = pad_to_multiple(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255, divisor)
    levels = (model(batch).clamp(0, 1) * 255).round().to(torch.uint8)
    restored: Image = levels[0].permute(1, 2, 0)[: image.shape[0], : image.shape[1]].contiguous().numpy()
    return restored


def _check(path: Path, model: nn.Module, image: Image, divisor: int) -> None:
    """What the file gives is what torch gives, to one level; raises VerificationError."""
    with DeblurEngine(path, provider="cpu") as engine:
        difference = np.abs(engine(image).astype(np.int16) - _restored(model, image, divisor)).max()
    if difference > 1:
        raise VerificationError(f"{path.name} differs from torch by {difference} levels; 1 is allowed")
