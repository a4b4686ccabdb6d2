from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deblur_deploy.errors import InputError, MissingFileError, ModelError, OutputError
from tests.conftest import noise

av = pytest.importorskip("av")
video = pytest.importorskip("deblur_deploy.media.video")


def make(path: Path, codec: str, pixels: str, *, rotation: int = 0, colour_range: int = 1, sound: bool = False) -> Path:
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=25, options={"x265-params": "log-level=none"} if "265" in codec else {})
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = 64, 48, pixels
        context.time_base = stream.time_base = Fraction(1, 1000)
        context.color_range, context.colorspace = colour_range, 1
        if rotation:
            stream.set_display_rotation(rotation)
        audio: Any = output.add_stream("aac", rate=16000, layout="mono") if sound else None
        if sound:
            audio.metadata["language"] = "deu"
            audio.disposition = int(av.stream.Disposition.original)
        pts = 0
        for i in range(17):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 + i * 12, np.uint8), format="rgb24")
            frame = frame.reformat(format=pixels, src_color_range=2, dst_color_range=colour_range)
            frame.pts, frame.time_base, frame.color_range = pts, Fraction(1, 1000), colour_range
            pts += 40 if i % 3 else 55  # a variable frame rate, as phones write it
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        for i in range(10 if sound else 0):
            samples = av.AudioFrame.from_ndarray(noise(1, 1024).astype("f4") / 255, format="fltp", layout="mono")
            samples.rate, samples.pts = 16000, i * 1024
            output.mux(audio.encode(samples))
        if sound:
            output.mux(audio.encode(None))
    return path


def facts(path: Path) -> dict[str, Any]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        found = {
            "times": [round(float(frame.pts * stream.time_base), 4) for frame in frames],
            "rotation": frames[0].rotation,
            "range": frames[0].color_range,
            "space": frames[0].colorspace,
            "pixels": frames[0].format.name,
            "codec": stream.codec_context.codec.canonical_name,
            "means": np.array([frame.to_ndarray(format="rgb24").mean() for frame in frames]),
        }
    with av.open(str(path)) as container:
        found["sound"] = [bytes(packet) for packet in container.demux() if packet.stream.type == "audio"]
    return found


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "options"),
    [
        ("a.mp4", "libx264", "yuv420p", {"rotation": 90, "sound": True, "colour_range": 2}),
        ("a.mov", "libx264", "yuv444p", {"rotation": -90}),
        ("a.mkv", "libx265", "yuv420p10le", {"sound": True}),
        ("a.webm", "libvpx-vp9", "yuv420p", {}),
        ("a.avi", "mpeg4", "yuv420p", {}),
    ],
)
def test_only_the_pixels_change(tmp_path: Path, name: str, codec: str, pixels: str, options: dict[str, Any]) -> None:
    source, target = make(tmp_path / name, codec, pixels, **options), tmp_path / "out" / name
    seen = []

    def restore(image: np.ndarray) -> np.ndarray:
        seen.append(image.dtype)
        return image

    ticks: list[int] = []
    assert video.restore_video(source, target, restore, on_frame=lambda: ticks.append(1)) == 17 == len(ticks)
    before, after = facts(source), facts(target)
    assert np.abs(before.pop("means") - after.pop("means")).max() < 4
    assert after == before
    assert set(seen) == {np.dtype(np.uint16 if "10" in pixels else np.uint8)}
    assert [path.name for path in target.parent.iterdir()] == [name]


def test_the_frames_are_the_restored_ones(tmp_path: Path) -> None:
    source = make(tmp_path / "a.mp4", "libx264", "yuv444p")
    video.restore_video(source, tmp_path / "b.mp4", lambda image: 255 - image)
    assert np.abs(255 - facts(source)["means"] - facts(tmp_path / "b.mp4")["means"]).max() < 4


