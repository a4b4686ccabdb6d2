"""Ordinary video as a source: between two sharp frames, blur is made along the motion that really was there.

At 30 frames a second an average of frames shows ghosts.  So the motion between neighbours is found by DIS optical flow
(Kroeger et al., 2016), and the light of a virtual exposure around the middle frame is averaged along it: at each
moment the two frames around it, moved towards that moment, are blended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from deblur_deploy.errors import InputError
from deblur_deploy.media.images import Image
from deblur_deploy.training.blur import BlurConfig, draw_gamma
from deblur_deploy.training.motion import Array
from deblur_deploy.training.sources import (
    VARIED,
    ImageCache,
    Patch,
    corner,
    detail,
    larger_px,
    readable,
    reflected,
    varied_pair,
)

EXPOSURE = (0.1, 1.6)
"""Shortest and longest exposure, in frame intervals: above 1, slow stretches give strong blur as well."""
_PAD = 48
"""Pixels around a patch in which flow is found too, so that what moves in comes from somewhere."""
_TRIES = 8
_CUT = 14.0
"""Levels that motion may leave unexplained; fast ones leave 4 to 9, another scene 25 or more."""


@dataclass
class Film:
    """Consecutive frames of one shot at any rate, the sharp ones against blur made around them."""

    paths: list[Path]
    cache: ImageCache = field(default_factory=ImageCache)
    blur: BlurConfig = field(default_factory=BlurConfig)
    """Only its gammas matter here."""
    varied: float = VARIED

    def files(self) -> Sequence[Path]:
        return self.paths

    def _three(self, first: int) -> Sequence[Path]:
        return self.paths[first : first + 3]

    def draw(self, rng: np.random.Generator, side_px: int, margin_px: int) -> Patch:  # noqa: ARG002
        for attempt in range(_TRIES):
            paths, frames = readable(lambda: self._three(int(rng.integers(len(self.paths) - 2))), self.cache)
            name = paths[1]
            if any(frame.shape != frames[1].shape for frame in frames):
                raise InputError(f"the frames around {name} differ in size; one folder is one sequence")
            taken = larger_px(rng, side_px, frames[1], self.varied)
            wanted = taken + 2 * _PAD
            top, left = corner(rng, frames[1], wanted)
            before, sharp, after = (
                reflected(frame[top : top + wanted, left : left + wanted], wanted) for frame in frames
            )
            # A frame blurrier than its neighbours is no truth.
            if detail(sharp) < 0.9 * max(detail(before), detail(after)) and attempt < _TRIES - 1:
                continue
            motion = Motion(before, sharp, after)
            if motion.unexplained() < _CUT or attempt == _TRIES - 1:
                break
        exposure = float(np.exp(rng.uniform(*np.log(EXPOSURE))))
        blurred = motion.exposed(exposure, draw_gamma(self.blur, rng))
        pair = np.concatenate([blurred, sharp], axis=2)[_PAD : taken + _PAD, _PAD : taken + _PAD]
        return varied_pair(rng, str(name), pair, side_px, self.varied)


class Motion:
    """Where everything in a frame comes from and goes to; all three frames are uint8 HxWx3 RGB of one size."""

    def __init__(self, before: Image, sharp: Image, after: Image) -> None:
        self.frames = before, sharp, after
        self._forth = [_flow(sharp, other) for other in (before, after)]
        self._back = [_flow(other, sharp) for other in (before, after)]
        y, x = np.mgrid[: sharp.shape[0], : sharp.shape[1]].astype(np.float32)
        self._at = np.stack([x, y], axis=-1)

    def unexplained(self) -> float:
        """Mean difference in levels between the frame and its neighbours after motion; large across a cut."""
        before, sharp, after = (frame.astype(np.float32) for frame in self.frames)
        moved = [_moved(other, self._at + flow) for other, flow in zip((before, after), self._forth, strict=True)]
        return max(float(np.abs(other - sharp).mean()) for other in moved)

    def exposed(self, exposure: float, gamma: float) -> Image:
        """The middle frame as an exposure of ``exposure`` frame intervals around it sees it; uint8 HxWx3.

        ``gamma``: light is averaged as value ** gamma.
        """
        lights = [(frame.astype(np.float32) / 255) ** gamma for frame in self.frames]
        reach = exposure * max(float(np.percentile(np.hypot(*flow.T), 98)) for flow in self._forth)
        count = int(np.clip(np.ceil(reach * 0.8), 5, 31)) | 1
        total = np.zeros_like(lights[1])
        for moment in np.linspace(-exposure / 2, exposure / 2, count):
            side, share = int(moment > 0), abs(float(moment))
            # From here ``share`` of the way to the neighbour; the neighbour comes the rest of the way back.
            here = _moved(lights[1], self._at - share * self._forth[side])
            there = _moved(lights[2 * side], self._at - (1 - share) * self._back[side])
            total += (1 - share) * here + share * there
        return np.rint((total / count).clip(0, 1) ** (1 / gamma) * 255).astype(np.uint8)


def _flow(a: Image, b: Image) -> Array:
    """(H, W, 2): by how many pixels what is in ``a`` has moved in ``b``."""
    gray = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (a, b)]
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return np.asarray(dis.calc(gray[0], gray[1], None), np.float32)


def _moved(light: NDArray[Any], come_from: NDArray[Any]) -> Array:
    """``light`` as it lies at ``come_from`` (H, W, 2), which is exact where the flow is smooth."""
    moved = cv2.remap(light, come_from.astype(np.float32), None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(moved, np.float32)
