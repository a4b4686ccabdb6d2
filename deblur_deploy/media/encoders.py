"""Which encoder and pixel format a restored video gets, and a track that says of itself what the source's track said.

The source's own codec, if it can hold what the frames hold; colour is never thinned out, so frames of an odd size go
to 4:4:4 where an encoder wants even sides, and RGB that cannot stay RGB does as well.
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from deblur_deploy.errors import InputError, MissingExtraError
from deblur_deploy.media.containers import is_rgb, raw_side_data, side_data, turning

try:
    import av
    from av.codec import Codec, CodecContext
    from av.sidedata.sidedata import Type
    from av.video.reformatter import ColorRange, Colorspace
except ImportError:
    raise MissingExtraError("videos need PyAV; install it: pip install 'deblur-deploy[video]'") from None

_ENCODERS = {
    "av1": ("libsvtav1", "libvpx-vp9", "libx265"),
    "ffv1": ("ffv1",),
    "h264": ("libx264rgb", "libx264"),
    "hevc": ("libx265",),
    "mjpeg": ("mjpeg",),
    "mpeg4": ("mpeg4",),
    "prores": ("prores_ks",),
    "vp8": ("libvpx",),
    "vp9": ("libvpx-vp9", "libsvtav1", "libx265"),
}
# For what is not above: AVI tells no times, as H.264 needs them, and WebM holds its own codecs only.
_USUAL = {"avi": ("mpeg4", "libx264"), "webm": ("libvpx-vp9", "libsvtav1")}
FINE = {"flags": "+qscale", "global_quality": str(2 * 118)}
"""Options of FFmpeg's own encoders for quality 2 of 31; they count it in units of 118."""

_OPTIONS = {
    "libsvtav1": {"crf": "24", "preset": "8"},
    "libvpx": {"crf": "8", "b": "8M"},
    "libvpx-vp9": {"crf": "20", "b": "0", "row-mt": "1", "cpu-used": "4"},
    "libx264": {"crf": "17"},
    "libx264rgb": {"crf": "17"},
    "libx265": {"crf": "18", "x265-params": "log-level=none"},
    "mjpeg": FINE,
    "mpeg4": FINE,
}
_EVEN = frozenset({"libx264", "libx265"})
_FINEST_TICK = {"mpeg4": 65535}
_GLOBAL_HEADER = 1 << 22
_OF_THE_STREAM = ("encoder", "bps", "duration", "number_of_", "_statistics_")
# Where an encoder takes HDR10's mastering display and light level: the option, their names in it, and how many units
# of it are 1 in colour coordinates and in candela per square metre.
_LIGHT = {
    "libsvtav1": ("svtav1-params", "mastering-display", "content-light", 1, 1),
    "libx264": ("x264-params", "mastering-display", "cll", 50_000, 10_000),
    "libx265": ("x265-params", "master-display", "max-cll", 50_000, 10_000),
}
_UNSPECIFIED = 2


