"""``log.csv``: how a run is going, one line every few steps; a resumed run goes on as if it had never stopped."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from deblur_deploy.errors import InputError, OutputError, one_line
from deblur_deploy.files import writing_file
from deblur_deploy.training.validation import SetQuality

COLUMNS = ("step", "loss", "learning_rate", "images_per_s", "waiting", "dead")
SET_COLUMNS = ("psnr_blurred", "psnr", "ssim", "gain_db", "worst_gain_db")


@dataclass
class Clock:
    """What happened since the last log line."""

    started: float = field(default_factory=time.perf_counter)
    waited_s: float = 0.0
    images: int = 0
    losses: list[float] = field(default_factory=list)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what is not training but waiting for data."""
        since = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training step."""
        since = time.perf_counter()
        yield
        self.started += time.perf_counter() - since

    @property
    def images_per_s(self) -> float:
        return self.images / (time.perf_counter() - self.started)

    @property
    def share_waiting(self) -> float:
        return self.waited_s / (time.perf_counter() - self.started)


class Log:
    """Appends to one CSV file."""

    def __init__(self, path: Path, sets: Sequence[str], *, from_step: int) -> None:
        """Keep the lines up to ``from_step`` of an earlier run; ``sets`` are the names of the validation sets."""
        self.path = path
        self.columns = [*COLUMNS, *(f"{name}_{column}" for name in sets for column in SET_COLUMNS)]
        rows = [row for row in read_log(path) if float(row["step"]) <= from_step] if from_step else []
        self.columns += [name for name in (rows[0] if rows else []) if name not in self.columns]
        with writing_file(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)

    def write(
        self, step: int, learning_rate: float, clock: Clock, quality: dict[str, SetQuality], dead: float | None
    ) -> None:
        """Add one line, ``dead`` being the share of dead channels; raises OutputError if the disk is full."""
        row: dict[str, object] = {
            "step": step,
            "loss": f"{fmean(clock.losses):.6f}",
            "learning_rate": f"{learning_rate:.3g}",
            "images_per_s": f"{clock.images_per_s:.2f}",
            "waiting": f"{clock.share_waiting:.3f}",
            "dead": "" if dead is None else f"{dead:.3f}",
        }
        for name, result in quality.items():
            values = [result.mean.psnr_blurred, result.mean.psnr, result.mean.ssim]
            values += [result.mean.gain_db, result.worst_gain_db]
            row |= {f"{name}_{column}": f"{value:.4f}" for column, value in zip(SET_COLUMNS, values, strict=True)}
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}; make room and --resume") from None


def read_log(path: Path) -> list[dict[str, str]]:
    """All lines of a log; none if there is no file.  Raises InputError that names the line which is damaged."""
    if not path.exists():
        return []
    rows: list[dict[str, str]] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rows.append(_numbers({name: value or "" for name, value in row.items() if name}))
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise InputError(
            f"{path} is damaged after row {len(rows)} ({one_line(error)}); repair it, or move it away"
        ) from None
    return rows


def _numbers(row: dict[str, str]) -> dict[str, str]:
    """``row``, all of whose values are numbers or, but for the first three, empty; raises ValueError or KeyError."""
    int(row["step"])
    for value in (row["loss"], row["learning_rate"], *filter(None, row.values())):
        float(value)
    return row
