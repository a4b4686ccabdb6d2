"""The torch JPEG loses what a real one loses."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from deblur_deploy.evaluation.quality import psnr
from deblur_deploy.media.images import Image
from deblur_deploy.training.jpeg import jpeg_roundtrip
from tests.photos import photo


def ours(images: list[Image], qualities: list[float]) -> list[Image]:
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    packed = (jpeg_roundtrip(batch, torch.tensor(qualities)) * 255).round().to(torch.uint8)
    return list(packed.permute(0, 2, 3, 1).numpy())


def opencvs(image: Image, quality: int) -> Image:
    settings = [
        cv2.IMWRITE_JPEG_QUALITY,
        quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    ]
    _, data = cv2.imencode(".jpg", image[..., ::-1], settings)
    return cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)


@pytest.mark.parametrize("quality", [20, 60, 75, 85, 95])
@pytest.mark.parametrize("size", [(96, 128), (61, 77)])
def test_it_is_close_to_opencvs(quality: int, size: tuple[int, int]) -> None:
    image = photo(3, *size)
    (mine,) = ours([image], [quality])
    theirs = opencvs(image, quality)
    assert psnr(mine, theirs) >= 36
    assert psnr(mine, image) == pytest.approx(psnr(theirs, image), abs=0.5)


def test_every_image_of_a_batch_has_its_own_quality() -> None:
    image = photo(5)
    good, bad = ours([image, image], [95, 20])
    assert psnr(good, image) > psnr(bad, image) + 3
    assert np.array_equal(bad, ours([image], [20])[0])
