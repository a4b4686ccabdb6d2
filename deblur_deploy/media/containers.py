"""Video files as FFmpeg opens them: real containers only, and what they hold beside the moving picture.

A script or playlist (ffconcat, HLS) would make FFmpeg open other files than the one that was given, and a name with a
colon another protocol.  ``facts`` is what two files must agree in, so that nothing is lost without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from deblur_deploy.errors import InputError, MissingExtraError

try:
    import av
    from av.sidedata.sidedata import Type
except ImportError:
    raise MissingExtraError("videos need PyAV; install it: pip install 'deblur-deploy[video]'") from None

FORMATS = "mov,matroska,avi,flv,mpegts,mpeg,ogg,asf"
"""FFmpeg's names of the containers that are read: each holds its own streams, and opens nothing else."""

# Bytes that are no UTF-8 come out as they went in.
_TEXT = {"metadata_encoding": "utf-8", "metadata_errors": "surrogateescape"}
_COVER = int(av.stream.Disposition.attached_pic)
_THUMBNAILS = int(av.stream.Disposition.timed_thumbnails)
_UNSTATED = (0, 2)  # FFmpeg's "reserved" and "unspecified"
_TECHNICAL = frozenset({"compatible_brands", "duration", "encoder", "major_brand", "minor_version", "software"})
_SIDE_DATA: dict[Any, str] = {
    None: "side data of an unknown kind",
    Type.MASTERING_DISPLAY_METADATA: "its mastering display",
    Type.CONTENT_LIGHT_LEVEL: "its content light level",
    Type.AMBIENT_VIEWING_ENVIRONMENT: "its ambient viewing environment",
    Type.DYNAMIC_HDR_PLUS: "its HDR10+ metadata",
    Type.DYNAMIC_HDR_VIVID: "its HDR Vivid metadata",
    Type.DOVI_METADATA: "its Dolby Vision metadata",
    Type.A53_CC: "its closed captions",
    Type.AFD: "its active format description",
    Type.ICC_PROFILE: "its ICC profile",
    Type.SPHERICAL: "its spherical projection",
    Type.STEREO3D: "its two eyes' arrangement",
}


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a file begins with."""

    frame: Any
    """The first frame that can be decoded."""
    covers: dict[int, bytes]
    """Cover pictures, by the index of their stream."""


def url(path: Path) -> str:
    """``path`` as FFmpeg takes it for a file whatever is in its name."""
    return f"file:{path}"


def opened(path: Path) -> Any:
    """An open av.container.InputContainer; raises InputError if it is none of ``FORMATS`` or damaged."""
    safe = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    try:
        return av.open(url(path), container_options=safe, **_TEXT)
    except av.error.ArgumentError:
        known = "MP4, MOV, Matroska, WebM, AVI"
        raise InputError(f"{path} cannot be read as a video: it is not a video ({known}), or damaged") from None
    except (av.error.FFmpegError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read as a video: {reason}") from None


def created(path: Path, **options: str) -> Any:
    """An av.container.OutputContainer in the format that the suffix names."""
    # FFmpeg's own choice for .m4v takes fewer codecs than files of that name have.
    kind = "mp4" if path.suffix.lower() == ".m4v" else None
    return av.open(url(path), "w", format=kind, container_options=options, **_TEXT)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of FFmpeg's in the block become InputErrors about ``path``."""
    try:
        yield
    except av.error.FFmpegError as error:
        raise InputError(f"{path} cannot be restored as a video: {error.strerror}") from None


def video_stream(container: Any, path: Path, *, threads: str = "AUTO") -> Any:
    """The one moving picture; raises InputError if there is none, several, or one of unknown size."""
    streams = [stream for stream in container.streams.video if not int(stream.disposition) & (_COVER | _THUMBNAILS)]
    if not streams or streams[0].codec_context is None:
        raise InputError(f"{path} has no video in it that can be decoded")
    if len(streams) > 1:
        raise InputError(f"{path} has {len(streams)} video tracks; save the one to restore as a file of its own")
    stream = streams[0]
    if stream.codec_context.format is None or not stream.width or not stream.height:
        raise InputError(f"{path} does not say what its frames look like; it may be damaged")
    stream.thread_type = threads
    return stream


def cover_streams(container: Any) -> list[Any]:
    """Pictures that stand for the file, such as a film's poster."""
    return [stream for stream in container.streams.video if int(stream.disposition) & (_COVER | _THUMBNAILS) == _COVER]


def start(container: Any, path: Path) -> Start:
    """Read up to the first frame (``container`` is used up); raises InputError if there is none."""
    stream, covers = video_stream(container, path), {}
    with reading(path):
        # Cover pictures come before all else.
        for packet in container.demux(stream, *cover_streams(container)):
            if packet.stream is not stream:
                if packet.size:
                    covers[packet.stream.index] = bytes(packet)
                continue
            for frame in decoded(packet):
                return Start(frame=frame, covers=covers)
    raise InputError(f"{path} has no frames that can be decoded")


