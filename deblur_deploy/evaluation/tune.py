"""Chooses how one model runs fastest on this machine, from what ``bench`` measures: file, provider, threads, tiles.

One question after the other, since all combinations would take hours: first which file on which provider, then how
many threads and whether shapes get sessions of their own, last how large the tiles of a large image are.  The winner
of each goes into the next.  It starts with what the engine would do by itself, which only gives way to what is faster
beyond the noise of both.

A candidate is put before the engine as an app's engine will find it: as a choice in a cache directory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from deblur_deploy.bundles.manifest import Bundle
from deblur_deploy.errors import ProviderError
from deblur_deploy.evaluation.bench import Entry, Plan, Progress, measure_latency
from deblur_deploy.evaluation.record import Row
from deblur_deploy.evaluation.worker import Candidate
from deblur_deploy.files import existing
from deblur_deploy.media.images import Image
from deblur_deploy.runtime import tuned
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.runtime.providers import AUTO, Provider, find
from deblur_deploy.runtime.tuned import Tuned
from deblur_deploy.runtime.variants import choose_variant, within_budget
from deblur_deploy.system.threads import usable_cores

SIZE, LARGE = (1280, 720), (3072, 2048)
TILES = (2**20, 2**21)
"""Pixels of a tile; beside them memory alone decides."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One candidate and what was measured of it."""

    choice: Tuned
    row: Row
    won: bool
    """Whether it went into the next question, or is the answer to the last."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a model's tuning found."""

    trials: list[Trial]
    best: Tuned
    faster: float
    """How many times faster ``size`` is with the best file, provider, threads and shapes than by the engine's own
    choice: the product of both gains, each measured in turn."""


def tune(
    model: Path,
    *,
    providers: Sequence[str] = (),
    budget_s: float = 90,
    size: tuple[int, int] = SIZE,
    large: tuple[int, int] = LARGE,
    on_progress: Progress = lambda _: None,
) -> Outcome:
    """Measure ``model`` (a bundle or one ``.onnx``) on ``providers``, by default all of ``auto`` that are present.

    ``size`` and ``large`` are width and height.  Raises MissingFileError, ModelError, or ProviderError if no candidate
    runs.
    """
    trials: list[Trial] = []

    def fastest(choices: Sequence[Tuned], size: tuple[int, int]) -> tuple[Tuned, float]:
        found = _measured(model, choices, size, budget_s / 3, on_progress)
        trials.extend(found)
        won = next(trial for trial in found if trial.won)
        own = found[0].row.median_ms
        return won.choice, own / won.row.median_ms if own and won.row.median_ms else 1.0

    best, by_file = fastest(_files(model, _present(providers)), size)
    cores = usable_cores()
    threads = dict.fromkeys(n for n in (cores, cores // 2, cores // 4) if n) if best.threads else (None,)
    best, by_threads = fastest(
        [replace(best, threads=n, fixed=fixed) for n in threads for fixed in (True, False)], size
    )
    tiles = (None, *(pixels for pixels in TILES if pixels < large[0] * large[1]))
    best, _ = fastest([replace(best, tile_pixels=pixels) for pixels in tiles], large)
    return Outcome(trials=trials, best=best, faster=by_file * by_threads)


def candidate(model: str) -> Candidate:
    """The factory for an engine that must find its choice in the cache."""
    engine = DeblurEngine(model)
    if engine.receipt.tuned is None:
        raise ProviderError(engine.receipt.skipped.get("tuned", "the choice was not found"))
    return Candidate(restore=engine, facts={"text": str(engine.receipt)}, threads=engine.receipt.threads)


def _present(names: Sequence[str]) -> dict[str, Provider]:
    found = {}
    for name in names or AUTO:
        try:
            found[name] = find(name)
        except ProviderError:
            if names:
                raise
    return found


def _files(model: Path, providers: Mapping[str, Provider]) -> list[Tuned]:
    """Every file within the quality budget on every provider; what the engine would take comes first."""
    if model.is_dir():
        bundle = Bundle.read(model)
        names = {
            name: [variant.name for variant in within_budget(bundle, provider)] for name, provider in providers.items()
        }
        own = {name: choose_variant(bundle, provider, "auto").name for name, provider in providers.items()}
    else:
        stem = existing(model, kind="file").stem
        names, own = {name: [stem] for name in providers}, dict.fromkeys(providers, stem)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return [
        Tuned(
            variant=variant,
            provider=name,
            threads=usable_cores() if provider.kind == "CPU" else None,
            fixed=True,
            tile_pixels=None,
            date=date,
        )
        for name, provider in providers.items()
        for variant in sorted(names[name], key=lambda variant: variant != own[name])
    ]


def _measured(
    model: Path, choices: Sequence[Tuned], size: tuple[int, int], budget_s: float, on_progress: Progress
) -> list[Trial]:
    """All ``choices``, of which the fastest won, or the first where nothing is faster beyond the noise."""
    photo: Image = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    with tempfile.TemporaryDirectory() as name:
        entries = []
        for number, choice in enumerate(choices):
            folder = Path(name) / str(number)
            tuned.save(model, choice, folder)
            entries.append(
                Entry(
                    model=model.name,
                    variant=describe(choice),
                    provider=choice.provider,
                    factory="deblur_deploy.evaluation.tune:candidate",
                    arguments={"model": str(model)},
                    environment={"DEBLUR_CACHE": str(folder)},
                )
            )
        rows = measure_latency(entries, photo, Plan(sizes=(size,), budget_s=budget_s), on_progress).rows
    best: int | None = None
    for number, row in enumerate(rows):
        if row.median_ms is not None and (best is None or _beats(row, rows[best])):
            best = number
    if best is None:
        raise ProviderError(f"no candidate of {model} runs: {rows[0].error}")
    return [Trial(choice=choice, row=row, won=row is rows[best]) for choice, row in zip(choices, rows, strict=True)]


def _beats(row: Row, other: Row) -> bool:
    assert row.median_ms is not None
    assert other.median_ms is not None
    return row.median_ms * (1 + (row.noise or 0)) < other.median_ms * (1 - (other.noise or 0))


def describe(choice: Tuned) -> str:
    """A choice in words, without its provider."""
    threads = f", {choice.threads} thread{'s' if choice.threads > 1 else ''}" if choice.threads else ""
    shapes = "fixed shapes" if choice.fixed else "any shape"
    tiles = f", tiles of {choice.tile_pixels / 2**20:g} Mpx" if choice.tile_pixels else ""
    return f"{choice.variant}{threads}, {shapes}{tiles}"
