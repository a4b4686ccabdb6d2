"""Where training patches come from: sharp photographs, blur/sharp pairs, consecutive sharp frames.

A source draws one random patch at a time with the generator that it is given and keeps no state of its own but a cache
of decoded files, so any patch of a run can be drawn again from the seed alone.  A file that cannot be read is replaced
by the next random one, which keeps that promise as long as the file stays unreadable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from deblur_deploy.errors import InputError, MissingFileError
from deblur_deploy.evaluation.pairs import PathPair
from deblur_deploy.media.images import Image, read_image
from deblur_deploy.training.blur import BlurConfig, draw_gamma

WINDOW = (5, 31)
"""Up to an eighth of a second at 240 frames a second: slow stretches of a film then give strong blur as well."""
VARIED = 0.4
"""Share of the patches of pairs, frames and films that get another scale, and of those that get other colours."""


@dataclass(frozen=True)
class Patch:
    """uint8 HxWx3 RGB.  Without ``blurred``, ``sharp`` carries the blur's margin on every side."""

    name: str
    sharp: Image
    blurred: Image | None = None


class Source(Protocol):
    """Draws patches of ``side_px`` pixels (plus ``margin_px`` on every side where blur is still to be made)."""

    cache: ImageCache

    def draw(self, rng: np.random.Generator, side_px: int, margin_px: int) -> Patch: ...

    def files(self) -> Sequence[Path]:
        """Every file that may be read."""
        ...


class Unreadable(Exception):  # noqa: N818, since it never leaves this module
    """The drawn file cannot be read; draw another."""


@dataclass
class ImageCache:
    """Decoded files, kept until ``budget_bytes`` are used; a file that cannot be read is tried once and remembered."""

    budget_bytes: int = 2 << 30
    unreadable: dict[Path, str] = field(default_factory=dict)
    """Files that cannot be read, and why."""
    _images: dict[Path, Image] = field(default_factory=dict)

    def __getitem__(self, path: Path) -> Image:
        image = self._images.get(path)
        if image is not None:
            return image
        if path in self.unreadable:
            raise Unreadable
        try:
            image = read_image(path)
        except (InputError, MissingFileError, OSError) as error:
            self.unreadable[path] = str(error)
            raise Unreadable from None
        if image.nbytes <= self.budget_bytes:
            self.budget_bytes -= image.nbytes
            self._images[path] = image
        return image


@dataclass
class Photos:
    """Sharp photographs; large ones are drawn at a random smaller scale, which also hides their JPEG blocks."""

    paths: list[Path]
    cache: ImageCache = field(default_factory=ImageCache)

    def files(self) -> Sequence[Path]:
        return self.paths

    def draw(self, rng: np.random.Generator, side_px: int, margin_px: int) -> Patch:
        # Of two, the one with more detail: skies and what a lens left soft teach little.
        return max((self._draw(rng, side_px + 2 * margin_px) for _ in range(2)), key=lambda drawn: detail(drawn.sharp))

    def _draw(self, rng: np.random.Generator, wanted: int) -> Patch:
        (path,), (image,) = readable(lambda: [self.paths[int(rng.integers(len(self.paths)))]], self.cache)
        smallest = max(wanted / min(image.shape[:2]), 0.25)
        scale = float(np.exp(rng.uniform(np.log(smallest), 0))) if smallest < 1 and rng.random() < 0.7 else 1.0
        crop = _crop(rng, image, min(int(np.ceil(wanted / scale)), min(image.shape[:2])) if scale < 1 else wanted)
        if scale < 1:
            crop = np.asarray(cv2.resize(crop, (wanted, wanted), interpolation=cv2.INTER_AREA), np.uint8)
        return Patch(str(path), _turned(rng, reflected(crop, wanted)))


@dataclass
class Pairs:
    """Blurred photographs with their ground truth."""

    paths: list[PathPair]
    cache: ImageCache = field(default_factory=ImageCache)
    varied: float = VARIED

    def files(self) -> Sequence[Path]:
        return [path for pair in self.paths for path in pair]

    def draw(self, rng: np.random.Generator, side_px: int, margin_px: int) -> Patch:  # noqa: ARG002
        paths, (blurred, sharp) = readable(lambda: self.paths[int(rng.integers(len(self.paths)))], self.cache)
        name = str(paths[0])
        if blurred.shape != sharp.shape:
            raise InputError(
                f"{name} has {blurred.shape[1]}x{blurred.shape[0]} pixels but {paths[1]} "
                f"{sharp.shape[1]}x{sharp.shape[0]}; sizes must agree"
            )
        taken = larger_px(rng, side_px, sharp, self.varied)
        top, left = corner(rng, sharp, taken)
        both = [image[top : top + taken, left : left + taken] for image in (blurred, sharp)]
        return varied_pair(rng, name, np.concatenate(both, axis=2), side_px, self.varied)


