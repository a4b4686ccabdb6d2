from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deblur_deploy.errors import InputError, MissingFileError, OutputError
from deblur_deploy.media import images
from deblur_deploy.media.beside import Beside, put_back
from deblur_deploy.media.headers import FORMATS, pixel_size
from deblur_deploy.media.tiff import page_count, read_tags, with_tags
from tests.conftest import noise

SIDEWAYS = b"II*\0" + struct.pack("<IHHHII I", 8, 1, 274, 3, 1, 6, 0)[:22]
ICC = b"\0" * 128 + b"\0\0\0\0"


def profile(space: bytes, size: int = 200) -> bytes:
    return (b"\0" * 16 + space).ljust(size, b"p")


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def chunk(name: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def riff(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) & 1)


def png(colours: int, bits: int, size: tuple[int, int], rows: bytes, *parts: bytes) -> bytes:
    """A PNG of unfiltered ``rows``."""
    step = len(rows) // size[1]
    raw = b"".join(b"\0" + rows[i : i + step] for i in range(0, len(rows), step))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(parts) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND")


def tiff(
    colours: int, bits: int, size: tuple[int, int], raw: bytes, order: str = "<", **tags: tuple[int, int]
) -> bytes:
    """A TIFF of one strip; ``tags`` are called ``tNUMBER``, each with its type (3 or 4) and value."""
    samples = len(raw) * 8 // bits // (size[0] * size[1])

    def row(tag: int, kind: int, *values: int) -> bytes:
        inside = struct.pack(order + len(values) * ("H" if kind == 3 else "I"), *values)
        return struct.pack(order + "HHI", tag, kind, len(values)) + inside.ljust(4, b"\0")

    # Bits of each sample lie between the header and the pixels where they are more than a row holds.
    rows = {258: row(258, 3, *[bits] * samples) if samples < 3 else struct.pack(order + "HHII", 258, 3, samples, 8)}
    facts = {"t256": (4, size[0]), "t257": (4, size[1]), "t259": (3, 1), "t262": (3, colours), "t273": (4, 16),
             "t277": (3, samples), "t278": (4, size[1]), "t279": (4, len(raw)), **tags}  # fmt: skip
    rows |= {int(name[1:]): row(int(name[1:]), *fact) for name, fact in facts.items()}
    head = struct.pack(order + "2sHI4H", b"II" if order == "<" else b"MM", 42, 16 + len(raw), *[bits] * 4)
    return head + raw + struct.pack(order + "H", len(rows)) + b"".join(rows[tag] for tag in sorted(rows)) + b"\0" * 4


def with_parts(path: Path, pixels: NDArray[Any], *parts: bytes, settings: Sequence[int] = ()) -> None:
    """Write an image that carries ``parts``."""
    encoded = cv2.imencode(path.suffix, pixels, settings)[1].tobytes()
    path.write_bytes(put_back(encoded, Beside(format=FORMATS[path.suffix], parts=parts)))


def again(path: Path) -> bytes:
    """The content of what comes of ``path`` when it is read and written."""
    photo = images.read_photo(path)
    assert photo.beside is not None
    images.write_photo(path.with_stem("again"), photo, kind=photo.beside.format)
    return path.with_stem("again").read_bytes()


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


