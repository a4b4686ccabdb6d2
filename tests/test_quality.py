"""PSNR, SSIM and pairs: what they measure, and what they say about bad input."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from deblur_deploy.errors import InputError, MissingFileError
from deblur_deploy.evaluation.pairs import find_pairs, holds_pairs
from deblur_deploy.evaluation.quality import EQUAL_DB, PairSet, measure, psnr, psnr_shifted, ssim
from deblur_deploy.media.images import write_image
from tests.photos import photo, write_pairs


def test_psnr_and_ssim_are_the_textbooks() -> None:
    a, b = photo(0), photo(1)
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b), abs=1e-4)
    assert psnr(a, a) == EQUAL_DB
    assert ssim(a, a) == pytest.approx(1)
    assert -1 <= ssim(a, b) < 0.9


def test_doing_nothing_gains_nothing(tmp_path: Path) -> None:
    for pair in PairSet(write_pairs(tmp_path, 2)):
        quality = measure(lambda image: image, pair)
        assert quality.gain_db == 0
        assert measure(lambda image, sharp=pair.sharp: sharp, pair).psnr == EQUAL_DB


@pytest.mark.parametrize(("x", "y", "at_least"), [(0, 0, EQUAL_DB), (2, -1, EQUAL_DB), (0.5, -0.5, 38), (-1.5, 1, 38)])
def test_a_shift_of_at_most_two_pixels_is_forgiven(x: float, y: float, at_least: float) -> None:
    truth = np.asarray(cv2.GaussianBlur(photo(2, 120, 140), (0, 0), 1.2), np.uint8)
    matrix = np.array([[1, 0, x], [0, 1, y]], np.float32)
    moved = np.asarray(cv2.warpAffine(truth, matrix, (140, 120), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT))
    assert psnr_shifted(moved, truth) >= at_least
    assert psnr_shifted(moved, truth) >= psnr(moved[6:-6, 6:-6], truth[6:-6, 6:-6])


def test_a_larger_shift_is_not_forgiven() -> None:
    truth = photo(2, 120, 140)
    assert psnr_shifted(np.roll(truth, 5, axis=1), truth) < 30


def test_gopros_layout_gives_every_blurred_folder(tmp_path: Path) -> None:
    for sequence in ("A", "B"):
        write_pairs(tmp_path / sequence, 2)
        write_pairs(tmp_path / sequence, 2, blur="blur_gamma")
    pairs = find_pairs(tmp_path)
    assert len(pairs) == 8
    assert all(b.name == s.name and s.parent.name == "sharp" and b.parts[-3] == s.parts[-3] for b, s in pairs)
    assert holds_pairs(tmp_path)
    assert len({pair.name for pair in PairSet(tmp_path)}) == 8


def test_names_may_differ_in_their_suffix(tmp_path: Path) -> None:
    write_image(tmp_path / "blur" / "a.jpg", photo(0))
    write_image(tmp_path / "sharp" / "a.png", photo(0))
    assert find_pairs(tmp_path) == [(tmp_path / "blur" / "a.jpg", tmp_path / "sharp" / "a.png")]


def test_two_images_of_one_name_are_named(tmp_path: Path) -> None:
    for name in ("blur/a.jpg", "blur/a.png", "sharp/a.png"):
        write_image(tmp_path / name, photo(0))
    with pytest.raises(InputError, match=r"a\.png and a\.jpg share a name"):
        find_pairs(tmp_path)


@pytest.mark.parametrize("header", ["", "blur,sharp\n", "Sharp,Blur\n"])
def test_a_csv_lists_pairs_beside_itself(header: str, tmp_path: Path) -> None:
    write_pairs(tmp_path / "x", 2)
    order = ("sharp", "blur") if header.startswith("S") else ("blur", "sharp")
    lines = [",".join(f"x/{folder}/{i}.png" for folder in order) for i in range(2)]
    (tmp_path / "list.csv").write_text(header + "\n".join(lines) + "\n\n")
    pairs = find_pairs(tmp_path / "list.csv")
    assert [(b.parent.name, s.parent.name) for b, s in pairs] == [("blur", "sharp")] * 2


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "lists no pairs"), ("one\n", "line 1: 1 columns"), ("blur,sharp\na.png,b.png\n", "line 2: no such file")],
)
def test_a_bad_csv_is_named_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        find_pairs(tmp_path / "list.csv")


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="nowhere"):
        find_pairs(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no pairs in"):
        find_pairs(tmp_path)
    write_pairs(tmp_path, 3)
    (tmp_path / "blur" / "1.png").unlink()
    with pytest.raises(InputError, match=r"sharp/1\.png has no partner"):
        find_pairs(tmp_path)


def test_pairs_of_different_sizes_are_named(tmp_path: Path) -> None:
    write_pairs(tmp_path, 1)
    write_image(tmp_path / "sharp" / "0.png", photo(0, 20, 30))
    with pytest.raises(InputError, match=r"0\.png has 80x64 pixels.* 30x20"):
        list(PairSet(tmp_path))
