"""Half an hour of a server's life in one process: does memory stay, and is every result right?

Four threads restore images of changing sizes and dtypes, one by one and as streams, with two engines that all share and
with engines that they open, use for a while and close; some take images apart into tiles, some have threads of their
own.  Every result is compared with what a fresh engine gave before.  Memory of the process while all this goes on is
compared between the second tenth of the time and the last, and, with everything closed, after the first tenth and at
the end.

    python -m benchmarks.soak --minutes 30
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from benchmarks.common import Options, script
from deblur_deploy import DeblurEngine
from deblur_deploy.cli.common import OK, SOME_FAILED
from deblur_deploy.evaluation.record import new_record, write_json
from deblur_deploy.system.memory import resident_bytes

MAY_GROW = 0.05
"""Share by which memory may grow."""
FORMS = (("u1", 3), ("u1", 4), ("u1", 0), ("u2", 3), ("f4", 3), ("f8", 1))
"""dtype and channels; 0 has no axis for them."""


@dataclass(frozen=True, kw_only=True)
class SoakOptions(Options):
    """Memory and results over a long time."""

    minutes: float = 30
    """How long."""
    workers: int = 4
    """Threads that restore."""
    sizes: int = 8
    """Different sizes, in each of the dtypes."""
    largest_px: int = 256
    """The longest side; small enough that every shape has come often before memory is looked at first."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """An image and what an engine must make of it."""

    image: np.ndarray
    expected: np.ndarray

    def wrong(self, restored: np.ndarray) -> str:
        """What is wrong with ``restored``; nothing beyond the last bit that another order of sums may change."""
        if restored.dtype != self.expected.dtype or restored.shape != self.expected.shape:
            return f"{restored.dtype}{restored.shape} for {self.expected.dtype}{self.expected.shape}"
        most = np.abs(restored.astype(float) - self.expected).max()
        allowed = {"u": 1, "f": 1e-4}[restored.dtype.kind]
        return f"differs by {most} on {self.image.dtype}{self.image.shape}" if most > allowed else ""


def cases(options: SoakOptions) -> list[Case]:
    """Images of every form in every size, with their results by a fresh engine."""
    random_ = np.random.default_rng(options.seed)
    found = []
    with DeblurEngine(options.model, "cpu") as engine:
        for _ in range(options.sizes):
            height, width = random_.integers(1, options.largest_px, 2)
            for dtype, channels in FORMS:
                shape = (height, width, channels) if channels else (height, width)
                scale = {"u1": 255, "u2": 65535}.get(dtype, 1)
                image = (random_.random(shape) * scale).astype(dtype)
                found.append(Case(image=image, expected=engine(image)))
    return found


class Soak:
    """The threads, what they share, and what they found."""

    def __init__(self, options: SoakOptions) -> None:
        self.options, self.cases = options, cases(options)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.memory: list[tuple[float, float]] = []
        """Seconds since the start, and MiB."""
        self.closed_mb: list[float] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> None:
        """Two stretches, after each of which everything is closed: a tenth of the time, and the rest."""
        start, whole = time.monotonic(), 60 * self.options.minutes
        for number, until in enumerate((whole / 10, whole)):
            self._stop.clear()
            shared = [DeblurEngine(self.options.model, "cpu"), DeblurEngine(self.options.model, "cpu", threads=1)]
            threads = [
                threading.Thread(
                    target=self._work, args=(np.random.default_rng((self.options.seed, number, i)), shared)
                )
                for i in range(self.options.workers)
            ]
            for thread in threads:
                thread.start()
            while (now := time.monotonic() - start) < until and any(thread.is_alive() for thread in threads):
                self.memory.append((now, (resident_bytes() or 0) / 2**20))
                time.sleep(min(0.5, whole / 200))
            self._stop.set()
            for thread in threads:
                thread.join()
            for engine in shared:
                engine.close()
            del shared, threads, engine, thread
            gc.collect()
            self.closed_mb.append((resident_bytes() or 0) / 2**20)

    def _work(self, random_: np.random.Generator, shared: list[DeblurEngine]) -> None:
        while not self._stop.is_set():
            try:
                if random_.random() < 0.8:
                    self._use(random_, shared[random_.integers(len(shared))], 10)
                else:
                    settings: dict[str, Any] = ({}, {"threads": 2}, {"max_memory_mb": 8})[random_.integers(3)]
                    with DeblurEngine(self.options.model, "cpu", **settings) as engine:
                        self._count("engines opened")
                        self._use(random_, engine, 20)
            except Exception as error:
                self._fault(repr(error))

    def _use(self, random_: np.random.Generator, engine: DeblurEngine, times: int) -> None:
        chosen = [self.cases[i] for i in random_.integers(len(self.cases), size=times)]
        images = [case.image for case in chosen]
        stream = random_.random() < 0.3
        for case, restored in zip(chosen, engine.map(images) if stream else map(engine, images), strict=False):
            self._count("streamed" if stream else "called")
            if wrong := case.wrong(restored):
                self._fault(wrong)
            if self._stop.is_set():
                return

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def _fault(self, what: str) -> None:
        with self._lock:
            self.counts["wrong results"] += 1
            if len(self.wrong) < 100:
                self.wrong.append(what[:300])

    def found(self) -> dict[str, Any]:
        """Figures for the record."""
        whole = 60 * self.options.minutes
        early, late = (
            median([mb for at, mb in self.memory if since <= at / whole <= since + 0.1] or [0.0])
            for since in (0.1, 0.9)
        )
        return {
            **self.counts,
            "running_mb": [early, late],
            "running_growth": late / early - 1 if early else None,
            "closed_mb": self.closed_mb,
            "closed_growth": self.closed_mb[1] / self.closed_mb[0] - 1,
            "most_mb": max(mb for _, mb in self.memory),
            "wrong": self.wrong,
        }


def run(options: SoakOptions) -> int:
    """Soak, write the record; answers the exit status."""
    soak = Soak(options)
    soak.run()
    found = soak.found()
    settings = options.settings(
        **{name: getattr(options, name) for name in ("minutes", "workers", "sizes", "largest_px", "seed")}
    )
    write_json(options.out / "soak.json", new_record("soak", settings, found=found))
    print({**found, "wrong": found["wrong"][:5]})
    grown = max(found["running_growth"] or 0, found["closed_growth"])
    return SOME_FAILED if soak.wrong or grown > MAY_GROW else OK


if __name__ == "__main__":
    script(SoakOptions, run)