def decoded(packet: Any) -> list[Any]:
    """The frames that a packet completes; none where it is damaged."""
    try:
        return packet.decode()
    except av.error.FFmpegError:
        return []


def raw_side_data(frame: Any) -> dict[Any, bytes]:
    """What comes with a frame, by av.sidedata.sidedata.Type; None is a kind that this PyAV does not know."""
    try:
        return {entry.type: bytes(entry) for entry in frame.side_data}
    except ValueError:  # it then tells of none
        return {None: b""}


def side_data(frame: Any) -> set[str]:
    """What comes with a frame and says how it is to be shown, in words."""
    return {_SIDE_DATA[kind] for kind in raw_side_data(frame) if kind in _SIDE_DATA}


def is_rgb(pixels: Any) -> bool:
    """Whether an av.VideoFormat is RGB, by planes, packed or by a palette."""
    return bool(pixels.is_rgb or pixels.has_palette)


def turning(frame: Any) -> list[int]:
    """FFmpeg's display matrix of nine numbers, which turns and mirrors; empty if the frame is shown as it is."""
    matrix: list[int] = np.frombuffer(raw_side_data(frame).get(Type.DISPLAYMATRIX, b""), np.int32).tolist()
    return matrix if matrix[:2] + matrix[3:5] != [65536, 0, 0, 65536] else []


def facts(path: Path, wanted: Set[str] = frozenset()) -> dict[str, Any]:
    """What a file holds beside its pixels and copied tracks, by what to call it; false values are not there.

    "tags" are the names of what is said about the whole file, such as its title.  Frames are looked at until all side
    data that is ``wanted`` was met, a second of them at most.
    """
    with opened(path) as container:
        stream = video_stream(container, path)
        rate = max(1, round(float(stream.average_rate or 25)))
        chapters = [
            (round(float(one["start"] * one["time_base"]), 2), one["metadata"].get("title"))
            for one in container.chapters()
        ]
        tags = {key.lower().encode("ascii", "backslashreplace").decode() for key in container.metadata}
        found = {
            "tags": tags - _TECHNICAL,
            "its chapters": chapters,
            "its cover picture": len(cover_streams(container)),
            "its timed thumbnails": sum(bool(int(one.disposition) & _THUMBNAILS) for one in container.streams.video),
            "its attachments": sorted(str(one.name) for one in container.streams.attachments),
            "its flags (default, forced and the like)": int(stream.disposition),
            "its timecode": stream.metadata.get("timecode"),
            "the shape of its pixels": stream.sample_aspect_ratio not in (None, 0, 1) and stream.sample_aspect_ratio,
        }
        first: dict[str, Any] = {}
        kinds: set[str] = set()
        with reading(path):
            frames = (frame for packet in container.demux(stream) for frame in decoded(packet))
            for frame in islice(frames, rate):
                first = first or _first_frame(frame)
                kinds |= side_data(frame)
                if kinds >= wanted:
                    break
    return found | first | dict.fromkeys(kinds, True)


def _first_frame(frame: Any) -> dict[str, Any]:
    yuv = not is_rgb(frame.format)
    return {
        "its rotation": turning(frame)[:2] + turning(frame)[3:5],
        "its colour primaries": frame.color_primaries not in _UNSTATED and frame.color_primaries,
        "its transfer function": frame.color_trc not in _UNSTATED and frame.color_trc,
        "its colour matrix": yuv and frame.colorspace not in _UNSTATED and frame.colorspace,
        "its full range": yuv and frame.color_range == 2,
    }


def add_copy(output: Any, other: Any) -> Any:
    """A stream of ``output`` for the packets of ``other`` as they are, with its tags and flags."""
    copy = output.add_stream_from_template(other)
    copy.metadata.update(other.metadata)
    copy.disposition = int(other.disposition)
    return copy


def is_copied(stream: Any) -> bool:
    """Whether it is a track beside the picture whose packets are carried over."""
    return stream.type in ("audio", "subtitle") and stream.codec_context is not None


def add_pictures(container: Any, output: Any, covers: dict[int, bytes]) -> Iterator[Any]:
    """Add cover pictures and attachments where the format has a place for them; packets to write first."""
    kind = output.format.name
    for other in cover_streams(container):
        data = covers.get(other.index, b"")
        if data and kind == "matroska":
            name, mime = other.metadata.get("filename", "cover"), other.metadata.get("mimetype")
            output.add_attachment(name, mime or f"image/{other.codec_context.name.replace('mjpeg', 'jpeg')}", data)
        elif data and kind in ("mov", "mp4") and other.codec_context is not None:
            packet = av.Packet(data)
            packet.stream = add_copy(output, other)
            packet.pts = packet.dts = 0
            yield packet
    for other in container.streams.attachments if kind == "matroska" else ():
        copy = output.add_attachment(other.name or "attached", other.mimetype or "application/octet-stream", other.data)
        copy.metadata.update(other.metadata)
