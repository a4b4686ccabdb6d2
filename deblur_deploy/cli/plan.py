"""What deblur-run is to do: which files, under which names, and what is left out and why."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TypeVar

from rich.console import Console

from deblur_deploy.cli.run_config import RunConfig
from deblur_deploy.errors import InputError, MissingFileError, OutputError
from deblur_deploy.files import existing, kind_of
from deblur_deploy.media.images import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from deblur_deploy.media.listing import look_into

Name = TypeVar("Name", bound=PurePath)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One file to restore."""

    source: Path
    target: Path


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What there is to do, and what is not done."""

    jobs: list[Job] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    """What folders hold besides, by what it is."""
    failed: list[str] = field(default_factory=list)
    """What could not be looked at."""


def check(config: RunConfig) -> None:
    """Raise InputError for what makes no sense, whatever the inputs are."""
    if not config.inputs:
        raise InputError("give images or folders to restore; see deblur-run --help")
    if "" in config.inputs:
        raise InputError("an input is empty, perhaps a variable of the shell that is not set; '.' is this folder")
    if config.seconds is not None:
        raise InputError("--seconds is for a live source, such as camera:0; leave it out")
    if not config.glob or Path(config.glob).name != config.glob or config.glob == "..":
        raise InputError(f"glob is {config.glob!r}; give a pattern of names inside the folder, such as 'IMG_*'")


def plan_jobs(config: RunConfig) -> Plan:
    """What there is to do, in order; raises MissingFileError, InputError or OutputError on what makes no sense."""
    check(config)
    for place in (config.out, *config.out.parents):
        if os.path.isfile(place):  # noqa: PTH113, since it does not raise inside a locked folder
            raise OutputError(f"{place} is a file, --out must be a folder; choose another")
    plan, jobs = Plan(), dict[Path, Job]()
    for given in map(Path, config.inputs):
        for source, target in _pairs(config, given, plan):
            if os.path.realpath(target) == os.path.realpath(source):
                raise InputError(f"{source} would be overwritten by its own result; choose another --out")
            if target in jobs and jobs[target].source != source:
                raise InputError(f"{jobs[target].source} and {source} would both be written to {target}")
            jobs[target] = Job(source=source, target=target)
    plan.jobs.extend(jobs.values())
    return plan


def _pairs(config: RunConfig, given: Path, plan: Plan) -> list[tuple[Path, Path]]:
    """Sources with their targets; what is left out goes into ``plan``."""
    known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    if not (kind := kind_of(given)):
        raise MissingFileError(f"no such file or folder: {given}")
    if kind != "folder":
        if given.suffix.lower() not in known:
            raise InputError(f"{given} is neither a folder nor of a known kind ({', '.join(sorted(known))})")
        if kind != "file":
            existing(given, kind="file")
        return [(given, config.out / result_name(given).name)]
    # A result folder inside the input folder must not be fed to the network again.
    found = look_into(given, config.glob, recursive=config.recursive, but=config.out)
    if not found.paths and not found.failed:
        besides = f"; it holds {_counted(found.left_out)}" if found.left_out else ""
        raise InputError(f"no images or videos match {config.glob!r} in {given}{besides}")
    plan.left_out.update(found.left_out)
    plan.failed.extend(found.failed)
    return [(source, config.out / result_name(source).relative_to(given)) for source in found.paths]


def result_name(source: Name) -> Name:
    """Where the result of ``source`` lies, relative to the same folder."""
    # 256 colours cannot hold a restored picture.
    return source.with_name(f"{source.name}.png") if source.suffix.lower() == ".gif" else source


def _counted(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in left_out.most_common())


def tell_plan(plan: Plan, console: Console) -> None:
    """What is not done, and why."""
    for line in plan.failed:
        say(line, console)
    if plan.left_out:
        console.print(f"left out: {_counted(plan.left_out)}")


def say(line: str, console: Console) -> None:
    """One line about one file."""
    console.print(f"deblur-run: {line}")
