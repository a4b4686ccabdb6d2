"""What stands at the door: which kind of network it is, its hash, its body when that is asked for, its reference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from deblur_deploy.contract import CHECKPOINT_KEY
from deblur_deploy.errors import InputError, ModelError
from deblur_deploy.evaluation.quality import Pair, Restorer
from deblur_deploy.files import existing, sha256
from deblur_deploy.pipeline.config import NetworkConfig
from deblur_deploy.pipeline.convention import Convention, Reference, Runner
from deblur_deploy.pipeline.inputs import Photos
from deblur_deploy.pipeline.network import EVERYTHING_PX, Network, Prepared

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Source:
    """One network, not yet looked into where that takes time."""

    name: str
    """As files and reports call it."""
    parent: str
    """SHA-256 of the file, or of the graph that torch exported."""
    path: Path | None
    prepare: Callable[[], Prepared]
    runner: Callable[[], Runner] | None = None
    """The network as it came; None for our checkpoints."""
    module: nn.Module | None = None
    convention: Convention | None = None
    """How the module takes images; None where there is none, or where it is found out later."""

    def reference(self, convention: Convention) -> Restorer:
        """The network as a ``Restorer``."""
        if self.runner is None:
            from deblur_deploy.training.checkpoint import load_checkpoint
            from deblur_deploy.training.validation import TorchRestorer

            assert self.path is not None
            return TorchRestorer(load_checkpoint(self.path))
        return Reference(self.runner(), convention)


def open_door(checkpoint: Path | None, wish: NetworkConfig, pairs: Photos[Pair], work: Path) -> Source:
    """The network that ``checkpoint`` and ``wish`` name; ``pairs`` are for guesses about how it takes images.

    ``work``: a folder for a checkpoint, where a module turns out to be a U-Net of ours.

    Raises MissingFileError, ModelError, InputError or MissingExtraError, each one line.
    """
    if wish.model:
        from deblur_deploy.pipeline.doors.module import load_module
        from deblur_deploy.training.checkpoint import save_checkpoint
        from deblur_deploy.training.unet import UNet

        module = load_module(wish.model, checkpoint)
        if isinstance(module, UNet):
            path = work / f"{wish.model.rpartition(':')[2]}.safetensors"
            save_checkpoint(module, path)
            return of_checkpoint(path)
        return of_module(module, wish.model.rpartition(":")[2], f"--model {wish.model}", wish, pairs.images)
    assert checkpoint is not None
    existing(checkpoint, kind="file")
    if checkpoint.suffix.lower() == ".onnx":
        return _onnx(checkpoint, wish, pairs)
    if _is_ours(checkpoint):
        _refuse_wishes(wish, checkpoint)
        return of_checkpoint(checkpoint)
    from deblur_deploy.pipeline.doors.weights import SUFFIXES, load_weights

    if checkpoint.suffix.lower() not in SUFFIXES:
        raise ModelError(f"{checkpoint} is no network; give .onnx, {', '.join(SUFFIXES)}, or --model")
    module, notes = load_weights(checkpoint)
    parent = sha256(checkpoint)
    return of_module(
        module, checkpoint.stem, str(checkpoint), wish, pairs.images, notes=notes, path=checkpoint, parent=parent
    )


def _refuse_wishes(wish: NetworkConfig, path: Path) -> None:
    """Raise InputError for what is known of a network of ours, and would be ignored."""
    if wish != NetworkConfig():
        raise InputError(f"{path} is a network of ours; leave out --divisor, --output and --input")


def of_checkpoint(path: Path) -> Source:
    """One of our checkpoints."""

    def prepare() -> Prepared:
        from deblur_deploy.pipeline.body import export_body
        from deblur_deploy.training.checkpoint import load_checkpoint

        unet = load_checkpoint(path)
        return Prepared(
            body=export_body(unet),
            network=Network.of(unet),
            convention=Convention(output="output"),
            about={"network": msgspec.to_builtins(unet.config)},
        )

    return Source(name=path.stem, parent=sha256(path), path=path, prepare=prepare)


def _is_ours(path: Path) -> bool:
    """Whether a file is safetensors with a config of ours in it, or at least may be meant as that."""
    if path.suffix.lower() != ".safetensors":
        return False
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, 1 << 26)))
    except (OSError, ValueError, MemoryError):
        return True  # its own reader says best what is wrong with it
    return not isinstance(header, dict) or CHECKPOINT_KEY in header.get("__metadata__", {})


def _onnx(path: Path, wish: NetworkConfig, pairs: Photos[Pair]) -> Source:
    name = str(path)

    def prepare() -> Prepared:
        from deblur_deploy.pipeline.doors.onnx_file import image_input, plain, read_onnx
        from deblur_deploy.pipeline.doors.own import own_body
        from deblur_deploy.pipeline.doors.recognise import recognise
        from deblur_deploy.pipeline.nodes import OnnxRunner

        model = read_onnx(path)
        if mine := own_body(model, path):
            _refuse_wishes(wish, path)
            body, network, how = mine
            return Prepared(body=body, network=network, convention=how, notes=(f"{path.name} is a file of ours",))
        model, notes = plain(model, name)
        layouts, takes_bytes = image_input(model, name)
        run = OnnxRunner(model, name)
        found, said = recognise(run, name, wish, pairs.images, layouts=layouts, takes_bytes=takes_bytes)
        return prepared(model, found, (*notes, *said), name)

    def runner() -> Runner:
        from deblur_deploy.pipeline.doors.onnx_file import image_input, plain, read_onnx
        from deblur_deploy.pipeline.doors.own import own_body
        from deblur_deploy.pipeline.nodes import OnnxRunner

        model = read_onnx(path)
        if own_body(model, path) is None:
            model, _ = plain(model, name)
            image_input(model, name)
        return OnnxRunner(model, name)

    return Source(name=path.stem, parent=_hash(path), path=path, prepare=prepare, runner=runner)


def _hash(path: Path) -> str:
    """SHA-256 of an ONNX file, and of the files beside it that it keeps weights in."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    whole = sha256(path)
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception:  # read_onnx says what is wrong with it
        return whole
    held = (one.t for node in graph.node for one in node.attribute if one.HasField("t"))
    tensors = (*graph.initializer, *held)
    places = {str(ExternalDataInfo(tensor).location) for tensor in tensors if uses_external_data(tensor)}
    data = [path.parent / place for place in sorted(places) if (path.parent / place).is_file()]
    if not data:
        return whole
    named = [f"{other.name} {sha256(other)}" for other in data]
    return hashlib.sha256("".join([whole, *named]).encode()).hexdigest()


