"""A camera, or a stream by its URL, restored into a video file until it ends or is told to.

OpenCV opens it, so what opens depends on its build.  A stream that states how many frames it has keeps their times;
anything else is live, and a frame's time is that of its arrival: what is too slow then loses frames, not time.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Thread
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from deblur_deploy.errors import DeblurError, InputError, MissingExtraError, OutputError, one_line
from deblur_deploy.files import writing_file
from deblur_deploy.media.containers import FORMATS, created
from deblur_deploy.media.encoders import FINE
from deblur_deploy.media.images import MAX_PIXELS, VIDEO_SUFFIXES
from deblur_deploy.runtime.streams import overlapped

try:
    import av
    from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
except ImportError:
    raise MissingExtraError("streams need PyAV; install it: pip install 'deblur-deploy[video]'") from None

_TIMEOUT_MS = 10_000
_MILLISECONDS = Fraction(1, 1000)
_ENCODERS = {
    ".avi": ("mpeg4", FINE),
    ".webm": ("libvpx-vp9", {"crf": "20", "b": "0", "row-mt": "1", "deadline": "realtime", "cpu-used": "8"}),
}
_NETWORK = (
    "crypto,data,http,httpproxy,https,mmsh,mmst,rtmp,rtmpe,rtmps,rtmpt,rtmpte,rtmpts,rtp,rtsp,srt,srtp,tcp,tls,udp"
)
_USUAL = "libx264", {"crf": "17", "preset": "veryfast"}


def record(
    source: str,
    target: Path,
    restore: Callable[[NDArray[Any]], NDArray[Any]],
    *,
    seconds: float | None = None,
    stopped: Callable[[], bool] = lambda: False,
    max_pixels: int = MAX_PIXELS,
    on_frame: Callable[[], object] = lambda: None,
) -> int:
    """Write ``source`` (``camera:NUMBER`` or a URL), every frame restored, to ``target``; returns the frames written.

    It ends with the stream, after ``seconds`` of it, or once ``stopped`` says so, and the file is then whole.
    ``restore`` gets and returns uint8 HxWx3 RGB.  Raises InputError if the source cannot be opened or has no frames,
    OutputError if the file cannot be written.  What fails later on, such as frames that change their size, is raised
    when the frames before it are safe in ``target``: a live source gives them once only.
    """
    shown = without_password(source)
    if target.suffix.lower() not in VIDEO_SUFFIXES:
        known = ", ".join(sorted(VIDEO_SUFFIXES))
        raise OutputError(f"cannot write {target}: unknown video format; use one of {known}")
    frames = _frames(_opened(source, shown), shown, seconds, stopped, max_pixels)
    with writing_file(target) as temporary:
        written = _Written()
        try:
            with created(temporary) as output:
                _write(output, target.suffix.lower(), frames, restore, on_frame, written)
        except (av.error.FFmpegError, DeblurError, MemoryError, cv2.error) as error:
            # A full disk fails twice, by a frame and by the file's end; what is there of it can be watched.
            written.failed = written.failed or error
        failed, count = written.failed, written.count
        if failed and not count:
            if isinstance(failed, av.error.FFmpegError):
                raise OutputError(f"cannot write {target}: {failed}; nothing was left behind") from None
            raise failed
        if not count:
            raise InputError(f"{shown} was opened, but gave no frame")
    if failed:
        kind = type(failed) if isinstance(failed, DeblurError) else OutputError
        raise kind(f"{one_line(failed)}; the {count} frames before that are in {target}")
    return count


def without_password(source: str) -> str:
    """A URL as messages show it: they end up in logs, and passwords must not."""
    return re.sub(r"//[^/]*@", "//", source)


@dataclass
class _Written:
    """What is in the file so far, and what ended it."""

    count: int = 0
    failed: Exception | None = None


def _opened(source: str, shown: str) -> cv2.VideoCapture:
    kind, _, rest = source.partition(":")
    try:
        if kind.lower() == "camera":
            capture = cv2.VideoCapture(int(rest))
        elif cv2.videoio_registry.hasBackend(cv2.CAP_FFMPEG):
            waits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _TIMEOUT_MS]
            with _only_what_was_asked_for(local=kind.lower() == "file"):
                capture = cv2.VideoCapture(source, cv2.CAP_FFMPEG, waits)
        else:
            capture = cv2.VideoCapture(source)
    except (cv2.error, OverflowError):
        raise InputError(f"{shown} cannot be opened; is it there?") from None
    if not capture.isOpened():
        why = "there is no such device, or another program has it"
        if kind.lower() != "camera":
            why = f"nobody answered within {_TIMEOUT_MS // 1000} s, or it is nothing that this build of OpenCV reads"
        raise InputError(f"{shown} cannot be opened: {why}")
    return capture


@contextmanager
def _only_what_was_asked_for(*, local: bool) -> Iterator[None]:
    """Keep a stream from opening anything else: a playlist from the network no file, and a file no other file.

    OpenCV takes FFmpeg's options from the environment only.
    """
    name, before = "OPENCV_FFMPEG_CAPTURE_OPTIONS", os.environ.get("OPENCV_FFMPEG_CAPTURE_OPTIONS")
    allowed = f"protocol_whitelist;file|format_whitelist;{FORMATS}" if local else f"protocol_whitelist;{_NETWORK}"
    # What OpenCV sets where the variable is not there.
    os.environ[name] = f"{before or 'rtsp_transport;tcp'}|{allowed}"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _frames(
    capture: cv2.VideoCapture, shown: str, seconds: float | None, stopped: Callable[[], bool], max_pixels: int
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Times in milliseconds, which grow, and frames, which keep their size."""
    size, start, last = None, 0.0, -1
    live = capture.get(cv2.CAP_PROP_FRAME_COUNT) <= 0
    for now, frame in _newest(capture, stopped) if live else _each(capture):
        if stopped():
            return
        if size is None:
            size, start = frame.shape, now
            if size[0] * size[1] > max_pixels:
                limit = f"the limit of {max_pixels / 1e6:.0f} megapixels"
                raise InputError(f"{shown} has {size[1]}x{size[0]} pixels a frame, more than {limit}")
        if frame.shape != size:
            raise InputError(f"{shown} cannot be restored: its frames change their size")
        last = max(last + 1, round(now - start))
        if seconds is not None and last >= 1e3 * seconds:
            return
        yield last, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


