"""What moves while the shutter is open: smooth paths, and the picture as seen from each point of one."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float32]
Range = tuple[float, float]


def log_uniform(limits: Range, rng: np.random.Generator, size: int = 1) -> Array:
    """``size`` numbers between the limits, small ones as often as large ones."""
    return np.asarray(np.exp(rng.uniform(math.log(limits[0]), math.log(limits[1]), size)), np.float32)


def draw_path(
    extent_px: float, rng: np.random.Generator, *, rotation: float = 0.0, zoom: float = 0.0, centre: bool = True
) -> Array:
    """A smooth random path (P, 4) of shift x and y in pixels, rotation in radians, log zoom: inertia, as a hand has it.

    ``extent_px``: how far it reaches; ``rotation`` and ``zoom``: the most of each.  Its mean is zero or, without
    ``centre``, its middle is.
    """
    count = int(np.clip(np.ceil(extent_px * 0.8), 5, 25)) | 1
    jitter = rng.uniform(0, 1) ** 2
    velocity = rng.normal(size=(1, 4)) + jitter * np.cumsum(rng.normal(0, 3 / np.sqrt(count), (count, 4)), axis=0)
    path = np.cumsum(velocity, axis=0)
    path -= path.mean(axis=0) if centre else path[count // 2]
    reach = np.abs(path).max(axis=0) + 1e-9
    path[:, :2] *= extent_px / 2 / np.linalg.norm(path[:, :2], axis=1).max()
    path[:, 2] *= rng.uniform(0, rotation) / reach[2]
    path[:, 3] *= rng.uniform(0, zoom) / reach[3]
    return path.astype(np.float32)


def warped(image: Tensor, poses: Array, cut: int = 0, tilt: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """(P, C, H - 2 cut, W - 2 cut): the inside of ``image`` (C, H, W) as seen from each pose, bilinear.

    ``tilt``: by which share the shift grows towards the right and lower border, as what is nearer moves further.
    """
    height, width = image.shape[-2:]
    dx, dy, angle, zoom = torch.from_numpy(poses).to(image.device).T[:, :, None]
    # x and y in pixels from the centre.  Each coordinate is a part that depends on the column plus one that depends on
    # the row, and adding them as complex numbers is three times faster than affine_grid.
    x = torch.arange(cut, width - cut, device=image.device) - (width - 1) / 2
    y = torch.arange(cut, height - cut, device=image.device) - (height - 1) / 2
    cos, sin = torch.cos(angle) * torch.exp(zoom), torch.sin(angle) * torch.exp(zoom)
    right, low = tilt[0] * x * (2 / width), tilt[1] * y * (2 / height)
    across = torch.complex((cos * x + dx * right) * (2 / width), (sin * x + dy * right) * (2 / height))
    down = torch.complex((dx * (1 + low) - sin * y) * (2 / width), (dy * (1 + low) + cos * y) * (2 / height))
    grid = torch.view_as_real(across[:, None, :] + down[:, :, None])
    batch = image.expand(len(poses), *image.shape)
    return F.grid_sample(batch, grid, mode="bilinear", padding_mode="border", align_corners=False)
