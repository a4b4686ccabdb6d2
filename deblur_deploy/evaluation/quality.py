"""PSNR and SSIM of anything that restores an image, by scikit-image's definitions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Protocol

import numpy as np
from skimage.metrics import structural_similarity

from deblur_deploy.errors import InputError
from deblur_deploy.runtime.media import Image, list_images, read_image


class Restorer(Protocol):
    """uint8 HxWx3 RGB in, the same out: torch, ONNX Runtime, the identity and every peer are measured as this."""

    def __call__(self, image: Image, /) -> Image: ...


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A blurred photograph and its ground truth, both uint8 HxWx3 RGB of one size."""

    name: str
    blurred: Image
    sharp: Image


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
    """Peak signal-to-noise ratio in dB over all channels; infinite for equal images."""
    error = np.mean(np.square(image.astype(np.float32) - truth.astype(np.float32)), dtype=np.float64)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(image: Image, truth: Image) -> float:
    """Structural similarity with Wang's Gaussian window (2004), mean of the channels; images from 11x11."""
    return float(
        structural_similarity(image, truth, channel_axis=2, gaussian_weights=True, use_sample_covariance=False)
    )


def read_pairs(folder: Path) -> Iterator[Pair]:
    """Pairs from ``folder/blur`` and ``folder/sharp``, matched by file name.

    Raises MissingFileError or InputError that names the file without a partner or of another size.
    """
    names = [path.name for path in list_images(folder / "blur")]
    if not names:
        raise InputError(f"{folder}/blur holds no images; pairs are {folder}/blur/NAME and {folder}/sharp/NAME")
    for name in names:
        blurred, sharp = read_image(folder / "blur" / name), read_image(folder / "sharp" / name)
        if blurred.shape != sharp.shape:
            raise InputError(f"{folder}: {name} is {blurred.shape} in blur, {sharp.shape} in sharp; sizes must agree")
        yield Pair(name=name, blurred=blurred, sharp=sharp)


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