@pytest.mark.parametrize(
    ("suffix", "part"),
    [
        (".jpg", segment(0xE1, b"Exif\0\0" + SIDEWAYS)),
        (".png", chunk(b"eXIf", SIDEWAYS)),
        (".webp", riff(b"EXIF", SIDEWAYS)),
    ],
)
def test_orientation_is_kept_and_not_applied_twice(tmp_path: Path, suffix: str, part: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    with_parts(path, noise(20, 30, 3), part)
    assert images.read_image(path).shape == (30, 20, 3)
    for _ in range(3):
        photo = images.read_photo(path)
        assert photo.pixels.shape == (20, 30, 3)
        assert photo.beside is not None
        assert photo.beside.parts == (part,)
        images.write_photo(path, photo)


JFIF = segment(0xE0, b"JFIF\0\1\2\1\1\x2c\1\x2c\0\0")
MPF = segment(0xE2, b"MPF\0" + bytes(66))


def icc_segments(*bodies: bytes) -> list[bytes]:
    return [segment(0xE2, b"ICC_PROFILE\0" + bytes([i, len(bodies)]) + body) for i, body in enumerate(bodies, 1)]


@pytest.mark.parametrize(
    "parts",
    [
        [MPF],
        [MPF, *icc_segments(profile(b"RGB "))],
        [*icc_segments(profile(b"RGB ")), MPF],
        [JFIF, *icc_segments(profile(b"RGB ", 65000), b"q" * 65000, b"r" * 9)],
        [JFIF, segment(0xE1, b"Exif\0\0" + SIDEWAYS), segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"),
         segment(0xED, b"Photoshop 3.0\x008BIM"), segment(0xEE, b"Adobe\0\x64\0\0\0\0\0"),
         segment(0xFE, b"Adobe and others")],
    ],
)  # fmt: skip
def test_segments_of_a_jpeg_stay_byte_for_byte(tmp_path: Path, parts: list[bytes]) -> None:
    """All but those that point behind the picture (MPF) or say how colours are encoded (Adobe)."""
    path = tmp_path / "a.jpg"
    with_parts(path, noise(20, 30, 3), *parts)
    kept = b"".join(part for part in parts if part != MPF and part[1] != 0xEE)
    result = again(path)
    assert result[2:].startswith(kept + b"\xff\xdb" if kept else b"\xff\xe0")
    assert b"MPF" not in result
    np.testing.assert_allclose(
        images.read_photo(tmp_path / "again.jpg").pixels, images.read_photo(path).pixels, atol=60
    )


@pytest.mark.parametrize("sampling", [0x111111, 0x121111, 0x211111, 0x221111, 0x411111])
def test_a_jpeg_keeps_its_chroma_sampling(tmp_path: Path, sampling: int) -> None:
    with_parts(tmp_path / "a.jpg", noise(20, 30, 3), settings=[cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling])
    result = again(tmp_path / "a.jpg")
    at = result.find(b"\xff\xc0")
    assert [result[at + 11 + 3 * i] for i in range(3)] == [sampling >> 16, 0x11, 0x11]


@pytest.mark.parametrize(
    ("behind", "lost"),
    [
        (b"", ()),
        (b"\xff\xd8\xffpreview", ()),
        (b"\xff\xd8\xffgains hdrgm:Version", ("its HDR gain map",)),
        (b"\0\0\0\x18ftypmp42", ("the video in it",)),
    ],
)
def test_what_follows_a_jpeg_is_named(tmp_path: Path, behind: bytes, lost: tuple[str, ...]) -> None:
    with_parts(tmp_path / "a.jpg", noise(20, 30, 3))
    with (tmp_path / "a.jpg").open("ab") as file:
        file.write(behind)
    photo = images.read_photo(tmp_path / "a.jpg")
    assert photo.beside is not None
    assert photo.beside.lost == lost


def test_chunks_of_a_png_stay_byte_for_byte(tmp_path: Path) -> None:
    """All but those of the encoding, and those that nobody may copy who does not know them."""
    kept = [chunk(b"gAMA", struct.pack(">I", 100000)), chunk(b"cHRM", bytes(32)), chunk(b"cICP", b"\x09\x10\0\1"),
            chunk(b"iCCP", b"name\0\0" + zlib.compress(profile(b"RGB "))),
            chunk(b"pHYs", struct.pack(">IIB", 11811, 11811, 1)),
            chunk(b"bKGD", bytes(6)), chunk(b"tEXt", b"Title\0dawn"), chunk(b"zTXt", b"k\0\0" + zlib.compress(b"v")),
            chunk(b"iTXt", b"k\0\0\0\0\0v"), chunk(b"tIME", bytes([7, 234, 11, 27, 1, 2, 3]))]  # fmt: skip
    dropped = [chunk(b"sBIT", b"\5\6\5"), chunk(b"iDOT", bytes(28)), chunk(b"tRNS", bytes([1, 2] * 3))]
    pixels = noise(9, 9, 3)
    (tmp_path / "a.png").write_bytes(png(2, 8, (9, 9), pixels.tobytes(), *kept, *dropped))
    result = again(tmp_path / "a.png")
    assert result[33:].startswith(b"".join(kept))
    assert result[33 + len(b"".join(kept)) + 4 :].startswith(b"IDAT")
    photo = images.read_photo(tmp_path / "again.png")
    np.testing.assert_array_equal(photo.pixels[..., :3], pixels)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".gif"])
