"""deblur-run: deblurs images, folders, videos and streams."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
from rich.console import Console

from deblur_deploy.cli.arguments import parse_arguments
from deblur_deploy.cli.common import OK, SOME_FAILED, guarded
from deblur_deploy.cli.progress import advance, bar
from deblur_deploy.cli.run_config import USUAL, RunConfig
from deblur_deploy.errors import DeblurError, InputError, MissingFileError, OutputError
from deblur_deploy.media.images import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Photo,
    is_stream,
    list_media,
    read_photo,
    write_photo,
)
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.runtime.streams import overlapped


@dataclass(frozen=True, kw_only=True)
class Job:
    """One file to restore."""

    source: Path
    target: Path


def plan_jobs(config: RunConfig) -> list[Job]:
    """What there is to do, in order; raises MissingFileError, InputError or OutputError on what makes no sense."""
    if not config.inputs:
        raise InputError("give images or folders to restore; see deblur-run --help")
    if config.seconds is not None:
        raise InputError("--seconds is for a live source, such as camera:0; leave it out")
    if not config.glob or Path(config.glob).is_absolute() or ".." in Path(config.glob).parts:
        raise InputError(f"glob is {config.glob!r}; give a pattern of names inside the folder, such as 'IMG_*'")
    for place in (config.out, *config.out.parents):
        if place.is_file():
            raise OutputError(f"{place} is a file, --out must be a folder; choose another")
    jobs: dict[Path, Job] = {}
    for given in map(Path, config.inputs):
        if not given.exists():
            raise MissingFileError(f"no such file or folder: {given}")
        if given.is_dir():
            # A result folder inside the input folder must not be fed to the network again.
            out = config.out.resolve()
            inside = given.resolve() in out.parents
            sources = [
                path
                for path in list_media(given, config.glob, recursive=config.recursive)
                if not (inside and path.resolve().is_relative_to(out))
            ]
            if not sources:
                more = "" if config.recursive else " (subfolders: --recursive)"
                raise InputError(f"no images or videos match {config.glob!r} in {given}{more}")
            pairs = [(source, config.out / source.relative_to(given)) for source in sources]
        elif given.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
            pairs = [(given, config.out / given.name)]
        else:
            known = ", ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
            raise InputError(f"{given} is neither a folder nor of a known kind ({known})")
        for source, target in pairs:
            if target.resolve() == source.resolve():
                raise InputError(f"{source} would be overwritten by its own result; choose another --out")
            if target in jobs and jobs[target].source != source:
                raise InputError(f"{jobs[target].source} and {source} would both be written to {target}")
            jobs[target] = Job(source=source, target=target)
    return list(jobs.values())


def run(config: RunConfig, console: Console) -> int:
    """Do the jobs; returns the exit status.  Files that fail are named on ``console`` and the others still done."""
    if any(is_stream(str(given)) for given in config.inputs):
        # Here, so that images need no PyAV.
        from deblur_deploy.cli.live import run_live

        return run_live(config, console)
    jobs = plan_jobs(config)
    todo = [job for job in jobs if config.overwrite or not job.target.exists()]
    if not todo:
        console.print(f"nothing to do: all {len(jobs)} were in {config.out} already", highlight=False, soft_wrap=True)
        return OK
    _remove_leftovers(todo)
    images = [job for job in todo if job.source.suffix.lower() in IMAGE_SUFFIXES]
    videos = [job for job in todo if job.source.suffix.lower() not in IMAGE_SUFFIXES]
    with config.engine() as engine:
        try:
            config.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write to {config.out}: {error.strerror}; choose another --out") from None
        console.print(str(engine.receipt), highlight=False, soft_wrap=True)
        failed = _restore_images(engine, images, config, console) if images else 0
        failed += sum(not _restore_video(engine, job, config, console) for job in videos)
        if engine.float_receipt not in (None, engine.receipt):
            console.print(f"more than 8 bits: {engine.float_receipt}", highlight=False, soft_wrap=True)
    done, skipped = len(todo) - failed, len(jobs) - len(todo)
    console.print(f"{done} restored to {config.out}, {skipped} were there already, {failed} failed", highlight=False)
    return SOME_FAILED if failed else OK


def _remove_leftovers(jobs: Sequence[Job]) -> None:
    # What a killed run was writing for these jobs: names as ``writing_file`` makes them.
    targets = {job.target for job in jobs}
    for folder in {target.parent for target in targets}:
        for path in folder.glob(".*-????????.*"):
            target = folder / (path.stem[1:-9] + path.suffix)
            if target in targets and re.fullmatch("[a-z0-9_]{8}", path.stem[-8:]):
                path.unlink(missing_ok=True)


def _restore_images(engine: DeblurEngine, jobs: Sequence[Job], config: RunConfig, console: Console) -> int:
    def read() -> Iterator[tuple[Job, Photo | DeblurError]]:
        for job in jobs:
            try:
                yield job, read_photo(job.source, max_pixels=config.max_pixels)
            except DeblurError as error:
                yield job, error

    def restore(read: tuple[Job, Photo | DeblurError]) -> tuple[Job, Photo | DeblurError]:
        job, photo = read
        if isinstance(photo, DeblurError):
            return read
        try:
            return job, photo.with_pixels(engine(photo.pixels))
        except InputError as error:
            return job, InputError(f"{job.source}: {error}")
        except DeblurError as error:
            return job, error

    failed = 0
    with bar(console) as progress:
        task = progress.add_task("images", total=len(jobs), rate="")
        for job, photo in overlapped(read(), restore):
            try:
                if isinstance(photo, DeblurError):
                    raise photo
                write_photo(job.target, photo)
            except DeblurError as error:
                failed += 1
                _complain(error, console)
            advance(progress, task)
    return failed


def _restore_video(engine: DeblurEngine, job: Job, config: RunConfig, console: Console) -> bool:
    try:
        # Here, so that images need no PyAV.
        from deblur_deploy.media.video import frame_count, restore_video

        with bar(console) as progress:
            task = progress.add_task(job.source.name, total=frame_count(job.source), rate="")
            restore_video(
                job.source,
                job.target,
                engine,
                max_pixels=config.max_pixels,
                on_frame=lambda: advance(progress, task),
            )
    except DeblurError as error:
        _complain(error, console)
        return False
    return True


def _complain(error: DeblurError, console: Console) -> None:
    console.print(f"deblur-run: {error}", highlight=False, markup=False, soft_wrap=True)


def doctor(config: RunConfig, console: Console) -> int:
    """Print the findings; returns SOME_FAILED if no engine can be made here."""
    # Here, since nothing else needs it.
    from deblur_deploy.runtime.doctor import examine

    findings = examine(config.model)
    for finding in findings:
        console.print(f"{finding.topic:12} {finding.text}", highlight=False, markup=False, soft_wrap=True)
        if finding.mend:
            console.print(f"{'':12} -> {finding.mend}", highlight=False, markup=False, soft_wrap=True)
    return SOME_FAILED if findings[-1].mend else OK


def parse(argv: Sequence[str] | None) -> RunConfig:
    """What the command line asks for; raises InputError on a mistake."""
    return parse_arguments(RunConfig, "deblur-run", argv, usual=USUAL)


def command(argv: Sequence[str] | None) -> int:
    """Parse and run; returns the exit status."""
    config = parse(argv)
    # What OpenCV would say about a damaged file, our own line says.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return doctor(config, Console()) if config.doctor else run(config, Console(stderr=True))


main = guarded("deblur-run", command)

if __name__ == "__main__":
    sys.exit(main())