class Encoder:
    """Encodes frames into a new track of ``output`` in place of ``stream``, which begins with the frame ``first``."""

    def __init__(self, output: Any, stream: Any, first: Any) -> None:
        source = stream.codec_context
        name, self.pixels = choice(
            output.format.name, source.codec.canonical_name, first.format, first.width, first.height
        )
        self._rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        self._tick, self._times = stream.time_base, list[tuple[int, int]]()
        # Dolby Vision is described in the container, but its data, which are in the bit stream, are lost.
        same = Codec(name, "w").canonical_name == source.codec.canonical_name
        if same and "its Dolby Vision metadata" not in side_data(first):
            # Only a copy of the track keeps what is said in the container: HDR, mirroring, projection.
            self.stream = output.add_stream_from_template(stream, opaque=True)
            self._context = CodecContext.create(name, "w")
        else:
            self.stream = output.add_stream(name, rate=self._rate)
            self.stream.time_base = stream.time_base
            self._context = self.stream.codec_context
            self.stream.set_display_matrix(turning(first) or None)
        self._configure(source, first)
        if output.format.flags & av.format.Flags.global_header.value:
            self._context.flags |= _GLOBAL_HEADER
        if output.format.name == "avi":
            self._context.max_b_frames = 0  # so that frames are stored in the order in which they are shown
        self._context.options = _with_light(name, first)
        if name == "libsvtav1":
            os.environ.setdefault("SVT_LOG", "1")  # it writes a page about itself otherwise
        self._context.open()
        if self.stream.codec_context is not self._context:
            self._describe(output)
        # What was true of the old bit stream only is left behind.
        said = {key: text for key, text in stream.metadata.items() if not key.lower().startswith(_OF_THE_STREAM)}
        self.stream.metadata.update(said)
        self.stream.disposition = int(stream.disposition)
        # Apple's players take HEVC by this name only.
        if source.codec_tag == "hvc1" and same and output.format.name in ("mov", "mp4"):
            self.stream.codec_context.codec_tag = "hvc1"

    def _configure(self, source: Any, first: Any) -> None:
        context = self._context
        context.width, context.height, context.pix_fmt = first.width, first.height, self.pixels.name
        self._coarse = self._tick.denominator > _FINEST_TICK.get(context.name, self._tick.denominator)
        context.framerate = self._rate
        context.time_base = (1 / self._rate).limit_denominator(65535) if self._coarse else self._tick
        context.color_range, context.colorspace = source.color_range, source.colorspace
        if self._leaves_rgb(first):
            context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
        context.color_primaries, context.color_trc = source.color_primaries, source.color_trc
        if source.sample_aspect_ratio:
            context.sample_aspect_ratio = source.sample_aspect_ratio

    def _describe(self, output: Any) -> None:
        """Put what the new bit stream is into the track that was copied from the source."""
        track, context = self.stream.codec_context, self._context
        track.pix_fmt, track.extradata, track.framerate = self.pixels.name, context.extradata, self._rate
        track.color_range, track.colorspace = context.color_range, context.colorspace
        track.bit_rate, track.level = 0, context.level
        if context.profile:
            track.profile = context.profile
        if context.codec_tag.strip("\0") and output.format.name in ("mov", "mp4"):
            track.codec_tag = context.codec_tag

    def _leaves_rgb(self, frame: Any) -> bool:
        return is_rgb(frame.format) and not is_rgb(self.pixels)

    def colours(self, frame: Any) -> tuple[int, int]:
        """Range and matrix that a restored ``frame`` is to have."""
        if self._leaves_rgb(frame):
            return int(ColorRange.MPEG), int(Colorspace.ITU709)
        return int(frame.color_range), int(frame.colorspace)

    def encode(self, frame: Any | None) -> list[Any]:
        """Packets for the output; None ends the track."""
        if frame is not None and self._coarse:
            # The encoder cannot count so finely: it counts frames, and their times are put back behind it.
            self._times.append((frame.pts, frame.duration))
            frame.pts, frame.time_base = len(self._times) - 1, self._context.time_base
        packets = self._context.encode(frame)
        for packet in packets:
            if self._coarse:
                packet.pts, packet.duration = self._times[packet.pts]
                packet.dts, packet.time_base = packet.pts, self._tick
            packet.stream = self.stream
        return packets


def refuse(stream: Any, first: Any, path: Path) -> None:
    """Raise InputError for a video of which a result could not hold all that is to be seen."""
    if any(part.is_alpha for part in first.format.components) or stream.metadata.get("alpha_mode") == "1":
        raise InputError(f"{path} has transparency, which is not kept in videos; save its frames as PNG images")
    if any(word in first.format.name for word in ("f16", "f32")):
        raise InputError(f"{path} has floating-point colours ({first.format.name}), which are not kept in videos")
    if stream.codec_context.field_order > 1 or first.interlaced_frame:
        raise InputError(interlaced(path))
    if "its Dolby Vision metadata" in side_data(first) and first.color_trc == _UNSPECIFIED:
        raise InputError(f"{path} is Dolby Vision alone, without a picture for other players; convert it first")


