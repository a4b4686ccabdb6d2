"""Video files, through PyAV: every frame restored, and everything else as it was.

Timestamps, rotation, colours, pixel format, HDR10 metadata, chapters, cover pictures, attachments, flags, tags and the
other tracks (audio, subtitles) are carried over; only the pixels are new.  The result is compared with the source, and
what it lacks is named.  It is written beside its final place and renamed when it is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deblur_deploy.errors import DeblurError, InputError, MissingExtraError, OutputError
from deblur_deploy.files import existing, writing_file
from deblur_deploy.media.containers import (
    Start,
    add_copy,
    add_pictures,
    created,
    facts,
    is_copied,
    is_rgb,
    opened,
    reading,
    side_data,
    start,
    video_stream,
)
from deblur_deploy.media.encoders import Encoder, bits, interlaced, refuse
from deblur_deploy.media.extent import missing_bytes
from deblur_deploy.media.images import MAX_PIXELS
from deblur_deploy.runtime.streams import overlapped

try:
    import av
    from av.video.reformatter import ColorRange, VideoReformatter
except ImportError:
    raise MissingExtraError("videos need PyAV; install it: pip install 'deblur-deploy[video]'") from None

_DISCARD_ALL = int(av.stream.Discard.all)
_ONE_FRAME_A_PACKET = ("h264", "hevc")


@dataclass(kw_only=True)
class _Read:
    """What came out of the source."""

    demuxed: int = 0
    """Packets of the picture."""
    packets: int = 0
    """Those of them that are shown: an edit list may begin behind the first."""
    frames: int = 0
    damaged: int = 0
    end: float = 0.0
    """Of the last packet of any track, in seconds."""
    shown: float = 0.0
    """End of the last frame."""
    failed: bool = False
    """Whether reading ended with an error."""
    kinds: set[str] = field(default_factory=set)
    """Of side data, in words."""


def frame_count(path: Path) -> int | None:
    """Frames that the file says it has; None if it does not.  Raises MissingFileError or InputError."""
    existing(path, kind="file")
    with opened(path) as container:
        stream = video_stream(container, path)
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
    on_note: Callable[[str], object] = lambda _: None,
) -> tuple[str, ...]:
    """Write ``source`` with every frame restored to ``target``; returns what the source had and the result lacks.

    ``restore`` gets uint8 HxWx3 RGB, or uint16 where the video has more than 8 bits, and returns the same.
    ``on_note`` gets what is lacking and neither seen nor heard, such as a track of positions.  A source that is cut off
    or damaged is restored as far as it goes, and what is missing is among what is returned.
    Raises MissingFileError, InputError if the video cannot be read or no result could hold what it shows (transparency,
    interlaced fields, several video tracks), OutputError if it cannot be written.
    """
    existing(source, kind="file")
    with opened(source) as container:
        stream = video_stream(container, source)
        if stream.width * stream.height > max_pixels:
            limit = f"the limit of {max_pixels / 1e6:.0f} megapixels"
            raise InputError(f"{source} states {stream.width}x{stream.height} pixels a frame, more than {limit}")
        first = start(container, source)
        refuse(stream, first.frame, source)
    cut = missing_bytes(source) > 0
    with writing_file(target) as temporary:
        with opened(source) as container:
            # Frames that are still under way in several threads are lost where a file breaks off.
            stream = video_stream(container, source, threads="SLICE" if cut else "AUTO")
            named = any("." in key for key in container.metadata) and not first.covers
            try:
                # Apple's own tags (place, camera) have names of this kind, and are written only if asked for.
                with created(temporary, **({"movflags": "use_metadata_tags"} if named else {})) as output:
                    job = Job(source, container, stream, output, first, cut=cut)
                    job.run(restore, on_frame)
                lost = [*job.uncopied(on_note), *job.unread()]
            # What goes wrong in reading is an InputError by now.
            except (av.error.ArgumentError, av.error.InvalidDataError) as error:
                raise InputError(f"{source} cannot be written anew ({error.strerror}); it may be damaged") from None
            except av.error.FFmpegError as error:
                raise OutputError(f"cannot write {target}: {error.strerror}; nothing was left behind") from None
        lost += _unwritten(source, temporary, job.read.kinds, on_note)
    return tuple(lost)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A frame on its way."""

    source: Any
    """As it was decoded."""
    rgb: Any
    """The same in RGB, with its times and side data."""
    pixels: NDArray[Any]
    """HxWx3 RGB, uint8 or uint16: the pixels of ``rgb``, to be overwritten with the restored ones."""


