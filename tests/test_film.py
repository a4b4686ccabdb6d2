"""Blur along optical flow is the blur that an exposure between the frames would have had."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from deblur_deploy.evaluation.quality import psnr
from deblur_deploy.media.images import Image, write_image
from deblur_deploy.training import film
from deblur_deploy.training.blur import BlurConfig
from deblur_deploy.training.film import Film, Motion
from tests.photos import photo

NOISE = np.random.default_rng(0).normal(0, 90, (220, 320, 1)).astype(np.float32)
SCENE = (photo(5, 220, 320) / 2 + 64 + cv2.GaussianBlur(NOISE, (0, 0), 1.2)[..., None]).clip(0, 255).astype(np.uint8)


def seen(shift: float) -> Image:
    """The scene from a camera that has moved ``shift`` pixels to the right."""
    moved = cv2.warpAffine(SCENE, np.float32([[1, 0, -shift], [0, 1, 0]]), SCENE.shape[1::-1])
    return np.asarray(moved[20:200, 40:280], np.uint8)


@pytest.mark.parametrize("gamma", [1.0, 2.2])
@pytest.mark.parametrize("exposure", [0.5, 1.0])
def test_it_is_the_average_of_the_light_on_the_way(exposure: float, gamma: float) -> None:
    blurred = Motion(seen(-9), seen(0), seen(9)).exposed(exposure, gamma)
    moments = np.linspace(-4.5 * exposure, 4.5 * exposure, 41)
    light = np.mean([(seen(shift) / 255.0) ** gamma for shift in moments], axis=0)
    expected = np.rint(light ** (1 / gamma) * 255).astype(np.uint8)
    ours, still, wanted = (image[24:-24, 24:-24] for image in (blurred, seen(0), expected))
    assert psnr(ours, wanted) > max(32, psnr(still, wanted) + 8)


def test_motion_explains_neighbours_but_not_another_scene() -> None:
    assert Motion(seen(-6), seen(0), seen(6)).unexplained() < film._CUT / 2
    assert Motion(seen(-6), seen(0), photo(9, 180, 240)).unexplained() > film._CUT


def test_blurry_frames_are_no_truth(tmp_path: Path) -> None:
    for index in range(7):
        frame = seen(3.0 * index - 9)
        write_image(tmp_path / f"{index}.png", cv2.GaussianBlur(frame, (0, 0), 1) if index % 2 else frame)
    source = Film(sorted(tmp_path.iterdir()), blur=BlurConfig())
    drawn = [source.draw(np.random.default_rng(seed), 32, 0) for seed in range(6)]
    assert {Path(patch.name).stem for patch in drawn} <= {"2", "4"}
    assert all(patch.blurred is not None and patch.blurred.shape == patch.sharp.shape == (32, 32, 3) for patch in drawn)
