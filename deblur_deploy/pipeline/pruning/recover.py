"""Recovery: the pruned network is fine-tuned on truth and on what the unpruned one makes of the same photographs.

It is an ordinary training run of ``training.train`` whose loss also compares with the teacher (Hinton et al. 2015), in
the image and, through 1x1 projections that only training has, in the decoder's features (Romero et al., FitNets, 2015).
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deblur_deploy.errors import InputError
from deblur_deploy.files import writing_file
from deblur_deploy.pipeline.photos import builtin_photographs
from deblur_deploy.pipeline.pruning.config import RecoverConfig
from deblur_deploy.system.threads import usable_cores
from deblur_deploy.training.bank import Bank, bank_folder
from deblur_deploy.training.batches import Batches
from deblur_deploy.training.blur import BlurConfig
from deblur_deploy.training.checkpoint import load_checkpoint
from deblur_deploy.training.config import TrainConfig
from deblur_deploy.training.discovery import find_sources
from deblur_deploy.training.losses import Loss
from deblur_deploy.training.sources import ImageCache, Photos, Source
from deblur_deploy.training.supervision import Supervised
from deblur_deploy.training.train import Progress, Trainer
from deblur_deploy.training.unet import UNet, pad_to_multiple
from deblur_deploy.training.validation import PairSets, validate


class Distilled(Supervised):
    """A student that is trained beside its frozen teacher; both see the same blurred patches."""

    def __init__(self, student: UNet, teacher: UNet, *, output: float, features: float) -> None:
        super().__init__(student, multi_scale=False)
        # Copied, since training moves it to its device.
        self.teacher = copy.deepcopy(teacher).requires_grad_(requires_grad=False).eval()
        self.output, self.weight = output, features
        ours, theirs = ([block[-1] for block in unet.config.decoder] for unet in (student, teacher))
        if features:
            self.heads = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(ours, theirs, strict=True))
            for head in self.heads:
                # From zero, so that a projection that knows nothing yet does not drag the student along.
                nn.init.zeros_(head.weight)  # type: ignore[arg-type]
                nn.init.zeros_(head.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> list[Tensor]:
        """The student's image, the teacher's, then projected and wanted feature of each decoder level in turn."""
        height, width = image.shape[-2:]
        padded = pad_to_multiple(image, self.unet.config.size_divisor)
        ours = self.unet.features(padded)
        with torch.no_grad():
            theirs = self.teacher.features(padded)
        found = [unet.composed(padded, features[-1])[..., :height, :width]
                 for unet, features in ((self.unet, ours), (self.teacher, theirs))]  # fmt: skip
        for head, our, their in zip(self.heads, ours[1:], theirs[1:], strict=False):
            found += [head(our), their]
        return found

    def loss(self, images: list[Tensor], truth: Tensor, loss: Loss, multi_scale: float) -> Tensor:  # noqa: ARG002
        """``loss`` against the truth and the teacher, and the relative error of the features."""
        image, wanted, *features = images
        total = loss(image, truth) + self.output * loss(image, wanted)
        errors = [
            F.mse_loss(ours, theirs) / theirs.square().mean().clamp_min(1e-8)
            for ours, theirs in zip(features[::2], features[1::2], strict=True)
        ]
        return total + self.weight * torch.stack(errors).mean() if errors else total


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What fine-tuning made of a pruned network."""

    unet: UNet
    """The best by validation: the pruned one itself, if it only became worse."""
    steps: int
    seconds: float


