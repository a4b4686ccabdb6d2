"""deblur-run on a live source: one camera or stream into one video file, until it ends or Ctrl-C."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event

from rich.console import Console

from deblur_deploy.cli.common import OK
from deblur_deploy.cli.progress import advance, bar
from deblur_deploy.cli.run_config import RunConfig
from deblur_deploy.errors import InputError, OutputError
from deblur_deploy.files import leftovers
from deblur_deploy.media.images import VIDEO_SUFFIXES
from deblur_deploy.media.live import record, without_password


def run_live(config: RunConfig, console: Console) -> int:
    """Record the one input; returns the exit status.  Raises InputError, OutputError or what the engine does."""
    source, *more = map(str, config.inputs)
    if more:
        raise InputError(f"a live source is restored alone; leave {without_password(more[0])} to another deblur-run")
    if config.out.suffix.lower() not in VIDEO_SUFFIXES or config.out.is_dir():
        raise OutputError(f"--out is {config.out}; for a live source name a video file, such as live.mkv")
    if config.out.exists() and not config.overwrite:
        raise OutputError(f"{config.out} is there already; give --overwrite or another --out")
    # What FFmpeg would say about a stream, our own line says.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    for path in leftovers([config.out]):
        console.print(f"note: {path} is what another recording writes, or left when it was killed; it stays")
    with config.engine() as engine, _first_interrupt() as asked:
        console.print(str(engine.receipt))
        with bar(console) as progress:
            task = progress.add_task("frames, Ctrl-C ends", total=None, rate="")
            count = record(
                source,
                config.out,
                engine,
                seconds=config.seconds,
                stopped=asked.is_set,
                max_pixels=config.max_pixels,
                on_frame=lambda: advance(progress, task),
            )
    console.print(f"{count} frames restored to {config.out}")
    return OK


@contextmanager
def _first_interrupt() -> Iterator[Event]:
    """The first Ctrl-C or SIGTERM sets the event, so that the file can be finished; the second one is as usual."""
    asked = Event()

    def ask(number: int, _: object) -> None:
        asked.set()
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