@dataclass
class Frames:
    """Consecutive sharp frames: an odd window averaged, with the gammas of ``blur``, against its middle frame."""

    paths: list[Path]
    cache: ImageCache = field(default_factory=ImageCache)
    window: tuple[int, int] = WINDOW
    """Fewest and most frames; the number is drawn evenly between them."""
    blur: BlurConfig = field(default_factory=BlurConfig)
    """Only its ``gamma`` and ``flatter`` matter here."""
    varied: float = VARIED

    def files(self) -> Sequence[Path]:
        return self.paths

    def draw(self, rng: np.random.Generator, side_px: int, margin_px: int) -> Patch:  # noqa: ARG002
        longest = (min(self.window[1], len(self.paths)) - 1) // 2

        def window() -> Sequence[Path]:
            # Drawn anew each time: a long one may not fit between two frames that cannot be read.
            half = int(rng.integers(self.window[0] // 2, longest + 1))
            first = int(rng.integers(len(self.paths) - 2 * half))
            return self.paths[first : first + 2 * half + 1]

        paths, frames = readable(window, self.cache)
        half = len(paths) // 2
        name = paths[half]
        if any(frame.shape != frames[half].shape for frame in frames):
            raise InputError(f"the frames around {name} differ in size; one folder is one sequence")
        taken = larger_px(rng, side_px, frames[half], self.varied)
        top, left = corner(rng, frames[half], taken)
        crops = [frame[top : top + taken, left : left + taken] for frame in frames]
        gamma = draw_gamma(self.blur, rng)
        table = ((np.arange(256) / 255) ** gamma).astype(np.float32)
        light = np.zeros(crops[half].shape, np.float32)
        for crop in crops:
            cv2.accumulate(cv2.LUT(crop, table), light)
        blurred = np.rint((light / len(crops)) ** (1 / gamma) * 255).astype(np.uint8)
        return varied_pair(rng, str(name), np.concatenate([blurred, crops[half]], axis=2), side_px, self.varied)


def detail(image: Image) -> float:
    """How much changes from pixel to pixel: mean absolute Laplacian, in levels."""
    return float(np.abs(cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.CV_16S)).mean())


def readable(draw: Callable[[], Sequence[Path]], cache: ImageCache) -> tuple[Sequence[Path], list[Image]]:
    """What ``draw`` gives, and the images there; it is asked again while a file cannot be read."""
    for _ in range(100):
        paths = draw()
        try:
            return paths, [cache[path] for path in paths]
        except Unreadable:
            pass
    reason = next(iter(cache.unreadable.values()))
    raise InputError(f"{len(cache.unreadable)} or more training files cannot be read, first: {reason}")


def corner(rng: np.random.Generator, image: Image, side: int) -> tuple[int, int]:
    """Top and left of a random crop; of two, the one with more detail, as walls and skies teach little."""
    height, width = image.shape[:2]
    two = [
        (int(rng.integers(max(height - side, 0) + 1)), int(rng.integers(max(width - side, 0) + 1))) for _ in range(2)
    ]
    return max(two, key=lambda place: detail(image[place[0] : place[0] + side, place[1] : place[1] + side]))


def _crop(rng: np.random.Generator, image: Image, side: int) -> Image:
    top, left = corner(rng, image, side)
    return image[top : top + side, left : left + side]


def reflected(image: Image, side: int) -> Image:
    """Filled up to ``side`` by reflection, for photographs smaller than the patch."""
    height, width = image.shape[:2]
    if height >= side and width >= side:
        return image
    return np.pad(image, ((0, max(side - height, 0)), (0, max(side - width, 0)), (0, 0)), mode="symmetric")


def _turned(rng: np.random.Generator, image: Image) -> Image:
    """One of the eight symmetries of the square."""
    which = int(rng.integers(8))
    turned = np.rot90(image, which % 4)
    return np.ascontiguousarray(turned[:, ::-1] if which >= 4 else turned)


def larger_px(rng: np.random.Generator, side_px: int, image: Image, share: float) -> int:
    """Side of what is cut out of ``image`` for a patch of ``side_px``; a ``share`` shrinks, to half at most."""
    scale = rng.uniform(0.5, 1) if rng.random() < share else 1.0
    return max(min(round(side_px / scale), *image.shape[:2]), side_px)


def varied_pair(rng: np.random.Generator, name: str, both: Image, side_px: int, share: float) -> Patch:
    """A patch of ``side_px`` from blurred and sharp crops, HxWx6; real pairs come from few scenes, so they are varied.

    Scale, the order of the colours and how much there is of each change blurred and sharp alike: with light that adds
    up as value ** gamma, blur stays what it was.
    """
    both = _turned(rng, reflected(both, side_px))
    images = [both[..., part] for part in (np.s_[:3], np.s_[3:])]
    if len(both) > side_px:
        images = [
            np.asarray(cv2.resize(one, (side_px, side_px), interpolation=cv2.INTER_AREA), np.uint8) for one in images
        ]
    if rng.random() < share:
        order, gains = rng.permutation(3), rng.uniform(0.5, 1, 3)
        images = [np.rint(one[..., order] * gains).astype(np.uint8) for one in images]
    blurred, sharp = map(np.ascontiguousarray, images)
    return Patch(name, sharp=sharp, blurred=blurred)
