"""What the engine costs beside the bare session, from a cold start, on a large photo and over a long life.

    python -m benchmarks.engine all

``overhead`` runs the engine and ``session.run`` of the same session in turn at 1280x720; ``cold`` starts new processes;
``memory`` is what one image of that size takes; ``large`` restores a photo of 20 megapixels (--photo, else noise);
``threads`` compares 8 threads with one; ``soak`` makes many calls of varying sizes.  Each runs in a process of its own,
and ends in one JSON line; ``all`` keeps them in one record, with the frames per second beside what the machine's
ceilings would allow.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

sys.path.insert(0, str(Path(__file__).parent))  # for python -m benchmarks.engine

from common import Options, progress, save, script

from deblur_deploy.cli.common import OK
from deblur_deploy.errors import InputError, ProviderError
from deblur_deploy.evaluation.record import Row, new_record
from deblur_deploy.system.threads import usable_cores

SIZE = "1280x720"
PARTS = ("overhead", "cold", "memory", "large", "threads", "soak")


@dataclass(frozen=True, kw_only=True)
class Engine(Options):
    """Measure the engine, or one part of it."""

    what: Annotated[Literal["all", "overhead", "cold", "memory", "large", "threads", "soak"], tyro.conf.Positional] = (
        "all"
    )
    """``all`` writes a record; one part only prints what it found."""
    provider: str = "auto"
    """Execution provider."""
    precision: str = "auto"
    """Precision of the engine."""
    photo: Path | None = None
    """Large photo; by default noise of 20 megapixels."""
    calls: int = 20_000
    """Calls of the long life, at least 1000."""
    repeats: int = 41
    """Timed calls of ``overhead``."""

    def part_options(self) -> dict[str, Any]:
        """What the parts' process is told."""
        return {
            "model": str(self.model),
            "provider": self.provider,
            "precision": self.precision,
            # A count of its own is another way to run: engines then take no turns.
            "threads": self.threads if self.threads != usable_cores() else None,
            "photo": str(self.photo) if self.photo else None,
            "large": (1200, 1600) if self.quick else (3648, 5472),
            "calls": 1000 if self.quick else self.calls,
            "repeats": 5 if self.quick else self.repeats,
            "starts": 2 if self.quick else 5,
            "images": 20 if self.quick else 500,
        }


def run(options: Engine) -> int:
    """Measure, and print or save."""
    if options.calls < 1000 or options.repeats < 1:
        raise InputError(f"calls is {options.calls}, repeats {options.repeats}; allowed: from 1000, and from 1")
    if options.what != "all":
        print(json.dumps({"part": options.what, **measured(options.what, options)}))
        return OK
    on_progress = progress()
    found: dict[str, Any] = {}
    notes: list[str] = []
    for part in PARTS:
        on_progress(part)
        found[part] = measured(part, options)
    on_progress("the machine's ceilings")
    row = Row(
        model=options.model.name,
        variant=found["overhead"]["receipt"]["variant"],
        provider=found["overhead"]["receipt"]["provider"],
        size=SIZE,
        median_ms=found["overhead"]["engine"],
        calls=options.part_options()["repeats"],
        facts={"receipt": found["overhead"].pop("receipt")},
    )
    found["limits"] = beside_limits(row, options, notes)
    settings = options.settings(
        provider=options.provider, precision=options.precision, photo=options.photo.name if options.photo else "noise"
    )
    return save(new_record("engine", settings, notes=notes, rows=[row], found=found), options)


def measured(part: str, options: Engine) -> dict[str, Any]:
    """One part in its process; raises ProviderError with its last words."""
    command = [sys.executable, str(Path(__file__).with_name("engine_parts.py")), part]
    done = subprocess.run([*command, json.dumps(options.part_options())], capture_output=True, text=True)
    if done.returncode:
        raise ProviderError(f"{part} failed: {(done.stderr.strip() or 'no word').splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def beside_limits(row: Row, options: Engine, notes: list[str]) -> dict[str, Any]:
    """Frames per second, and the share of the machine's measured arithmetic and copying that they take."""
    import msgspec
    import torch
    from limits import cpu_ceilings, gpu_ceilings, share

    from deblur_deploy.bundles.manifest import MANIFEST
    from deblur_deploy.training.unet import UNetConfig

    try:
        manifest = json.loads((options.model / MANIFEST).read_text(encoding="utf-8"))
        config = msgspec.convert(manifest["network"], UNetConfig)
    except (OSError, KeyError, ValueError) as error:
        notes.append(f"no shares of the limits: the bundle does not say what its network is ({error})")
        return {}
    side, seconds = (512, 1) if options.quick else (2048, 10)
    ceilings = {"cpu": cpu_ceilings(side, options.threads, seconds)}
    if row.provider == "cuda" and torch.cuda.is_available():
        ceilings["cuda"] = gpu_ceilings(4 * side)
    found = {"frames_per_s": row.frames_per_s, "ceilings": ceilings}
    try:
        return {**found, "share": share(row, config, ceilings)}
    except KeyError as error:
        notes.append(f"no shares of the limits: no ceiling {error} was measured for {row.provider}")
        return found


if __name__ == "__main__":
    script(Engine, run)
