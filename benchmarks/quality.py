"""PSNR and SSIM of every variant on every provider, over the built-in pairs and any other folders of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Options, pairs, product, progress, save, script

from deblur_deploy.evaluation.bench import measure_quality, readable_pairs
from deblur_deploy.evaluation.record import new_record


@dataclass(frozen=True, kw_only=True)
class Quality(Options):
    """Measure PSNR and SSIM against ground truth, and PSNR against fp32."""

    data: tuple[Path, ...] = ()
    """Folders of pairs (blur/NAME and sharp/NAME), each a set of its own beside the built-in photographs."""


def run(options: Quality) -> int:
    """Measure and save; the rows are those of the built-in pairs, ``found`` has every set."""
    notes: list[str] = []
    entries = product(options, notes)
    sets = {"built-in": pairs(options)}
    for folder in options.data:
        sets[folder.name], failed = readable_pairs(folder)
        notes += failed
    on_progress = progress()
    found: dict[str, dict[str, Any]] = {}
    for name, chosen in sets.items():
        on_progress(f"{name}: {len(chosen)} pairs")
        found[name] = measure_quality(entries, chosen, on_progress)
    rows = [entry.row("", **found["built-in"][entry.name]) for entry in entries]
    compact = {
        name: {
            "pairs": [pair.name for pair in sets[name]],
            "mean": {
                entry: {key: value for key, value in row.items() if key != "facts"} for entry, row in means.items()
            },
        }
        for name, means in found.items()
    }
    settings = options.settings(data="built-in photographs", pairs=[pair.name for pair in sets["built-in"]])
    record = new_record("quality", settings, notes=notes, rows=rows, found={"sets": compact})
    return save(record, options)


if __name__ == "__main__":
    script(Quality, run)
