"""Blurred photographs made from sharp ones, in torch, the same code on every device.

A sample's blur is drawn on the CPU as a small ``BlurPlan`` (so it depends on the seed alone) and then applied where
the image is.  Light is averaged in linear intensity, as a sensor does (but see ``flatter``): decode gamma, brighten
highlights beyond what the sensor can hold, move and defocus, clip, add shot and read noise, encode, round to 8 bits,
compress.

Camera shake is a smooth path of shift, rotation and zoom, hence different in every corner of the image.  Every path
and kernel is centred on its mean, which is where a network that sees one image can place the sharp result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args
from zipfile import BadZipFile

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from deblur_deploy.errors import InputError
from deblur_deploy.training.jpeg import jpeg_roundtrip

Kind = Literal["shake", "object", "defocus", "gaussian", "measured", "sharp"]
Range = tuple[float, float]
Array = NDArray[np.float32]


class BlurConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What blur is made, how often and how strong.  Ranges are (low, high); lengths are drawn log-uniformly."""

    shake: float = 0.40
    """Share of samples with camera shake."""
    object: float = 0.10
    """Share of samples with an object that moves over a still background."""
    defocus: float = 0.08
    """Share of samples out of focus."""
    gaussian: float = 0.26
    """Share of samples with an isotropic or anisotropic Gaussian."""
    measured: float = 0.08
    """Share of samples blurred with a measured kernel; counts as shake when no kernels are given."""
    sharp: float = 0.08
    """Share of samples that stay sharp, so that sharp photographs are left alone."""
    combined: float = 0.2
    """Share of the moving samples that get a small Gaussian as well (lens, demosaicking, resizing)."""
    path_px: Range = (3.0, 36.0)
    """Largest extent of a shake or object path, in pixels."""
    rotation_deg: float = 1.2
    """Largest rotation over one exposure."""
    zoom: float = 0.02
    """Largest change of scale over one exposure."""
    defocus_radius_px: Range = (0.7, 6.0)
    """Radius of the defocus disk."""
    gaussian_sigma_px: Range = (0.4, 3.2)
    """Standard deviation along each axis."""
    highlights: float = 0.2
    """Share of samples whose highlights are brighter than the sensor can hold."""
    highlight_gain: Range = (1.5, 8.0)
    """How much brighter."""
    noisy: float = 0.6
    """Share of samples with sensor noise."""
    read_noise: Range = (0.0005, 0.008)
    """Standard deviation of the read noise, as a share of full scale in linear light."""
    shot_noise: Range = (0.00001, 0.0008)
    """Variance of the shot noise at full scale in linear light."""
    jpeg: float = 0.1
    """Share of samples that are JPEG-compressed."""
    jpeg_quality: Range = (60, 97)
    """Quality as in libjpeg."""
    gamma: float = 2.2
    """Encoded value = linear light ** (1 / gamma)."""
    flatter: float = 0.35
    """Share of samples with a gamma between 1 and ``gamma``: tone curves of cameras flatten what is bright, and many
    published pairs were averaged without decoding at all."""

    def __post_init__(self) -> None:
        for name in (*get_args(Kind), "combined", "highlights", "noisy", "jpeg", "flatter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 0 to 1")
        if sum(getattr(self, kind) for kind in get_args(Kind)) <= 0:
            raise ValueError(f"the shares {', '.join(get_args(Kind))} are all 0; allowed: at least one above 0")
        for name, low in (("rotation_deg", 0), ("zoom", 0), ("gamma", 1)):
            if not low <= getattr(self, name) <= 10:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {low} to 10")
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, tuple) and not 0 < value[0] <= value[1]:
                raise ValueError(f"{name} is {value}; allowed: (low, high) with 0 < low <= high")
        if self.path_px[1] > 60 or self.defocus_radius_px[1] > 20 or self.gaussian_sigma_px[1] > 8:
            raise ValueError("blur is too large; allowed: path_px to 60, defocus_radius_px 20, gaussian_sigma_px 8")
        if self.jpeg_quality[0] < 1 or self.jpeg_quality[1] > 100:
            raise ValueError(f"jpeg_quality is {self.jpeg_quality}; allowed: 1 to 100")

    @property
    def margin_px(self) -> int:
        """Pixels that a sharp patch must extend beyond the wanted one, so that its border sees real content."""
        reach = max(self.path_px[1] / 2 + 8, self.defocus_radius_px[1] + 2, 3 * self.gaussian_sigma_px[1])
        return 8 * int(np.ceil(reach / 8))