def batches_for(config: RecoverConfig, training: TrainConfig, folder: Path) -> Batches:
    """What recovery trains on; videos are unpacked into ``folder``.  Raises InputError for data of no use."""
    weighted: list[tuple[Source, float]] = [(Photos(builtin_photographs()), 1.0)]
    if not config.weak:
        # A bank is filled by one process a core, each with a cache of its own.
        cache, frames = ImageCache(ImageCache.budget_bytes // usable_cores()), folder / "frames"
        found = find_sources(
            config.data, config.frames, config.video, frames_folder=frames, cache=cache, window=config.frames_window
        )
        weighted = [pair for item in found for pair in item.weighted()]
    return Batches(weighted, BlurConfig(), training.schedule(), seed=config.seed)


def banked(
    batches: Batches,
    config: RecoverConfig,
    device: torch.device,
    filling: Callable[[int, int], object] = lambda _made, _of: None,
) -> Batches | Bank:
    """``batches``, by way of a bank where recovery has one."""
    if not config.bank_gb or config.minutes is not None or device.type != "cpu":
        return batches
    return Bank(batches, bank_folder(), batches.identity(), int(config.bank_gb * 2**30), watch=filling)


def samples_for(config: RecoverConfig, folder: Path, count: int = 8, side_px: int = 128) -> list[tuple[Tensor, Tensor]]:
    """``count`` batches of (blurred, sharp), float NCHW in [0, 1], to look at the network with before it trains."""
    training = msgspec.structs.replace(config, patches=4, side_px=side_px, seed=config.seed + 1).training(count)
    batches = batches_for(config, training, folder)
    return [
        (batch.blurred.float() / 255, batch.sharp.float() / 255) for batch in map(batches.__getitem__, range(count))
    ]


def recover(
    student: UNet,
    teacher: UNet,
    config: RecoverConfig,
    out: Path,
    sets: PairSets,
    watch: Callable[[Progress], None] | None = None,
    filling: Callable[[int, int], object] = lambda _made, _of: None,
) -> Recovered:
    """Fine-tune a copy of ``student``; validation on ``sets`` says which step was the best.

    ``watch`` is told of every step, ``filling`` how many of how many patches were blurred ahead.

    ``out`` keeps the run's state: the same call goes on where an interrupted one stopped.  Raises KeyboardInterrupt,
    everything saved, if a signal asks to stop; InputError if ``out`` holds another run.
    """
    start = time.perf_counter()
    steps = config.steps if config.minutes is None else _steps_in(config.minutes, student, teacher, config, out)
    if steps == 0:
        return Recovered(unet=student, steps=0, seconds=0.0)
    training = config.training(steps)
    batches = batches_for(config, training, out)
    trainer = _trainer(student, teacher, config, training, out, _identity(batches, teacher, config))
    if (out / "state.safetensors").exists():
        trainer.load_state()
    elif sets:
        before = validate(student, sets, training.validate_px)
        trainer.best_gain = sum(row.mean.gain_db for row in before.values()) / len(before)
    trainer.run(banked(batches, config, trainer.device, filling), sets, watch)
    if trainer.step < steps:
        raise KeyboardInterrupt
    best = out / "best.safetensors"
    unet = load_checkpoint(best) if best.exists() else student
    return Recovered(unet=unet, steps=steps, seconds=time.perf_counter() - start)


def _trainer(
    student: UNet, teacher: UNet, config: RecoverConfig, training: TrainConfig, out: Path, identity: str = ""
) -> Trainer:
    copied = copy.deepcopy(student)
    both = Distilled(copied, teacher, output=config.teacher, features=config.features)
    return Trainer(copied, training, out, data_id=identity, supervised=both)


def _identity(batches: Batches, teacher: UNet, config: RecoverConfig) -> str:
    """Names the data and the teacher, so that no other run is resumed."""
    weights = [hashlib.sha256(value.detach().cpu().numpy().tobytes()).hexdigest() for value in teacher.parameters()]
    content = [batches.identity(), config.teacher, config.features, weights]
    return hashlib.sha256(msgspec.json.encode(content)).hexdigest()


def _steps_in(minutes: float, student: UNet, teacher: UNet, config: RecoverConfig, out: Path) -> int:
    """Steps that fit, by the pace of the first few; decided once, so that a run can be resumed."""
    decided = out / "steps.txt"
    if decided.exists() and (text := decided.read_text(errors="replace")).isdecimal():
        return int(text)
    stamps: list[float] = []
    with TemporaryDirectory(prefix="deblur-pace-") as folder:
        # A step with a validation behind it takes longer, so only the last one has it.
        training = msgspec.structs.replace(config.training(_PACE_STEPS), validate_every=_PACE_STEPS)
        trainer = _trainer(student, teacher, config, training, Path(folder))
        trainer.run(batches_for(config, training, out), {}, lambda _: stamps.append(time.perf_counter()))
    if len(stamps) < _PACE_STEPS:
        raise KeyboardInterrupt
    pace = median(b - a for a, b in pairwise(stamps))
    steps = int(60 * minutes / pace)
    if steps < 1:
        raise InputError(f"minutes is {minutes:g}, but one step takes {pace:.1f} s; give more")
    with writing_file(decided) as temporary:
        temporary.write_text(str(steps))
    return steps


_PACE_STEPS = 6
