"""Which codec and pixel format a result gets, and what is told about its colours."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from deblur_deploy.errors import InputError
from tests.conftest import noise
from tests.test_video import facts, make

av = pytest.importorskip("av")
containers = pytest.importorskip("deblur_deploy.media.containers")
encoders = pytest.importorskip("deblur_deploy.media.encoders")
video = pytest.importorskip("deblur_deploy.media.video")

ODD, EVEN = (129, 97), (64, 48)


@pytest.mark.parametrize(
    ("container", "codec", "pixels", "size", "chosen"),
    [
        ("mp4", "h264", "yuv420p", EVEN, "libx264 yuv420p"),
        ("mp4", "h264", "yuvj420p", EVEN, "libx264 yuvj420p"),
        ("mp4", "h264", "yuv444p", ODD, "libx264 yuv444p"),
        ("mp4", "h264", "gbrp", EVEN, "libx264rgb bgr0"),
        ("mp4", "h264", "gbrp10le", EVEN, "libx264 yuv444p10le"),
        ("mkv", "theora", "yuv420p", ODD, "libx264 yuv444p"),
        ("mkv", "mpeg2video", "yuv420p", EVEN, "libx264 yuv420p"),
        ("mkv", "mpeg2video", "yuv420p", (64, 97), "libx264 yuv422p"),
        ("avi", "msmpeg4v3", "yuv420p", ODD, "mpeg4 yuv420p"),
        ("avi", "rawvideo", "bgr24", EVEN, "libx264 yuv444p"),
        ("avi", "rawvideo", "yuv411p", EVEN, "libx264 yuv422p"),
        ("mov", "png", "rgb24", EVEN, "libx264 yuv444p"),
        ("mov", "png", "pal8", EVEN, "libx264 yuv444p"),
        ("mov", "prores", "yuv444p12le", EVEN, "prores_ks yuv444p10le"),
        ("webm", "vp9", "yuv420p10le", ODD, "libsvtav1 yuv420p10le"),
        ("mkv", "av1", "yuv444p", EVEN, "libvpx-vp9 yuv444p"),
        ("mkv", "hevc", "gray12le", EVEN, "libx265 gray12le"),
    ],
)
def test_the_codec_stays_if_it_can_hold_the_frames(
    container: str, codec: str, pixels: str, size: tuple[int, int], chosen: str
) -> None:
    name, found = encoders.choice(container, codec, av.VideoFormat(pixels), *size)
    assert f"{name} {found.name}" == chosen


def test_colour_that_nothing_holds_is_refused() -> None:
    with pytest.raises(InputError, match="nothing here writes vp8 of yuv444p at 64x48"):
        encoders.choice("webm", "vp8", av.VideoFormat("yuv444p"), 64, 48)


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "becomes", "space"),
    [
        ("a.mp4", "libx264rgb", "rgb24", "gbrp", 0),
        ("a.mp4", "libx265", "gbrp", "gbrp", 0),
        ("a.webm", "libvpx-vp9", "gbrp", "gbrp", 0),
        ("a.mkv", "ffv1", "bgr0", "bgr0", 0),
        ("a.mov", "png", "rgb24", "yuv444p", 1),
        ("a.avi", "rawvideo", "bgr24", "yuv444p", 1),
    ],
)
def test_rgb_stays_or_becomes_444_and_is_called_what_it_is(
    tmp_path: Path, name: str, codec: str, pixels: str, becomes: str, space: int
) -> None:
    source, target = make(tmp_path / name, codec, pixels), tmp_path / "out" / name
    assert video.restore_video(source, target, lambda image: image * (1, 0, 0)) == ()
    found = facts(target)
    assert (found["pixels"], found["space"]) == (becomes, space)
    with av.open(str(target)) as container:
        red = next(container.decode(video=0)).to_ndarray(format="rgb24").mean(axis=(0, 1))
    assert np.abs(red - (20, 0, 0)).max() <= 3


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("a.mkv", "mpeg2video", "yuv420p"),
        ("a.avi", "msmpeg4", "yuv420p"),
        ("a.mp4", "mpeg4", "yuv420p"),
        ("a.webm", "libvpx-vp9", "yuv420p"),
        ("a.webm", "libvpx", "yuv420p"),
        ("a.mkv", "ffv1", "yuv420p"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.mov", "prores_ks", "yuv422p10le"),
        ("a.mp4", "libx265", "yuv444p"),
    ],
)
def test_odd_sizes_stay_whole(tmp_path: Path, name: str, codec: str, pixels: str) -> None:
    tick = Fraction(1, 25)
    source = make(tmp_path / name, codec, pixels, size=ODD, tick=tick, colour_range=2 if "j" in pixels else 1)
    assert video.restore_video(source, tmp_path / "out" / name, lambda image: image) == ()
    before, after = facts(source), facts(tmp_path / "out" / name)
    assert after["size"] == ODD
    assert after["times"] == before["times"]
    assert np.abs(before["means"] - after["means"]).max() < 4


def test_mpeg4_keeps_times_that_its_encoder_cannot_count(tmp_path: Path) -> None:
    source = make(tmp_path / "a.mp4", "mpeg4", "yuv420p", muxing={"video_track_timescale": "1000000"})
    assert video.restore_video(source, tmp_path / "b.mp4", lambda image: image) == ()
    assert facts(tmp_path / "b.mp4")["times"] == facts(source)["times"]


@pytest.mark.parametrize(("name", "codec", "pixels"), [("a.avi", "mjpeg", "yuvj444p"), ("a.avi", "mpeg4", "yuv420p")])
def test_fine_texture_stays(tmp_path: Path, name: str, codec: str, pixels: str) -> None:
    texture = cv2.GaussianBlur(noise(48, 64, 3), (0, 0), 1.5)
    source = make(tmp_path / name, codec, pixels, tick=Fraction(1, 25), colour_range=2 if "j" in pixels else 1)
    video.restore_video(source, tmp_path / "b.avi", lambda _: texture)
    with av.open(str(tmp_path / "b.avi")) as container:
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    expected = cv2.cvtColor(texture, cv2.COLOR_RGB2GRAY).astype(float)
    assert 10 * np.log10(255**2 / np.mean((np.array(frames) - expected) ** 2)) > 36


def interlacing(output: Any, stream: Any) -> None:
    stream.codec_context.field_order = 2


def see_through(output: Any, stream: Any) -> None:
    stream.metadata["alpha_mode"] = "1"


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "options", "says"),
    [
        ("a.mov", "qtrle", "argb", {}, "transparency"),
        ("a.mov", "prores_ks", "yuva444p10le", {}, "transparency"),
        ("a.webm", "libvpx-vp9", "yuva420p", {}, "transparency"),
        ("a.mp4", "libx264", "yuv420p", {"options": {"flags": "+ildct+ilme"}}, "interlaced"),
        ("a.avi", "mpeg4", "yuv420p", {"options": {"flags": "+ildct+ilme"}}, "interlaced"),
        ("a.mkv", "ffv1", "yuv420p", {"prepare": interlacing}, "interlaced"),
    ],
)
def test_what_a_result_could_not_hold_is_refused(
    tmp_path: Path, name: str, codec: str, pixels: str, options: dict[str, Any], says: str
) -> None:
    source = make(tmp_path / name, codec, pixels, tick=Fraction(1, 25), **options)
    with pytest.raises(InputError, match=says):
        video.restore_video(source, tmp_path / "out" / name, lambda image: image)
    assert not (tmp_path / "out").exists()


def test_floating_point_colours_are_refused(tmp_path: Path) -> None:
    stream = SimpleNamespace(metadata={}, codec_context=SimpleNamespace(field_order=0))
    first = SimpleNamespace(format=av.VideoFormat("gbrpf32le"), interlaced_frame=False)
    with pytest.raises(InputError, match="floating-point"):
        encoders.refuse(stream, first, tmp_path)


COUNTED = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)"
WRITTEN = "G(0.265,0.69)B(0.15,0.06)R(0.68,0.32)WP(0.3127,0.329)L(1000,0.005)"


def light(path: Path) -> dict[str, bytes]:
    with av.open(str(path)) as container:
        sides = next(container.decode(video=0)).side_data
        return {one.type.name: bytes(one) for one in sides if one.type.name.startswith(("MASTERING", "CONTENT"))}


@pytest.mark.parametrize(
    ("codec", "option", "value"),
    [
        ("libx265", "x265-params", f"log-level=none:master-display={COUNTED}:max-cll=1000,400"),
        ("libx264", "x264-params", f"mastering-display={COUNTED}:cll=1000,400"),
        ("libsvtav1", "svtav1-params", f"mastering-display={WRITTEN}:content-light=1000,400"),
    ],
)
def test_hdr10_stays_in_the_bit_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, option: str, value: str
) -> None:
    monkeypatch.setenv("SVT_LOG", "1")
    source = make(tmp_path / "a.mkv", codec, "yuv420p10le", options={option: value})
    assert video.restore_video(source, tmp_path / "b.mkv", lambda image: image) == ()
    assert len(light(source)) == 2
    before, after = (
        {name: values(data) for name, data in light(tmp_path / name).items()} for name in ("a.mkv", "b.mkv")
    )
    for name, numbers in before.items():
        assert after[name] == pytest.approx(numbers, rel=0.01)


def values(data: bytes) -> list[float]:
    whole = np.frombuffer(data, np.int32)
    return (whole[:20:2] / whole[1:20:2]).tolist() if len(whole) > 2 else whole.tolist()


def with_boxes(path: Path, entry: bytes, boxes: bytes) -> None:
    """Put boxes into the sample entry of an MP4 file whose header comes last, so that nothing behind it moves."""
    content = bytearray(path.read_bytes())
    place = content.index(entry, content.index(b"stsd")) - 4
    end = place + int.from_bytes(content[place : place + 4])
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", entry):
        start = content.rindex(name, 0, place + 8) - 4
        content[start : start + 4] = (int.from_bytes(content[start : start + 4]) + len(boxes)).to_bytes(4)
    path.write_bytes(content[:end] + boxes + content[end:])


@pytest.mark.parametrize(("codec", "entry"), [("libvpx-vp9", b"vp09"), ("libx265", b"hev1"), ("libx264", b"avc1")])
def test_hdr10_stays_in_the_container(tmp_path: Path, codec: str, entry: bytes) -> None:
    source = make(tmp_path / "a.mp4", codec, "yuv420p")
    numbers = (13250, 34500, 7500, 3000, 34000, 16000, 15635, 16450)
    display = b"".join(number.to_bytes(2) for number in numbers) + (10_000_000).to_bytes(4) + (50).to_bytes(4)
    level = (1000).to_bytes(2) + (400).to_bytes(2)
    with_boxes(source, entry, (32).to_bytes(4) + b"mdcv" + display + (12).to_bytes(4) + b"clli" + level)
    assert video.restore_video(source, tmp_path / "b.mp4", lambda image: image) == ()
    assert len(light(source)) == 2
    assert light(tmp_path / "b.mp4") == light(source)
    assert b"mdcv" + display in (tmp_path / "b.mp4").read_bytes()


def test_apple_finds_hevc_by_its_name(tmp_path: Path) -> None:
    def named(output: Any, stream: Any) -> None:
        stream.codec_context.codec_tag = "hvc1"

    source = make(tmp_path / "a.mp4", "libx265", "yuv420p", prepare=named)
    for name in ("b.mp4", "b.m4v", "b.mkv"):
        assert video.restore_video(source, tmp_path / name, lambda image: image) == ()
    assert b"hvc1" in (tmp_path / "b.mp4").read_bytes()
    assert b"hvc1" in (tmp_path / "b.m4v").read_bytes()


def test_a_mirrored_picture_stays_mirrored_in_another_codec(tmp_path: Path) -> None:
    mirrored = [-65536, 0, 0, 0, 65536, 0, 64 << 16, 0, 1 << 30]
    source = make(
        tmp_path / "a.mov", "qtrle", "rgb24", prepare=lambda output, stream: stream.set_display_matrix(mirrored)
    )
    assert video.restore_video(source, tmp_path / "b.mov", lambda image: image) == ()
    for path in (source, tmp_path / "b.mov"):
        with av.open(str(path)) as container:
            assert containers.turning(next(container.decode(video=0)))[:5] == mirrored[:5]


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_the_shape_of_pixels_stays(tmp_path: Path, name: str) -> None:
    def wide(output: Any, stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        stream.metadata["encoder"] = "the old one"

    source = make(tmp_path / name, "mpeg4", "yuv420p", prepare=wide)
    assert video.restore_video(source, tmp_path / "out" / name, lambda image: image) == ()
    with av.open(str(tmp_path / "out" / name)) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(4, 3)
        assert "the old one" not in container.streams.video[0].metadata.values()
