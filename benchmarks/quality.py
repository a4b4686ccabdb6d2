"""PSNR and SSIM of every variant on every provider, over the built-in pairs and any other sets of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import BUILTIN, Chosen, pairs, product, progress, save, script

from deblur_deploy.evaluation.quality import Pair
from deblur_deploy.evaluation.record import new_record
from deblur_deploy.evaluation.sets import measure_quality, names, usable_sets


@dataclass(frozen=True, kw_only=True)
class Quality(Chosen):
    """Measure PSNR and SSIM against ground truth, and PSNR against fp32."""

    data: tuple[Path, ...] = ()
    """Folders or CSV files of pairs, each a set of its own beside the built-in photographs."""


def run(options: Quality) -> int:
    """Measure and save: one row a set, variant and provider, those of the built-in pairs first."""
    notes: list[str] = []
    entries = product(options, notes)
    sets: dict[str, Sequence[Pair]] = {BUILTIN: pairs(options)}
    more, failed = usable_sets(options.data) if options.data else ({}, [])
    sets |= more
    rows = measure_quality(entries, sets, progress())
    counts = {name: len(chosen) for name, chosen in sets.items()}
    settings = options.settings(data=", ".join(sets), sets=counts, pairs=names(sets))
    return save(new_record("quality", settings, notes=[*notes, *failed], rows=rows), options, failed)


if __name__ == "__main__":
    script(Quality, run)