def interlaced(path: Path) -> str:
    """Why such a video is not restored."""
    return f"{path} is interlaced: each frame shows two moments; deinterlace it first (ffmpeg -vf bwdif)"


def choice(kind: str, codec: str, source: Any, width: int, height: int) -> tuple[str, Any]:
    """The encoder and its av.VideoFormat for frames of the format ``source`` in a container of that ``kind``.

    Never one that thins out colour, and one with fewer bits only if none has enough.
    Raises InputError if there is none.
    """
    best: tuple[tuple[Any, ...], str, Any] | None = None
    for place, name in enumerate(_ENCODERS.get(codec) or _USUAL.get(kind, ("libx264", "libx265"))):
        try:
            formats = Codec(name, "w").video_formats or ()
        except ValueError:  # not in this build of FFmpeg
            continue
        for number, pixels in enumerate(formats):
            if not _holds(pixels, source) or (name in _EVEN and not _divides(pixels, width, height)):
                continue
            rank = (
                max(0, bits(source) - bits(pixels)),
                place,
                pixels.name != source.name,
                is_rgb(pixels) != is_rgb(source),
                bits(pixels),
                [-part for part in _thinned(pixels)],
                number,
            )
            if best is None or rank < best[0]:
                best = rank, name, pixels
    if best is None:
        raise InputError(f"nothing here writes {codec} of {source.name} at {width}x{height}; convert the video first")
    return best[1], best[2]


def bits(pixels: Any) -> int:
    """Bits of a colour component."""
    return max(part.bits for part in pixels.components)


def _holds(pixels: Any, source: Any) -> bool:
    thinner = any(new > old for new, old in zip(_thinned(pixels), _thinned(source), strict=True))
    return not thinner and (is_rgb(source) or not is_rgb(pixels)) and not any(c.is_alpha for c in pixels.components)


def _thinned(pixels: Any) -> tuple[int, int]:
    """By how many powers of two the colour is narrower and lower than the picture; gray has none to keep."""
    if not is_rgb(pixels) and all(part.is_luma for part in pixels.components):
        return 9, 9
    return (64 // pixels.chroma_width(64)).bit_length() - 1, (64 // pixels.chroma_height(64)).bit_length() - 1


def _divides(pixels: Any, width: int, height: int) -> bool:
    across, down = _thinned(pixels)
    return across == 9 or (width % 2**across == 0 and height % 2**down == 0)


def _with_light(name: str, first: Any) -> dict[str, str]:
    """The encoder's options, with the mastering display and light level of HDR10 where it writes them."""
    options = dict(_OPTIONS.get(name, {}))
    if name not in _LIGHT:
        return options
    option, display_name, level_name, point_units, light_units = _LIGHT[name]
    known, said = raw_side_data(first), []
    # FFmpeg's AVMasteringDisplayMetadata: ten fractions (x, y of red, green, blue, white; least, most) and two flags.
    display = np.frombuffer(known.get(Type.MASTERING_DISPLAY_METADATA, b""), np.int32)
    if display.size >= 22 and display[20] and display[21] and display[1:20:2].all():
        values = display[:20:2] / display[1:20:2] * ([point_units] * 8 + [light_units] * 2)
        texts = [f"{value:.4f}" if point_units == 1 else f"{value:.0f}" for value in values]
        (red, green, blue, white), (least, most) = [",".join(texts[i : i + 2]) for i in range(0, 8, 2)], texts[8:]
        said.append(f"{display_name}=G({green})B({blue})R({red})WP({white})L({most},{least})")
    level = np.frombuffer(known.get(Type.CONTENT_LIGHT_LEVEL, b""), np.uint32)
    if level.size >= 2:
        said.append(f"{level_name}={level[0]},{level[1]}")
    if said:
        options[option] = ":".join([*filter(None, [options.get(option)]), *said])
    return options
