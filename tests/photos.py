"""Small photographs that tests can make anywhere: edges, texture and colour, drawn from a seed."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from deblur_deploy.media.images import Image, write_image


def photo(seed: int, height: int = 96, width: int = 128) -> Image:
    """uint8 HxWx3 RGB with everything between flat areas and fine texture."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (6, 8, 3)).astype(np.float32)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(12):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        cv2.circle(image, centre, int(rng.integers(3, 20)), rng.uniform(0, 255, 3).tolist(), int(rng.integers(1, 4)))
    texture = rng.normal(0, 12, (height, width, 1)) * (np.linspace(0, 1, width) > 0.5)[None, :, None]
    return np.clip(image + texture, 0, 255).astype(np.uint8)


def write_photos(folder: Path, count: int, height: int = 96, width: int = 128) -> Path:
    """``folder`` with ``count`` photographs in it."""
    for seed in range(count):
        write_image(folder / f"photo{seed}.png", photo(seed, height, width))
    return folder


def write_pairs(folder: Path, count: int, height: int = 64, width: int = 80, blur: str = "blur") -> Path:
    """``folder`` with ``count`` pairs in the flat layout."""
    for seed in range(count):
        sharp = photo(seed, height, width)
        write_image(folder / "sharp" / f"{seed}.png", sharp)
        write_image(folder / blur / f"{seed}.png", np.asarray(cv2.GaussianBlur(sharp, (0, 0), 1.5), np.uint8))
    return folder
