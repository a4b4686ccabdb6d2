"""Calibration uses what it is given, and the audit sees what is wrong with it."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deblur_deploy.errors import InputError
from deblur_deploy.media.images import write_image
from deblur_deploy.pipeline.graph import BLOCKS
from deblur_deploy.pipeline.int8 import calibrate
from deblur_deploy.pipeline.int8.calibrate import (
    clipped_shares,
    cut_smaller,
    cut_tiles,
    find_ranges,
    kinds_of,
    make_audit,
    run_body,
    to_blocks,
)
from deblur_deploy.pipeline.int8.quantize import quantize_body
from deblur_deploy.pipeline.photos import calibration_from
from tests.photos import photo, write_photos
from tests.small import body

OPS = ["Conv", "Relu", "MaxPool", "Concat", "DepthToSpace"]


def test_blocks_are_what_pixel_unshuffle_gives_with_colours_last():
    image = photo(0, 8, 12)
    blocks = to_blocks(image, 4)[0]
    assert blocks.shape == (48, 2, 3)
    np.testing.assert_allclose(blocks[(1 * 4 + 2) * 3 + 1, 1, 2] * 255, image[4 + 1, 8 + 2, 1], rtol=1e-6)


@given(height=st.integers(16, 200), width=st.integers(16, 200))
def test_tiles_fit_the_network(height, width):
    tiles = cut_tiles({"only": photo(0, height, width)}, 16, 3, 100)
    assert {tile.shape for tile in tiles.images} == {(tiles.side_px, tiles.side_px, 3)}
    assert tiles.side_px == min(96, min(height, width) // 16 * 16)
    assert (tiles.photos, tiles.left_out) == ({"only": 3}, [])


@pytest.mark.parametrize(
    ("radius", "divisor", "side"), [(9, 2, 32), (4, 2, 32), (2, 2, 16), (0, 1, 16), (0, 8, 16), (3, 32, 32)]
)
def test_smaller_tiles_are_all_of_the_tiles_and_still_show_what_the_network_sees(radius, divisor, side):
    tiles = [photo(seed, 32, 32) for seed in range(2)]
    smaller = cut_smaller(tiles, radius, divisor)
    assert {tile.shape for tile in smaller} == {(side, side, 3)}
    np.testing.assert_array_equal(np.sort(np.ravel(smaller)), np.sort(np.ravel(tiles)))
    np.testing.assert_array_equal(smaller[0], tiles[0][:side, :side])


def test_photographs_smaller_than_a_tile_are_left_out_and_named():
    photos = {"tiny": photo(0, 20, 300), "one": photo(1, 80, 90), "two": photo(2, 100, 70)}
    tiles = cut_tiles(photos, 16, 5, 64)
    assert (tiles.side_px, tiles.left_out, tiles.photos) == (64, ["tiny"], {"one": 3, "two": 2})


@pytest.mark.parametrize("photos", [{}, {"a": photo(0, 15, 200)}])
def test_photographs_too_small_to_calibrate_on_are_refused(photos):
    with pytest.raises(InputError, match="16 px that"):
        cut_tiles(photos, 16, 4, 64)


def test_a_folder_of_one_image_calibrates_and_an_empty_one_is_refused(tmp_path):
    write_photos(tmp_path / "one", 1)
    assert list(calibration_from(tmp_path / "one", 8)) == ["photo0.png"]
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds no images to calibrate with"):
        calibration_from(tmp_path / "none", 8)


def test_a_large_folder_is_sampled_evenly(tmp_path):
    for index in range(7):
        write_image(tmp_path / f"{index}.png", photo(index, 20, 20))
    assert list(calibration_from(tmp_path, 3)) == ["0.png", "3.png", "6.png"]


def test_values_that_the_calibration_never_saw_are_counted():
    plain, dark = body("stem4", "planes"), [photo(seed, 64, 64) // 8 for seed in range(3)]
    ranges = find_ranges(plain, dark, 4, OPS, "minmax")
    quantized = quantize_body(plain, ranges, OPS)
    assert set(clipped_shares(plain, quantized, dark, 4).values()) == {0}
    bright = clipped_shares(plain, quantized, [photo(9, 64, 64)], 4)
    (seen,) = run_body(plain, [photo(9, 64, 64)], 4, {"relu", "max_pool2d", "cat"})
    for name in ("relu", "max_pool2d", "cat"):
        low, high = ranges[name].range_value
        half = (high - low) / 255 / 2
        outside = (seen[name] < low - half) | (seen[name] > high + half)
        assert bright[name] == pytest.approx(outside.mean(), abs=0.002)
        assert bright[name] > 0.004
    assert {node.output[0] for node in plain.graph.node if node.op_type == "DepthToSpace"} <= bright.keys()


def test_kinds_tell_dark_bright_sharp_and_blurred():
    sharp = np.random.default_rng(0).integers(100, 156, (64, 64, 3), np.uint8)
    flat = np.full((64, 64, 3), 250, np.uint8)
    assert kinds_of([sharp, flat, sharp // 8, cv2.GaussianBlur(sharp, (0, 0), 4)]) == {
        "dark": 0.25, "bright": 0.25, "sharp": 0.25, "blurred": 0.5,
    }  # fmt: skip


def test_the_audit_names_what_is_missing_and_what_was_seen_before():
    photos = {"a": photo(0, 64, 64), "b": photo(1, 64, 64)}
    held_out = {"white": np.full((64, 64, 3), 250, np.uint8), "again": photo(1, 64, 64)}
    tiles, others = (cut_tiles(images, 16, 4, 64) for images in (photos, held_out))
    audit = make_audit("result", (0.5, 0.8), photos, tiles, held_out, {"relu": 0.0}, others)
    assert audit.missing == ["bright", "blurred"]
    assert audit.shared_with_pairs == ["b"]
    assert (audit.tiles, audit.tile_px, audit.photos) == (4, 64, {"a": 2, "b": 2})


def test_values_too_large_to_be_held_together_come_one_after_the_other(monkeypatch):
    net, tiles = body("stem4", "planes"), [photo(seed, 64, 64) for seed in range(2)]
    names = {node.output[0] for node in net.graph.node if node.op_type == "Conv"}
    (*together,) = run_body(net, tiles, 4, names)
    assert len(together) == 2
    monkeypatch.setattr(calibrate, "_MOST_BYTES", 60000)
    (*parts,) = run_body(net, tiles, 4, names)
    assert len(parts) > 2
    assert max(sum(value.nbytes for name, value in part.items() if name in names) for part in parts) <= 60000
    for name in (*names, BLOCKS):
        mine = [part[name] for part in parts if name in part]
        assert len(mine) == 2
        for one, other in zip(mine, together, strict=True):
            np.testing.assert_array_equal(one, other[name])
