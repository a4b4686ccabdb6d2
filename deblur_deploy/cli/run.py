"""deblur-run: deblurs images, folders, videos and streams."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console

from deblur_deploy.cli.arguments import parse_arguments
from deblur_deploy.cli.common import OK, SOME_FAILED, guarded
from deblur_deploy.cli.doctor import tell
from deblur_deploy.cli.plan import Job, plan_jobs, say, tell_plan
from deblur_deploy.cli.progress import advance, bar
from deblur_deploy.cli.run_config import USUAL, RunConfig
from deblur_deploy.errors import DeblurError, about
from deblur_deploy.files import make_folder, remove_leftovers
from deblur_deploy.media.headers import FORMATS
from deblur_deploy.media.images import IMAGE_SUFFIXES, Photo, is_stream, read_photo, write_photo
from deblur_deploy.media.opencv import silence
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.runtime.streams import overlapped

_OWN = (DeblurError, OSError, MemoryError)
"""What goes wrong with one file, and with no other."""


def run(config: RunConfig, console: Console) -> int:
    """Do the jobs; returns the exit status.  Files that fail are named on ``console`` and the others still done."""
    if config.ray is not None:
        # Here, since one machine needs no Ray.
        from deblur_deploy.cli.cluster import run_cluster

        return run_cluster(config, console)
    if any(is_stream(str(given)) for given in config.inputs):
        # Here, so that images need no PyAV.
        from deblur_deploy.cli.live import run_live

        return run_live(config, console)
    plan = plan_jobs(config)
    todo = [job for job in plan.jobs if config.overwrite or not os.path.exists(job.target)]  # noqa: PTH110, as above
    unseen = SOME_FAILED if plan.failed else OK
    if not todo:
        tell_plan(plan, console)
        console.print(f"nothing to do: all {len(plan.jobs)} were in {config.out} already; {_REDO}")
        return unseen
    remove_leftovers(job.target for job in todo)
    images = [job for job in todo if job.source.suffix.lower() in IMAGE_SUFFIXES]
    videos = [job for job in todo if job.source.suffix.lower() not in IMAGE_SUFFIXES]
    with config.engine() as engine:
        make_folder(config.out)
        console.print(str(engine.receipt))
        tell_plan(plan, console)
        failed, incomplete = _restore_images(engine, images, config, console) if images else (0, 0)
        films = [_restore_video(engine, job, config, console) for job in videos]
        if engine.float_receipt not in (None, engine.receipt):
            console.print(f"more than 8 bits: {engine.float_receipt}")
    failed, incomplete = failed + films.count("failed"), incomplete + films.count("incomplete")
    done, skipped = len(todo) - failed, len(plan.jobs) - len(todo)
    lacking = f" ({incomplete} of them incomplete)" if incomplete else ""
    kept = f"{skipped} were there already" + (f" ({_REDO})" if skipped else "")
    console.print(f"{done} restored{lacking} to {config.out}, {kept}, {failed} failed")
    return SOME_FAILED if failed or incomplete else unseen


# A result does not say which model made it.
_REDO = "--overwrite does them again, as with another --model"


def _restore_images(engine: DeblurEngine, jobs: Sequence[Job], config: RunConfig, console: Console) -> tuple[int, int]:
    """How many failed, and how many lack something that the source had."""

    def read() -> Iterator[tuple[Job, Photo | BaseException]]:
        for job in jobs:
            try:
                yield job, read_photo(job.source, max_pixels=config.max_pixels)
            except _OWN as error:
                yield job, error

    def restore(read: tuple[Job, Photo | BaseException]) -> tuple[Job, Photo | BaseException]:
        job, photo = read
        if isinstance(photo, BaseException):
            return read
        try:
            return job, photo.restored(engine)
        except _OWN as error:
            return job, error

    failed = incomplete = 0
    with bar(console) as progress:
        task = progress.add_task("images", total=len(jobs), rate="")
        for job, photo in overlapped(read(), restore):
            try:
                if isinstance(photo, BaseException):
                    raise photo
                incomplete += _write(job, photo, console)
            except _OWN as error:
                failed += 1
                say(about(job.source, error), console)
            advance(progress, task)
    return failed, incomplete


def _write(job: Job, photo: Photo, console: Console) -> bool:
    """Whether the result lacks something that the source had."""
    assert photo.beside is not None
    # The content decides, as it did for every program that has opened the file.
    write_photo(job.target, photo, kind=photo.beside.format)
    if photo.beside.format != FORMATS.get(job.target.suffix.lower()):
        say(f"note: {job.source} is a {photo.beside.format} inside, and so is its result", console)
    for lost in photo.beside.lost:
        say(f"{job.source} is restored without {lost}", console)
    return bool(photo.beside.lost)


def _restore_video(engine: DeblurEngine, job: Job, config: RunConfig, console: Console) -> str:
    """One of "whole", "incomplete" (the result lacks something that the source had) and "failed"."""
    notes: list[str] = []
    try:
        # Here, so that images need no PyAV.
        from deblur_deploy.media.video import frame_count, restore_video

        with bar(console) as progress:
            task = progress.add_task(job.source.name, total=frame_count(job.source), rate="")
            losses = restore_video(
                job.source,
                job.target,
                engine,
                max_pixels=config.max_pixels,
                on_frame=lambda: advance(progress, task),
                on_note=notes.append,
            )
    except _OWN as error:
        say(about(job.source, error), console)
        return "failed"
    for lost in losses:
        say(f"{job.source} is restored without {lost}", console)
    for lost in notes:
        say(f"note: {job.source} is restored without {lost}, which is neither seen nor heard", console)
    return "incomplete" if losses else "whole"


def parse(argv: Sequence[str] | None) -> RunConfig:
    """What the command line asks for; raises InputError on a mistake."""
    return parse_arguments(RunConfig, "deblur-run", argv, usual=USUAL)


def command(argv: Sequence[str] | None) -> int:
    """Parse and run; returns the exit status."""
    config = parse(argv)
    silence()
    # Names of files are no markup, and no line of theirs is broken.
    console = Console(stderr=not config.doctor, highlight=False, markup=False, soft_wrap=True)
    return tell(config, console) if config.doctor else run(config, console)


main = guarded("deblur-run", command)

if __name__ == "__main__":
    sys.exit(main())