def prepared(model: ModelProto, convention: Convention, notes: Sequence[str], name: str) -> Prepared:
    """The body of ``model``, a plain float graph in its own ``convention``, with the facts about it."""
    from deblur_deploy.pipeline.doors.own import parameters_of
    from deblur_deploy.pipeline.graph import BLOCKS, CORRECTION
    from deblur_deploy.pipeline.int8.coverage import cost_of_body
    from deblur_deploy.pipeline.nodes import OnnxRunner
    from deblur_deploy.pipeline.reach import Reach, reach
    from deblur_deploy.pipeline.rewrite import body_of, prepared

    body, residual = prepared(body_of(model, convention), convention.divisor, convention.least_px)
    run = OnnxRunner(body, name)
    assert run.input == BLOCKS
    if moving := {node.op_type for node in body.graph.node} & {"GridSample", "DeformConv"}:
        # How far they reach is for the image to say.
        seen = Reach(radius_px=EVERYTHING_PX, grid=convention.divisor)
        notes = [*notes, f"{', '.join(sorted(moving))} may move a pixel any way"]
    else:
        seen = reach(lambda image: run(image)[CORRECTION], convention.divisor, convention.least_px)
    macs, values = cost_of_body(body, max(convention.least_px, convention.divisor))
    network = Network(
        size_divisor=seen.grid,
        receptive_radius_px=seen.radius_px,
        macs_per_pixel=macs,
        values_per_pixel=values,
        parameters=parameters_of(body),
        residual=residual,
        least_px=convention.least_px,
        sees_everything=seen.everything,
        any_batch=convention.any_batch,
    )
    said = [*notes]
    if seen.everything:
        said.append("every pixel may change any other: engines run an image whole, and never cut it unasked")
    return Prepared(body=body, network=network, convention=convention, notes=tuple(said))


def of_module(
    module: nn.Module,
    name: str,
    called: str,
    wish: NetworkConfig,
    pairs: Sequence[Pair],
    *,
    notes: Sequence[str] = (),
    path: Path | None = None,
    parent: str | None = None,
    known: Convention | None = None,
) -> Source:
    """Somebody's module, which messages call ``called``: torch exports it here, and the graph's hash names it.

    ``known``: how it takes images, where that need not be found out.
    """
    from deblur_deploy.pipeline.doors.module import ModuleRunner, exported
    from deblur_deploy.pipeline.doors.onnx_file import plain
    from deblur_deploy.pipeline.doors.recognise import recognise

    run = ModuleRunner(module)
    found, told = (known, ()) if known else recognise(run, called, wish, pairs, guess=path is None)
    model, more = plain(exported(module, called, found), called)
    digest = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    said = (*notes, *told, *more)
    return Source(
        name=name,
        parent=parent or digest,
        path=path,
        prepare=lambda: prepared(model, found, said, called),
        runner=lambda: run,
        module=module,
        convention=found,
    )
