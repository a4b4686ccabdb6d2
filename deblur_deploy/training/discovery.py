"""From the paths that a person gives to training sources: the kind of each, its share, and what is wrong with it.

A CSV file, or a folder with ``sharp`` beside ``blur`` inside, is pairs; a video file is frames; any other folder is
photographs.  Only consecutive frames cannot be told from photographs by looking, so their folders are named as such.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
from PIL import Image as Header
from PIL import UnidentifiedImageError

from deblur_deploy.errors import InputError, MissingExtraError, MissingFileError
from deblur_deploy.evaluation.pairs import find_pairs, holds_pairs
from deblur_deploy.files import writing_folder
from deblur_deploy.media.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES, list_images
from deblur_deploy.training.blur import BlurConfig
from deblur_deploy.training.film import Film
from deblur_deploy.training.sources import WINDOW, Frames, ImageCache, Pairs, Photos, Source

Kind = Literal["photos", "pairs", "frames", "video"]
SLOW_FPS = 120
"""Below this many frames a second an average of frames shows ghosts instead of blur."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One input: what it is and what it gives."""

    path: Path
    kind: Kind
    share: float
    sources: tuple[Source, ...]
    note: str = ""
    """Something about the input that a person should know."""

    def weighted(self) -> list[tuple[Source, float]]:
        """Sources with their shares; sequences of frames share by their number of frames."""
        total = sum(len(source.files()) for source in self.sources)
        return [(source, self.share * len(source.files()) / total) for source in self.sources]


def find_sources(
    inputs: Sequence[str],
    frames: Sequence[str],
    video: Sequence[str] = (),
    *,
    frames_folder: Path,
    cache: ImageCache | None = None,
    window: tuple[int, int] = WINDOW,
    blur: BlurConfig | None = None,
) -> list[Found]:
    """What ``inputs`` (kind detected), ``frames`` (of a fast camera) and ``video`` (at any rate) hold.

    Each is ``PATH`` or ``PATH=SHARE``; ``frames`` and ``video`` are folders of consecutive frames, or video files.

    Inputs without a share divide equally what the others leave of 1.  Videos are unpacked into ``frames_folder``,
    once.  ``window``: fewest and most frames that are averaged, with the gammas of ``blur``.

    Raises MissingFileError or InputError that names what is not there or not usable.
    """
    groups: list[tuple[Sequence[str], Kind | None]] = [(inputs, None), (frames, "frames"), (video, "video")]
    texts = [text for group, _ in groups for text in group]
    kinds = [kind for group, kind in groups for _ in group]
    if not texts:
        raise InputError("no training data: give folders of photographs, pairs, --frames or --video")
    paths, shares = zip(*(_path_and_share(text) for text in texts), strict=True)
    cache = cache or ImageCache()
    found = []
    for path, share, given in zip(paths, _filled(shares), kinds, strict=True):
        kind, note = given or _kind(path), ""
        if not path.exists():
            raise MissingFileError(f"no such file or folder: {path}")
        if kind == "pairs":
            sources: tuple[Source, ...] = (Pairs(find_pairs(path), cache),)
        elif kind == "photos":
            sources = (Photos(_photographs(path), cache),)
        else:
            sequences, note = _sequences(path, frames_folder)
            blur = blur or BlurConfig()
            slow = kind == "video"
            least = 5 if slow else max(5, window[0] | 1)
            if short := next((frames for frames in sequences if len(frames) < least), None):
                raise InputError(
                    f"{short[0].parent} holds {len(short)} frames; at least {least} consecutive ones are needed"
                )
            sources = tuple(Film(s, cache, blur) if slow else Frames(s, cache, window, blur) for s in sequences)
            note = "" if slow else note
        found.append(Found(path=path, kind=kind, share=share, sources=sources, note=note))
    return found


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What the headers of all files say, before any is decoded."""

    files: int
    small: tuple[Path, ...]
    """Images that are smaller than a patch; training fills them up by reflection."""
    unreadable: tuple[Path, ...]
    """Files that are no images; training skips them."""


def inspect(sources: Sequence[Source], side_px: int, margin_px: int) -> Inspection:
    """Look at every file's header.  Raises InputError that names the first pair whose sizes differ."""
    files, small, unreadable = 0, [], []
    for source in sources:
        wanted = side_px + 2 * margin_px * isinstance(source, Photos)
        sizes = {path: _header_size(path) for path in source.files()}
        if isinstance(source, Pairs):
            for blurred, sharp in source.paths:
                a, b = sizes[blurred], sizes[sharp]
                if a and b and a != b:
                    raise InputError(
                        f"{blurred} has {a[0]}x{a[1]} pixels but {sharp} {b[0]}x{b[1]}; the sizes of a pair must agree"
                    )
        if isinstance(source, Frames | Film):
            known = {size: path for path, size in sizes.items() if size}
            if len(known) > 1:
                (a, one), (b, other) = list(known.items())[:2]
                raise InputError(
                    f"{one} has {a[0]}x{a[1]} pixels but {other} {b[0]}x{b[1]}; one folder is one sequence, of one size"
                )
        files += len(sizes)
        small += [path for path, size in sizes.items() if size and min(size) < wanted]
        unreadable += [path for path, size in sizes.items() if size is None]
        if len(unreadable) == files:
            raise InputError(f"none of {files} files can be read as an image, first: {unreadable[0]}")
    return Inspection(files=files, small=tuple(small), unreadable=tuple(unreadable))


