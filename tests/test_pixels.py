"""What lies hidden under alpha 0 has no influence on what is seen, and stays as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deblur_deploy import DeblurEngine
from deblur_deploy.runtime.pixels import spread
from tests.conftest import noise
from tests.photos import photo


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_hidden_colours_do_not_matter(bundle: Path, dtype: type) -> None:
    image = np.dstack([photo(0, 61, 83), np.full((61, 83), 255, np.uint8)])
    image[:, 40:, 3] = 0
    image[20:30, 50:60, 3] = 128
    full = 1 if dtype == np.float32 else np.iinfo(dtype).max
    image = (image * (full / 255)).astype(dtype)
    hidden = image[..., 3] == 0
    results = []
    with DeblurEngine(bundle, "cpu") as engine:
        for colour in (0, full):
            given = image.copy()
            given[hidden, :3] = colour
            result = engine(given)
            np.testing.assert_array_equal(result[hidden], given[hidden])
            results.append(result[~hidden])
    np.testing.assert_array_equal(*results)
    assert (results[0] != image[~hidden]).any()


def test_colours_spread_from_what_is_seen() -> None:
    image, alpha = noise(37, 50, 3), np.zeros((37, 50), np.uint8)
    assert spread(image, alpha) is image
    alpha[5:20, 7:30] = 255
    image[5:20, 7:30] = (200, 100, 50)
    image[6, 8], alpha[6, 8] = (0, 0, 0), 1
    filled = spread(image, alpha)
    assert tuple(filled[6, 8]) == (0, 0, 0)
    filled[6, 8] = (200, 100, 50)
    assert np.abs(filled.astype(int) - (200, 100, 50)).max() <= 1
    assert spread(image, np.ones_like(alpha)) is image