@dataclass(frozen=True, kw_only=True)
class BlurPlan:
    """Everything random about one sample, drawn."""

    kind: Kind
    poses: Array | None = None
    """(P, 4): shift in x and y (pixels), rotation (radians), log zoom; the mean is zero."""
    blob: Array | None = None
    """(5, 5) low-frequency noise whose positive part is the moving object."""
    kernel: Array | None = None
    """(K, K), odd K, sums to 1."""
    highlight_gain: float = 0.0
    read_noise: float = 0.0
    shot_noise: float = 0.0
    jpeg_quality: float | None = None
    noise_seed: int = 0
    gamma: float = 2.2


def draw_gamma(config: BlurConfig, rng: np.random.Generator) -> float:
    """One sample's gamma."""
    return float(rng.uniform(1, config.gamma)) if rng.random() < config.flatter else config.gamma


def draw_plan(config: BlurConfig, rng: np.random.Generator, measured: list[Array] | None = None) -> BlurPlan:
    """Draw one sample's blur.  ``measured``: kernels for the share of that name."""
    kinds = get_args(Kind)
    shares = np.array([getattr(config, kind) for kind in kinds])
    kind: Kind = kinds[rng.choice(len(kinds), p=shares / shares.sum())]
    if kind == "measured" and not measured:
        kind = "shake"
    poses = blob = kernel = None
    if kind in ("shake", "object"):
        poses = _path(config, rng, still_camera=kind == "object")
        if rng.random() < config.combined:
            sigma_x, sigma_y = np.minimum(_log_uniform(config.gaussian_sigma_px, rng, 2), 1.2)
            kernel = gaussian_kernel(sigma_x, sigma_y, 0.0)
    if kind == "object":
        blob = rng.normal(0.2, 1.0, (5, 5)).astype(np.float32)
    if kind == "defocus":
        kernel = disk_kernel(_log_uniform(config.defocus_radius_px, rng).item())
    if kind == "gaussian":
        sigma = _log_uniform(config.gaussian_sigma_px, rng, 2)
        kernel = gaussian_kernel(sigma[0], sigma[0] if rng.random() < 0.5 else sigma[1], rng.uniform(0, np.pi))
    if kind == "measured" and measured:
        kernel = np.rot90(measured[rng.integers(len(measured))], int(rng.integers(4))).copy()
        kernel = kernel[:, ::-1].copy() if rng.random() < 0.5 else kernel
    noisy = rng.random() < config.noisy
    return BlurPlan(
        kind=kind,
        poses=poses,
        blob=blob,
        kernel=kernel,
        highlight_gain=_log_uniform(config.highlight_gain, rng).item() if rng.random() < config.highlights else 0.0,
        read_noise=_log_uniform(config.read_noise, rng).item() * noisy,
        shot_noise=_log_uniform(config.shot_noise, rng).item() * noisy,
        jpeg_quality=rng.uniform(*config.jpeg_quality) if rng.random() < config.jpeg else None,
        noise_seed=int(rng.integers(2**31)),
        gamma=draw_gamma(config, rng),
    )


