"""deblur-run: deblurs images, folders and videos."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deblur_deploy.cli.common import OK, SOME_FAILED, guarded
from deblur_deploy.errors import DeblurError, InputError, MissingFileError
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.runtime.media import IMAGE_SUFFIXES, Photo, list_images, read_photo, write_photo
from deblur_deploy.runtime.streams import overlapped
from deblur_deploy.runtime.variants import Wish


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Deblur images, folders and videos.

    Finished files are kept: run the same command again after an interruption and it does the rest.
    """

    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image or video files, or folders of images."""
    out: Path = Path("restored")
    """Folder for the results, which have the names and formats of the inputs."""
    model: Path | None = None
    """Bundle folder or .onnx file of deblur-export; by default the model that ships with the package."""
    provider: str = "auto"
    """auto, cpu, openvino, cuda, tensorrt or another execution provider; a named one runs or fails."""
    precision: Wish = "auto"
    """auto is the fastest within 0.1 dB of fp32."""
    recursive: bool = False
    """Go into subfolders too."""
    glob: str = "*"
    """Only files of a folder whose names match this, such as 'IMG_*'."""
    overwrite: bool = False
    """Do files again whose result is there already."""
    threads: int | None = None
    """Cores to use; by default all that this process may use."""
    max_memory_mb: float | None = None
    """Larger images are cut into tiles; by default decided by the free memory."""
    max_megapixels: float = 268.4
    """Refuse image files that state more pixels than this."""

    def __post_init__(self) -> None:
        if not self.max_megapixels > 0:
            raise ValueError(f"max-megapixels is {self.max_megapixels}; allowed: more than 0")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One file to restore."""

    source: Path
    target: Path


def plan_jobs(config: RunConfig) -> list[Job]:
    """What there is to do, in order; raises MissingFileError or InputError on inputs that make no sense."""
    if not config.inputs:
        raise InputError("give images or folders to restore; see deblur-run --help")
    jobs: dict[Path, Job] = {}
    for given in config.inputs:
        if not given.exists():
            raise MissingFileError(f"no such file or folder: {given}")
        if given.is_dir():
            # A result folder inside the input folder must not be fed to the network again.
            out = config.out.resolve()
            sources = [
                path
                for path in list_images(given, config.glob, recursive=config.recursive)
                if out == given.resolve() or not path.resolve().is_relative_to(out)
            ]
            if not sources:
                more = "" if config.recursive else " (subfolders: --recursive)"
                raise InputError(f"no images match {config.glob!r} in {given}{more}")
            pairs = [(source, config.out / source.relative_to(given)) for source in sources]
        elif given.suffix.lower() in IMAGE_SUFFIXES:
            pairs = [(given, config.out / given.name)]
        else:
            raise InputError(f"{given} has no known image suffix ({', '.join(sorted(IMAGE_SUFFIXES))})")
        for source, target in pairs:
            if target.resolve() == source.resolve():
                raise InputError(f"{source} would be overwritten by its own result; choose another --out")
            if target in jobs and jobs[target].source != source:
                raise InputError(f"{jobs[target].source} and {source} would both be written to {target}")
            jobs[target] = Job(source=source, target=target)
    return list(jobs.values())


def run(config: RunConfig, console: Console) -> int:
    """Do the jobs; returns the exit status.  Files that fail are named on ``console`` and the others still done."""
    jobs = plan_jobs(config)
    todo = [job for job in jobs if config.overwrite or not job.target.exists()]
    with DeblurEngine(
        config.model,
        config.provider,
        config.precision,
        threads=config.threads,
        max_memory_mb=config.max_memory_mb,
    ) as engine:
        console.print(str(engine.receipt), highlight=False, soft_wrap=True)
        failed = _restore_images(engine, todo, config, console) if todo else 0
    done, skipped = len(todo) - failed, len(jobs) - len(todo)
    console.print(f"{done} restored to {config.out}, {skipped} were there already, {failed} failed", highlight=False)
    return SOME_FAILED if failed else OK


def _restore_images(engine: DeblurEngine, jobs: Sequence[Job], config: RunConfig, console: Console) -> int:
    def read() -> Iterator[tuple[Job, Photo | DeblurError]]:
        for job in jobs:
            try:
                yield job, read_photo(job.source, max_pixels=int(config.max_megapixels * 1e6))
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
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.fields[rate]}"), console=console) as progress:
        task = progress.add_task("images", total=len(jobs), rate="")
        for job, photo in overlapped(read(), restore):
            try:
                if isinstance(photo, DeblurError):
                    raise photo
                write_photo(job.target, photo)
            except DeblurError as error:
                failed += 1
                console.print(f"deblur-run: {error}", highlight=False, markup=False, soft_wrap=True)
            speed = progress.tasks[task].speed
            progress.update(task, advance=1, rate=f"{speed:.1f}/s" if speed else "")
    return failed


def command(argv: Sequence[str] | None) -> int:
    """Parse and run; returns the exit status."""
    config = tyro.cli(RunConfig, prog="deblur-run", args=argv)
    return run(config, Console(stderr=True))


main = guarded("deblur-run", command)

if __name__ == "__main__":
    sys.exit(main())
