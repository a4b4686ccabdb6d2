"""The built-in photographs are the same everywhere, and those that calibrate never verify."""

from pathlib import Path

import numpy as np
import pytest

from deblur_deploy.errors import InputError
from deblur_deploy.evaluation.quality import psnr
from deblur_deploy.pipeline import photos


def test_builtin_pairs_are_blurred_and_the_same_each_time():
    first, again = photos.builtin_pairs(), photos.builtin_pairs()
    assert len({pair.name for pair in first}) == 8
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.blurred, other.blurred)
        assert one.blurred.shape == one.sharp.shape
        assert psnr(one.blurred, one.sharp) < 40


def test_calibration_shares_no_photograph_with_verification():
    assert not set(photos._CALIBRATE) & set(photos._VERIFY)
    assert len(photos.builtin_calibration()) == 15


def test_an_empty_calibration_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        photos.calibration_from(Path(tmp_path), 4)
