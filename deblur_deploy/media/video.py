"""Video files, through PyAV: every frame restored, and everything else as it was.

Timestamps, rotation, colour space and range, pixel format, metadata and the other streams (audio, subtitles) are
carried over; only the pixels are new.  The result is written beside its final place and renamed when it is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deblur_deploy.errors import InputError, MissingExtraError, OutputError
from deblur_deploy.files import existing, writing_file
from deblur_deploy.media.images import MAX_PIXELS
from deblur_deploy.runtime.streams import overlapped

try:
    import av
    from av.video.reformatter import ColorRange, VideoReformatter
except ImportError:
    raise MissingExtraError("videos need PyAV; install it: pip install 'deblur-deploy[video]'") from None

_ENCODERS = {
    "av1": ("libsvtav1", {"crf": "24", "preset": "8"}),
    "ffv1": ("ffv1", {}),
    "h264": ("libx264", {"crf": "17"}),
    "hevc": ("libx265", {"crf": "18", "x265-params": "log-level=none"}),
    "mjpeg": ("mjpeg", {"q": "2"}),
    "mpeg4": ("mpeg4", {"q": "2"}),
    "prores": ("prores_ks", {}),
    "vp8": ("libvpx", {"crf": "8", "b": "8M"}),
    "vp9": ("libvpx-vp9", {"crf": "20", "b": "0", "row-mt": "1", "cpu-used": "4"}),
}


def frame_count(path: Path) -> int | None:
    """Frames that the file says it has; None if it does not.  Raises MissingFileError or InputError."""
    existing(path, kind="file")
    with _opened(path) as container:
        stream = _video_stream(container, path)
        if stream.frames:
            return int(stream.frames)
        seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        return round(seconds * float(stream.average_rate or 0)) or None


def restore_video(
    source: Path,
    target: Path,
    restore: Callable[[NDArray[Any]], NDArray[Any]],
    *,
    max_pixels: int = MAX_PIXELS,
    on_frame: Callable[[], object] = lambda: None,
) -> int:
    """Write ``source`` with every frame restored to ``target``; returns the number of frames.

    ``restore`` gets uint8 HxWx3 RGB, or uint16 where the video has more than 8 bits, and returns the same.
    Raises MissingFileError, InputError if the video cannot be read to its end, OutputError if it cannot be written.
    """
    existing(source, kind="file")
    with writing_file(target) as temporary:
        with _opened(source) as container:
            stream = _video_stream(container, source)
            if stream.width * stream.height > max_pixels:
                limit = f"the limit of {max_pixels / 1e6:.0f} megapixels"
                raise InputError(f"{source} states {stream.width}x{stream.height} pixels a frame, more than {limit}")
            rotation = _rotation(source)
            try:
                with av.open(str(temporary), "w") as output:
                    count = _restore_streams(source, container, stream, output, rotation, restore, on_frame)
            except av.error.FFmpegError as error:
                # What goes wrong in reading is an InputError by now.
                raise OutputError(f"cannot write {target}: {error}; nothing was left behind") from None
        if not count:
            raise InputError(f"{source} has no frames that can be decoded")
    return count


def _restore_streams(
    source: Path,
    container: Any,
    stream: Any,
    output: Any,
    rotation: int,
    restore: Callable[[NDArray[Any]], NDArray[Any]],
    on_frame: Callable[[], object],
) -> int:
    try:
        encoder = _add_encoder(output, stream)
        others = {other.index: _add_copy(output, other) for other in container.streams if _is_copied(other)}
    except ValueError as error:  # a codec that is not in this build, or that the container cannot hold
        raise OutputError(f"the streams of {source} cannot be written as {output.format.name}: {error}") from None
    if rotation:
        encoder.set_display_rotation(rotation)
    output.metadata.update(container.metadata)
    deep = any(component.bits > 8 for component in stream.codec_context.format.components)
    read, write = VideoReformatter(), VideoReformatter()
    count = 0

    def pieces() -> Iterator[Any]:
        with _reading(source):
            for packet in container.demux(stream, *(container.streams[index] for index in others)):
                if packet.stream is stream:
                    for frame in packet.decode():
                        if (frame.width, frame.height) != (stream.width, stream.height):
                            raise InputError(f"{source} cannot be restored: its frames change their size")
                        yield frame
                elif packet.dts is not None:
                    yield packet

    def work(piece: Any) -> Any:
        if not isinstance(piece, av.VideoFrame):
            return piece
        with _reading(source):
            rgb = read.reformat(piece, format="rgb48le" if deep else "rgb24", **_from(piece)).to_ndarray()
        restored = av.VideoFrame.from_ndarray(np.ascontiguousarray(restore(rgb)), format="rgb48le" if deep else "rgb24")
        # Both ways with one matrix: what no frame states would be taken for BT.601.
        restored.colorspace = piece.colorspace
        frame = write.reformat(restored, format=encoder.codec_context.pix_fmt, **_to(piece))
        frame.pts, frame.time_base = piece.pts, stream.time_base
        frame.color_range, frame.colorspace = piece.color_range, piece.colorspace
        return frame

    for piece in overlapped(pieces(), work):
        if isinstance(piece, av.VideoFrame):
            output.mux(encoder.encode(piece))
            count += 1
            on_frame()
        else:
            piece.stream = others[piece.stream.index]
            output.mux(piece)
    output.mux(encoder.encode(None))
    return count


def _add_encoder(output: Any, stream: Any) -> Any:
    source = stream.codec_context
    name, options = _ENCODERS.get(source.name.removeprefix("lib"), _ENCODERS["h264"])
    if source.codec.canonical_name in _ENCODERS:
        name, options = _ENCODERS[source.codec.canonical_name]
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    encoder = output.add_stream(name, rate=rate, options=dict(options))
    context = encoder.codec_context
    context.width, context.height = stream.width, stream.height
    wanted = source.pix_fmt
    possible = [pixel.name for pixel in context.codec.video_formats or ()]
    context.pix_fmt = wanted if wanted in possible or not possible else possible[0]
    context.time_base = encoder.time_base = stream.time_base
    context.color_range, context.colorspace = source.color_range, source.colorspace
    context.color_primaries, context.color_trc = source.color_primaries, source.color_trc
    if stream.sample_aspect_ratio:
        context.sample_aspect_ratio = stream.sample_aspect_ratio
    encoder.metadata.update(stream.metadata)
    return encoder


def _add_copy(output: Any, other: Any) -> Any:
    copy = output.add_stream_from_template(other)
    copy.metadata.update(other.metadata)
    copy.disposition = int(other.disposition)
    return copy


def _rotation(path: Path) -> int:
    # Only frames tell it, and the header is written before the first of them is restored.
    with _opened(path) as container, _reading(path):
        frame = next(container.decode(_video_stream(container, path)), None)
        return 0 if frame is None else int(frame.rotation)


def _is_copied(stream: Any) -> bool:
    return stream.type in ("audio", "subtitle") and stream.codec_context is not None


def _from(frame: Any) -> dict[str, Any]:
    return {"src_color_range": frame.color_range or ColorRange.MPEG, "dst_color_range": ColorRange.JPEG}


def _to(frame: Any) -> dict[str, Any]:
    return {"src_color_range": ColorRange.JPEG, "dst_color_range": frame.color_range or ColorRange.MPEG}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except av.error.FFmpegError as error:
        raise InputError(f"{path} cannot be restored as a video: {error}") from None


def _opened(path: Path) -> Any:
    try:
        return av.open(str(path))
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise InputError(f"{path} is not a video that can be read: {error}") from None


def _video_stream(container: Any, path: Path) -> Any:
    if not container.streams.video or container.streams.video[0].codec_context is None:
        raise InputError(f"{path} has no video in it that can be decoded")
    stream = container.streams.video[0]
    if stream.codec_context.format is None or not stream.width or not stream.height:
        raise InputError(f"{path} does not say what its frames look like; it may be damaged")
    stream.thread_type = "AUTO"
    return stream