def _header_size(path: Path) -> tuple[int, int] | None:
    """(width, height) as the EXIF orientation turns it, or None if the header is no image's."""
    try:
        with Header.open(path) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            return (image.height, image.width) if turned else (image.width, image.height)
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Header.DecompressionBombError):
        return None


def _path_and_share(text: str) -> tuple[Path, float | None]:
    name, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), None
    try:
        share = float(number)
    except ValueError:
        return Path(text), None
    if not 0 < share < float("inf"):
        raise InputError(f"{text}: the share is {number}; allowed: more than 0")
    return Path(name), share


def _filled(shares: Sequence[float | None]) -> list[float]:
    given = sum(share for share in shares if share is not None)
    rest = [share for share in shares if share is None]
    if rest and given >= 1:
        raise InputError(f"the shares given add up to {given:g}, so nothing is left for the inputs without one")
    return [(1 - given) / len(rest) if share is None else share for share in shares]


def _kind(path: Path) -> Kind:
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return "frames"
    if path.is_file() and path.suffix.lower() != ".csv":
        raise InputError(f"{path} is a single file; give a folder, a CSV of pairs, or a video")
    return "pairs" if holds_pairs(path) else "photos"


def _photographs(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise InputError(f"no photographs in {folder} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return paths


def _sequences(path: Path, frames_folder: Path) -> tuple[list[list[Path]], str]:
    """Sequences of consecutive frames: a video, a folder of images, or a folder of such."""
    if path.is_file():
        if path.suffix.lower() not in VIDEO_SUFFIXES:
            raise InputError(f"{path} is no video; frames are a folder or {', '.join(sorted(VIDEO_SUFFIXES))}")
        unpacked, note = unpack_video(path, frames_folder)
        return [sorted(unpacked.iterdir())], note
    notes = []
    sequences: list[list[Path]] = []
    for folder in [path, *sorted(child for child in path.rglob("*") if child.is_dir())]:
        images = sorted(list_images(folder), key=_natural)
        sequences += [images] if images else []
        for video in sorted(child for child in folder.iterdir() if child.suffix.lower() in VIDEO_SUFFIXES):
            unpacked, note = unpack_video(video, frames_folder)
            sequences.append(sorted(unpacked.iterdir()))
            notes += [note] if note else []
    if not sequences:
        raise InputError(f"no frames in {path}: no images and no video in it or the folders below")
    return sequences, "; ".join(notes)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts ``frame10`` behind ``frame9``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", path.name)]


def unpack_video(path: Path, folder: Path) -> tuple[Path, str]:
    """All frames of a video as images in a folder below ``folder`` (kept if it is there), and a note about its rate.

    Random windows of a compressed video would decode it from the last key frame each time, hence unpacked; as JPEG at
    quality 98 without chroma subsampling, which is far below the video's own compression loss.
    Raises InputError if it is no video, or has fewer than 5 frames.
    """
    try:
        import av

        from deblur_deploy.media.containers import opened
    except ImportError:
        raise MissingExtraError("reading video needs PyAV; install deblur-deploy[video]") from None
    stat = path.stat()
    tag = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:8]
    target = folder / f"{path.stem}-{tag}"
    settings = [cv2.IMWRITE_JPEG_QUALITY, 98, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    try:
        with opened(path) as video:
            stream = next(iter(video.streams.video), None)
            if stream is None:
                raise InputError(f"{path} has no picture, only sound; give another video")
            rate = float(stream.average_rate or 0)
            if not target.is_dir():
                stream.thread_type = "AUTO"
                with writing_folder(target) as temporary:
                    count = 0
                    for count, frame in enumerate(video.decode(stream), 1):
                        _, data = cv2.imencode(".jpg", frame.to_ndarray(format="bgr24"), settings)
                        (temporary / f"{count:06}.jpg").write_bytes(data.tobytes())
                    if count < 5:
                        raise InputError(f"{path} has {count} frames; at least 5 are needed")
    except av.FFmpegError as error:
        raise InputError(f"{path} cannot be read as a video ({error}); it may be damaged") from None
    slow = f"{path} says {rate:g} frames a second; below {SLOW_FPS} their average shows ghosts instead of blur, "
    return target, (
        slow + "unless it is slow motion of a fast camera; give it as --video"
    ) if 0 < rate < SLOW_FPS else ""