@pytest.mark.parametrize("colorspace", [1, 5, 6, 2, 9])  # BT.709, BT.601 (625 and 525 lines), unstated, BT.2020
@pytest.mark.parametrize("colour_range", [1, 2])
def test_saturated_colours_stay(tmp_path: Path, colorspace: int, colour_range: int) -> None:
    source, target = tmp_path / "a.mkv", tmp_path / "b.mkv"
    colours = [(220, 40, 60), (30, 200, 90), (20, 60, 230)]
    red, blue = {1: (0.2126, 0.0722), 9: (0.2627, 0.0593)}.get(colorspace, (0.299, 0.114))
    with av.open(str(source), "w") as output:
        stream = output.add_stream("ffv1", rate=25)
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = 64, 48, "yuv444p"
        context.color_range, context.colorspace = colour_range, colorspace
        for i, (r, g, b) in enumerate(colours):
            luma = red * r + (1 - red - blue) * g + blue * b
            chroma = np.array([(b - luma) / (1 - blue), (r - luma) / (1 - red)]) / 2
            limited = colour_range == 1
            yuv = [16 + luma * 219 / 255 if limited else luma, *(128 + chroma * (224 / 255 if limited else 1))]
            pixels = np.full((48, 64, 3), np.rint(yuv).astype(np.uint8))
            frame = av.VideoFrame.from_ndarray(pixels, format="yuv444p", channel_last=True)
            frame.pts, frame.color_range, frame.colorspace = i, colour_range, colorspace
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    seen: list[np.ndarray] = []

    def identity(image: np.ndarray) -> np.ndarray:
        seen.append(image.mean(axis=(0, 1)))
        return image

    video.restore_video(source, target, identity)
    assert np.abs(np.array(seen) - colours).max() <= 2
    with av.open(str(source)) as before, av.open(str(target)) as after:
        for old, new in zip(before.decode(video=0), after.decode(video=0), strict=True):
            assert (new.colorspace, new.color_range) == (colorspace, colour_range)
            assert np.abs(new.to_ndarray().astype(int) - old.to_ndarray()).max() <= 2


def test_tracks_keep_their_language_and_place(tmp_path: Path) -> None:
    source, target = make(tmp_path / "a.mkv", "libx264", "yuv420p", sound=True), tmp_path / "b.mkv"
    video.restore_video(source, target, lambda image: image)
    with av.open(str(target)) as container:
        audio = container.streams.audio[0]
        assert audio.language == "deu"
        assert int(audio.disposition) == int(av.stream.Disposition.original)


@pytest.mark.parametrize("error", [InputError, ModelError])
def test_an_error_on_the_way_leaves_nothing(tmp_path: Path, error: type[Exception]) -> None:
    source = make(tmp_path / "a.mp4", "libx264", "yuv420p")

    def fail(image: np.ndarray) -> np.ndarray:
        raise error("no")

    with pytest.raises(error, match=r"^no$"):
        video.restore_video(source, tmp_path / "out" / "b.mp4", fail)
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_the_outputs_fault(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    source = make(tmp_path / "a.mkv", "ffv1", "yuv444p")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*b\.mkv"):
            video.restore_video(source, tmp_path / "out" / "b.mkv", lambda image: noise(*image.shape))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out").iterdir())


def test_a_codec_that_the_container_cannot_hold_is_named(tmp_path: Path) -> None:
    source = make(tmp_path / "a.avi", "mpeg4", "yuv420p")
    with pytest.raises(OutputError, match=r"a\.avi cannot be written as webm"):
        video.restore_video(source, tmp_path / "b.webm", lambda image: image)
    assert [path.name for path in tmp_path.iterdir()] == ["a.avi"]


def test_too_many_pixels_are_refused_before_a_frame_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path / "a.mp4", "libx264", "yuv420p")
    monkeypatch.setattr(video, "_rotation", lambda path: pytest.fail("a frame was decoded"))
    with pytest.raises(InputError, match="limit"):
        video.restore_video(source, tmp_path / "b.mp4", lambda image: image, max_pixels=1000)


def test_what_is_no_video_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("hello")
    with pytest.raises(InputError, match=r"a\.mp4"):
        video.frame_count(tmp_path / "a.mp4")
    with pytest.raises(InputError, match=r"a\.mp4"):
        video.restore_video(tmp_path / "a.mp4", tmp_path / "b.mp4", lambda image: image)
    with pytest.raises(MissingFileError):
        video.frame_count(tmp_path / "none.mp4")
    big = make(tmp_path / "c.mp4", "libx264", "yuv420p")
    with pytest.raises(InputError, match="limit"):
        video.restore_video(big, tmp_path / "b.mp4", lambda image: image, max_pixels=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "c.mp4"]
