from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from deblur_deploy.cli import common, run
from deblur_deploy.errors import InputError, MissingFileError, ModelError, OutputError
from tests.conftest import noise

av = pytest.importorskip("av")
video = pytest.importorskip("deblur_deploy.media.video")


def make(
    path: Path,
    codec: str,
    pixels: str,
    *,
    rotation: int = 0,
    colour_range: int = 1,
    sound: bool = False,
    size: tuple[int, int] = (64, 48),
    tick: Fraction = Fraction(1, 1000),
    options: dict[str, str] | None = None,
    muxing: dict[str, str] | None = None,
    prepare: Callable[[Any, Any], object] = lambda output, stream: None,
) -> Path:
    """17 flat gray frames, each lighter than the one before; ``prepare`` may add to the output before it begins."""
    rgb = pixels.startswith(("gbr", "rgb", "bgr", "pal"))
    with av.open(f"file:{path}", "w", container_options=muxing or {}) as output:
        quiet = {"x265-params": "log-level=none"} if "265" in codec else {}
        stream = output.add_stream(codec, rate=25, options=quiet | (options or {}))
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = *size, pixels
        context.time_base = stream.time_base = tick
        context.color_range, context.colorspace = 2 if rgb else colour_range, 0 if rgb else 1
        if rotation:
            stream.set_display_rotation(rotation)
        prepare(output, stream)
        audio: Any = output.add_stream("aac", rate=16000, layout="mono") if sound else None
        if sound:
            audio.metadata["language"] = "deu"
            audio.disposition = int(av.stream.Disposition.original)
        milliseconds = 0
        for i in range(17):
            frame = av.VideoFrame.from_ndarray(np.full((*size[::-1], 3), 20 + i * 12, np.uint8), format="rgb24")
            frame = frame.reformat(format=pixels, src_color_range=2, dst_color_range=2 if rgb else colour_range)
            frame.color_range, frame.colorspace = context.color_range, context.colorspace
            frame.pts, frame.time_base = round(milliseconds / 1000 / tick), tick
            milliseconds += 40 if i % 3 or tick == Fraction(1, 25) else 55  # a variable frame rate, as phones write it
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
            "size": (frames[0].width, frames[0].height),
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
    assert video.restore_video(source, target, restore, on_frame=lambda: ticks.append(1)) == ()
    assert len(ticks) == 17
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


def chapters(output: Any) -> None:
    parts = [(0, 300, "one"), (300, 700, "two")]
    output.set_chapters(
        [
            {"id": i, "start": start, "end": end, "time_base": Fraction(1, 1000), "metadata": {"title": title}}
            for i, (start, end, title) in enumerate(parts, 1)
        ]
    )


def surroundings(path: Path) -> dict[str, Any]:
    with av.open(str(path)) as container:
        return {
            "chapters": [
                (float(one["start"] * one["time_base"]), one["metadata"]["title"]) for one in container.chapters()
            ],
            "title": container.metadata["title"],
            "tag": container.metadata.get("com.apple.quicktime.model"),
            "video": [(int(stream.disposition), stream.codec_context.name) for stream in container.streams.video],
            "files": [(stream.name, stream.mimetype, stream.data) for stream in container.streams.attachments],
            "pictures": [bytes(p) for p in container.demux(video=1) if p.size]
            if len(container.streams.video) > 1
            else [],
        }


PNG = cv2.imencode(".png", noise(6, 8, 3))[1].tobytes()


def as_matroska(output: Any, stream: Any) -> None:
    output.metadata["title"] = "My film"
    stream.disposition = int(av.stream.Disposition.default | av.stream.Disposition.forced)
    chapters(output)
    output.add_attachment("a.ttf", "application/x-truetype-font", b"letters")
    output.add_attachment("notes.txt", "text/plain", b"words")
    output.add_attachment("cover.png", "image/png", PNG)


def as_webm(output: Any, stream: Any) -> None:
    output.metadata["title"] = "My film"
    stream.disposition = int(av.stream.Disposition.default)
    chapters(output)


def as_mp4(output: Any, stream: Any) -> None:
    output.metadata["title"] = "My film"
    chapters(output)


def as_phone(output: Any, stream: Any) -> None:
    output.metadata.update({"title": "My film", "com.apple.quicktime.model": "Phone"})


