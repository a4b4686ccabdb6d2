"""``log.csv``: how a run is going, one line every few steps; a resumed run goes on as if it had never stopped."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import psutil

from deblur_deploy.errors import InputError, OutputError, one_line
from deblur_deploy.files import writing_file
from deblur_deploy.system.threads import usable_cores
from deblur_deploy.training.validation import SetQuality

COLUMNS = ("step", "loss", "learning_rate", "images_per_s", "waiting", "network", "others", "dead")
SET_COLUMNS = ("psnr_blurred", "psnr", "ssim", "gain_db", "worst_gain_db")


@dataclass(frozen=True)
class Processors:
    """Who had this machine's processors, as shares of all that they can do."""

    network: float
    """This process while it was not waiting for data: forward, backward, optimizer (and its threads' spinning)."""
    others: float
    """Everything but this process and those that it started."""


def _seconds() -> tuple[float, float, float]:
    """Processor seconds so far of this process, of it and its children, and of everything on the machine."""
    family = sum(os.times()[:4])  # those that ended are counted there
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            family += sum(child.cpu_times()[:2])
    machine = psutil.cpu_times()
    return time.process_time(), family, sum(machine) - machine.idle - getattr(machine, "iowait", 0.0)


@dataclass
class Clock:
    """What happened since the last log line."""

    started: float = field(default_factory=time.perf_counter)
    waited_s: float = 0.0
    images: int = 0
    losses: list[float] = field(default_factory=list)
    unused_s: float = 0.0
    """Processor seconds of this process that were no training step."""

    def __post_init__(self) -> None:
        self._born, self._before = time.perf_counter(), _seconds()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what is not training but waiting for data."""
        since, own = time.perf_counter(), time.process_time()
        yield
        self.waited_s += time.perf_counter() - since
        self.unused_s += time.process_time() - own

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training step."""
        since, own = time.perf_counter(), time.process_time()
        yield
        self.started += time.perf_counter() - since
        self.unused_s += time.process_time() - own

    @property
    def images_per_s(self) -> float:
        return self.images / (time.perf_counter() - self.started)

    @property
    def share_waiting(self) -> float:
        return self.waited_s / (time.perf_counter() - self.started)

    def processors(self) -> Processors | None:
        """Who had the processors; None where this process may not use all of the machine's, so that it cannot tell."""
        cores = usable_cores()
        if cores != psutil.cpu_count():
            return None
        own, family, machine = (now - before for now, before in zip(_seconds(), self._before, strict=True))
        now = time.perf_counter()
        network = (own - self.unused_s) / (cores * (now - self.started))
        return Processors(min(network, 1.0), max(machine - family, 0.0) / (cores * (now - self._born)))


class Log:
    """Appends to one CSV file."""

    def __init__(self, path: Path, sets: Sequence[str], *, from_step: int) -> None:
        """Keep the lines up to ``from_step`` of an earlier run; ``sets`` are the names of the validation sets."""
        self.path = path
        self.columns = [*COLUMNS, *(f"{name}_{column}" for name in sets for column in SET_COLUMNS)]
        rows = [row for row in read_log(path) if float(row["step"]) <= from_step] if from_step else []
        self.columns += [name for name in (rows[0] if rows else []) if name not in self.columns]
        with writing_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)

    def write(
        self, step: int, learning_rate: float, clock: Clock, quality: dict[str, SetQuality], dead: float | None
    ) -> None:
        """Add one line, ``dead`` being the share of dead channels; raises OutputError if the disk is full."""
        processors = clock.processors()
        row: dict[str, object] = {
            "step": step,
            "loss": f"{fmean(clock.losses):.6f}",
            "learning_rate": f"{learning_rate:.3g}",
            "images_per_s": f"{clock.images_per_s:.2f}",
            "waiting": f"{clock.share_waiting:.3f}",
            "network": "" if processors is None else f"{processors.network:.3f}",
            "others": "" if processors is None else f"{processors.others:.3f}",
            "dead": "" if dead is None else f"{dead:.3f}",
        }
        for name, result in quality.items():
            values = [result.mean.psnr_blurred, result.mean.psnr, result.mean.ssim]
            values += [result.mean.gain_db, result.worst_gain_db]
            row |= {f"{name}_{column}": f"{value:.4f}" for column, value in zip(SET_COLUMNS, values, strict=True)}
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
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
