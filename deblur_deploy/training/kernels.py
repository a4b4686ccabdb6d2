"""Blur that is the same everywhere: kernels of lenses and of measured shake, and how they are applied."""

from __future__ import annotations

from typing import cast
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from deblur_deploy.errors import InputError
from deblur_deploy.training.motion import Array


def convolve(image: Tensor, kernel: Tensor) -> Tensor:
    """(N, C, H, W), each convolved with its odd (N, K, K) kernel; wraps around at the border, so give it a margin.

    Through the FFT, whose cost does not grow with the kernel.
    """
    height, width = image.shape[-2:]
    side = kernel.shape[-1]
    padded = F.pad(kernel, (0, width - side, 0, height - side)).roll((-(side // 2), -(side // 2)), (-2, -1))
    spectrum: Tensor = torch.fft.rfft2(image) * torch.fft.rfft2(padded)[:, None]
    return cast("Tensor", torch.fft.irfft2(spectrum, s=(height, width)))


def gaussian_kernel(sigma_x: float, sigma_y: float, angle: float) -> Array:
    """Anisotropic Gaussian, axes turned by ``angle`` radians; sums to 1."""
    radius = int(np.ceil(3 * max(sigma_x, sigma_y)))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    return _normalised(np.exp(-0.5 * ((u / sigma_x) ** 2 + (v / sigma_y) ** 2)))


def disk_kernel(radius_px: float) -> Array:
    """Defocus disk whose edge falls off over one pixel; sums to 1."""
    side = int(np.ceil(radius_px)) + 1
    y, x = np.mgrid[-side : side + 1, -side : side + 1]
    return _normalised(np.clip(radius_px + 0.5 - np.hypot(x, y), 0, 1))


def _normalised(kernel: NDArray[np.float64]) -> Array:
    return np.asarray(kernel / kernel.sum(), np.float32)


def load_kernels(path: str, largest_px: int) -> list[Array]:
    """Kernels from an ``.npz`` (any arrays of (N, K, K) or (K, K), odd K up to ``largest_px``), each scaled to sum 1.

    Where the mean of one is not its middle, what it blurs is shifted against the truth.  Raises InputError if the file
    is of another kind.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = [archive[name] for name in archive.files]
    except (OSError, ValueError, AttributeError, EOFError, BadZipFile) as error:
        raise InputError(f"cannot read kernels from {path}: {error}; an .npz of (N, K, K) arrays is needed") from None
    if any(a.ndim not in (2, 3) or a.shape[-1] != a.shape[-2] or a.shape[-1] % 2 == 0 for a in arrays) or not arrays:
        raise InputError(f"{path} must hold square kernels with an odd side, (N, K, K) or (K, K); crop or pad them")
    if (largest := max(a.shape[-1] for a in arrays)) > largest_px:
        raise InputError(
            f"{path} holds kernels of {largest} px, but patches have a border for {largest_px} px only; crop the "
            "kernels, or raise --blur.path-px, which widens it"
        )
    kernels = [kernel.astype(np.float64) for array in arrays for kernel in array.reshape(-1, *array.shape[-2:])]
    if any(not np.isfinite(kernel).all() or kernel.sum() <= 0 for kernel in kernels):
        raise InputError(f"{path} holds a kernel whose sum is not a positive number; leave it out")
    return [_normalised(kernel) for kernel in kernels]


def stacked(kernels: list[Array]) -> Tensor:
    """(N, K, K), the smaller ones filled up with zeros all around."""
    side = max(len(kernel) for kernel in kernels)
    return torch.from_numpy(np.stack([np.pad(kernel, (side - len(kernel)) // 2) for kernel in kernels]))
