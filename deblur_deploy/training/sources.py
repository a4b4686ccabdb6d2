"""Where training patches come from: sharp photographs, blur/sharp pairs, consecutive sharp frames.

A source draws one random patch at a time with the generator that it is given and keeps no state of its own but a cache
of decoded files, so any patch of a run can be drawn again from the seed alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from deblur_deploy.errors import InputError
from deblur_deploy.runtime.media import Image, list_images, read_image


@dataclass(frozen=True)
class Patch:
    """uint8 HxWx3 RGB.  Without ``blurred``, ``sharp`` carries the blur's margin on every side."""

    sharp: Image
    blurred: Image | None = None


class Source(Protocol):
    """Draws patches of ``side_px`` pixels (plus ``margin_px`` on every side where blur is still to be made)."""

    def draw(self, rng: np.random.Generator, side_px: int, margin_px: int) -> Patch: ...


@dataclass
class ImageCache:
    """Decoded files, kept until ``budget_bytes`` are used; a file that cannot be read is reported once."""

    budget_bytes: int = 4 << 30
    _images: dict[Path, Image] = field(default_factory=dict)

    def __getitem__(self, path: Path) -> Image:
        image = self._images.get(path)
        if image is None:
            image = read_image(path)
            self.budget_bytes -= image.nbytes
            if self.budget_bytes > 0:
                self._images[path] = image
        return image


@dataclass
class Photos:
    """Sharp photographs; large ones are drawn at a random smaller scale, which also hides their JPEG blocks."""

    paths: list[Path]
    cache: ImageCache = field(default_factory=ImageCache)

    def draw(self, rng: np.random.Generator, side_px: int, margin_px: int) -> Patch:
        image = self.cache[self.paths[rng.integers(len(self.paths))]]
        wanted = side_px + 2 * margin_px
        smallest = max(wanted / min(image.shape[:2]), 0.25)
        scale = float(np.exp(rng.uniform(np.log(smallest), 0))) if smallest < 1 and rng.random() < 0.7 else 1.0
        crop = _crop(rng, image, min(int(np.ceil(wanted / scale)), min(image.shape[:2])))
        if scale < 1:
            crop = cv2.resize(crop, (wanted, wanted), interpolation=cv2.INTER_AREA)
        return Patch(_turned(rng, _reflected(crop, wanted))[0])


@dataclass
class Pairs:
    """Blurred photographs with their ground truth."""

    paths: list[tuple[Path, Path]]
    cache: ImageCache = field(default_factory=ImageCache)

    def draw(self, rng: np.random.Generator, side_px: int, margin_px: int) -> Patch:
        blurred, sharp = (self.cache[path] for path in self.paths[rng.integers(len(self.paths))])
        if blurred.shape != sharp.shape:
            raise InputError(f"a pair has sizes {blurred.shape} and {sharp.shape}; they must agree")
        both = _crop(rng, np.concatenate([blurred, sharp], axis=2), side_px)
        turned, _ = _turned(rng, _reflected(both, side_px))
        return Patch(sharp=turned[..., 3:], blurred=turned[..., :3])


@dataclass
class Frames:
    """Consecutive sharp frames: an odd window averaged in linear light, against its middle frame."""

    paths: list[Path]
    cache: ImageCache = field(default_factory=ImageCache)
    window: tuple[int, int] = (5, 15)
    gamma: float = 2.2

    def draw(self, rng: np.random.Generator, side_px: int, margin_px: int) -> Patch:
        half = int(rng.integers(self.window[0] // 2, min(self.window[1], len(self.paths)) // 2 + 1))
        middle = int(rng.integers(half, len(self.paths) - half))
        frames = [self.cache[path] for path in self.paths[middle - half : middle + half + 1]]
        top, left = _corner(rng, frames[0], side_px)
        table = (np.arange(256, dtype=np.float32) / 255) ** self.gamma
        light = np.zeros((side_px, side_px, 3), np.float32)
        for frame in frames:
            light += _reflected(table[frame[top : top + side_px, left : left + side_px]], side_px)
        blurred = np.rint((light / len(frames)) ** (1 / self.gamma) * 255).astype(np.uint8)
        sharp = _reflected(frames[half][top : top + side_px, left : left + side_px], side_px)
        turned, _ = _turned(rng, np.concatenate([blurred, sharp], axis=2))
        return Patch(sharp=turned[..., 3:], blurred=turned[..., :3])


def photos(folders: list[Path]) -> Photos:
    """All photographs in ``folders``; raises InputError if there are none."""
    paths = [path for folder in folders for path in list_images(folder)]
    if not paths:
        raise InputError(f"no photographs in {', '.join(map(str, folders))}")
    return Photos(paths)


def frames(folder: Path) -> Frames:
    """Consecutive frames, in the order of their names; raises InputError if there are fewer than five."""
    paths = list_images(folder)
    if len(paths) < 5:
        raise InputError(f"{folder} holds {len(paths)} frames; at least 5 consecutive ones are needed")
    return Frames(paths)


def _corner(rng: np.random.Generator, image: Image, side: int) -> tuple[int, int]:
    height, width = image.shape[:2]
    return int(rng.integers(max(height - side, 0) + 1)), int(rng.integers(max(width - side, 0) + 1))


def _crop(rng: np.random.Generator, image: Image, side: int) -> Image:
    top, left = _corner(rng, image, side)
    return image[top : top + side, left : left + side]


def _reflected(image: np.ndarray, side: int) -> np.ndarray:
    """Filled up to ``side`` by reflection, for photographs smaller than the patch."""
    height, width = image.shape[:2]
    if height >= side and width >= side:
        return image
    return np.pad(image, ((0, max(side - height, 0)), (0, max(side - width, 0)), (0, 0)), mode="symmetric")


def _turned(rng: np.random.Generator, image: Image) -> tuple[Image, int]:
    """One of the eight symmetries of the square."""
    which = int(rng.integers(8))
    turned = np.rot90(image, which % 4)
    return np.ascontiguousarray(turned[:, ::-1] if which >= 4 else turned), which
