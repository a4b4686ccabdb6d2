"""What can be chosen about pruning and recovery; free of torch, since every command line needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import tyro

from deblur_deploy.errors import check_bounds
from deblur_deploy.training.config import Kind, Precision, Stage, TrainConfig, check_window, loss_terms

Importance = Literal["magnitude", "taylor", "activation"]
Target = Literal["macs", "parameters"]

WEAK = (
    "recovered on five built-in photographs only, which is weak: give photographs like those in use with "
    "--prune.recover.data"
)


class RecoverConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a pruned network is fine-tuned."""

    data: tuple[str, ...] = ()
    """Photographs, pairs or videos as deblur-train takes them; without any, five that scikit-image carries."""
    frames: tuple[str, ...] = ()
    """Folders of consecutive frames, or videos, as deblur-train takes them."""
    video: tuple[str, ...] = ()
    """The same at any rate, as deblur-train takes them."""
    frames_window: tuple[int, int] = (5, 31)
    """Fewest and most frames that average to one blur."""
    bank_gb: float = 4.0
    """Disk for patches that are blurred ahead, as in deblur-train; with ``minutes``, or on a GPU, there is no bank."""
    steps: int = 600
    """Optimizer steps, over all rounds; 0 is no recovery."""
    minutes: float | None = None
    """Time for all rounds instead of steps: as many as fit, by the pace of the first few."""
    patches: int = 8
    """Patches in a batch."""
    side_px: int = 192
    """Height and width of a patch."""
    loss: str = "l1=1"
    """Against the truth, and against the unpruned network's image, as in training (but not perceptual)."""
    optimizer: Kind = "adamw"
    """As in training."""
    learning_rate: float = 3e-4
    """Highest learning rate."""
    teacher: float = 1.0
    """Weight of the loss against the unpruned network's image, beside 1 for the truth."""
    features: float = 0.01
    """Weight of the relative squared error of the decoder's features against the unpruned network's; a
    network of your own (--model) has none that are known."""
    precision: Precision = "auto"
    """Arithmetic of training."""
    workers: int = 1
    """Processes that make batches ahead."""
    seed: int = 0
    """Seed of data order and blur."""

    def __post_init__(self) -> None:
        names = ("steps", "teacher", "features", "workers", "seed", "bank_gb")
        check_bounds(self, patches=(1, None), **dict.fromkeys(names, (0, None)))
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes is {self.minutes:g}; allowed: more than 0")
        check_window(self.frames_window)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate:g}; allowed: more than 0")
        if "perceptual" in dict(loss_terms(self.loss)):
            raise ValueError(f"loss is {self.loss!r}; allowed: what needs no weights of its own, so not perceptual")
        Stage(share=1, patches=self.patches, side_px=self.side_px)

    @property
    def weak(self) -> bool:
        """Whether there is no data but the built-in photographs."""
        return not (self.data or self.frames or self.video)

    def training(self, steps: int) -> TrainConfig:
        """The training run of ``steps`` steps."""
        return TrainConfig(
            steps=steps,
            stages=(Stage(share=1, patches=self.patches, side_px=self.side_px),),
            loss=self.loss,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            warmup_steps=min(100, steps // 10),
            precision=self.precision,
            workers=self.workers,
            seed=self.seed,
            validate_every=max(1, -(-steps // 4)),
            log_every=min(50, max(1, steps // 10)),
        )


class PruneConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much smaller the network gets, by what measure, and how it recovers; without a target it stays as it is."""

    macs: float | None = None
    """Share of the multiply-accumulates to keep, as in 0.5."""
    parameters: float | None = None
    """Share of the parameters to keep."""
    target_ms: float | None = None
    """Latency that the exported network must have, on this machine."""
    at: Annotated[str, tyro.conf.arg(prefix_name=False, metavar="WIDTHxHEIGHT")] = "1280x720"
    """Size of the image that target-ms is for."""
    provider: Annotated[str, tyro.conf.arg(prefix_name=False)] = "cpu"
    """Execution provider that target-ms is for."""
    precision: Literal["int8", "fp16", "fp32"] = "int8"
    """Variant that target-ms is for; a network of your own (--model) is timed in fp32."""
    importance: Importance = "taylor"
    """Which channels go first: those of the smallest weights, of the least effect on the loss, or of the least effect
    on the layers that read them."""
    multiple: int = 16
    """Widths become multiples of this (of less, in layers narrower than twice of it): what kernels like."""
    balance: float = 0.8
    """Every layer keeps about this part of the share of its channels that the fullest keeps (those that never fire
    go first): 0 lets importance alone decide, 1 narrows all layers alike."""
    rounds: int = 1
    """Times that the network is pruned and recovers, each time by the same factor; only 1 with --model."""
    recover: RecoverConfig = RecoverConfig()
    """Fine-tuning afterwards."""

    def __post_init__(self) -> None:
        for name in ("macs", "parameters"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name} is {share:g}; allowed: more than 0, up to 1 (the share to keep)")
        if self.target_ms is not None and not 0 < self.target_ms < float("inf"):
            raise ValueError(f"target_ms is {self.target_ms:g}; allowed: more than 0")
        given = [name for name in ("macs", "parameters", "target_ms") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given together; allowed: one of them")
        check_bounds(self, balance=(0, 1), multiple=(1, None), rounds=(1, None))
        self.size()

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return not self.macs is self.parameters is self.target_ms is None

    def under(self, folder: Path) -> PruneConfig:
        """The same with the training data, whose paths are relative to ``folder``, named from wherever one stands."""
        paths = {
            name: tuple(str(folder.absolute() / text) for text in getattr(self.recover, name))
            for name in ("data", "frames", "video")
        }
        return msgspec.structs.replace(self, recover=msgspec.structs.replace(self.recover, **paths))

    def missed(self, ms: float) -> list[str]:
        """What there is to say if the chosen network, timed once more, takes ``ms``."""
        if self.target_ms is None or ms <= self.target_ms:
            return []
        said = f"timed again, the network takes {ms:.1f} ms and not {self.target_ms:g}: this machine is not steady"
        return [f"{said}, or is busy; ask for less"]

    def size(self) -> tuple[int, int]:
        """(width, height) of ``at``."""
        width, _, height = self.at.partition("x")
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            raise ValueError(f"at is {self.at!r}; allowed: WIDTHxHEIGHT, as in 1280x720")
        return int(width), int(height)
