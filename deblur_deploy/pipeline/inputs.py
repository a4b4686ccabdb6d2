"""What a run reads besides the checkpoint: known by the hash of its files at once, decoded only if a stage needs it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from deblur_deploy.errors import InputError
from deblur_deploy.evaluation.pairs import find_pairs
from deblur_deploy.evaluation.quality import Pair, PairSet
from deblur_deploy.files import sha256
from deblur_deploy.media.images import Image, list_images
from deblur_deploy.wheels import OPENCVS, versions

T = TypeVar("T")

DECODERS = versions("numpy", *OPENCVS, "scikit-image", "torch")
"""What decides pixels, besides files: libraries that decode them, or that blur the built-in photographs."""


class Photos(Generic[T]):
    """Photographs: ``digest`` names them, ``load`` decodes them when ``images`` is first asked for."""

    def __init__(self, digest: str, load: Callable[[], Sequence[T]]) -> None:
        self.digest, self._load = digest, load

    @cached_property
    def images(self) -> Sequence[T]:
        return self._load()


def pairs(folder: Path | None) -> Photos[Pair]:
    """Pairs to verify on; raises MissingFileError or InputError if ``folder`` holds none."""

    def load() -> list[Pair]:
        from deblur_deploy.pipeline.photos import builtin_pairs

        return builtin_pairs() if folder is None else list(PairSet(folder))

    paths = [] if folder is None else find_pairs(folder)
    return Photos(_digest((image for pair in paths for image in pair), folder), load)


def calibration(folder: Path | None, count: int) -> Photos[tuple[str, Image]]:
    """Photographs to calibrate on, with their names; raises MissingFileError or InputError if ``folder`` holds none."""

    def load() -> list[tuple[str, Image]]:
        from deblur_deploy.pipeline.photos import calibration_from

        return list(calibration_from(folder, count).items())

    paths = [] if folder is None else list_images(folder)
    if folder and not paths:
        raise InputError(f"{folder} holds no images to calibrate with; blurred photographs as in use are needed")
    return Photos(_digest(paths, folder), load)


def _digest(paths: Iterable[Path], folder: Path | None) -> str:
    """SHA-256 of the files, in order, with their names; the built-in ones are known by the code that makes them."""
    if folder is None:
        return "built-in"
    whole = hashlib.sha256()
    for path in paths:
        whole.update(f"{path.name} {sha256(path)}\n".encode())
    return whole.hexdigest()
