"""What deblur-run --ray costs beside the plain engine on this machine, and what that would mean on many.

    python -m benchmarks.cluster [--photos FOLDER]

The same photographs are restored by plain deblur-run and by Ray Data with one worker of all cores and with two of half
of them each, every one in a new process; all files must be the same to the byte.  How many outcomes a second the
cluster hands out at most is measured with images that are finished already.  The line for 100 machines is arithmetic
from these rates, not a measurement.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import cv2

sys.path.insert(0, str(Path(__file__).parent))  # for python -m benchmarks.cluster

from common import Options, pairs, progress, save, script

from deblur_deploy.errors import InputError, ProviderError
from deblur_deploy.evaluation.record import Row, new_record
from deblur_deploy.media.images import list_images, write_image

MACHINES = 100


@dataclass(frozen=True, kw_only=True)
class Cluster(Options):
    """Measure deblur-run --ray."""

    photos: Path | None = None
    """Folder of photographs; by default the built-in ones at 1280x720, again and again."""
    count: int = 100
    """How many of the built-in ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise InputError(f"count is {self.count}; allowed: 1 or more")


CHILD = """
import json, sys
from pathlib import Path
from time import perf_counter
from deblur_deploy.cluster.work import Settings, Task, connected, packed, restore
given = json.load(sys.stdin)
tasks = [Task(source=a, target=b) for a, b in given["tasks"]]
started = perf_counter()
times = []
with connected():
    for outcome in restore(tasks, Settings(model=packed(Path(given["model"])), threads=given["threads"])):
        if outcome.error:
            sys.exit(outcome.error)
        times.append(perf_counter() - started)
print(json.dumps({"first": times[0], "last": times[-1]}))
"""


def by_ray(options: Cluster, photos: list[Path], out: Path, threads: int) -> dict[str, float]:
    """Seconds from Ray's start until the first and the last outcome, and of the whole process."""
    tasks = [(str(path.absolute()), str(out / path.name)) for path in photos]
    given = json.dumps({"tasks": tasks, "model": str(options.model), "threads": threads})
    started = perf_counter()
    found: dict[str, float] = json.loads(_run([sys.executable, "-c", CHILD], given).splitlines()[-1])
    return {**found, "all": perf_counter() - started}


def plainly(options: Cluster, folder: Path, out: Path) -> float:
    """Seconds of a plain deblur-run."""
    started = perf_counter()
    command = [sys.executable, "-m", "deblur_deploy.cli.run", str(folder), "--out", str(out)]
    _run([*command, "--model", str(options.model), "--threads", str(options.threads)])
    return perf_counter() - started


def _run(command: list[str], given: str = "") -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    if done.returncode:
        raise ProviderError(f"a run failed: {(done.stderr.strip() or 'no word').splitlines()[-1]}")
    return done.stdout


def photographs(options: Cluster, folder: Path) -> Path:
    """The folder given, or one that is made."""
    if options.photos is not None:
        return options.photos
    images = [cv2.resize(pair.blurred, (1280, 720), interpolation=cv2.INTER_CUBIC) for pair in pairs(options)]
    for i in range(4 if options.quick else options.count):
        write_image(folder / f"{i:04}.jpg", images[i % len(images)])
    return folder


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files."""
    return {path.name: path.read_bytes() for path in one.iterdir()} == {
        path.name: path.read_bytes() for path in other.iterdir()
    }


def run(options: Cluster) -> int:
    """Measure and save."""
    on_progress = progress()
    rows, found, lost = [], {}, []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        folder = photographs(options, place / "photos")
        photos = list_images(folder)
        on_progress(f"{len(photos)} photographs, plainly")
        plain_s = plainly(options, folder, place / "plain")
        rows.append(row(options, "plain deblur-run", plain_s, len(photos), {"seconds": plain_s}))
        for workers in sorted({1, min(2, options.threads)}):
            on_progress(f"{len(photos)} photographs, {workers} workers")
            out = place / f"ray{workers}"
            seconds = by_ray(options, photos, out, options.threads // workers)
            what = f"--ray, {workers} worker{'s' if workers > 1 else ''}"
            rows.append(row(options, what, seconds["all"], len(photos), seconds))
            if not same(place / "plain", out):
                lost.append(what)
        on_progress("images that are finished already")
        many = photos * (2 if options.quick else 100)
        again = by_ray(options, many, place / "ray1", options.threads)
    outcomes_per_s = len(many) / (again["last"] - again["first"])
    per_machine = len(photos) / min(plain_s, *(entry.facts["seconds"] for entry in rows))
    found = {
        "outcomes_per_s": outcomes_per_s,
        "paper_not_measured": {
            "machines": MACHINES,
            "images_per_s": min(MACHINES * per_machine, outcomes_per_s),
            "busy": min(1.0, outcomes_per_s / (MACHINES * per_machine)),
            "hours_for_ten_million": 1e7 / min(MACHINES * per_machine, outcomes_per_s) / 3600,
        },
    }
    notes = [f"{what}: files differ from plain deblur-run's" for what in lost]
    settings = options.settings(photos=options.photos.name if options.photos else "built-in", images=len(photos))
    return save(new_record("cluster", settings, notes=notes, rows=rows, found=found), options, lost)


def row(options: Cluster, what: str, seconds: float, images: int, facts: dict[str, Any]) -> Row:
    """Wall time an image, everything included."""
    return Row(
        model=options.model.name,
        variant=what,
        provider="auto",
        size="",
        median_ms=1e3 * seconds / images,
        calls=images,
        facts={**facts, "seconds": seconds},
    )


if __name__ == "__main__":
    script(Cluster, run)