Timed = tuple[float, NDArray[Any]]
"""Milliseconds from anywhere, and a frame as OpenCV has it."""


def _each(capture: cv2.VideoCapture) -> Iterator[Timed]:
    """All frames, at the times that the stream gives them; the capture is then closed."""
    # Closed by the thread that reads, here and below: under a read that still waits, it would crash.
    try:
        while (read := capture.read())[0]:
            yield capture.get(cv2.CAP_PROP_POS_MSEC), read[1]
    finally:
        capture.release()


def _newest(capture: cv2.VideoCapture, stopped: Callable[[], bool]) -> Iterator[Timed]:
    """Frames at the times when they came; of those that come before the next is asked for, the last one."""
    slot, ended, failed = Queue[Timed](1), Event(), list[BaseException]()

    def read() -> None:
        try:
            while not ended.is_set():
                found, frame = capture.read()
                if not found:
                    return
                with suppress(Empty):
                    slot.get_nowait()
                slot.put((1e3 * time.monotonic(), frame))
        except BaseException as error:  # the other thread raises it
            failed.append(error)
        finally:
            ended.set()
            capture.release()

    Thread(target=read, daemon=True).start()
    try:
        while not stopped():
            try:
                yield slot.get(timeout=0.1)
            except Empty:
                if ended.is_set() and slot.empty():
                    break
        if failed:
            raise failed[0]
    finally:
        ended.set()


def _write(
    output: Any,
    suffix: str,
    frames: Iterator[tuple[int, NDArray[Any]]],
    restore: Callable[[NDArray[Any]], NDArray[Any]],
    on_frame: Callable[[], object],
    written: _Written,
) -> None:
    """Write what there is, and into ``written`` what became of it."""
    encoder, reformatter = None, VideoReformatter()

    def work(timed: tuple[int, NDArray[Any]]) -> tuple[int, NDArray[Any]]:
        return timed[0], np.ascontiguousarray(restore(timed[1]))

    try:
        for milliseconds, image in overlapped(frames, work):
            if encoder is None:
                encoder = _encoder(output, suffix, image)
            frame = reformatter.reformat(
                av.VideoFrame.from_ndarray(image, format="rgb24"),
                format=encoder.codec_context.pix_fmt,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            frame.pts, frame.time_base = milliseconds, _MILLISECONDS
            output.mux(encoder.encode(frame))
            written.count += 1
            on_frame()
    except (DeblurError, MemoryError, cv2.error, av.error.FFmpegError) as error:
        written.failed = error
    if encoder is not None:
        output.mux(encoder.encode(None))


def _encoder(output: Any, suffix: str, image: NDArray[Any]) -> Any:
    name, options = _ENCODERS.get(suffix, _USUAL)
    try:
        encoder = output.add_stream(name, rate=30, options=dict(options))
    except ValueError as error:  # PyAV's, for what its FFmpeg was built without
        raise OutputError(f"{suffix} cannot be written: {error}; choose another kind of file") from None
    context = encoder.codec_context
    context.height, context.width = image.shape[:2]
    # Colour at half the size needs even sides.
    context.pix_fmt = "yuv444p" if name == "libx264" and (context.height % 2 or context.width % 2) else "yuv420p"
    context.time_base = encoder.time_base = _MILLISECONDS
    context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
    return encoder