class Job:
    """One video on its way from ``container`` to ``output``."""

    def __init__(self, source: Path, container: Any, stream: Any, output: Any, first: Start, *, cut: bool) -> None:
        self.read = _Read()
        self._source, self._container, self._stream, self._output = source, container, stream, output
        self._reader, self._writer = VideoReformatter(), VideoReformatter()
        self._bits = bits(first.frame.format)
        self._cut = cut
        try:
            self._encoder = Encoder(output, stream, first.frame)
            self._copies = {other.index: add_copy(output, other) for other in container.streams if is_copied(other)}
            self._covers = list(add_pictures(container, output, first.covers))
        except DeblurError:
            raise
        except ValueError as error:  # a codec that is not in this build, or that the container cannot hold
            kind = output.format.name
            raise OutputError(f"the streams of {source} cannot be written as {kind}: {error}") from None
        output.metadata.update(container.metadata)
        output.set_chapters(container.chapters())

    def run(self, restore: Callable[[NDArray[Any]], NDArray[Any]], on_frame: Callable[[], object]) -> None:
        def work(piece: Any) -> Any:
            if isinstance(piece, Picture):
                piece.pixels[:] = restore(np.ascontiguousarray(piece.pixels))
            return piece

        self._output.mux(self._covers)
        # Colours are converted where frames are read and where they are written: what restores does nothing else.
        with closing(overlapped(self.pieces(), work, patient=True)) as pieces:
            for piece in pieces:
                if isinstance(piece, Picture):
                    self._output.mux(self.encoded(piece))
                    on_frame()
                else:
                    piece.stream = self._copies[piece.stream.index]
                    self._output.mux(piece)
        self._output.mux(self.encoded(None))

    def uncopied(self, on_note: Callable[[str], object]) -> Iterator[str]:
        """What no track of the output holds: ``on_note`` gets what is neither seen nor heard."""
        if self._bits > bits(self._encoder.pixels):
            yield f"{self._bits - bits(self._encoder.pixels)} of the {self._bits} bits of its colours"
        for other in self._container.streams:
            if other.type in ("audio", "subtitle") and not is_copied(other):
                yield f"its {other.type} track {other.index}, whose codec is not known here"
            # Chapters and timecode are tracks too, which are written anew.
            written = int(other.discard) == _DISCARD_ALL or "timecode" in other.metadata
            if other.type in ("data", "unknown") and not written:
                on_note(f"its data track {other.index}")

    def unread(self) -> Iterator[str]:
        """What is missing of a file that was cut off or damaged."""
        read, kind = self.read, self._container.format.name
        if self._stream.codec_context.name in _ONE_FRAME_A_PACKET:
            read.damaged = max(read.damaged, read.packets - read.frames)
        if read.damaged:
            yield f"{read.damaged} damaged frame{'s' if read.damaged > 1 else ''}"
        # MP4 names all its packets at the front.  Matroska names its length: up to a frame of it is rounding.
        short = kind.startswith("mov") and read.demuxed < len(self._stream.index_entries)
        stated, frame = (self._container.duration or 0) / 1e6, 1 / float(self._stream.average_rate or 25)
        short |= kind.startswith("matroska") and stated - read.end > max(0.1, 2 * frame)
        if self._cut or read.failed or short:
            of = f" of {stated:.1f} s" if stated > read.shown else ""
            yield f"all that follows after {read.shown:.1f} s{of} (the file is cut off or damaged)"

    def pieces(self) -> Iterator[Any]:
        """Pictures to restore, and packets of the other tracks as they are."""
        others = [self._container.streams[index] for index in self._copies]
        last: int | None = None
        try:
            for packet in self._container.demux(self._stream, *others):
                self._count(packet)
                if packet.stream is not self._stream:
                    if packet.dts is not None:
                        yield packet
                    continue
                for frame in self._decoded(packet):
                    if frame.pts is None:
                        frame.pts = frame.dts if frame.dts is not None else (last or 0) + max(1, frame.duration)
                    # A damaged file may show two frames at one time, which none can be written with.
                    if last is not None and frame.pts <= last:
                        self.read.damaged += 1
                        continue
                    last = frame.pts
                    self.read.shown = float((last + frame.duration) * self._stream.time_base)
                    yield self._picture(frame)
        except av.error.FFmpegError:
            self.read.failed = True

    def _count(self, packet: Any) -> None:
        if packet.pts is not None:
            self.read.end = max(self.read.end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream is self._stream and packet.size:
            self.read.demuxed += 1
            self.read.packets += not packet.is_discard

    def _decoded(self, packet: Any) -> Iterator[Any]:
        try:
            # Half a packet would give a picture that is gray from there down.
            frames = [] if packet.is_corrupt and self._cut else packet.decode()
        except av.error.FFmpegError:
            self.read.damaged += 1
            return
        for frame in frames:
            if (frame.width, frame.height) != (self._stream.width, self._stream.height):
                raise InputError(f"{self._source} cannot be restored: its frames change their size")
            if frame.interlaced_frame:
                raise InputError(interlaced(self._source))
            self.read.frames += 1
            self.read.damaged += frame.is_corrupt
            self.read.kinds |= side_data(frame)
            yield frame

    def _picture(self, piece: Any) -> Picture:
        depth = np.uint16 if self._bits > 8 else np.uint8
        with reading(self._source):
            # What reformat makes keeps times, colours and side data of its frame, so the pixels are put into that.
            frame = self._reader.reformat(
                piece,
                format="rgb48le" if self._bits > 8 else "rgb24",
                src_color_range=ColorRange.JPEG if is_rgb(piece.format) else piece.color_range or ColorRange.MPEG,
                dst_color_range=ColorRange.JPEG,
            )
        frame.make_writable()
        rows = np.frombuffer(memoryview(frame.planes[0]), depth).reshape(frame.height, -1)
        pixels = rows[:, : 3 * frame.width].reshape(frame.height, frame.width, 3)
        return Picture(source=piece, rgb=frame, pixels=pixels)

    def encoded(self, picture: Picture | None) -> list[Any]:
        """Packets of the output that a restored picture completes; None ends the track."""
        if picture is None:
            return self._encoder.encode(None)
        scale, matrix = self._encoder.colours(picture.source)
        rgb = is_rgb(self._encoder.pixels)
        result = self._writer.reformat(
            picture.rgb,
            format=self._encoder.pixels.name,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.JPEG if rgb else scale or ColorRange.MPEG,
            dst_colorspace=matrix if is_rgb(picture.source.format) and not rgb else None,
        )
        # The encoder is to choose anew which frames it predicts from which.
        result.pict_type, result.time_base = av.video.frame.PictureType.NONE, self._stream.time_base
        result.color_range, result.colorspace = scale, matrix
        return self._encoder.encode(result)


def _unwritten(source: Path, result: Path, kinds: set[str], on_note: Callable[[str], object]) -> Iterator[str]:
    """What the result lacks when it is read back; ``kinds`` of side data came with the source's frames."""
    before = facts(source) | dict.fromkeys(kinds, True)
    try:
        after = facts(result, kinds)
    except InputError:
        raise InputError(f"{source} cannot be written anew: no result could be read back; it may be damaged") from None
    for tag in sorted(before.pop("tags") - after.pop("tags")):
        on_note(f"its tag {tag}")
    yield from (name for name, value in before.items() if value and after.get(name) != value)
