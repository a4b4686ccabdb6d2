"""A video through ``deblur-run``: what decoding, restoring and encoding cost alone, and all of them at the same time.

    python -m benchmarks.video

The clip pans over a photograph.  Decoding goes to RGB and encoding begins there, as in ``media.video``, whose own code
is timed.  With cores to spare the slowest of the three alone would decide; where all of them want every core, nothing
can be faster than the processor time of all three on all cores.  The whole is compared with the larger of both.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for python -m benchmarks.video

import av
import cv2
import numpy as np
from common import Options, pairs, progress, save, script

from deblur_deploy.errors import InputError, ProviderError
from deblur_deploy.evaluation.record import Row, new_record
from deblur_deploy.media.containers import created, opened, start, video_stream
from deblur_deploy.media.video import Job, Picture, restore_video
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.system.threads import usable_cores

PARTS = ("decode", "restore", "encode")


@dataclass(frozen=True, kw_only=True)
class Video(Options):
    """Time a video's way through deblur-run, and the share of each part."""

    provider: str = "auto"
    """Execution provider."""
    width_px: int = 1280
    height_px: int = 720
    frames: int = 90
    """Length of the clip; all of it is held in memory."""
    codec: str = "libx264"
    """FFmpeg's name of the encoder that makes the clip."""
    repeats: int = 3
    """Times that everything is timed, in turn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.frames, self.repeats, self.width_px, self.height_px) < 1:
            raise ValueError("frames, repeats, width-px and height-px must be 1 or more")


@dataclass(frozen=True)
class Cost:
    """Seconds of the wall clock, and of the processor in all threads."""

    wall_s: float
    cpu_s: float


def run(options: Video) -> int:
    """Measure and save."""
    frames = 12 if options.quick else options.frames
    on_progress = progress()
    with tempfile.TemporaryDirectory(prefix="deblur-video-") as name:
        clip = make_clip(Path(name) / "clip.mp4", pairs(options)[0].blurred, frames, options)
        threads = options.threads if options.threads != usable_cores() else None
        with DeblurEngine(options.model, options.provider, threads=threads) as engine:
            receipt, costs = engine.receipt, list[dict[str, Cost]]()
            warm_up(engine, options)
            for number in range(1 if options.quick else options.repeats):
                on_progress(f"round {number + 1}")
                costs.append(alone(clip, Path(name) / "alone.mp4", engine))
                with timed(costs[-1], "whole"):
                    restore_video(clip, Path(name) / "whole.mp4", engine)
        on_progress("deblur-run")
        command_s = command(clip, Path(name) / "out", options)
    found = {**summary(costs, frames, receipt.threads or usable_cores()), "command_s": command_s, "frames": frames}
    row = Row(
        model=options.model.name,
        variant=receipt.variant,
        provider=receipt.provider,
        size=f"{options.width_px}x{options.height_px}",
        median_ms=found["whole_ms"],
        calls=frames * len(costs),
        facts={"text": str(receipt)},
    )
    settings = options.settings(provider=options.provider, codec=options.codec, frames=frames, size=row.size)
    return save(new_record("video", settings, rows=[row], found=found), options)


def summary(costs: list[dict[str, Cost]], frames: int, cores: int) -> dict[str, Any]:
    """Milliseconds a frame of each part alone, shares of their sum, and the whole beside what bounds it."""
    wall, cpu = (
        {part: 1e3 / frames * median(getattr(cost[part], of) for cost in costs) for part in (*PARTS, "whole")}
        for of in ("wall_s", "cpu_s")
    )
    one_by_one, slowest = sum(wall[part] for part in PARTS), max(PARTS, key=wall.__getitem__)
    bound = max(wall[slowest], sum(cpu[part] for part in PARTS) / cores)
    return {
        "alone_ms": {part: wall[part] for part in PARTS},
        "processor_ms": cpu,
        "shares": {part: wall[part] / one_by_one for part in PARTS},
        "one_by_one_ms": one_by_one,
        "slowest": slowest,
        "bound_ms": bound,
        "bound_by": slowest if bound == wall[slowest] else f"{cores} cores",
        "whole_ms": wall["whole"],
        "whole_over_bound": wall["whole"] / bound,
        "whole_over_one_by_one": wall["whole"] / one_by_one,
        "frames_per_s": 1e3 / wall["whole"],
    }


@contextmanager
def timed(costs: dict[str, Cost], part: str) -> Iterator[None]:
    """Keep what the block costs as ``part``."""
    wall, cpu = perf_counter(), process_time()
    yield
    costs[part] = Cost(perf_counter() - wall, process_time() - cpu)


def alone(clip: Path, target: Path, restore: Callable[[Any], Any]) -> dict[str, Cost]:
    """What each part costs while no other runs."""
    costs: dict[str, Cost] = {}
    with opened(clip) as container:
        first = start(container, clip)
    with opened(clip) as container, created(target) as output:
        job = Job(clip, container, video_stream(container, clip), output, first, cut=False)
        with timed(costs, "decode"):
            pictures = [piece for piece in job.pieces() if isinstance(piece, Picture)]
        with timed(costs, "restore"):
            for picture in pictures:
                picture.pixels[:] = restore(np.ascontiguousarray(picture.pixels))
        with timed(costs, "encode"):
            for picture in pictures:
                output.mux(job.encoded(picture))
            output.mux(job.encoded(None))
    return costs


def warm_up(engine: DeblurEngine, options: Video) -> None:
    """From the third image of a size on nothing changes."""
    for _ in range(3):
        engine(np.zeros((options.height_px, options.width_px, 3), np.uint8))


def make_clip(path: Path, photo: np.ndarray, frames: int, options: Video) -> Path:
    """A pan over ``photo``, of ``frames`` frames at 30 a second."""
    width, height = options.width_px, options.height_px
    # Wider than a frame by what the pan covers.
    scale = max((width + 2 * frames) / photo.shape[1], height / photo.shape[0])
    wide = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    try:
        with created(path) as output:
            stream = output.add_stream(options.codec, rate=30)
            stream.codec_context.width, stream.codec_context.height = width, height
            stream.codec_context.pix_fmt = "yuv420p"
            for number in range(frames):
                picture = np.ascontiguousarray(wide[:height, 2 * number : 2 * number + width])
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            output.mux(stream.encode(None))
    except (av.error.FFmpegError, ValueError) as error:
        raise InputError(f"no clip can be made with {options.codec}: {error}; choose another --codec") from None
    return path


def command(clip: Path, out: Path, options: Video) -> float:
    """Seconds of the whole command, from its start to its end."""
    line = [sys.executable, "-m", "deblur_deploy.cli.run", str(clip), "--out", str(out), "--model", str(options.model)]
    line += ["--provider", options.provider, "--threads", str(options.threads)]
    begin = perf_counter()
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise ProviderError(f"deblur-run failed: {(done.stderr.strip() or 'no word').splitlines()[-1]}")
    return perf_counter() - begin


if __name__ == "__main__":
    script(Video, run)
