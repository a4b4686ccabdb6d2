from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deblur_deploy.errors import InputError, MissingFileError, OutputError
from deblur_deploy.media import images
from deblur_deploy.media.headers import pixel_size
from deblur_deploy.media.tiff import page_count, read_tags, with_tags
from tests.conftest import noise

SIDEWAYS = b"II*\0" + struct.pack("<IHHHII I", 8, 1, 274, 3, 1, 6, 0)[:22]
ICC = b"\0" * 128 + b"\0\0\0\0"


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
@pytest.mark.parametrize("channels", [None, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_lossless_formats_give_back_the_pixels(tmp_path: Path, suffix: str, channels: int | None, dtype: type) -> None:
    if suffix == ".bmp" and (dtype == np.uint16 or channels is None):
        pytest.skip("BMP has neither 16 bits nor gray")
    shape = (20, 31) if channels is None else (20, 31, channels)
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    path = tmp_path / f"a{suffix}"
    images.write_photo(path, images.Photo(pixels=pixels))
    assert pixel_size(path.read_bytes()) == (31, 20)
    again = images.read_photo(path)
    np.testing.assert_array_equal(again.pixels, pixels)


def test_red_is_red(tmp_path: Path) -> None:
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    images.write_image(tmp_path / "a.jpg", red)
    for image in (images.read_image(tmp_path / "a.jpg"), images.read_photo(tmp_path / "a.jpg").pixels):
        assert image[..., 0].min() > 240
        assert image[..., 1:].max() < 15


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_orientation_is_kept_and_not_applied_twice(tmp_path: Path, suffix: str) -> None:
    photo = images.Photo(pixels=noise(20, 30, 3), metadata=((cv2.IMAGE_METADATA_EXIF, SIDEWAYS),))
    path = tmp_path / f"a{suffix}"
    images.write_photo(path, photo)
    assert images.read_image(path).shape == (30, 20, 3)
    for _ in range(3):
        photo = images.read_photo(path)
        assert photo.pixels.shape == (20, 30, 3)
        assert dict(photo.metadata)[cv2.IMAGE_METADATA_EXIF] == SIDEWAYS
        images.write_photo(path, photo)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a_colour_profile_is_kept(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    images.write_photo(path, images.Photo(pixels=noise(9, 9, 3), metadata=((cv2.IMAGE_METADATA_ICCP, ICC),)))
    assert dict(images.read_photo(path).metadata)[cv2.IMAGE_METADATA_ICCP] == ICC


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_a_real_profile_is_kept(tmp_path: Path, suffix: str) -> None:
    cms = pytest.importorskip("PIL.ImageCms")
    pil = pytest.importorskip("PIL.Image")
    profile = cms.ImageCmsProfile(cms.createProfile("sRGB")).tobytes()
    pil.fromarray(noise(20, 30, 3)).save(tmp_path / f"a{suffix}", icc_profile=profile)
    photo = images.read_photo(tmp_path / f"a{suffix}")
    images.write_photo(tmp_path / f"b{suffix}", photo)
    with pil.open(tmp_path / f"b{suffix}") as image:
        assert image.info["icc_profile"] == profile


def test_tiff_keeps_its_profile(tmp_path: Path) -> None:
    tags = {34675: (7, len(ICC), ICC)}
    images.write_photo(tmp_path / "a.tif", images.Photo(pixels=noise(20, 30, 3), tiff_tags=tags))
    photo = images.read_photo(tmp_path / "a.tif")
    assert dict(photo.tiff_tags) == tags
    images.write_photo(tmp_path / "b.tif", photo)
    again = images.read_photo(tmp_path / "b.tif")
    assert dict(again.tiff_tags) == tags
    np.testing.assert_array_equal(again.pixels, photo.pixels)
    assert photo.pixels.shape == (20, 30, 3)


@pytest.mark.parametrize("order", [b"II*\0", b"MM\0*"])
def test_tiff_keeps_what_a_camera_wrote(tmp_path: Path, order: bytes) -> None:
    """Written and read again by another library."""
    pil = pytest.importorskip("PIL.Image")
    plugin = pytest.importorskip("PIL.TiffImagePlugin")
    tags = plugin.ImageFileDirectory_v2(order + b"\0" * 4)
    plain = {270: "a cat", 271: "Maker", 272: "Model", 274: 6, 296: 2, 305: "Soft", 306: "2026:01:02 03:04:05",
             315: "Äsop".encode("latin1"), 33432: "me", 700: b"<x/>", 34675: ICC}  # fmt: skip
    for tag, value in plain.items():
        tags[tag] = value
    tags[282], tags[283] = 300.5, 72
    tags[34665] = {33434: 0.004, 34855: 800, 36867: "2026:01:02 03:04:05", 37500: b"note" * 9}
    tags[34853] = {1: "N", 2: (52.0, 30.0, 15.5)}
    pixels = noise(20, 30, 3)
    size = {256: 30, 257: 20, 258: (8, 8, 8), 259: 1, 262: 2, 273: 0, 277: 3, 278: 20, 279: pixels.size}
    for tag, number in size.items():
        tags[tag] = number
    content = order + struct.pack("<I" if order == b"II*\0" else ">I", 8) + tags.tobytes(8) + pixels.tobytes()
    (tmp_path / "a.tif").write_bytes(content)
    photo = images.read_photo(tmp_path / "a.tif")
    np.testing.assert_array_equal(photo.pixels, pixels)
    for name in ("b.tif", "c.tif"):  # again, from what was written
        images.write_photo(tmp_path / name, photo)
        photo = images.read_photo(tmp_path / name)
        np.testing.assert_array_equal(photo.pixels, pixels)
    with pil.open(tmp_path / "a.tif") as before, pil.open(tmp_path / "c.tif") as after:
        for tag in (*plain, 282, 283):
            assert after.tag_v2[tag] == before.tag_v2[tag], tag
        for directory in (34665, 34853):
            assert dict(after.getexif().get_ifd(directory)) == dict(before.getexif().get_ifd(directory))
            assert after.getexif().get_ifd(directory)
    images.write_photo(tmp_path / "d.jpg", photo)
    with pil.open(tmp_path / "d.jpg") as jpeg:
        assert jpeg.getexif()[274] == 6
        assert jpeg.getexif().get_ifd(34665)[34855] == 800
    assert images.read_image(tmp_path / "d.jpg").shape == (30, 20, 3)


def test_a_directory_of_many_entries_for_the_same_bytes_is_left_out() -> None:
    entries = b"".join(struct.pack("<HHII", tag, 7, 10_000, 0) for tag in range(2000))
    exif = struct.pack("<H", 2000) + entries
    data = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 34665, 4, 1, 26, 0) + exif
    assert read_tags(data) == {}


def test_a_sideways_tiff_is_turned_once(tmp_path: Path) -> None:
    upright = noise(20, 30, 3)
    data = cv2.imencode(".tif", upright)[1].tobytes()
    (directory,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, directory)
    entries = data[directory + 2 : directory + 2 + 12 * count] + struct.pack("<HHIHH", 274, 3, 1, 6, 0)
    turned = data[:4] + struct.pack("<I", len(data)) + data[8:] + struct.pack("<H", count + 1) + entries + b"\0" * 4
    (tmp_path / "a.tif").write_bytes(turned)
    photo = images.read_photo(tmp_path / "a.tif")
    images.write_photo(tmp_path / "b.tif", photo)
    for path in (tmp_path / "a.tif", tmp_path / "b.tif"):
        np.testing.assert_array_equal(images.read_image(path), np.rot90(upright[..., ::-1], -1))


def test_big_endian_tags_are_read() -> None:
    data = b"MM\0*" + struct.pack(">IHHHIII", 8, 1, 34675, 7, len(ICC), 26, 0) + ICC
    assert read_tags(data) == {34675: (7, len(ICC), ICC)}
    assert with_tags(b"no tiff", read_tags(data)) == b"no tiff"


def test_damaged_metadata_does_not_cost_the_image(tmp_path: Path) -> None:
    photo = images.Photo(pixels=noise(9, 9, 3), metadata=((cv2.IMAGE_METADATA_ICCP, b"nonsense"),))
    images.write_photo(tmp_path / "a.png", photo)
    np.testing.assert_array_equal(images.read_photo(tmp_path / "a.png").pixels, photo.pixels)


def png_claiming(width: int, height: int) -> bytes:
    data = bytearray(cv2.imencode(".png", noise(4, 4, 3))[1].tobytes())
    data[16:24] = struct.pack(">II", width, height)
    return bytes(data)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_claiming(60_000, 60_000))
    with pytest.raises(InputError, match="60000x60000 pixels, more than the limit of 268 megapixels"):
        images.read_photo(tmp_path / "a.png")
    images.write_image(tmp_path / "b.png", noise(20, 20, 3))
    with pytest.raises(InputError, match="limit"):
        images.read_image(tmp_path / "b.png", max_pixels=399)
    assert images.read_image(tmp_path / "b.png", max_pixels=400).shape == (20, 20, 3)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"RIFF1234WEBP"]
)
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png") as caught:
        images.read_photo(path)
    assert "\n" not in str(caught.value)


