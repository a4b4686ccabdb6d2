"""Live sources: files and MJPEG streams served on this machine stand in for cameras."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from deblur_deploy.cli import common, run
from deblur_deploy.errors import InputError, OutputError
from deblur_deploy.media import images
from tests.conftest import noise
from tests.test_video import facts, make

live = pytest.importorskip("deblur_deploy.media.live")
av = pytest.importorskip("av")


class Camera(BaseHTTPRequestHandler):
    """Multipart JPEG as network cameras send it; it never ends by itself."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        jpeg = cv2.imencode(".jpg", np.full((48, 64, 3), 90, np.uint8))[1].tobytes()
        try:
            while not getattr(self.server, "ending", False):
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                self.wfile.write(head.encode() + jpeg + b"\r\n")
                time.sleep(0.02)
        except OSError:
            return

    def log_message(self, *_: object) -> None:
        pass


class Numbered(Camera):
    """Frames whose brightness counts them; ``server.sent`` has when each was sent."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        sent = self.server.sent = []  # type: ignore[attr-defined]
        try:
            while not getattr(self.server, "ending", False) and len(sent) < 120:
                jpeg = cv2.imencode(".jpg", np.full((48, 64, 3), 2 * len(sent), np.uint8))[1].tobytes()
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                sent.append(time.monotonic())
                self.wfile.write(head.encode() + jpeg + b"\r\n")
                time.sleep(0.02)
        except OSError:
            return


class Files(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(handler: object, servers: list[ThreadingHTTPServer] | None = None) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        if servers is not None:
            servers.append(server)
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.ending = True  # type: ignore[attr-defined]
            server.shutdown()
            thread.join()


def identity(image: np.ndarray) -> np.ndarray:
    return image


@pytest.mark.parametrize("kind", ["file", "http"])
@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".webm", ".avi"])
def test_a_stream_with_an_end_keeps_its_frames_and_times(tmp_path: Path, kind: str, suffix: str) -> None:
    source, target = make(tmp_path / "a.mkv", "libx264", "yuv420p"), tmp_path / "out" / f"b{suffix}"
    with served(partial(Files, directory=str(tmp_path))) as address:
        url = f"{address}/a.mkv" if kind == "http" else source.as_uri()
        assert live.record(url, target, lambda image: 255 - image) == 17
    before, after = facts(source), facts(target)
    assert np.abs(255 - before["means"] - after["means"]).max() < 5
    assert np.abs(np.array(before["times"]) - after["times"]).max() < 0.002
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_odd_sizes_and_only_the_seconds_asked_for(tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "a.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 10, (65, 49))
    for i in range(20):
        writer.write(noise(49, 65, 3, seed=i))
    writer.release()
    assert live.record((tmp_path / "a.avi").as_uri(), tmp_path / "b.mkv", identity, seconds=0.95) == 10
    assert facts(tmp_path / "b.mkv")["times"] == [i / 10 for i in range(10)]


def test_an_endless_stream_ends_when_told_and_keeps_real_time(tmp_path: Path) -> None:
    seen: list[float] = []
    start = time.monotonic()
    with served(Camera) as address:
        count = live.record(
            f"{address}/live.mjpeg",
            tmp_path / "a.mkv",
            identity,
            stopped=lambda: len(seen) >= 8,
            on_frame=lambda: seen.append(time.monotonic()),
        )
    elapsed = time.monotonic() - start
    times = facts(tmp_path / "a.mkv")["times"]
    assert len(times) == count >= 8
    assert all(b > a for a, b in pairwise(times))
    assert times[-1] <= elapsed


def test_what_is_too_slow_loses_frames_and_not_time(tmp_path: Path) -> None:
    shown: list[int] = []

    def slow(image: np.ndarray) -> np.ndarray:
        time.sleep(0.15)
        shown.append(round(float(image.mean()) / 2))
        return image

    servers: list[ThreadingHTTPServer] = []
    with served(Numbered, servers) as address:
        live.record(f"{address}/live.mjpeg", tmp_path / "a.mkv", slow, stopped=lambda: len(shown) >= 8)
        sent = servers[0].sent  # type: ignore[attr-defined]
    times = facts(tmp_path / "a.mkv")["times"]
    assert shown[len(times) - 1] - shown[0] > 2 * len(times), "most were left out"
    of_camera = [sent[min(number, len(sent) - 1)] - sent[shown[0]] for number in shown[: len(times)]]
    assert max(abs(a - b) for a, b in zip(times, of_camera, strict=True)) < 0.3


def deblur_run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["deblur-run", *map(str, arguments)])
    return run.main()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_file(
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written = live.overlapped
    killed = tmp_path / ".a-deblur-abcd1234.mkv"
    killed.touch()

    def interrupting(*arguments: object) -> Iterator[object]:
        for place, item in enumerate(written(*arguments)):
            yield item
            if place == 5:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(live, "overlapped", interrupting)
    handler = signal.getsignal(number)
    with served(Camera) as address:
        arguments = f"{address}/live.mjpeg", "--out", tmp_path / "a.mkv", "--model", bundle, "--provider", "cpu"
        assert deblur_run(monkeypatch, *arguments) == common.OK
        assert len(facts(tmp_path / "a.mkv")["times"]) >= 6
        said = capsys.readouterr().err
        assert "frames restored to" in said
        assert f"{killed.name} is what another recording" in said.replace("\n", "")
        assert deblur_run(monkeypatch, *arguments) == common.USER_ERROR
        assert "--overwrite" in capsys.readouterr().err
    assert signal.getsignal(number) is handler
    assert {path.name for path in tmp_path.iterdir()} == {"a.mkv", killed.name}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["camera:99", "--out", "{out}.mkv"], "camera:99 cannot be opened"),
        (["http://127.0.0.1:9/x", "--out", "{out}.mkv"], "http://127.0.0.1:9/x cannot be opened"),
        (["rtsp://me:s@secret@127.0.0.1:9/x", "--out", "{out}.mkv"], "rtsp://127.0.0.1:9/x cannot be opened"),
        (["file:///none.avi", "--out", "{out}.mkv"], "file:///none.avi cannot be opened"),
        (["strange://x", "--out", "{out}.mkv"], "strange://x cannot be opened"),
        (["camera:0", "--out", "{out}"], "such as live.mkv"),
        (["camera:0", "a.jpg", "--out", "{out}.mkv"], "alone"),
        (["camera:0", "rtsp://me:secret@x", "--out", "{out}.mkv"], "leave rtsp://x to another"),
        (["camera:0", "--out", "{out}.mkv", "--seconds", "0"], "seconds is 0"),
        (["a.jpg", "--seconds", "3"], "for a live source"),
    ],
)
def test_what_cannot_be_recorded_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    bundle: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    given = [argument.format(out=tmp_path / "out") for argument in arguments]
    assert deblur_run(monkeypatch, *given, "--model", bundle) == common.USER_ERROR
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("deblur-run: ")
    assert says in last
    assert "secret" not in last
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("served_by", ["file", "http"])
@pytest.mark.parametrize(
    "script",
    [
        "ffconcat version 1.0\nfile {secret}\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
    ],
)
def test_a_playlist_opens_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, served_by: str) -> None:
    monkeypatch.setenv("OPENCV_FFMPEG_CAPTURE_OPTIONS", "rtsp_transport;udp")
    secret = make(tmp_path / "secret.ts", "libx264", "yuv420p")
    (tmp_path / "a.m3u8").write_text(script.format(secret=secret.as_uri()))
    with served(partial(Files, directory=str(tmp_path))) as address:
        url = f"{address}/a.m3u8" if served_by == "http" else (tmp_path / "a.m3u8").as_uri()
        with pytest.raises(InputError, match="cannot be opened"):
            live.record(url, tmp_path / "b.mkv", identity)
    assert os.environ["OPENCV_FFMPEG_CAPTURE_OPTIONS"] == "rtsp_transport;udp"
    assert not (tmp_path / "b.mkv").exists()


def test_what_was_recorded_before_a_failure_is_kept(tmp_path: Path) -> None:
    calls = []

    def fails_late(image: np.ndarray) -> np.ndarray:
        calls.append(image)
        if len(calls) > 9:
            raise InputError("the camera changed its mind")
        return image

    source, target = make(tmp_path / "a.avi", "mpeg4", "yuv420p").as_uri(), tmp_path / "b.mkv"
    with pytest.raises(InputError, match=r"changed its mind; the 9 frames before that are in .*b\.mkv"):
        live.record(source, target, fails_late)
    assert len(facts(target)["times"]) == 9


@pytest.mark.parametrize(
    "error", [av.error.OSError(28, "No space left on device"), MemoryError("too much"), cv2.error()]
)
def test_what_was_recorded_before_the_disk_was_full_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    real, calls = live.VideoReformatter, []

    class Failing:
        def reformat(self, *arguments: object, **options: object) -> object:
            calls.append(1)
            if len(calls) > 9:
                raise error
            return real().reformat(*arguments, **options)

    monkeypatch.setattr(live, "VideoReformatter", Failing)
    source, target = make(tmp_path / "a.avi", "mpeg4", "yuv420p").as_uri(), tmp_path / "b.mkv"
    with pytest.raises(OutputError, match=r"the 9 frames before that are in .*b\.mkv"):
        live.record(source, target, identity)
    assert len(facts(target)["times"]) == 9


def test_an_encoder_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(live._ENCODERS, ".avi", ("nosuchencoder", {}))
    source = make(tmp_path / "a.avi", "mpeg4", "yuv420p").as_uri()
    with pytest.raises(OutputError, match=r"\.avi cannot be written: .*choose another kind of file"):
        live.record(source, tmp_path / "b.avi", identity)
    assert [path.name for path in tmp_path.iterdir()] == ["a.avi"]


def test_what_gives_no_frame_or_too_large_ones_leaves_nothing(tmp_path: Path) -> None:
    source = make(tmp_path / "a.avi", "mpeg4", "yuv420p").as_uri()
    with pytest.raises(InputError, match="limit"):
        live.record(source, tmp_path / "b.mkv", identity, max_pixels=1000)
    with pytest.raises(InputError, match="gave no frame"):
        live.record(source, tmp_path / "b.mkv", identity, stopped=lambda: True)
    with pytest.raises(OutputError, match="unknown video format"):
        live.record(source, tmp_path / "b.txt", identity)
    assert [path.name for path in tmp_path.iterdir()] == ["a.avi"]


@pytest.mark.parametrize(
    ("name", "stream"),
    [("camera:0", True), ("RTSP://x/y", True), ("http://x", True), ("camera:x", False), ("a/b.mp4", False),
     ("C://x", False), ("camera", False)],
)  # fmt: skip
def test_what_is_a_stream(name: str, stream: bool) -> None:
    assert images.is_stream(name) is stream
