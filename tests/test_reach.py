"""How far a network sees is found by trying, and believed only if tiles join."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deblur_deploy.pipeline.network import EVERYTHING_PX
from deblur_deploy.pipeline.reach import Reach, reach
from tests import strangers


def of(net: Callable[[Tensor], Tensor], divisor: int = 1) -> Reach:
    def run(image):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            return net(torch.from_numpy(image)).numpy()

    torch.manual_seed(0)
    return reach(run, divisor)


class Halved(nn.Module):
    """Restores each half by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Conv2d(3, 3, 5, padding=2)

    def forward(self, image: Tensor) -> Tensor:
        middle = image.shape[2] // 2
        return torch.cat([self.part(image[:, :, :middle]), self.part(image[:, :, middle:])], dim=2)


class Pooled(nn.Module):
    """Halves the image, and pads it by itself so that it can."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode, self.deep = mode, nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        padded = nn.functional.pad(image, (0, -width % 2, 0, -height % 2), mode=self.mode)
        up = nn.functional.interpolate(self.deep(nn.functional.avg_pool2d(padded, 2)), scale_factor=2)
        return up[..., :height, :width]


def test_convolutions_reach_as_far_as_their_kernels() -> None:
    assert of(nn.Conv2d(3, 3, 7, padding=3)) == Reach(radius_px=3, grid=1)
    assert of(nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)))) == Reach(radius_px=4, grid=1)


def test_tiles_begin_where_pooling_does() -> None:
    found = of(Pooled("replicate"))
    assert found.grid == 2
    assert 3 <= found.radius_px <= 5


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.InstanceNorm2d(3)),
        Halved(),
        Pooled("constant"),
        strangers.seeded(strangers.Attention),
    ],
)
def test_what_no_cut_leaves_alone_sees_everything(net: nn.Module) -> None:
    found = of(net)
    assert found.everything
    assert found.radius_px == EVERYTHING_PX


def test_windows_are_a_grid() -> None:
    assert of(strangers.seeded(strangers.Windows), 8).grid == 8


def test_what_takes_no_small_images_is_not_tried_on_them() -> None:
    pooled = Pooled("replicate")

    def body(image: np.ndarray) -> np.ndarray:
        assert min(image.shape[2:]) >= 8
        with torch.no_grad():
            return pooled(torch.from_numpy(image)).numpy()

    assert reach(body, 1, 8).grid == 2
