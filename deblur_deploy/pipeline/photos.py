"""Photographs for calibration and verification: the user's, or those that scikit-image carries in its wheel.

The built-in ones are blurred by a fixed recipe, so that a machine without data and without network gives the same
figures as any other.  Photographs that calibrate never verify.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import msgspec
import numpy as np
import skimage
import torch

from deblur_deploy.errors import InputError
from deblur_deploy.evaluation.quality import Pair
from deblur_deploy.media.images import Image, list_images, read_image
from deblur_deploy.training.blur import BlurConfig, draw_plan, synthesise
from deblur_deploy.training.sources import Photos

_VERIFY = ("astronaut.png", "coffee.png", "rocket.jpg", "ihc.png")
_CALIBRATE = ("chelsea.png", "motorcycle_left.png", "motorcycle_right.png", "hubble_deep_field.jpg", "retina.jpg")
# Every share is written out: these photographs must not change with the defaults of training.
_BLUR = BlurConfig(
    scene=0,
    shake=0.42,
    object=0.14,
    defocus=0.10,
    gaussian=0.18,
    measured=0.08,
    sharp=0,
    noisy=0.7,
    jpeg=0,
    flatter=0,
    undecoded=0,
    highlights=0,
    path_px=(6, 16),
    defocus_radius_px=(1.5, 3),
    gaussian_sigma_px=(1, 2.2),
)

_WIDE = msgspec.structs.replace(
    _BLUR,
    sharp=0.1,
    jpeg=0.1,
    highlights=0.2,
    path_px=(3, 36),
    defocus_radius_px=(0.7, 6),
    gaussian_sigma_px=(0.4, 3.2),
)
"""For calibration: ranges must hold for blur of every strength."""
_CROPS = 128


def builtin_pairs() -> list[Pair]:
    """Two differently blurred versions of each of four photographs, 368 to 608 pixels a side."""
    return [_pair(name, seed) for index, name in enumerate(_VERIFY) for seed in (2 * index, 2 * index + 1)]


def builtin_calibration() -> list[Image]:
    """Blurred and, each third, sharp photographs: dark sky, fur, machines, a retina."""
    pairs = [_pair(name, 100 + 3 * index + k, 400) for index, name in enumerate(_CALIBRATE) for k in range(3)]
    return [pair.sharp if index % 3 == 2 else pair.blurred for index, pair in enumerate(pairs)]


def builtin_photographs() -> list[Path]:
    """The sharp photographs that calibration is made of, as files."""
    return [Path(skimage.__file__).parent / "data" / name for name in _CALIBRATE]


def calibration_from(folder: Path | None, count: int) -> dict[str, Image]:
    """At most ``count`` photographs of ``folder``, spread evenly over it, or crops of the built-in ones, by name.

    Raises InputError if the folder holds none.
    """
    if folder is None:
        return {pair.name: pair.blurred for pair in map(_crop, range(_CROPS))}
    paths = list_images(folder)
    if not paths:
        raise InputError(f"{folder} holds no images to calibrate with; blurred photographs as in use are needed")
    return {str(path.relative_to(folder)): read_image(path) for path in paths[:: -(-len(paths) // count)]}


def _pair(name: str, seed: int, longest_px: int = 640) -> Pair:
    photo = read_image(Path(skimage.__file__).parent / "data" / name)
    # Scaled down, because the large ones are soft at their full size.
    scale = min(1.0, longest_px / max(photo.shape[:2]))
    photo = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else photo
    return _blurred(Path(name).stem, photo, _BLUR, seed)


def _crop(seed: int) -> Pair:
    """256x256 pixels of a built-in photograph at any scale, at any strength of blur."""
    drawn = Photos(builtin_photographs()).draw(np.random.default_rng((1, seed)), 256, _WIDE.margin_px)
    return _blurred(Path(drawn.name).stem, drawn.sharp, _WIDE, 1000 + seed)


def _blurred(name: str, photo: Image, blur: BlurConfig, seed: int) -> Pair:
    plan = draw_plan(blur, np.random.default_rng(seed))
    images = synthesise(torch.from_numpy(photo).permute(2, 0, 1)[None], [plan], blur.margin_px)
    blurred, sharp = (np.ascontiguousarray(image[0].permute(1, 2, 0).numpy()) for image in images)
    return Pair(name=f"{name}-{plan.kind}-{seed}", blurred=blurred, sharp=sharp)
