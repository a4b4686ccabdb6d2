"""Validation looks at the middle of each pair, and arithmetic is bf16 only where that is native."""

import numpy as np
import pytest

from deblur_deploy.evaluation.quality import Pair
from deblur_deploy.training import config as module
from deblur_deploy.training.config import Precision, uses_bf16
from deblur_deploy.training.validation import middle
from tests.photos import photo


@pytest.mark.parametrize(
    ("size", "wanted", "got"),
    [
        ((40, 60), (20, 10), (10, 20)),
        ((40, 61), (0, 10), (10, 61)),
        ((8, 60), (99, 9), (8, 60)),
        ((9, 9), (0, 0), (9, 9)),
    ],
)
def test_the_middle_of_both(size: tuple[int, int], wanted: tuple[int, int], got: tuple[int, int]) -> None:
    image = photo(0, *size)
    pair = middle(Pair(name="a", blurred=image, sharp=255 - image), *wanted)
    assert pair.sharp.shape == (*got, 3)
    np.testing.assert_array_equal(pair.blurred, 255 - pair.sharp)
    top, left = ((have - is_) // 2 for have, is_ in zip(size, got, strict=True))
    np.testing.assert_array_equal(pair.blurred, image[top : top + got[0], left : left + got[1]])


@pytest.mark.parametrize(
    ("precision", "cuda", "native", "bf16"),
    [("auto", False, False, False), ("auto", False, True, True), ("auto", True, False, True),
     ("auto", False, None, False),
     ("bf16", False, False, True), ("fp32", True, True, False)],
)  # fmt: skip
def test_auto_is_bf16_where_it_is_native(
    precision: Precision, cuda: bool, native: bool | None, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "native_bf16", lambda: native)
    assert uses_bf16(precision, cuda=cuda) is bf16
