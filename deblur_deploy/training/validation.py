"""How good a network is on pairs, as a mean and as the image that fares worst."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
import torch

from deblur_deploy.evaluation.quality import Pair, PairSet, Quality, mean_quality, measure
from deblur_deploy.media.images import Image
from deblur_deploy.training.unet import UNet

PairSets = Mapping[str, Iterable[Pair]]
"""Validation pairs by the name of their set; gone through once a validation."""


@dataclass(frozen=True)
class TorchRestorer:
    """A network as a ``Restorer``: the plain float reference that everything else is compared with."""

    model: UNet

    @torch.inference_mode()
    def __call__(self, image: Image) -> Image:
        device = next(self.model.parameters()).device
        batch = torch.from_numpy(np.ascontiguousarray(image)).to(device).permute(2, 0, 1)[None].float() / 255
        levels = (self.model(batch).clamp(0, 1) * 255).round().to(torch.uint8)
        restored: Image = levels[0].permute(1, 2, 0).contiguous().cpu().numpy()
        return restored


@dataclass(frozen=True, kw_only=True)
class SetQuality:
    """Quality on one set of pairs."""

    mean: Quality
    worst_gain_db: float
    """The lowest gain of one image; below zero, the network made it worse."""
    worst: str
    """Which image that is."""


def identity(sets: PairSets) -> str:
    """Names the pictures of all sets: those on disk by the sizes of their files too, as many sets call them alike."""
    named = [
        [name, *(f"{path.name} {path.stat().st_size}" for two in pairs.paths for path in two)]
        if isinstance(pairs, PairSet)
        else [name, *(pair.name for pair in pairs)]
        for name, pairs in sorted(sets.items())
    ]
    return sha256(json.dumps(named).encode()).hexdigest()


def middle(pair: Pair, width: int, height: int) -> Pair:
    """The middle of a pair, at most ``width`` x ``height``; 0 is no limit."""
    inside = tuple(
        slice((have - want) // 2, (have - want) // 2 + want) if 0 < want < have else slice(None)
        for have, want in zip(pair.sharp.shape, (height, width), strict=False)
    )
    return replace(pair, blurred=pair.blurred[inside], sharp=pair.sharp[inside])


def validate(model: UNet, sets: PairSets, side_px: tuple[int, int] = (0, 0)) -> dict[str, SetQuality]:
    """Quality of ``model`` on each named set of pairs, or on the middle of each pair (width, height; 0 is all)."""
    restorer, found = TorchRestorer(model), {}
    for name, pairs in sets.items():
        rows = [(pair.name, measure(restorer, middle(pair, *side_px))) for pair in pairs]
        worst, quality = min(rows, key=lambda row: row[1].gain_db)
        found[name] = SetQuality(mean=mean_quality(row for _, row in rows), worst_gain_db=quality.gain_db, worst=worst)
    return found
