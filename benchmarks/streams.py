"""Several engines at once in one process, as a candidate."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from deblur_deploy.evaluation.worker import Candidate
from deblur_deploy.runtime.engine import DeblurEngine

if TYPE_CHECKING:
    from deblur_deploy.media.images import Image


def load(model: str, provider: str, streams: int, threads: int) -> Candidate:
    """``streams`` engines with ``threads`` threads each; one call restores the image once on every engine."""
    engines = [DeblurEngine(model, provider, threads=threads) for _ in range(streams)]
    pool = ThreadPoolExecutor(streams)

    def restore(image: Image) -> Image:
        restored, *_ = pool.map(lambda engine: engine(image), engines)
        return restored

    facts = {"text": str(engines[0].receipt), "streams": streams}
    return Candidate(restore=restore, facts=facts, threads=streams * threads)
