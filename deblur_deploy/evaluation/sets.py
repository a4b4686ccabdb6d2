"""Quality of every entry of a benchmark on sets of image pairs, and rows that have both quality and latency.

Quality belongs to a variant on a provider, latency and memory also to a size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import msgspec

from deblur_deploy.errors import DeblurError, InputError, MissingFileError
from deblur_deploy.evaluation.bench import Entry, Outcome, Plan, Progress, measure_latency, silent
from deblur_deploy.evaluation.quality import Pair, PairSet, Quality, compare, mean_quality, psnr, usable_pairs
from deblur_deploy.evaluation.record import Row
from deblur_deploy.evaluation.worker import Worker
from deblur_deploy.media.images import Image

Sets = Mapping[str, Sequence[Pair]]
"""Image pairs by the name of their set; the first is the main one."""


def by_name(paths: Sequence[Path]) -> dict[str, Path]:
    """``paths`` by their last part without suffix; by all of it where two share that."""
    short = len({path.stem for path in paths}) == len(paths)
    return {path.stem if short else path.as_posix(): path for path in paths}


def usable_sets(paths: Sequence[Path]) -> tuple[dict[str, Sequence[Pair]], list[str]]:
    """``usable_pairs`` of each path, :func:`by_name`, and one line for each lost pair.

    A path without a usable pair is such a line too.  Raises InputError if that leaves nothing.
    """
    found: dict[str, Sequence[Pair]] = {}
    failed: list[str] = []
    for name, path in by_name(paths).items():
        try:
            found[name], lost = usable_pairs(path)
        except MissingFileError:
            raise
        except InputError as error:
            lost = [str(error)]
        failed += lost
    if not found:
        raise InputError(failed[0])
    return found, failed


def names(sets: Sets) -> list[str]:
    """Names of all pairs, for the record."""
    single = len(sets) == 1
    return [
        name if single else f"{of}/{name}"
        for of, pairs in sets.items()
        for name in (pairs.names if isinstance(pairs, PairSet) else [pair.name for pair in pairs])
    ]


def steps(entries: Sequence[Entry], sets: Sets, plan: Plan) -> int:
    """How many steps ``measure`` reports to its progress."""
    return sum(map(len, sets.values())) + len(entries) * (1 + len(plan.sizes)) + len(plan.sizes)


_QUALITY = ("data", "psnr_blurred", "psnr", "ssim", "psnr_to_fp32", "worst_drop_db", "worst_image")


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """What one entry made of one pair."""

    name: str
    quality: Quality
    to_fp32: float | None = None
    """PSNR against what fp32 made of it; None where there is no fp32."""
    drop_db: float | None = None
    """PSNR lost against fp32."""


def measure(
    entries: Sequence[Entry],
    sets: Sets,
    photo: Image,
    plan: Plan,
    on_progress: Progress = silent,
    on_round: Progress = silent,
) -> Outcome:
    """Quality on ``sets`` and latency at each size on ``photo`` scaled to it.

    One row an entry and size, with the quality on the first set, then one an entry and further set.
    """
    quality = measure_quality(entries, sets, on_progress)
    outcome = measure_latency(entries, photo, plan, on_progress, on_round)
    first = {row.key[:3]: row for row in quality[: len(entries)]}
    rows = [with_quality(row, first[row.key[:3]]) for row in outcome.rows]
    return replace(outcome, rows=rows + quality[len(entries) :])


def with_quality(row: Row, of: Row) -> Row:
    """``row``, with the quality that ``of`` has."""
    values = {name: getattr(of, name) for name in _QUALITY}
    return msgspec.structs.replace(row, **values, facts=row.facts or of.facts, error=row.error or of.error)


def measure_quality(entries: Sequence[Entry], sets: Sets, on_progress: Progress = silent) -> list[Row]:
    """Mean quality on each set (of at least one pair), one row a set and entry, without a size.

    PSNR to fp32 is taken against the first entry of the same model whose variant is called ``fp32`` and that is not
    known to compute in less.  All processes are alive at once, and only one pair at a time is in memory.
    """
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        errors: dict[str, str] = {}
        exact: set[str] = set()
        for entry in entries:
            on_progress(f"quality: starting {entry.name}")
            try:
                workers[entry.name] = stack.enter_context(entry.start())
                if _exact(entry, workers[entry.name]):
                    exact.add(entry.name)
            except DeblurError as error:
                errors[entry.name] = str(error)
        rows: list[Row] = []
        for name, pairs in sets.items():
            found: dict[str, list[_Finding]] = {entry.name: [] for entry in entries}
            for count, pair in enumerate(pairs, 1):
                on_progress(f"quality: {name}, {count} of {len(pairs)}")
                for at, value in _one_pair(entries, workers, exact, pair, errors).items():
                    found[at].append(value)
            rows += [_quality_row(entry, name, found[entry.name], workers, errors) for entry in entries]
    return rows


def _one_pair(
    entries: Sequence[Entry], workers: Mapping[str, Worker], exact: Collection[str], pair: Pair, errors: dict[str, str]
) -> dict[str, _Finding]:
    """By entry; who fails has none, and an error from now on."""
    found: dict[str, _Finding] = {}
    fp32: dict[str, tuple[Image, Quality]] = {}
    # fp32 first, so that the others can be compared with it.
    for entry in sorted(entries, key=lambda entry: entry.name not in exact):
        if entry.name in errors:
            continue
        try:
            restored = workers[entry.name].restore(pair.blurred)
        except DeblurError as error:
            errors[entry.name] = str(error)
            continue
        quality = compare(restored, pair)
        if entry.model in fp32:
            reference, best = fp32[entry.model]
            found[entry.name] = _Finding(
                name=pair.name,
                quality=quality,
                to_fp32=psnr(restored, reference),
                drop_db=best.psnr - quality.psnr,
            )
        else:
            found[entry.name] = _Finding(name=pair.name, quality=quality)
            if entry.name in exact:
                fp32[entry.model] = restored, quality
    return found


def _exact(entry: Entry, worker: Worker) -> bool:
    """Whether it computes in fp32: providers may run that file in bf16 or tf32, and their receipts say so."""
    receipt = worker.facts.get("receipt") or {}
    return entry.variant == "fp32" and receipt.get("effective_precision", "fp32") == "fp32"


def _quality_row(
    entry: Entry,
    data: str,
    found: Sequence[_Finding],
    workers: Mapping[str, Worker],
    errors: Mapping[str, str],
) -> Row:
    try:
        if entry.name in errors:
            raise DeblurError(errors[entry.name])
        facts = workers[entry.name].facts
    except DeblurError as error:
        return entry.row("", data=data, error=str(error))
    mean = mean_quality(of.quality for of in found)
    to_fp32 = [of.to_fp32 for of in found if of.to_fp32 is not None]
    drop, image = max(((of.drop_db, of.name) for of in found if of.drop_db is not None), default=(None, None))
    return entry.row(
        "",
        data=data,
        psnr_blurred=mean.psnr_blurred,
        psnr=mean.psnr,
        ssim=mean.ssim,
        psnr_to_fp32=fmean(to_fp32) if len(to_fp32) == len(found) else None,
        worst_drop_db=drop,
        worst_image=image,
        facts=facts,
    )
