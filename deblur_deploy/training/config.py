"""What can be chosen about a training run, apart from network and data."""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import numpy as np

from deblur_deploy.errors import InputError, check_bounds
from deblur_deploy.system.hardware import native_bf16

Kind = Literal["muon", "adamw", "adam"]
"""Which optimizer; see ``training.optimizer``."""


Precision = Literal["auto", "fp32", "bf16"]
"""Arithmetic of forward and backward passes; see ``uses_bf16``."""


LOSS_NAMES = ("mse", "l1", "charbonnier", "psnr", "ssim", "fft", "perceptual")
"""What a loss is a weighted sum of; see ``training.losses``."""


_WINDOW_PX = 11
"""Height and width of SSIM's window, as in ``evaluation.quality``, which would bring OpenCV along."""


def check_window(frames_window: tuple[int, int]) -> None:
    """Raise ValueError unless an odd number of frames, three or more, lies in ``frames_window``."""
    fewest, most = frames_window
    if not 3 <= fewest | 1 <= most:
        raise ValueError(f"frames_window is {frames_window}; allowed: (fewest, most) with an odd number from 3 in it")


def loss_terms(text: str) -> list[tuple[str, float]]:
    """Names and weights of ``text``, as in "l1=1,fft=0.05"; raises InputError else."""
    terms = []
    for term in text.split(","):
        name, _, weight = term.strip().partition("=")
        try:
            value = float(weight or 1)
        except ValueError:
            value = -1
        if name not in LOSS_NAMES:
            raise InputError(f"loss {name!r} is unknown; choose from {', '.join(LOSS_NAMES)}")
        if not 0 < value < float("inf"):
            raise InputError(f"loss {term.strip()!r} has no positive weight; write it as {name}=0.5")
        terms.append((name, value))
    return terms


def uses_bf16(precision: Precision, *, cuda: bool) -> bool:
    """Whether ``precision`` is bf16: auto is, on CUDA and on a CPU known to have it; emulated it is 15 times slower."""
    return precision == "bf16" or (precision == "auto" and (cuda or native_bf16() is True))


class Stage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One step of progressive training."""

    share: float
    """Share of all steps."""
    patches: int
    """Patches in a batch."""
    side_px: int
    """Height and width of a patch."""

    def __post_init__(self) -> None:
        for name, value in (("share", self.share), ("patches", self.patches)):
            if not value > 0:
                raise ValueError(f"{name} is {value}; allowed: more than 0")
        check_bounds(self, side_px=(8, 4096))

    @classmethod
    def parse(cls, text: str) -> Stage:
        """``0.35:32x128`` is 35 % of the steps with 32 patches of 128x128 pixels; raises ValueError otherwise."""
        try:
            share, _, shape = text.rpartition(":")
            patches, side = shape.split("x")
            numbers = float(share or 1), int(patches), int(side)
        except ValueError:
            raise ValueError(f"stage is {text!r}; allowed: SHARE:PATCHESxSIDE, as in 0.35:32x128") from None
        return cls(share=numbers[0], patches=numbers[1], side_px=numbers[2])

    def __str__(self) -> str:
        return f"{self.share:g}:{self.patches}x{self.side_px}"


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train, apart from network and data."""

    steps: int = 8000
    """Optimizer steps."""
    stages: tuple[Stage, ...] = (
        Stage(share=0.35, patches=32, side_px=128),
        Stage(share=0.35, patches=16, side_px=192),
        Stage(share=0.30, patches=16, side_px=256),
    )
    """Patch sizes, from low to high."""
    loss: str = "l1=1"
    """Weighted sum of mse, l1, charbonnier, psnr, ssim, fft, perceptual."""
    multi_scale: float = 0.0
    """Weight of the same loss at the decoder's coarser scales (through heads that only training has); 0 is off."""
    optimizer: Kind = "muon"
    """Muon with AdamW for biases and heads; AdamW (decoupled weight decay) or Adam for everything."""
    learning_rate: float = 2e-3
    """Highest learning rate.  AdamW wants 4e-4; at 1e-3 it killed most of the channels of ``hd``'s lower half."""
    weight_decay: float = 1e-4
    """Decoupled weight decay (not with Adam)."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises; it then falls along a cosine to 1 % of its height."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones that are validated and saved; early on it is less."""
    seed: int = 0
    """Seed of data order, blur and initial weights."""
    workers: int = 1
    """Processes that make batches ahead."""
    precision: Precision = "auto"
    """Arithmetic of forward and backward passes; auto is bf16 on CUDA, and on a CPU that has it, as emulating it takes
    fifteen times as long as fp32."""
    validate_every: int = 1000
    """Steps between validations."""
    validate_px: tuple[int, int] = (768, 512)
    """Width and height of the middle of each pair that they look at, so that they take seconds; 0 0 is all of it."""
    log_every: int = 50
    """Steps between lines of log.csv."""
    save_every_s: float = 60
    """Seconds between saved states."""

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "clip_norm", "validate_every", "log_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: more than 0")
        names = ("multi_scale", "weight_decay", "warmup_steps", "seed", "workers", "save_every_s")
        check_bounds(self, **dict.fromkeys(names, (0, None)))
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; allowed: 0 or more, below 1")
        if any(side < _WINDOW_PX for side in self.validate_px if side != 0):
            raise ValueError(f"validate_px is {self.validate_px}; allowed: 0, or {_WINDOW_PX} or more, as SSIM needs")
        if not self.stages:
            raise ValueError("stages is empty; allowed: one or more")

    def schedule(self) -> list[tuple[int, int, int]]:
        """(first step, patches, side in pixels) of each stage."""
        shares = np.cumsum([0.0, *(stage.share for stage in self.stages)])
        firsts = np.rint(shares / shares[-1] * self.steps).astype(int)
        return [(int(first), s.patches, s.side_px) for first, s in zip(firsts, self.stages, strict=False)]

    def rate(self, step: int) -> float:
        """Learning rate at ``step``."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        progress = min(1.0, max(0, step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1))
        return self.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))

    def same_run(self, other: TrainConfig) -> bool:
        """Whether both lead to the same weights, so that one may go on where the other stopped."""
        free = {"workers": 0, "validate_px": (0, 0), "validate_every": 1, "log_every": 1, "save_every_s": 0.0}
        return msgspec.structs.replace(self, **free) == msgspec.structs.replace(other, **free)
