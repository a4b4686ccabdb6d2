"""PSNR and SSIM of anything that restores an image, by scikit-image's definitions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Protocol, cast, overload

import cv2
import numpy as np
from skimage.metrics import structural_similarity

from deblur_deploy.errors import DeblurError, InputError
from deblur_deploy.evaluation.pairs import PathPair, find_pairs, match_pairs
from deblur_deploy.media.images import Image, read_image

EQUAL_DB = 100.0
"""The PSNR of images that are equal, or nearly: one level in one of 154,000 values."""

SSIM_PX = 11
"""Height and width of SSIM's window: smaller images have none."""


class Restorer(Protocol):
    """uint8 HxWx3 RGB in, the same out: torch, ONNX Runtime, the identity and every peer are measured as this."""

    def __call__(self, image: Image, /) -> Image: ...


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A blurred photograph and its ground truth, both uint8 HxWx3 RGB of one size."""

    name: str
    blurred: Image
    sharp: Image

    def centre(self, side_px: int) -> Pair:
        """The same of a square in the middle, or of all that there is of it."""
        top, left = (max(0, side - side_px) // 2 for side in self.blurred.shape[:2])
        window = slice(top, top + side_px), slice(left, left + side_px)
        blurred, sharp = (np.ascontiguousarray(image[window]) for image in (self.blurred, self.sharp))
        return Pair(name=self.name, blurred=blurred, sharp=sharp)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What restoring one image, or on average a set, brought; PSNR in dB, SSIM at most 1."""

    psnr_blurred: float
    psnr: float
    ssim: float

    @property
    def gain_db(self) -> float:
        """PSNR of the result minus PSNR of the blurred input."""
        return self.psnr - self.psnr_blurred


def psnr(image: Image, truth: Image) -> float:
    """Peak signal-to-noise ratio in dB over all channels, at most ``EQUAL_DB``: means of it stay finite."""
    error = np.mean(np.square(image.astype(np.float32) - truth.astype(np.float32)), dtype=np.float64)
    return EQUAL_DB if error == 0 else min(EQUAL_DB, 10 * math.log10(255**2 / error))


def psnr_shifted(image: Image, truth: Image, reach_px: int = 2) -> float:
    """PSNR after the best shift of at most ``reach_px``, to half a pixel, inside a border of reach + 4 pixels.

    For ground truth that is not centred on the exposure.  Shifted by Lanczos interpolation; compare it only with
    another number of this function.
    """
    best, at = -math.inf, (0.0, 0.0)
    border = reach_px + 4
    inside = slice(border, truth.shape[0] - border), slice(border, truth.shape[1] - border)
    if min(truth.shape[:2]) <= 2 * border:
        return psnr(image, truth)
    whole = [(float(x), float(y)) for y in range(-reach_px, reach_px + 1) for x in range(-reach_px, reach_px + 1)]
    for half in (False, True):
        shifts = [(at[0] + x / 2, at[1] + y / 2) for y in (-1, 0, 1) for x in (-1, 0, 1)] if half else whole
        for x, y in shifts:
            if max(abs(x), abs(y)) > reach_px:
                continue
            matrix = np.array([[1, 0, x], [0, 1, y]], np.float32)
            moved = cv2.warpAffine(
                image, matrix, image.shape[1::-1], flags=cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REPLICATE
            )
            value = psnr(cast("Image", moved)[inside], truth[inside])
            if value > best:
                best, at = value, (x, y)
    return best


def ssim(image: Image, truth: Image) -> float:
    """Structural similarity with Wang's Gaussian window (2004), mean of the channels.

    Raises InputError for images smaller than the window's 11x11 pixels.
    """
    if min(image.shape[:2]) < SSIM_PX:
        raise InputError(f"an image of {_size(image)} is too small for SSIM; {SSIM_PX}x{SSIM_PX} or more is needed")
    wang = {"gaussian_weights": True, "use_sample_covariance": False}
    return float(structural_similarity(image, truth, channel_axis=2, **wang))


class PairSet(Sequence[Pair]):
    """Pairs on disk, in any layout that ``find_pairs`` knows, read anew each time one is asked for."""

    def __init__(self, pairs: Path | Sequence[PathPair]) -> None:
        """``pairs`` themselves, or where they are to be found.

        Raises MissingFileError without such a path, InputError without pairs or for an image without a partner.
        """
        self.paths = find_pairs(pairs) if isinstance(pairs, Path) else list(pairs)
        short = len({blurred.name for blurred, _ in self.paths}) == len(self.paths)
        self.names = [blurred.name if short else "/".join(blurred.parts[-3:]) for blurred, _ in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | list[Pair]:
        """Pairs named by file (and folder, where files share names); raises InputError if sizes differ."""
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return _read_pair(self.paths[index], self.names[index])


def usable_pairs(path: Path) -> tuple[PairSet, list[str]]:
    """The pairs at ``path`` that can be compared, and one line for each that cannot: half of it is missing, cannot be
    read, has another size, or is too small for SSIM.

    Decodes every image once.  Raises MissingFileError without such a path, InputError if not one pair can be used.
    """
    pairs, failed = match_pairs(path)
    good = []
    for paths in pairs:
        try:
            pair = _read_pair(paths, "")
            if min(pair.sharp.shape[:2]) < SSIM_PX:
                raise InputError(f"{paths[0]} has {_size(pair.sharp)}; SSIM needs {SSIM_PX}x{SSIM_PX} or more")
            good.append(paths)
        except DeblurError as error:
            failed.append(str(error))
    if not good:
        raise InputError(f"no pair of {path} can be used: {failed[0]}")
    return PairSet(good), failed


def _read_pair(paths: PathPair, name: str) -> Pair:
    blurred, sharp = map(read_image, paths)
    if blurred.shape != sharp.shape:
        raise InputError(f"{paths[0]} has {_size(blurred)}, {paths[1]} {_size(sharp)}; sizes must agree")
    return Pair(name=name, blurred=blurred, sharp=sharp)


def _size(image: Image) -> str:
    return f"{image.shape[1]}x{image.shape[0]} pixels"


def compare(restored: Image, pair: Pair) -> Quality:
    """Quality of ``restored`` as the answer to ``pair.blurred``."""
    return Quality(
        psnr_blurred=psnr(pair.blurred, pair.sharp), psnr=psnr(restored, pair.sharp), ssim=ssim(restored, pair.sharp)
    )


def measure(restorer: Restorer, pair: Pair) -> Quality:
    """Restore one pair's blurred image and compare the result with the truth."""
    return compare(restorer(pair.blurred), pair)


def mean_quality(results: Iterable[Quality]) -> Quality:
    """Mean over images of each figure (the mean of PSNRs, as the literature reports it)."""
    rows = list(results)
    return Quality(
        psnr_blurred=fmean(row.psnr_blurred for row in rows),
        psnr=fmean(row.psnr for row in rows),
        ssim=fmean(row.ssim for row in rows),
    )
