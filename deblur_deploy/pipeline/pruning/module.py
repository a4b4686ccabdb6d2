"""Pruning of somebody else's network: any ``nn.Module`` from images to images of the same size.

What comes out is a module again, and goes the way of any other.  Its shape is no config, so it also travels as what
torch exported (``module.pt2``, which runs without the code that built it).  Recovery knows no features and does not
resume (see ``finetune``); a latency that is asked for is that of the fp32 file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import torch
from torch import nn

from deblur_deploy.errors import DeblurError, InputError, one_line
from deblur_deploy.evaluation.quality import Pair, psnr
from deblur_deploy.pipeline.config import NetworkConfig
from deblur_deploy.pipeline.convention import Convention, Reference
from deblur_deploy.pipeline.doors.module import ModuleRunner, exported, free_sizes, standard
from deblur_deploy.pipeline.doors.onnx_file import plain
from deblur_deploy.pipeline.doors.source import Source, of_module
from deblur_deploy.pipeline.export import Exporter
from deblur_deploy.pipeline.inputs import Photos
from deblur_deploy.pipeline.network import EVERYTHING_PX, Network
from deblur_deploy.pipeline.pruning.channels import Channels, named_failures
from deblur_deploy.pipeline.pruning.config import WEAK, PruneConfig
from deblur_deploy.pipeline.pruning.finetune import finetune
from deblur_deploy.pipeline.pruning.fit import fit, time_files
from deblur_deploy.pipeline.pruning.limit import time_limit
from deblur_deploy.pipeline.pruning.prune import Plan
from deblur_deploy.pipeline.pruning.recover import samples_for
from deblur_deploy.pipeline.pruning.shrink import Smaller
from deblur_deploy.pipeline.rewrite import body_of
from deblur_deploy.training.unet import parameter_count

MODULE = "module.pt2"
_TRACING_S = 25
"""Seconds that torch-pruning may take to trace a network: it never ends for some."""
_TOLD = 50
"""Steps of recovery between two lines about it."""


def prune_module(
    source: Source,
    config: PruneConfig,
    wish: NetworkConfig,
    pairs: Photos[Pair],
    work: Path,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Smaller:
    """Prune the module of ``source`` to a share of its cost or to a latency; ``work`` is for files that stay.

    Raises InputError for a network that cannot be pruned, if a share was asked for, or a target that is out of reach.
    """
    assert source.module is not None
    assert source.convention is not None
    if config.rounds > 1:
        raise InputError(f"rounds is {config.rounds}; allowed for a network of your own: 1")
    share = config.macs or config.parameters
    if share == 1:
        on_progress("note: nothing is pruned for a share of 1")
        return Smaller(source=source, record={})
    module, how = standard(source.module, source.convention)
    try:
        job = _Job(module, how, config, pairs.images, on_progress)
    except InputError as error:
        if share is not None:
            raise
        on_progress(f"note: not pruned: {error}")
        return Smaller(source=source, record={})
    small, record = job.run(share or 1.0)
    for note in record["notes"]:
        on_progress(f"note: {note}")
    for name, why in record["left"].items():
        on_progress(f"{name} is left as it is: {why}")
    called = f"{source.name}, pruned,"
    smaller = of_module(small, source.name, called, wish, pairs.images, path=source.path, known=how)
    file = work / MODULE
    # No square, which a network may take another road for.
    example = torch.rand(1, 3, job.side, job.side + how.divisor)
    try:
        torch.export.save(torch.export.export(small, (example,), dynamic_shapes=(free_sizes(how),)), file)
    except Exception as error:  # the ONNX export, which has more ways than this one, has worked
        on_progress(f"note: no {MODULE} in the bundle: {one_line(error)}")
        return Smaller(source=smaller, record=record)
    return Smaller(source=smaller, record={**record, "checkpoint": MODULE, "sha256": smaller.parent}, file=file)


class _Job:
    """One network on its way to a smaller one."""

    def __init__(
        self,
        module: nn.Module,
        how: Convention,
        config: PruneConfig,
        pairs: Sequence[Pair],
        on_progress: Callable[[str], None],
    ) -> None:
        self.module, self.how, self.config, self.pairs, self.say = module, how, config, pairs, on_progress
        self.side = max(64 * -(-how.divisor // 64), how.least_px)
        if self.side % how.divisor:
            self.side = how.divisor * -(-64 // how.divisor)
        example = torch.rand(1, 3, self.side, self.side, generator=torch.Generator().manual_seed(0))
        on_progress("which channels belong together")
        with time_limit(_TRACING_S, module, "torch-pruning does not come to an end"):
            self.channels = Channels(module, example, probe=True)
        with TemporaryDirectory(prefix="deblur-prune-") as unpacked:
            side = how.divisor * -(-max(128, how.least_px) // how.divisor)
            samples = samples_for(config.recover, Path(unpacked), count=4, side_px=side)
        with named_failures(module):
            self.plan = Plan(self.channels, config, samples)

    def timed(self, *several: Mapping[str, int]) -> list[float]:
        """Milliseconds of networks of these widths, in turn."""
        makes = [partial(fp32_file, self.plan.network(widths), self.how) for widths in several]
        took = [timing.median_ms for timing in time_files(makes, self.config, self.pairs[0].blurred)]
        self.say(f"timed at {self.config.at}, ms: " + ", ".join(f"{ms:.1f}" for ms in took))
        return took

    def run(self, share: float) -> tuple[nn.Module, dict[str, Any]]:
        """The pruned and recovered network, and what there is to say about it."""
        config, notes, latency = self.config, list[str](), None
        if config.target_ms is not None:
            found = fit(self.plan, config.target_ms, lambda widths: self.timed(widths)[0], Plan.widths)
            share, notes = found.share, [found.note] if found.note else []
        chosen = self.plan.widths(share)
        where = {"precision": "fp32", "provider": config.provider, "at": config.at}
        try:
            dense_ms, ms = self.timed({}, chosen)
            latency = {"dense_ms": dense_ms, "ms": ms, **where}
            notes += config.missed(ms)
        except DeblurError as error:
            if config.target_ms is not None:
                raise
            notes.append(f"not timed: {error}")
        nets = {"dense": self.module, "pruned": self.plan.network(chosen)}
        if chosen and (config.recover.steps or config.recover.minutes):
            notes += [WEAK] if config.recover.weak else []
            nets["recovered"] = self._recovered(nets["pruned"])
        quality = {name: self._quality(net) for name, net in nets.items()}
        best = max(list(nets)[1:], key=quality.__getitem__)
        if best != list(nets)[-1]:
            notes.append("recovery only made it worse; what is written is the pruned network as it was before")
        small, pixels = nets[best], self.side**2
        widths = {
            part.layer.removeprefix("model."): [self.channels.costs[part.layer].outputs, chosen.get(name, group.width)]
            for name, group in self.channels.groups.items()
            for part in group.slices
            if part.of_outputs
        }
        return small, {
            "macs_per_pixel": [self.channels.cost(sizes)[0] / pixels for sizes in ({}, chosen)],
            "parameters": [parameter_count(self.module), parameter_count(small)],
            "latency": latency,
            "widths": widths,
            "left": self.channels.left,
            "psnr": quality,
            "notes": notes,
            "config": msgspec.to_builtins(config),
        }

    def _recovered(self, pruned: nn.Module) -> nn.Module:
        def watch(step: int, loss: float) -> None:
            if step % _TOLD == 0:
                self.say(f"recovery, step {step}, loss {loss:.4f}")

        with TemporaryDirectory(prefix="deblur-prune-") as unpacked:
            return finetune(pruned, self.module, self.config.recover, self.how.divisor, Path(unpacked), watch)

    def _quality(self, net: nn.Module) -> float:
        restore = Reference(ModuleRunner(net), self.how)
        return sum(psnr(restore(pair.blurred), pair.sharp) for pair in self.pairs) / len(self.pairs)


def fp32_file(module: nn.Module, convention: Convention, folder: Path) -> Path:
    """A module as an fp32 file of ours in ``folder``, to time it: nothing about its reach is found out."""
    model, _ = plain(exported(module, "the network", convention), "the network")
    network = Network(
        size_divisor=convention.divisor,
        receptive_radius_px=EVERYTHING_PX,
        macs_per_pixel=0.0,
        parameters=0,
        least_px=convention.least_px,
        any_batch=convention.any_batch,
    )
    return Exporter(network, body_of(model, convention), "0" * 64, folder).fp32().path
