"""Batches that depend on nothing but (seed, step, index): any run can be resumed, or spread over processes, exactly."""

from __future__ import annotations

import hashlib
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deblur_deploy.errors import DeblurError, InputError
from deblur_deploy.media.images import Image
from deblur_deploy.training.blur import BlurConfig, BlurPlan, draw_plan, synthesise
from deblur_deploy.training.motion import Array
from deblur_deploy.training.sources import Frames, Patch, Source

Stages = list[tuple[int, int, int]]
"""(first step, patches, side in pixels), in order."""


@dataclass
class Batch:
    """What a loader hands over; images are uint8 NCHW, four times less to move between processes than floats."""

    blurred: Tensor
    sharp: Tensor
    unblurred: Tensor
    """Photographs with margin, whose blur is still to be made as ``plans`` say."""
    plans: list[BlurPlan]
    names: list[str]
    """Files that the patches came from."""
    unreadable: dict[str, str]
    """Files that the loader could not read so far, and why."""

    def finished(self, blur: BlurConfig, device: torch.device | str = "cpu") -> Batch:
        """The same on ``device`` with all blur made."""
        blurred, sharp = self.blurred.to(device, non_blocking=True), self.sharp.to(device, non_blocking=True)
        if self.plans:
            unblurred = self.unblurred.to(device, non_blocking=True)
            made, truth = synthesise(unblurred, self.plans, blur.margin_px)
            blurred, sharp = torch.cat([made, blurred]), torch.cat([truth, sharp])
        return Batch(blurred, sharp, self.unblurred[:0], [], self.names, self.unreadable)


class Batches(Dataset[Batch]):
    """Batch number ``i`` of a run; ``shape(i)`` gives its (patches, side in pixels).

    ``weighted``: sources and their shares.  ``rank`` and ``world`` split every batch over processes.
    """

    def __init__(
        self,
        weighted: list[tuple[Source, float]],
        blur: BlurConfig,
        stages: Stages,
        *,
        seed: int,
        kernels: list[Array] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not weighted or sum(share for _, share in weighted) <= 0:
            raise InputError("no training data: give photographs, pairs or frames")
        if uneven := [count for _, count, _ in stages if count % world]:
            raise InputError(f"a stage has {uneven[0]} patches, which {world} processes cannot share equally")
        self.weighted = weighted
        self.sources = [source for source, _ in weighted]
        shares = np.array([share for _, share in weighted], np.float64)
        self.shares = shares / shares.sum()
        self.blur, self.stages, self.seed, self.kernels = blur, stages, seed, kernels
        self.rank, self.world = rank, world
        self.blur_here = True
        """Whether the loader makes the blur; a GPU does it itself, faster than all of its host's cores."""

    def shape(self, step: int) -> tuple[int, int]:
        """(patches, side in pixels) of the whole batch at ``step``."""
        return next((count, side) for first, count, side in reversed(self.stages) if step >= first)

    def identity(self) -> str:
        """Names everything that decides which samples a step sees, wherever the folders lie."""
        files = [
            [type(source).__name__, *((path.name, _bytes(path)) for path in source.files())] for source in self.sources
        ]
        kernels = [kernel.tobytes() for kernel in self.kernels or []]
        windows = [source.window for source in self.sources if isinstance(source, Frames)]
        varied = [getattr(source, "varied", 0.0) for source in self.sources]
        content = msgspec.json.encode([self.blur, self.shares.tolist(), files, kernels, windows, varied])
        return hashlib.sha256(content).hexdigest()

    def __getitem__(self, step: int) -> Batch:
        count, side = self.shape(step)
        drawn = [self._draw(step, index, side) for index in range(self.rank, count, self.world)]
        # Photographs come first, so that their blur is one batch.
        drawn.sort(key=lambda item: item[1] is None)
        pairs = [(patches[0].blurred, patches[0].sharp) for patches, plan in drawn if plan is None]
        photographs = [patch.sharp for patches, plan in drawn if plan is not None for patch in patches]
        batch = Batch(
            blurred=_stacked([blurred for blurred, _ in pairs if blurred is not None], side),
            sharp=_stacked([sharp for _, sharp in pairs], side),
            unblurred=_stacked(photographs, side + 2 * self.blur.margin_px),
            plans=[plan for _, plan in drawn if plan is not None],
            names=[patches[0].name for patches, _ in drawn],
            unreadable={str(path): why for source in self.sources for path, why in source.cache.unreadable.items()},
        )
        return batch.finished(self.blur) if self.blur_here else batch

    def _draw(self, step: int, index: int, side: int) -> tuple[list[Patch], BlurPlan | None]:
        """A finished pair alone, or the photographs that a plan takes."""
        rng = np.random.default_rng((self.seed, step, index))
        source = self.sources[rng.choice(len(self.sources), p=self.shares)]
        patch = source.draw(rng, side, self.blur.margin_px)
        if patch.blurred is not None:
            return [patch], None
        plan = draw_plan(self.blur, rng, self.kernels)
        more = [source.draw(rng, side, self.blur.margin_px) for _ in range(plan.photographs - 1)]
        return [patch, *more], plan

    def load(self, first: int, last: int, workers: int) -> Iterator[Batch]:
        """Batches ``first`` to ``last - 1`` in order, made ahead by ``workers`` processes (0: in this one)."""
        return self.load_these(range(first, last), workers)

    def load_these(self, steps: Sequence[int], workers: int) -> Iterator[Batch]:
        """The batches of ``steps``, in order."""
        with warnings.catch_warnings():
            # On how many workers suit how many cores; that was the caller's choice.
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            loader = DataLoader(
                _Forgiving(self),
                sampler=steps,
                batch_size=None,
                collate_fn=_as_it_is,  # type: ignore[arg-type]  # without batching it gets one item, not a list
                num_workers=workers,
                prefetch_factor=4 if workers else None,
                worker_init_fn=_begin,
            )
            # A forked process hangs when it touches OpenCV's thread pool, so there must be none while they start.
            threads = cv2.getNumThreads()
            cv2.setNumThreads(1)
            iterator = iter(loader)
            cv2.setNumThreads(threads)
        try:
            for batch in iterator:
                if isinstance(batch, DeblurError):
                    raise batch
                yield batch
        finally:
            # An error that is kept keeps this frame, and a loader that nobody ends keeps the program from ending.
            del iterator


@dataclass
class _Forgiving(Dataset["Batch | DeblurError"]):
    """Returns our errors, since a loader process that raises them turns their one line into a traceback."""

    batches: Batches

    def __getitem__(self, step: int) -> Batch | DeblurError:
        try:
            return self.batches[step]
        except DeblurError as error:
            return error


def _as_it_is(batch: Batch | DeblurError) -> Batch | DeblurError:
    return batch


def _bytes(path: Path) -> int:
    """Size of a file; 0 of one that cannot be read, which training leaves out."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _stacked(images: list[Image], side: int) -> Tensor:
    if not images:
        return torch.empty(0, 3, side, side, dtype=torch.uint8)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def _begin(_: int) -> None:
    """In a loader process: a signal to the whole group is the trainer's to answer, which then ends its loaders."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