@pytest.mark.parametrize(
    ("name", "prepare", "codec", "muxing"),
    [
        ("a.mkv", as_matroska, "libx264", {}),
        ("a.webm", as_webm, "libvpx-vp9", {}),
        ("a.mp4", as_mp4, "libx264", {}),
        ("a.mov", as_phone, "libx264", {"movflags": "use_metadata_tags"}),
    ],
)
def test_what_comes_with_the_picture_stays(
    tmp_path: Path, name: str, prepare: Callable[[Any, Any], None], codec: str, muxing: dict[str, str]
) -> None:
    source, target = make(tmp_path / name, codec, "yuv420p", prepare=prepare, muxing=muxing), tmp_path / "out" / name
    notes: list[str] = []
    assert video.restore_video(source, target, lambda image: image, on_note=notes.append) == ()
    assert not notes
    before = surroundings(source)
    assert surroundings(target) == before
    assert before["chapters"] or before["tag"]
    assert len(facts(target)["times"]) == 17


def test_the_cover_of_an_mp4_stays_and_is_not_taken_for_the_video(tmp_path: Path) -> None:
    make(tmp_path / "plain.mp4", "libx264", "yuv420p")
    # Copied behind a cover picture, which is then the first of the tracks.
    with av.open(str(tmp_path / "plain.mp4")) as plain, av.open(str(tmp_path / "a.mp4"), "w") as output:
        output.metadata["title"] = "My film"
        picture = output.add_mux_stream("png", width=8, height=6)
        picture.disposition = int(av.stream.Disposition.attached_pic)
        stream = output.add_stream_from_template(plain.streams.video[0], opaque=True)
        packet = av.Packet(PNG)
        packet.stream, packet.pts, packet.dts = picture, 0, 0
        output.mux(packet)
        for packet in plain.demux(video=0):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
    assert video.restore_video(tmp_path / "a.mp4", tmp_path / "b.mp4", lambda image: 255 - image) == ()
    with av.open(str(tmp_path / "b.mp4")) as container:
        pictures = [bytes(p) for p in container.demux() if int(p.stream.disposition) & 1024 and p.size]
    assert pictures == [PNG]


def test_what_a_format_cannot_hold_is_named(tmp_path: Path) -> None:
    source = make(tmp_path / "a.mp4", "libx264", "yuv420p", rotation=90, prepare=as_mp4)
    lost = video.restore_video(source, tmp_path / "b.avi", lambda image: image)
    assert set(lost) == {"its chapters", "its flags (default, forced and the like)", "its rotation"}


def test_tracks_of_data_are_noted(tmp_path: Path) -> None:
    def positions(output: Any, stream: Any) -> None:
        data = output.add_data_stream("klv")
        packet = av.Packet(b"52.5N 13.4E")
        packet.stream, packet.pts, packet.dts = data, 0, 0
        output.mux(packet)

    source, notes = make(tmp_path / "a.ts", "libx264", "yuv420p", prepare=positions), list[str]()
    assert video.restore_video(source, tmp_path / "b.mp4", lambda image: image, on_note=notes.append) == ()
    assert notes == ["its data track 1"]


def test_what_is_neither_seen_nor_heard_is_noted(tmp_path: Path) -> None:
    source = make(
        tmp_path / "a.mp4",
        "libx264",
        "yuv420p",
        muxing={"movflags": "use_metadata_tags"},
        prepare=lambda output, _: output.metadata.update({"project": "x", "title": "y"}),
    )
    notes: list[str] = []
    assert video.restore_video(source, tmp_path / "b.mp4", lambda image: image, on_note=notes.append) == ()
    assert notes == ["its tag project"]


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"muxing": {"movflags": "faststart"}}),
        ("a.mp4", "libx264", {"muxing": {"movflags": "frag_keyframe+empty_moov"}}),
        ("a.mov", "mjpeg", {"muxing": {"movflags": "faststart"}}),
        ("a.mkv", "ffv1", {}),
        ("a.webm", "libvpx-vp9", {}),
        ("a.avi", "mpeg4", {"tick": Fraction(1, 25)}),
    ],
)
def test_a_file_that_is_cut_off_is_restored_as_far_as_it_goes(
    tmp_path: Path, name: str, codec: str, options: dict[str, Any]
) -> None:
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    source = make(tmp_path / name, codec, pixels, size=(160, 120), options={"g": "4", "bf": "0"}, **options)
    whole, target = facts(source), tmp_path / "out" / name
    content = source.read_bytes()
    # FFmpeg opens no file whose last fragment lacks its head.
    source.write_bytes(content[: content.rindex(b"mdat") + 40 if "frag" in str(options) else int(len(content) * 0.7)])
    lost = video.restore_video(source, target, lambda image: image)
    assert "(the file is cut off or damaged)" in lost[-1]
    found = facts(target)
    assert 2 <= len(found["times"]) < 17
    assert found["times"] == whole["times"][: len(found["times"])]
    assert np.abs(found["means"] - whole["means"][: len(found["means"])]).max() < 4