def synthesise(sharp: Tensor, plans: Sequence[BlurPlan], margin_px: int) -> tuple[Tensor, Tensor]:
    """Blur a batch of patches.

    ``sharp`` is uint8 (N, 3, H, W) with ``margin_px`` pixels to spare on every side; one plan a patch.  Returns
    (blurred, truth), both uint8 (N, 3, H - 2 margin, W - 2 margin), on the device where ``sharp`` is.
    """
    device = sharp.device
    truth = sharp.float() / 255
    gamma = _column([plan.gamma for plan in plans], truth)
    light = truth**gamma
    if bright := [i for i, plan in enumerate(plans) if plan.highlight_gain]:
        # A ramp, not a step: a step would draw contours that no sensor shows.  The truth clips them too.
        gain = _column([plans[i].highlight_gain for i in bright], light)
        light[bright] *= 1 + gain * ((truth[bright].amin(1, keepdim=True) - 0.8) / 0.2).clamp(min=0)
        truth[bright] = light[bright].clamp(max=1) ** (1 / gamma[bright])
    for i, plan in enumerate(plans):
        if plan.poses is not None:
            # Only what the crop below and the kernel before it will look at.
            cut = max(margin_px - (0 if plan.kernel is None else len(plan.kernel) // 2), 0)
            rows, columns = slice(cut, light.shape[-2] - cut), slice(cut, light.shape[-1] - cut)
            if plan.blob is None:
                light[i, :, rows, columns] = _warped(light[i], plan.poses, cut).mean(0)
            else:
                light[i, :, rows, columns], truth[i] = _moving_object(light[i], truth[i], plan.poses, plan.blob, cut)
    if soft := [i for i, plan in enumerate(plans) if plan.kernel is not None]:
        kernels = [kernel for i in soft if (kernel := plans[i].kernel) is not None]
        light[soft] = convolve(light[soft], _padded(kernels).to(device))
    inside = slice(margin_px, sharp.shape[-2] - margin_px), slice(margin_px, sharp.shape[-1] - margin_px)
    light, truth = light[..., *inside].clamp(0, 1), truth[..., *inside]
    if noisy := [i for i, plan in enumerate(plans) if plan.read_noise]:
        noise = torch.stack([_noise(light[i], plans[i].noise_seed) for i in noisy])
        read, shot = (_column([getattr(plans[i], name) for i in noisy], light) for name in ("read_noise", "shot_noise"))
        light[noisy] = (light[noisy] + noise * (read**2 + shot * light[noisy]).sqrt()).clamp(0, 1)
    blurred = light ** (1 / gamma)
    if packed := [i for i, plan in enumerate(plans) if plan.jpeg_quality is not None]:
        quality = torch.tensor([plans[i].jpeg_quality for i in packed], device=device)
        blurred[packed] = jpeg_roundtrip(blurred[packed], quality)
    return _to_8_bits(blurred), _to_8_bits(truth)


def _to_8_bits(image: Tensor) -> Tensor:
    return (image * 255).round().to(torch.uint8)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1)


def _noise(like: Tensor, seed: int) -> Tensor:
    # A seed a sample, so that a patch's noise does not depend on the batch that it is in.
    return torch.randn(like.shape, generator=torch.Generator(like.device).manual_seed(seed), device=like.device)


def _padded(kernels: list[Array]) -> Tensor:
    side = max(len(kernel) for kernel in kernels)
    return torch.from_numpy(np.stack([np.pad(kernel, (side - len(kernel)) // 2) for kernel in kernels]))


def _log_uniform(limits: Range, rng: np.random.Generator, size: int = 1) -> Array:
    return np.asarray(np.exp(rng.uniform(math.log(limits[0]), math.log(limits[1]), size)), np.float32)


def _path(config: BlurConfig, rng: np.random.Generator, *, still_camera: bool) -> Array:
    """A smooth random path (P, 4): velocity with inertia, as a hand has it."""
    extent = _log_uniform(config.path_px, rng).item()
    count = int(np.clip(np.ceil(extent * 0.8), 5, 25)) | 1
    jitter = rng.uniform(0, 1) ** 2
    velocity = rng.normal(size=(1, 4)) + jitter * np.cumsum(rng.normal(0, 3 / np.sqrt(count), (count, 4)), axis=0)
    path = np.cumsum(velocity, axis=0)
    path -= path.mean(axis=0)
    reach = np.abs(path).max(axis=0) + 1e-9
    path[:, :2] *= extent / 2 / np.linalg.norm(path[:, :2], axis=1).max()
    # Rotation and zoom grow with the shift, so that a short exposure is short in every respect.
    share = extent / config.path_px[1]
    path[:, 2] *= rng.uniform(0, np.deg2rad(config.rotation_deg)) * share / reach[2]
    path[:, 3] *= rng.uniform(0, config.zoom) * share / reach[3]
    if still_camera:
        path[:, 2:] *= 0.5
    return path.astype(np.float32)


def _warped(image: Tensor, poses: Array, cut: int = 0) -> Tensor:
    """(P, C, H - 2 cut, W - 2 cut): the inside of ``image`` (C, H, W) as seen from each pose, bilinear."""
    height, width = image.shape[-2:]
    dx, dy, angle, zoom = torch.from_numpy(poses).to(image.device).T[:, :, None]
    # x and y in pixels from the centre.  Each coordinate is a part that depends on the column plus one that depends on
    # the row, and adding them as complex numbers is three times faster than affine_grid.
    x = torch.arange(cut, width - cut, device=image.device) - (width - 1) / 2
    y = torch.arange(cut, height - cut, device=image.device) - (height - 1) / 2
    cos, sin = torch.cos(angle) * torch.exp(zoom), torch.sin(angle) * torch.exp(zoom)
    across = torch.complex(cos * x * (2 / width), sin * x * (2 / height))
    down = torch.complex((dx - sin * y) * (2 / width), (dy + cos * y) * (2 / height))
    grid = torch.view_as_real(across[:, None, :] + down[:, :, None])
    batch = image.expand(len(poses), *image.shape)
    return F.grid_sample(batch, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _moving_object(light: Tensor, truth: Tensor, poses: Array, blob: Array, cut: int) -> tuple[Tensor, Tensor]:
    """A mirrored copy of the scene, seen through a blob, moves over the still scene; ``light`` comes back cut."""
    size = light.shape[-2:]
    field = F.interpolate(torch.from_numpy(blob)[None, None].to(light.device), size, mode="bicubic", align_corners=True)
    mask = torch.sigmoid(20 * field[0])
    moving = _warped(torch.cat([light.flip(-1) * mask, mask]), poses, cut).mean(0)
    still = light[:, cut : size[0] - cut, cut : size[1] - cut]
    return moving[:3] + still * (1 - moving[3:]), truth.flip(-1) * mask + truth * (1 - mask)


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


def load_kernels(path: str) -> list[Array]:
    """Kernels from an ``.npz`` (any arrays of (N, K, K) or (K, K), odd K), each scaled to sum 1."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = [archive[name] for name in archive.files]
    except (OSError, ValueError, AttributeError, EOFError, BadZipFile) as error:
        raise InputError(f"cannot read kernels from {path}: {error}; an .npz of (N, K, K) arrays is needed") from None
    if any(a.ndim not in (2, 3) or a.shape[-1] != a.shape[-2] or a.shape[-1] % 2 == 0 for a in arrays) or not arrays:
        raise InputError(f"{path} must hold square kernels with an odd side, (N, K, K) or (K, K); crop or pad them")
    kernels = [kernel.astype(np.float64) for array in arrays for kernel in array.reshape(-1, *array.shape[-2:])]
    if any(not np.isfinite(kernel).all() or kernel.sum() <= 0 for kernel in kernels):
        raise InputError(f"{path} holds a kernel whose sum is not a positive number; leave it out")
    return [_normalised(kernel) for kernel in kernels]