def test_an_animation_is_refused(tmp_path: Path, suffix: str) -> None:
    pil = pytest.importorskip("PIL.Image")
    first, *more = (pil.fromarray(noise(20, 30, 3, seed=i)) for i in range(3))
    first.save(tmp_path / f"a{suffix}", save_all=True, append_images=more)
    with pytest.raises(InputError, match=rf"a\{suffix} is an animation"):
        images.read_photo(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("with_profile", [False, True])
@pytest.mark.parametrize(("bits", "dtype"), [(8, ">u1"), (16, ">u2")])
@pytest.mark.parametrize("key", [False, True])
def test_gray_with_transparency(tmp_path: Path, with_profile: bool, bits: int, dtype: str, key: bool) -> None:
    most = 2**bits - 1
    gray = np.array([[3, most, 200]], dtype)
    alpha = np.array([[most, 0, 9 if not key else most]], dtype)
    parts = [chunk(b"iCCP", b"name\0\0" + zlib.compress(profile(b"GRAY")))] if with_profile else []
    parts += [chunk(b"tRNS", struct.pack(">H", most))] if key else []
    rows = gray if key else np.dstack([gray, alpha]).astype(dtype)
    (tmp_path / "a.png").write_bytes(png(0 if key else 4, bits, (3, 1), rows.tobytes(), *parts))
    photo = images.read_photo(tmp_path / "a.png")
    np.testing.assert_array_equal(photo.pixels, np.dstack([gray, gray, gray, alpha]))
    assert photo.beside is not None
    assert [lost[:16] for lost in photo.beside.lost] == (["its gray profile"] if with_profile else [])
    assert b"iCCP" not in again(tmp_path / "a.png")
    coloured = photo.restored(lambda pixels: pixels // np.array([1, 2, 3, 1], pixels.dtype))
    assert (np.ptp(coloured.pixels[..., :3], axis=2) == 0).all()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("bits", "dtype"), [(8, "u1"), (16, "u2")])
@pytest.mark.parametrize(("extra", "written"), [(0, 0), (2, 2), (None, 0)])
def test_alpha_of_a_tiff_is_what_it_was(
    tmp_path: Path, order: str, bits: int, dtype: str, extra: int | None, written: int
) -> None:
    pil = pytest.importorskip("PIL.Image")
    pixels = noise(8, 9, 4).astype(order + dtype) * (257 if bits == 16 else 1)
    tags = {} if extra is None else {"t338": (3, extra)}
    (tmp_path / "a.tif").write_bytes(tiff(2, bits, (9, 8), pixels.tobytes(), order, **tags))
    photo = images.read_photo(tmp_path / "a.tif")
    np.testing.assert_array_equal(photo.pixels, pixels)
    again(tmp_path / "a.tif")
    np.testing.assert_array_equal(images.read_photo(tmp_path / "again.tif").pixels, pixels)
    with pil.open(tmp_path / "again.tif") as image:
        assert image.tag_v2[338] == (written,)
    seen = []
    restored = photo.restored(lambda image: (seen.append(image.shape[2]), image)[1])
    assert seen == [4 if written == 2 else 3]
    np.testing.assert_array_equal(restored.pixels, pixels)


@pytest.mark.parametrize(("bits", "dtype"), [(8, "u1"), (16, "<u2")])
def test_white_may_be_zero(tmp_path: Path, bits: int, dtype: str) -> None:
    pixels = noise(8, 9).astype(dtype) * (257 if bits == 16 else 1)
    (tmp_path / "a.tif").write_bytes(tiff(0, bits, (9, 8), pixels.tobytes()))
    np.testing.assert_array_equal(images.read_photo(tmp_path / "a.tif").pixels, 2**bits - 1 - pixels)
    in_bytes = pixels if bits == 8 else pixels // 257
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.tif")[..., 0], 255 - in_bytes)


def cmyk(suffix: str) -> bytes:
    pil, content = pytest.importorskip("PIL.Image"), io.BytesIO()
    pil.fromarray(noise(20, 30, 3)).convert("CMYK").save(content, "JPEG" if suffix == ".jpg" else "TIFF")
    return content.getvalue()


def turned_avif() -> bytes:
    pil, content = pytest.importorskip("PIL.Image"), io.BytesIO()
    exif = pil.Exif()
    exif[274] = 6
    pil.fromarray(noise(20, 30, 3)).save(content, "AVIF", exif=exif)
    return content.getvalue()


def jpeg_with(*parts: bytes) -> bytes:
    return put_back(cv2.imencode(".jpg", noise(9, 9, 3))[1].tobytes(), Beside(format="JPEG", parts=parts))


def begins_with_a_preview() -> bytes:
    """Two pictures, of which the first says that it is a reduced one."""
    done, data = cv2.imencodemulti(".tif", [noise(8, 10, 3), noise(64, 80, 3)])
    assert done
    content = bytearray(data.tobytes())
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    (at,) = (at for at in range(start + 2, start + 2 + 12 * count, 12) if content[at : at + 2] == b"\xfe\0")
    struct.pack_into("<I", content, at + 8, 1)
    return bytes(content)


RGBA = noise(1, 2, 4).tobytes()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jpg", lambda: cmyk(".jpg"), "a.jpg has colours in CMYK; convert it to RGB"),
        ("a.tif", lambda: cmyk(".tif"), "a.tif has colours in CMYK"),
        ("a.jpg", lambda: jpeg_with(*icc_segments(profile(b"Lab "))), "has colours in Lab"),
        ("a.tif", lambda: tiff(8, 8, (2, 1), RGBA[:6]), "has colours in Lab"),
        ("a.tif", lambda: tiff(2, 8, (2, 1), RGBA, t338=(3, 1)), "has premultiplied alpha"),
        ("a.tif", lambda: tiff(1, 8, (2, 1), RGBA[:4], t338=(3, 2)), "has 2 samples a pixel"),
        ("a.tif", lambda: tiff(2, 8, (2, 1), RGBA[:6], t50706=(4, 1025)), "is a DNG"),
        ("a.tif", begins_with_a_preview, "a.tif begins with a preview, which alone could be read"),
        ("a.tif", lambda: tiff(2, 16, (2, 1), RGBA[:6] * 2, t284=(3, 2)), "keeps each colour in a plane of its own"),
        ("a.tif", lambda: tiff(0, 32, (2, 1), RGBA, t339=(3, 3)), "floats that count from white down to black"),
        ("a.tif", lambda: tiff(2, 32, (2, 1), RGBA * 3, t339=(3, 2)), "has pixels of int32; save it with 8 or 16"),
        ("a.tif", lambda: tiff(1, 64, (2, 1), RGBA * 2, t339=(3, 3)), "has pixels of float64; save it with 8 or 16"),
        ("a.tif", lambda: b"II+\0\x08\0\0\0" + bytes(99), "is a BigTIFF, which cannot be restored"),
        ("a.jpg", lambda: b"\0\0\0\x18ftypheic" + bytes(99), "is a HEIC, which"),
        ("a.png", lambda: png_claiming(1_100_000, 4), "states 1100000x4 pixels; a side of more than 1000000"),
        ("a.avif", turned_avif, "has a rotation that would be lost"),
        ("a.png", lambda: b"\x89PNG\r\n\x1a\n" + bytes(9), "is a PNG image that is damaged or cut short"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path: Path, name: str, content: Callable[[], bytes], says: str) -> None:
    (tmp_path / name).write_bytes(content())
    with pytest.raises(InputError, match=says) as caught:
        images.read_photo(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_gif_becomes_a_png(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    picture = pil.fromarray(noise(20, 30) // 2).convert("RGB").quantize(64)
    picture.save(tmp_path / "a.gif", comment=b"taken at dawn")
    result = again(tmp_path / "a.gif")
    assert result.startswith(b"\x89PNG")
    with pil.open(io.BytesIO(result)) as image:
        assert image.info["Comment"] == "taken at dawn"
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.asarray(picture.convert("RGB")))
    with pytest.raises(OutputError, match="unknown image format"):
        images.write_image(tmp_path / "b.gif", noise(3, 3, 3))


@pytest.mark.parametrize("sampling", ["4:2:0", "4:4:4"])
def test_an_avif_keeps_exif_and_profile(tmp_path: Path, sampling: str) -> None:
    pil = pytest.importorskip("PIL.Image")
    exif = pil.Exif()
    exif[271] = "Maker"
    smooth = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
    icc = profile(b"RGB ")
    kept = {"subsampling": sampling, "exif": exif.tobytes(), "icc_profile": icc}
    pil.fromarray(smooth).save(tmp_path / "a.avif", quality=95, xmp=b"<x/>", **kept)
    photo = images.read_photo(tmp_path / "a.avif")
    assert photo.beside is not None
    assert photo.beside.lost == ("its XMP",)
    with pil.open(io.BytesIO(again(tmp_path / "a.avif"))) as image:
        assert image.getexif()[271] == "Maker"
        assert image.info["icc_profile"] == icc
        difference = np.abs(np.asarray(image).astype(int) - photo.pixels)
    assert difference.max() <= (0 if sampling == "4:4:4" else 12)


def test_a_bmp_keeps_its_resolution(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    pil.fromarray(noise(20, 30, 3)).save(tmp_path / "a.bmp", dpi=(300, 200))
    with pil.open(io.BytesIO(again(tmp_path / "a.bmp"))) as image:
        assert image.info["dpi"] == pytest.approx((300, 200), abs=0.1)


@pytest.mark.parametrize("mask", [None, 0, 0xFF000000])
def test_the_fourth_byte_of_a_bmp_is_alpha_only_if_it_says_so(tmp_path: Path, mask: int | None) -> None:
    pixels = noise(6, 8, 4)
    masks = struct.pack("<III", 0xFF0000, 0xFF00, 0xFF) + (b"" if mask is None else struct.pack("<I", mask) + bytes(48))
    size = 40 if mask is None else 104
    head = struct.pack("<IiiHHIIiiII", size, 8, -6, 1, 32, 3, pixels.size, 0, 0, 0, 0) + masks
    body = b"BM" + struct.pack("<IHHI", 14 + len(head) + pixels.size, 0, 0, 14 + len(head)) + head + pixels.tobytes()
    (tmp_path / "a.bmp").write_bytes(body)
    found = images.read_photo(tmp_path / "a.bmp").pixels
    np.testing.assert_array_equal(found, pixels[..., [2, 1, 0, 3]] if mask else pixels[..., [2, 1, 0]])


@pytest.mark.parametrize("channels", [3, 4])
def test_a_webp_keeps_its_chunks(tmp_path: Path, channels: int) -> None:
    pil = pytest.importorskip("PIL.Image")
    pixels = noise(20, 31, channels)
    parts = [riff(b"ICCP", profile(b"RGB ", 201)), riff(b"EXIF", SIDEWAYS), riff(b"XMP ", b"<x/>")]
    with_parts(tmp_path / "a.webp", pixels, *parts)
    result = again(tmp_path / "a.webp")
    assert result == (tmp_path / "a.webp").read_bytes()
    assert all(result.count(part) == 1 for part in parts)
    with pil.open(io.BytesIO(result)) as image:
        assert (image.size, image.mode) == ((31, 20), "RGB" if channels == 3 else "RGBA")
        assert image.info["icc_profile"] == profile(b"RGB ", 201)
        assert image.getexif()[274] == 6


def test_a_name_may_lie_about_the_format(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(cv2.imencode(".png", noise(9, 9, 4))[1].tobytes())
    assert again(tmp_path / "a.jpg").startswith(b"\x89PNG")
    with pytest.raises(OutputError, match="JPEG has no transparency"):
        images.write_photo(tmp_path / "b.jpg", images.read_photo(tmp_path / "a.jpg"))


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


def test_tiff_keeps_its_profile_and_what_maps_and_makers_wrote(tmp_path: Path) -> None:
    tags = {34675: (7, len(ICC), ICC), 33550: (12, 3, bytes(24)), 34735: (3, 4, bytes(8)), 65000: (2, 3, b"my\0")}
    beside = Beside(format="TIFF", tags=tags)
    images.write_photo(tmp_path / "a.tif", images.Photo(pixels=noise(20, 30, 3), beside=beside))
    for name in ("a", "b"):
        photo = images.read_photo(tmp_path / f"{name}.tif")
        assert photo.beside is not None
        assert photo.beside.tags == tags
        np.testing.assert_array_equal(photo.pixels, noise(20, 30, 3))
        images.write_photo(tmp_path / "b.tif", photo)


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
    damaged = chunk(b"iCCP", b"nonsense")[:-1] + b"!"
    (tmp_path / "a.png").write_bytes(png(2, 8, (9, 9), noise(9, 9, 3).tobytes(), damaged, chunk(b"eXIf", SIDEWAYS)))
    assert chunk(b"eXIf", SIDEWAYS) in again(tmp_path / "a.png")
    np.testing.assert_array_equal(images.read_photo(tmp_path / "again.png").pixels, noise(9, 9, 3))


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
        images.write_image(tmp_path / "a.xyz", noise(3, 3, 3))


SEEDS = {
    ".jpg": [JFIF, segment(0xE1, b"Exif\0\0" + SIDEWAYS), MPF, *icc_segments(profile(b"RGB "), b"q")],
    ".png": [chunk(b"iCCP", b"n\0\0" + zlib.compress(profile(b"RGB "))), chunk(b"eXIf", SIDEWAYS)],
    ".webp": [riff(b"ICCP", profile(b"RGB ")), riff(b"EXIF", SIDEWAYS)],
    ".bmp": [bytes(8)],
}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from([*SEEDS, ".tif", ".gif", ".avif"]))
def test_any_mutation_is_read_or_our_error(tmp_path: Path, data: st.DataObject, suffix: str) -> None:
    """And what was read can be written, and read again."""
    path = tmp_path / f"a{suffix}"
    if suffix in SEEDS:
        with_parts(path, noise(16, 16, 3), *SEEDS[suffix])
    else:
        path.write_bytes(cv2.imencode(suffix, noise(16, 16, 3))[1].tobytes())
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    path.write_bytes(content)
    with suppress(InputError):
        photo = images.read_photo(path, max_pixels=10**6)
        assert photo.beside is not None
        result = tmp_path / "result"
        images.write_photo(result, photo, kind=photo.beside.format)
        assert images.read_image(result).size


def test_lists_by_name_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", ".a.jpg", "c.txt", "d.mp4", "sub/e.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "aa.jpg").mkdir()
    assert [path.name for path in images.list_images(tmp_path)] == ["a.jpg", "b.PNG"]


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


def test_pages_are_not_lost(tmp_path: Path) -> None:
    pages = [noise(9, 9, 3, seed=i) for i in range(3)]
    assert cv2.imwritemulti(str(tmp_path / "a.tif"), pages)
    with pytest.raises(InputError, match=r"a\.tif has 3 pages"):
        images.read_photo(tmp_path / "a.tif")
    preview = b"II*\0" + struct.pack("<IHI", 8, 0, 14) + struct.pack("<HHHIII", 1, 254, 4, 1, 1, 8)
    assert page_count(preview) == 1