def test_absent_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such file"):
        images.read_image(tmp_path / "a.png")
    with pytest.raises(MissingFileError, match="is a folder"):
        images.read_image(tmp_path)
    with pytest.raises(MissingFileError):
        images.list_images(tmp_path / "none")
    with pytest.raises(OutputError, match="unknown image format"):
        images.write_image(tmp_path / "a.gif", noise(3, 3, 3))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from([".jpg", ".png", ".tif", ".webp", ".bmp"]))
def test_any_mutation_is_read_or_our_error(tmp_path: Path, data: st.DataObject, suffix: str) -> None:
    content = bytearray(cv2.imencode(suffix, noise(16, 16, 3))[1].tobytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with suppress(InputError):
        assert images.read_photo(path, max_pixels=10**6).pixels.size


def test_lists_by_name_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", ".a.jpg", "c.txt", "d.mp4", "sub/e.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "aa.jpg").mkdir()
    assert [path.name for path in images.list_images(tmp_path)] == ["a.jpg", "b.PNG"]
    assert [path.name for path in images.list_media(tmp_path, recursive=True)] == ["a.jpg", "b.PNG", "d.mp4", "e.tif"]
    assert [path.name for path in images.list_media(tmp_path, "a*")] == ["a.jpg"]


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".bmp", ".png"])
@pytest.mark.parametrize(("dtype", "white"), [(np.uint16, 65535), (np.float32, 1.0)])
def test_what_a_format_cannot_hold_is_scaled(tmp_path: Path, suffix: str, dtype: type, white: float) -> None:
    pixels = np.full((16, 16, 3), 0.25 * white).astype(dtype)
    images.write_photo(tmp_path / f"a{suffix}", images.Photo(pixels=pixels))
    assert np.abs(images.read_image(tmp_path / f"a{suffix}").astype(int) - 64).max() <= 2


