"""Batches that depend on nothing but (seed, step, index): any run can be resumed, or spread over processes, exactly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deblur_deploy.errors import InputError
from deblur_deploy.training.blur import Array, BlurConfig, draw_plan, synthesise
from deblur_deploy.training.sources import Source

Batch = tuple[Tensor, Tensor]
"""(blurred, sharp), both uint8 NCHW: four times less to hand over between processes than floats."""


class Batches(Dataset[Batch]):
    """Batch number ``i`` of a run; ``shape(i)`` gives its (patches, side in pixels).

    ``weighted``: sources and their shares.  ``rank`` and ``world`` split every batch over processes.
    """

    def __init__(
        self,
        weighted: list[tuple[Source, float]],
        blur: BlurConfig,
        stages: list[tuple[int, int, int]],
        *,
        seed: int,
        kernels: list[Array] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """``stages``: (first step, patches, side in pixels), in order."""
        if not weighted or sum(share for _, share in weighted) <= 0:
            raise InputError("no training data: give photographs, pairs or frames")
        self.sources = [source for source, _ in weighted]
        shares = np.array([share for _, share in weighted], np.float64)
        self.shares = shares / shares.sum()
        self.blur, self.stages, self.seed, self.kernels = blur, stages, seed, kernels
        self.rank, self.world = rank, world

    def shape(self, step: int) -> tuple[int, int]:
        """(patches, side in pixels) of the whole batch at ``step``."""
        return next((count, side) for first, count, side in reversed(self.stages) if step >= first)

    def __getitem__(self, step: int) -> Batch:
        count, side = self.shape(step)
        samples = [self._sample(step, index, side) for index in range(self.rank, count, self.world)]
        blurred, sharp = (torch.stack(images) for images in zip(*samples, strict=True))
        return blurred, sharp

    def _sample(self, step: int, index: int, side: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, step, index))
        margin = self.blur.margin_px
        source = self.sources[rng.choice(len(self.sources), p=self.shares)]
        patch = source.draw(rng, side, margin)
        sharp = torch.from_numpy(patch.sharp).permute(2, 0, 1)
        if patch.blurred is not None:
            return torch.from_numpy(patch.blurred).permute(2, 0, 1), sharp
        pair = synthesise(sharp, draw_plan(self.blur, rng, self.kernels), self.blur, margin)
        blurred, truth = ((image * 255).round().to(torch.uint8) for image in pair)
        return blurred, truth

    def load(self, first: int, last: int, workers: int) -> Iterator[Batch]:
        """Batches ``first`` to ``last - 1`` in order, made ahead by ``workers`` processes (0: in this one)."""
        return iter(
            DataLoader(
                self,
                sampler=range(first, last),
                batch_size=None,
                num_workers=workers,
                prefetch_factor=4 if workers else None,
                worker_init_fn=_one_thread,
            )
        )


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
    import cv2

    cv2.setNumThreads(1)
