"""Patches made ahead: blurred once, trained on many times, each time another crop in one of eight symmetries.

Making blur costs more than a training step on it, and a loader process beside the trainer slows every step, as OpenMP's
threads wait for each other.  So patches larger than wanted are made on all cores while training waits, into one
memory-mapped file; a crop then costs microseconds.  A part of the file is made anew each time every patch was used
once on average, so a long run goes on seeing new blur.

What lies in the file is decided by the sources, the seed and the step alone: piece ``k`` of an endless row is written
over piece ``k - pieces``.  A run that is resumed finds the file as it left it or makes what is missing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from deblur_deploy.errors import OutputError
from deblur_deploy.system.folders import cache_folder
from deblur_deploy.system.threads import usable_cores
from deblur_deploy.training.batches import Batch, Batches, Stages
from deblur_deploy.training.blur import BlurConfig

PIECE = 16
"""Patches that are made together."""
RENEWED = 0.1
"""Share of the bank that is made anew after each round through it."""
_LARGER = 1.375
"""Side of a patch in the bank, over that of the crops."""
_VERSION = 3


def stored_px(side: int) -> int:
    """Height and width of the patches in a bank from which crops of ``side`` pixels are taken."""
    return 8 * int(np.ceil(side * _LARGER / 8))


def bank_folder() -> Path:
    """Where banks lie.  Raises OutputError if the user has no home."""
    return cache_folder() / "bank"


@dataclass
class Bank:
    """Feeds a trainer as ``Batches`` do, from files in ``folder``; ``name`` is what tells their content apart."""

    batches: Batches
    folder: Path
    name: str
    max_bytes: int
    """All files in ``folder`` together; those that were used least recently go."""
    stopping: Callable[[], bool] = lambda: False
    """Whether somebody wants training to end, so that filling, which takes minutes, ends too."""
    watch: Callable[[int, int], object] = lambda _made, _of: None
    """Told how many patches were made, of how many."""

    @property
    def blur(self) -> BlurConfig:
        """How blur is made."""
        return self.batches.blur

    def shape(self, step: int) -> tuple[int, int]:
        """(patches, side in pixels) of the whole batch at ``step``."""
        return self.batches.shape(step)

    def load(self, first: int, last: int, workers: int) -> Iterator[Batch]:
        """Batches ``first`` to ``last - 1`` in order.

        ``workers``: 0 fills the bank in this process, anything else in one a core, since training waits meanwhile
        (where several processes train, they share the cores, and each has a bank of its own).
        """
        workers = max(usable_cores() // self.batches.world, 1) if workers else 0
        starts = [start for start, _, _ in self.batches.stages]
        for start, end in zip(starts, [*starts[1:], last], strict=True):
            if max(start, first) < min(end, last) and not self.stopping():
                yield from self._stage(start, min(end, last), max(start, first), workers)

    def _stage(self, start: int, end: int, first: int, workers: int) -> Iterator[Batch]:
        patches, side = self.shape(start)
        with _opened(self, side, uses=patches * (end - start)) as file:
            for step in range(first, end):
                rounds = (step - start) * patches // len(file.images)
                file.fill(file.pieces + rounds * max(round(RENEWED * file.pieces), 1), workers, self)
                if self.stopping():
                    return
                yield file.batch(np.random.default_rng((self.batches.seed, step)), patches, side, self.batches)


@dataclass
class _File:
    """One memory-mapped bank that this process alone may write."""

    images: NDArray[np.uint8]
    """(patches, 2, side, side, 3): blurred and sharp."""
    made: NDArray[np.int64]
    """Which piece of the endless row lies in each place; -1 while it is written."""
    source: Batches
    unreadable: dict[str, str]

    @property
    def pieces(self) -> int:
        return len(self.made)

    def fill(self, upto: int, workers: int, bank: Bank) -> None:
        """Make what is missing of the last pieces before number ``upto``, or what there is time for."""
        wanted = [piece for piece in range(upto - self.pieces, upto) if self.made[piece % self.pieces] != piece]
        if not wanted:
            return
        for done, batch in enumerate(self.source.load_these(wanted, workers), 1):
            piece = wanted[done - 1]
            place = piece % self.pieces
            self.made[place] = -1
            for which, images in enumerate((batch.blurred, batch.sharp)):
                self.images[place * PIECE : (place + 1) * PIECE, which] = images.permute(0, 2, 3, 1).numpy()
            self.made[place] = piece
            self.unreadable |= batch.unreadable
            bank.watch(done * PIECE, len(wanted) * PIECE)
            if bank.stopping():
                return

    def batch(self, rng: np.random.Generator, patches: int, side: int, batches: Batches) -> Batch:
        """``patches`` random crops, each in one of the square's eight symmetries; this process's share of them."""
        crops = []
        room = self.images.shape[2] - side + 1
        for index in range(patches):
            number, top, left, turn = (int(rng.integers(high)) for high in (len(self.images), room, room, 8))
            if index % batches.world != batches.rank:
                continue
            crop = np.rot90(self.images[number, :, top : top + side, left : left + side], turn % 4, axes=(1, 2))
            crops.append(crop[:, :, ::-1] if turn >= 4 else crop)
        both = torch.from_numpy(np.stack(crops)).permute(1, 0, 4, 2, 3)
        return Batch(both[0], both[1], both[0, :0], [], ["the bank"], dict(self.unreadable))


@contextmanager
def _opened(bank: Bank, side: int, uses: int) -> Iterator[_File]:
    """The file for ``uses`` crops of ``side`` pixels; made if it is not there, and nobody else's meanwhile."""
    larger = stored_px(side)
    bytes_each = 2 * 3 * larger**2
    pieces = max(min(bank.max_bytes // (bytes_each * PIECE), -(-uses // PIECE)), 1)
    # Names alone decide which samples a step sees; other content under the same names makes another bank.
    files = [[type(one).__name__, *map(_stamp, one.files())] for one in bank.batches.sources]
    about = [_VERSION, bank.name, bank.batches.seed, larger, pieces, files]
    stages: Stages = [(0, PIECE, larger)]
    source = Batches(bank.batches.weighted, bank.blur, stages, seed=bank.batches.seed, kernels=bank.batches.kernels)
    key = hashlib.sha256(msgspec.json.encode(about)).hexdigest()[:24]
    with ExitStack() as stack:
        try:
            path = stack.enter_context(_claimed(bank.folder, key))
            _make_room(bank, keep=path, needed=pieces * PIECE * bytes_each)
            images = _mapped(path / "images.npy", (pieces * PIECE, 2, larger, larger, 3), np.uint8, 0)
            made = _mapped(path / "made.npy", (pieces,), np.int64, -1)
        except OSError as error:
            raise OutputError(
                f"cannot write patches to {bank.folder}: {error.strerror or error}; make room, or give less --bank-gb"
            ) from None
        yield _File(images, made, source, {})


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change; zeros for a file that cannot be read, which training leaves out."""
    try:
        about = path.stat()
    except OSError:
        return 0, 0
    return about.st_size, about.st_mtime_ns


@contextmanager
def _claimed(folder: Path, key: str) -> Iterator[Path]:
    """A folder named by ``key`` that no other process uses: another training on the same data gets one of its own."""
    for number in count():
        path = folder / f"{key}-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path.with_suffix(".lock"), timeout=0):
                path.mkdir(exist_ok=True)
                os.utime(path)
                yield path
                return
        except Timeout:
            continue


def _mapped(path: Path, shape: tuple[int, ...], dtype: type, value: int) -> NDArray[Any]:
    """The array in ``path``; a new one full of ``value`` if there is none of that shape."""
    with suppress(OSError, ValueError):
        array = np.lib.format.open_memmap(path, mode="r+")
        if array.shape == shape and array.dtype == dtype:
            return array
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        # A disk that is full ends a process that writes to a map without a word, so the room is taken now.
        try:
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError:
            path.unlink()  # it is full of holes
            raise
    if value:
        array[:] = value
    return array


def _make_room(bank: Bank, *, keep: Path, needed: int) -> None:
    """Remove other banks, the least recently used first, until ``needed`` bytes fit under the limit."""
    used, sizes = dict[Path, float](), dict[Path, int]()
    for path in bank.folder.iterdir():
        with suppress(FileNotFoundError):  # another run removes it just now
            if path.is_dir() and path != keep:
                used[path] = path.stat().st_mtime
                sizes[path] = sum(file.stat().st_size for file in path.iterdir())
    for path in sorted(sizes, key=used.__getitem__):
        if needed + sum(sizes.values()) <= bank.max_bytes:
            return
        with suppress(Timeout), FileLock(path.with_suffix(".lock"), timeout=0):
            shutil.rmtree(path, ignore_errors=True)
            sizes.pop(path)