def test_transparency_is_not_lost_in_a_jpeg(tmp_path: Path) -> None:
    pixels = np.full((9, 9, 4), 255, np.uint8)
    images.write_photo(tmp_path / "a.jpg", images.Photo(pixels=pixels))
    pixels[4, 4, 3] = 0
    with pytest.raises(OutputError, match="no transparency"):
        images.write_photo(tmp_path / "b.jpg", images.Photo(pixels=pixels))


def test_a_damaged_block_costs_no_other(tmp_path: Path) -> None:
    metadata = ((cv2.IMAGE_METADATA_ICCP, b"nonsense"), (cv2.IMAGE_METADATA_EXIF, SIDEWAYS))
    images.write_photo(tmp_path / "a.png", images.Photo(pixels=noise(9, 9, 3), metadata=metadata))
    assert dict(images.read_photo(tmp_path / "a.png").metadata) == {cv2.IMAGE_METADATA_EXIF: SIDEWAYS}


def test_pages_are_not_lost(tmp_path: Path) -> None:
    pages = [noise(9, 9, 3, seed=i) for i in range(3)]
    assert cv2.imwritemulti(str(tmp_path / "a.tif"), pages)
    with pytest.raises(InputError, match=r"a\.tif has 3 pages"):
        images.read_photo(tmp_path / "a.tif")
    preview = b"II*\0" + struct.pack("<IHI", 8, 0, 14) + struct.pack("<HHHIII", 1, 254, 4, 1, 1, 8)
    assert page_count(preview) == 1
