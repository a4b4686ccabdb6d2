"""A load test of deblur-serve on this machine: latency and throughput at several requests at once, and nothing lost.

    python -m benchmarks.serving

Client and server share the machine's cores, as they would not in earnest.  Every answer is compared to the first one,
byte by byte; a run with a queue of 4 shows that what does not fit is told so, and is not lost either.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import cv2
import httpx2

sys.path.insert(0, str(Path(__file__).parent))  # for python -m benchmarks.serving

from common import Options, pairs, progress, save, script

from deblur_deploy.errors import ProviderError
from deblur_deploy.evaluation.record import Row, new_record
from deblur_deploy.runtime.engine import DeblurEngine

SIZE = (1280, 720)
QUEUE = 4


@dataclass(frozen=True, kw_only=True)
class Serving(Options):
    """Measure deblur-serve under load."""

    seconds: float = 20.0
    """Length of the load at each concurrency."""
    concurrency: tuple[int, ...] = (1, 4, 16)
    """Requests at once."""
    provider: str = "auto"
    """Execution provider."""


@dataclass
class Load:
    """What came of one run."""

    seconds: list[float] = field(default_factory=list)
    """Of the answers with an image."""
    statuses: Counter[int] = field(default_factory=Counter)
    differing: int = 0
    lost: list[str] = field(default_factory=list)
    """Requests without an answer, and why."""
    wall: float = 0.0

    def row(self, options: Serving, receipt: dict[str, Any], variant: str) -> Row:
        return Row(
            model=options.model.name,
            variant=variant,
            provider=receipt["provider"],
            size=f"{SIZE[0]}x{SIZE[1]}",
            median_ms=1e3 * median(self.seconds) if self.seconds else None,
            p95_ms=1e3 * quantiles(self.seconds, n=20)[-1] if len(self.seconds) > 1 else None,
            calls=len(self.seconds),
            error=f"{len(self.lost)} lost ({self.lost[:1]}), {self.differing} differing"
            if self.lost or self.differing or not self.seconds
            else None,
            facts={
                "receipt": receipt,
                "per_second": len(self.seconds) / self.wall,
                "statuses": {str(status): count for status, count in self.statuses.items()},
            },
        )


@contextmanager
def served(options: Serving, *more: str) -> Iterator[str]:
    """A deblur-serve of its own process; yields its URL."""
    command = [sys.executable, "-m", "deblur_deploy.cli.serve", "--port", "0", "--model", str(options.model)]
    command += ["--provider", options.provider, "--threads", str(options.threads), *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = [process.stderr.readline(), process.stderr.readline()]
        if "listening on" not in said[1]:
            raise ProviderError(f"deblur-serve does not start: {said[0].strip()}")
        yield said[1].split()[-1]
    finally:
        process.terminate()
        process.communicate(timeout=60)


async def load(url: str, body: bytes, at_once: int, seconds: float) -> Load:
    """``at_once`` clients that send one request after the other."""
    found = Load()
    begun = perf_counter()
    async with httpx2.AsyncClient(trust_env=False, timeout=60, limits=httpx2.Limits(max_connections=at_once)) as client:
        expected = (await client.post(url, content=body)).content

        async def ask() -> None:
            while perf_counter() - begun < seconds:
                started = perf_counter()
                try:
                    answer = await client.post(url, content=body)
                except httpx2.HTTPError as error:
                    found.lost.append(repr(error))
                    continue
                found.statuses[answer.status_code] += 1
                if answer.status_code == 200:
                    found.seconds.append(perf_counter() - started)
                    found.differing += answer.content != expected
                else:
                    await asyncio.sleep(0.05)

        begun = perf_counter()
        await asyncio.gather(*(ask() for _ in range(at_once)))
        found.wall = perf_counter() - begun
    return found


def by_hand(options: Serving, body: bytes) -> tuple[dict[str, Any], float]:
    """The engine's receipt, and the median of decoding, restoring and encoding without a server, in ms."""
    import numpy as np

    with DeblurEngine(options.model, options.provider, threads=options.threads) as engine:
        times = []
        for _ in range(4 if options.quick else 20):
            started = perf_counter()
            image = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR_RGB)
            cv2.imencode(".jpg", engine(image)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
            times.append(perf_counter() - started)
        receipt = json.loads(json.dumps(vars(engine.receipt), default=str))
    return receipt, 1e3 * median(times)


def run(options: Serving) -> int:
    """Measure and save."""
    on_progress = progress()
    photo = cv2.resize(pairs(options)[0].blurred, SIZE, interpolation=cv2.INTER_CUBIC)
    body = cv2.imencode(".jpg", photo[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
    on_progress("without a server")
    receipt, alone_ms = by_hand(options, body)
    seconds = min(options.seconds, 1.0) if options.quick else options.seconds
    rows = []
    with served(options) as url:
        for at_once in options.concurrency:
            on_progress(f"{at_once} at once, {seconds:g} s")
            found = asyncio.run(load(url, body, at_once, seconds))
            rows.append(found.row(options, receipt, f"{at_once} at once"))
        metrics = httpx2.get(url.replace("/restore", "/metrics"), trust_env=False).text
    with served(options, "--queue", str(QUEUE)) as url:
        on_progress(f"16 at once with a queue of {QUEUE}")
        found = asyncio.run(load(url, body, 16, min(seconds, 5.0)))
        rows.append(found.row(options, receipt, f"16 at once, queue of {QUEUE}"))
    counted = sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("deblur_requests_total{"))
    settings = options.settings(provider=options.provider, seconds=seconds, queue=16, body_bytes=len(body))
    notes = ["client and server shared the machine's cores"]
    facts = {"without_a_server_ms": alone_ms, "counted_by_the_server": counted}
    return save(new_record("serving", settings, notes=notes, found=facts, rows=rows), options)


if __name__ == "__main__":
    script(Serving, run)
