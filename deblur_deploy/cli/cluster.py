"""deblur-run --ray: the same images, on the machines of a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from rich.console import Console

from deblur_deploy.bundles.hub import url
from deblur_deploy.cli.common import OK, SOME_FAILED
from deblur_deploy.cli.plan import Plan, check, plan_jobs, result_name, say, tell_plan
from deblur_deploy.cli.progress import advance, bar
from deblur_deploy.cli.run_config import RunConfig
from deblur_deploy.cluster import places
from deblur_deploy.cluster.work import Settings, Task, connected, packed, restore
from deblur_deploy.errors import InputError, MissingExtraError, MissingFileError
from deblur_deploy.files import make_folder, remove_leftovers
from deblur_deploy.media.images import IMAGE_SUFFIXES


def run_cluster(config: RunConfig, console: Console) -> int:
    """Restore the inputs; returns the exit status.  Images that fail are named on ``console`` and the others done."""
    address, *more = config.ray or (None,)
    if more:
        raise InputError(f"--ray takes one address, not {more[0]!r} too; put the inputs before it")
    tasks, plan = planned(config)
    unseen = SOME_FAILED if plan.failed else OK
    there = set() if config.overwrite else _there(config, tasks)
    todo = [task for task in tasks if task.target not in there]
    if not todo:
        tell_plan(plan, console)
        console.print(f"nothing to do: all {len(tasks)} were in {_out(config)} already")
        return unseen
    settings = Settings(
        model=packed(config.model),
        provider=config.provider,
        precision=config.precision,
        threads=config.threads,
        max_memory_mb=config.max_memory_mb,
        max_pixels=config.max_pixels,
        overwrite=config.overwrite,
    )
    here = [Path(task.target) for task in todo if url(task.target) is None]
    if here:
        make_folder(config.out)
    failed = incomplete = 0
    try:
        with connected(address), bar(console) as progress:
            tell_plan(plan, console)
            row = progress.add_task("images", total=len(todo), rate="")
            for outcome in restore(todo, settings):
                if outcome.error:
                    failed += 1
                    say(outcome.error, console)
                elif outcome.lost:
                    incomplete += 1
                    say(f"{outcome.source} is restored without {outcome.lost}", console)
                advance(progress, row)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{error.name} is not installed; pip install 'deblur-deploy[ray]'") from None
    finally:
        # A worker that was killed could not remove what it was writing.
        remove_leftovers(here)
    done, skipped = len(todo) - failed, len(tasks) - len(todo)
    lacking = f" ({incomplete} of them incomplete)" if incomplete else ""
    console.print(f"{done} restored{lacking} to {_out(config)}, {skipped} were there already, {failed} failed")
    return SOME_FAILED if failed or incomplete else unseen


def planned(config: RunConfig) -> tuple[list[Task], Plan]:
    """What there is to do, and what is not done of local folders.

    Raises MissingFileError, InputError or OutputError on what makes no sense.
    """
    check(config)
    given = {name: url(name) for name in map(str, config.inputs)}
    found = [place for place in given.values() if place is not None]
    local = tuple(name for name, place in given.items() if place is None)
    tasks: dict[str, Task] = {}
    plan = plan_jobs(replace(config, inputs=local)) if local or not found else Plan()
    for job in plan.jobs:
        _add(tasks, _target(config, job.target.relative_to(config.out)), str(job.source.absolute()))
    for place in found:
        images = _images(places.listing(place, config.glob, recursive=config.recursive), place, _out(config))
        if not images:
            raise InputError(f"no images match {config.glob!r} in {place}")
        for name, source in images.items():
            _add(tasks, _target(config, result_name(PurePosixPath(name))), source)
    return list(tasks.values()), plan


def _there(config: RunConfig, tasks: Sequence[Task]) -> set[str]:
    """Targets that are finished."""
    place = url(config.out)
    if place is None:
        return {task.target for task in tasks if Path(task.target).exists()}
    try:
        # A store is asked once, not for each of millions.
        return set(places.listing(place, "*", recursive=True).values())
    except MissingFileError:
        return set()


def _add(tasks: dict[str, Task], target: str, source: str) -> None:
    if Path(source).suffix.lower() not in IMAGE_SUFFIXES:
        raise InputError(f"{source} is a video, --ray restores images; leave it to a deblur-run of its own, or --glob")
    if target == source:
        raise InputError(f"{source} would be overwritten by its own result; choose another --out")
    if target in tasks and tasks[target].source != source:
        raise InputError(f"{tasks[target].source} and {source} would both be written to {target}")
    tasks[target] = Task(source=source, target=target)


def _images(found: Mapping[str, str], place: str, out: str) -> dict[str, str]:
    """Images among ``found`` at ``place``, as folders here list them: not hidden, nor results in a folder inside."""
    inside, results = (f"{one.rstrip('/')}/" for one in (place, out))
    results = results if results.startswith(inside) and results != inside else "/"
    return {
        name: source
        for name, source in found.items()
        if Path(name).suffix.lower() in IMAGE_SUFFIXES
        and not source.startswith(results)
        and not any(part.startswith(".") for part in PurePosixPath(name).parts)
    }


def _out(config: RunConfig) -> str:
    return url(config.out) or str(config.out)


def _target(config: RunConfig, name: Path | PurePosixPath) -> str:
    place = url(config.out)
    return str(config.out.absolute() / name) if place is None else f"{place.rstrip('/')}/{name.as_posix()}"