def test_what_an_edit_list_hides_is_not_missed(tmp_path: Path) -> None:
    make(tmp_path / "whole.mp4", "libx264", "yuv420p", tick=Fraction(1, 25))
    with av.open(str(tmp_path / "whole.mp4")) as whole, av.open(str(tmp_path / "a.mp4"), "w") as output:
        stream = output.add_stream_from_template(whole.streams.video[0], opaque=True)
        for packet in whole.demux(video=0):
            if packet.size:
                shift = round(Fraction(5, 25) / packet.time_base)
                packet.stream, packet.pts, packet.dts = stream, packet.pts - shift, packet.dts - shift
                output.mux(packet)
    assert video.restore_video(tmp_path / "a.mp4", tmp_path / "b.mp4", lambda image: image) == ()
    seen = facts(tmp_path / "a.mp4")
    assert facts(tmp_path / "b.mp4")["times"] == seen["times"]
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert len(seen["times"]) == 12 < container.streams.video[0].frames


def test_damage_inside_is_counted_and_the_rest_restored(tmp_path: Path) -> None:
    source = make(tmp_path / "a.mkv", "libx264", "yuv420p", options={"g": "1"})
    with av.open(str(source)) as container:
        packet = [bytes(packet) for packet in container.demux(video=0)][8]
    content = source.read_bytes()
    assert content.count(packet) == 1
    source.write_bytes(content.replace(packet, bytes(len(packet))))
    assert video.restore_video(source, tmp_path / "b.mkv", lambda image: image) == ("1 damaged frame",)
    assert len(facts(tmp_path / "b.mkv")["times"]) == 16


def test_the_command_names_losses_and_ends_with_status_1(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    make(folder / "a:b.mp4", "libx264", "yuv420p")
    cut = make(folder / "cut.mkv", "ffv1", "yuv420p")
    (folder / "script.mp4").write_text("ffconcat version 1.0\nfile a:b.mp4\n")
    cut.write_bytes(cut.read_bytes()[:-2000])
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        sys, "argv", ["deblur-run", ".", "--out", "../out", "--model", str(bundle), "--provider", "cpu"]
    )
    assert run.main() == common.SOME_FAILED
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("deblur-run: cut.mkv is restored without all that follows after ") for line in lines)
    assert any(line.startswith("deblur-run: script.mp4 cannot be read as a video") for line in lines)
    assert lines[-1] == "2 restored (1 of them incomplete) to ../out, 0 were there already, 1 failed"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a:b.mp4", "cut.mkv"]


def test_reading_restoring_and_writing_go_on_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, together = make(tmp_path / "a.mp4", "libx264", "yuv444p"), threading.Barrier(3, timeout=60)
    counts, restoring, converting = Counter[str](), set[int](), set[int]()
    most, reformatter = 0, video.VideoReformatter

    def meet(what: str, number: int) -> None:
        nonlocal most
        counts[what] += 1
        most = max(most, counts["read"] - counts["written"])
        # The first frame is written while the second is restored and the third read, or nobody comes on.
        if counts[what] == number:
            together.wait()

    def read(frame: Any) -> set[str]:
        meet("read", 3)
        return set()

    class Reformatter:
        def __init__(self) -> None:
            self._own = reformatter()

        def reformat(self, *given: Any, **how: Any) -> Any:
            converting.add(threading.get_ident())
            return self._own.reformat(*given, **how)

    def restore(image: np.ndarray) -> np.ndarray:
        restoring.add(threading.get_ident())
        meet("restored", 2)
        return image

    monkeypatch.setattr(video, "side_data", read)
    monkeypatch.setattr(video, "VideoReformatter", Reformatter)
    before = threading.active_count()
    video.restore_video(source, tmp_path / "b.mp4", restore, on_frame=lambda: meet("written", 1))
    assert np.abs(facts(source)["means"] - facts(tmp_path / "b.mp4")["means"]).max() < 4
    assert counts == {"read": 17, "restored": 17, "written": 17}
    assert most <= 8  # of 17: two wait on either side, and each of the three has one in hand
    assert len(restoring) == 1
    assert len(converting) == 2
    assert not restoring & converting
    assert threading.active_count() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_ctrl_c_ends_all_threads_before_the_files_are_closed(tmp_path: Path, error: type[BaseException]) -> None:
    source, before, written = make(tmp_path / "a.mkv", "ffv1", "yuv444p"), threading.active_count(), []

    def stop() -> None:
        written.append(1)
        if len(written) == 3:
            raise error

    with pytest.raises(error) as caught:
        video.restore_video(source, tmp_path / "out" / "b.mkv", lambda image: image, on_frame=stop)
    # Also while somebody holds the error, and with it every frame of the stack.
    assert caught.tb is not None
    assert threading.active_count() == before
    assert not list((tmp_path / "out").iterdir())


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
    monkeypatch.setattr(video, "start", lambda *_: pytest.fail("a frame was decoded"))
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
