"""Blurred photographs made from sharp ones, in torch, the same code on every device.

A sample's blur is drawn on the CPU as a small ``BlurPlan`` (so it depends on the seed alone) and then applied where
the image is.  Light is averaged in linear intensity, as a sensor does (but see ``flatter``): decode gamma, brighten
highlights beyond what the sensor can hold, move and defocus, clip, add shot and read noise, encode, round to 8 bits,
compress.

Camera shake is a smooth path of shift, rotation and zoom, hence different in every corner of the image.  Its path and
every kernel made here are centred on their mean; scenes in layers are centred on mid exposure, as pairs made from film
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deblur_deploy.errors import check_bounds
from deblur_deploy.training.jpeg import jpeg_roundtrip
from deblur_deploy.training.kernels import convolve, disk_kernel, gaussian_kernel, stacked
from deblur_deploy.training.motion import Array, Range, draw_path, log_uniform, warped
from deblur_deploy.training.scene import Scene, draw_scene, expose

Kind = Literal["shake", "object", "defocus", "gaussian", "measured", "sharp", "scene"]


class BlurConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What blur is made, how often and how strong.  Ranges are (low, high); lengths are drawn log-uniformly."""

    scene: float = 0.45
    """Share of samples that are scenes in layers: a moving camera, a tilted background, things that move before it."""
    layers: int = 3
    """Most things in front of a scene's background; each is cut from another photograph."""
    shake: float = 0.15
    """Share of samples with camera shake over a flat scene."""
    object: float = 0.0
    """Share of samples with a mirrored piece of themselves that moves over a still background."""
    defocus: float = 0.08
    """Share of samples out of focus."""
    gaussian: float = 0.16
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
    """Largest rotation to either side of the middle of an exposure."""
    zoom: float = 0.02
    """Largest change of scale to either side of it."""
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
    flatter: float = 0.25
    """Share of samples with a gamma between 1 and ``gamma``: tone curves of cameras flatten what is bright."""
    undecoded: float = 0.25
    """Share of samples with a gamma of 1: many published pairs were averaged without decoding at all."""

    def __post_init__(self) -> None:
        shares = (*get_args(Kind), "combined", "highlights", "noisy", "jpeg", "flatter", "undecoded")
        check_bounds(self, **dict.fromkeys(shares, (0, 1)))
        if sum(getattr(self, kind) for kind in get_args(Kind)) <= 0:
            raise ValueError(f"the shares {', '.join(get_args(Kind))} are all 0; allowed: at least one above 0")
        check_bounds(self, rotation_deg=(0, 10), zoom=(0, 10), gamma=(1, 10))
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, tuple) and not 0 < value[0] <= value[1]:
                raise ValueError(f"{name} is {value}; allowed: (low, high) with 0 < low <= high")
        if self.path_px[1] > 60 or self.defocus_radius_px[1] > 20 or self.gaussian_sigma_px[1] > 8:
            raise ValueError("blur is too large; allowed: path_px to 60, defocus_radius_px 20, gaussian_sigma_px 8")
        if not 0 <= self.layers <= 8:
            raise ValueError(f"layers is {self.layers}; allowed: 0 to 8")
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
    scene: Scene | None = None
    """Background and layers; it takes as many photographs more as it has layers."""
    kernel: Array | None = None
    """(K, K), odd K, sums to 1."""
    highlight_gain: float = 0.0
    read_noise: float = 0.0
    shot_noise: float = 0.0
    jpeg_quality: float | None = None
    noise_seed: int = 0
    gamma: float = 2.2

    @property
    def photographs(self) -> int:
        """How many photographs the sample is made of."""
        return 1 + (len(self.scene.layers) if self.scene else 0)


def draw_gamma(config: BlurConfig, rng: np.random.Generator) -> float:
    """One sample's gamma."""
    drawn = rng.random() - config.undecoded
    if drawn < 0:
        return 1.0
    return float(rng.uniform(1, config.gamma)) if drawn < config.flatter else config.gamma


def draw_plan(config: BlurConfig, rng: np.random.Generator, measured: list[Array] | None = None) -> BlurPlan:
    """Draw one sample's blur.  ``measured``: kernels for the share of that name."""
    kinds = get_args(Kind)
    shares = np.array([getattr(config, kind) for kind in kinds])
    kind: Kind = kinds[rng.choice(len(kinds), p=shares / shares.sum())]
    if kind == "measured" and not measured:
        kind = "shake"
    poses = blob = kernel = scene = None
    if kind in ("shake", "object"):
        extent = log_uniform(config.path_px, rng).item()
        # Rotation and zoom grow with the shift, so that a short exposure is short in every respect.
        share = extent / config.path_px[1] * (0.5 if kind == "object" else 1)
        poses = draw_path(extent, rng, rotation=np.deg2rad(config.rotation_deg) * share, zoom=config.zoom * share)
    if kind == "scene":
        scene = draw_scene(config.path_px, np.deg2rad(config.rotation_deg), config.zoom, config.layers, rng)
    if kind in ("shake", "object", "scene") and rng.random() < config.combined:
        sigma_x, sigma_y = np.minimum(log_uniform(config.gaussian_sigma_px, rng, 2), 1.2)
        kernel = gaussian_kernel(sigma_x, sigma_y, 0.0)
    if kind == "object":
        blob = rng.normal(0.2, 1.0, (5, 5)).astype(np.float32)
    if kind == "defocus":
        kernel = disk_kernel(log_uniform(config.defocus_radius_px, rng).item())
    if kind == "gaussian":
        sigma = log_uniform(config.gaussian_sigma_px, rng, 2)
        kernel = gaussian_kernel(sigma[0], sigma[0] if rng.random() < 0.5 else sigma[1], rng.uniform(0, np.pi))
    if kind == "measured" and measured:
        kernel = np.rot90(measured[rng.integers(len(measured))], int(rng.integers(4))).copy()
        kernel = kernel[:, ::-1].copy() if rng.random() < 0.5 else kernel
    noisy = rng.random() < config.noisy
    return BlurPlan(
        kind=kind,
        poses=poses,
        blob=blob,
        scene=scene,
        kernel=kernel,
        highlight_gain=log_uniform(config.highlight_gain, rng).item() if rng.random() < config.highlights else 0.0,
        read_noise=log_uniform(config.read_noise, rng).item() * noisy,
        shot_noise=log_uniform(config.shot_noise, rng).item() * noisy,
        jpeg_quality=rng.uniform(*config.jpeg_quality) if rng.random() < config.jpeg else None,
        noise_seed=int(rng.integers(2**31)),
        gamma=draw_gamma(config, rng),
    )


def synthesise(sharp: Tensor, plans: Sequence[BlurPlan], margin_px: int) -> tuple[Tensor, Tensor]:
    """Blur a batch of patches.

    ``sharp`` is uint8 (M, 3, H, W) with ``margin_px`` pixels to spare on every side: for each plan in turn, the
    photographs that it takes.  Returns (blurred, truth), both uint8 (plans, 3, H - 2 margin, W - 2 margin), on the
    device where ``sharp`` is.
    """
    device = sharp.device
    light, everything = _light_of(sharp, plans)
    starts = [0, *accumulate(plan.photographs for plan in plans)]
    truth, gamma = everything[starts[:-1]], _column([plan.gamma for plan in plans], everything)
    lights, light = light, light[starts[:-1]]
    for i, plan in enumerate(plans):
        # Only what the crop below and the kernel before it will look at.
        cut = max(margin_px - (0 if plan.kernel is None else len(plan.kernel) // 2), 0)
        inside = ..., slice(cut, light.shape[-2] - cut), slice(cut, light.shape[-1] - cut)
        if plan.scene is not None:
            mine = slice(starts[i], starts[i + 1])
            light[i][inside], sharp_light = expose(lights[mine], plan.scene, cut)
            # Put together in light, as the sensor would have: where a layer's edge is soft, that is another colour.
            truth[i] = sharp_light.clamp(0, 1) ** (1 / plan.gamma)
        elif plan.poses is not None and plan.blob is not None:
            light[i][inside], truth[i] = _moving_object(light[i], truth[i], plan.poses, plan.blob, cut)
        elif plan.poses is not None:
            light[i][inside] = warped(light[i], plan.poses, cut).mean(0)
    if soft := [i for i, plan in enumerate(plans) if plan.kernel is not None]:
        kernels = [kernel for i in soft if (kernel := plans[i].kernel) is not None]
        light[soft] = convolve(light[soft], stacked(kernels).to(device))
    inside = ..., slice(margin_px, sharp.shape[-2] - margin_px), slice(margin_px, sharp.shape[-1] - margin_px)
    light, truth = light[inside].clamp(0, 1), truth[inside]
    if noisy := [i for i, plan in enumerate(plans) if plan.read_noise]:
        noise = torch.stack([_noise(light[i], plans[i].noise_seed) for i in noisy])
        read, shot = (_column([getattr(plans[i], name) for i in noisy], light) for name in ("read_noise", "shot_noise"))
        light[noisy] = (light[noisy] + noise * (read**2 + shot * light[noisy]).sqrt()).clamp(0, 1)
    blurred = light ** (1 / gamma)
    if packed := [i for i, plan in enumerate(plans) if plan.jpeg_quality is not None]:
        quality = torch.tensor([plans[i].jpeg_quality for i in packed], device=device)
        blurred[packed] = jpeg_roundtrip(blurred[packed], quality)
    return _to_8_bits(blurred), _to_8_bits(truth)


def _light_of(sharp: Tensor, plans: Sequence[BlurPlan]) -> tuple[Tensor, Tensor]:
    """Linear light, with highlights brighter than a sensor can hold, and what it shows of it; of every photograph."""
    shown = sharp.float() / 255
    each = [plan for plan in plans for _ in range(plan.photographs)]
    gamma = _column([plan.gamma for plan in each], shown)
    light = shown**gamma
    if bright := [i for i, plan in enumerate(each) if plan.highlight_gain]:
        # A ramp, not a step: a step would draw contours that no sensor shows.  The truth clips them too.
        gain = _column([each[i].highlight_gain for i in bright], light)
        light[bright] *= 1 + gain * ((shown[bright].amin(1, keepdim=True) - 0.8) / 0.2).clamp(min=0)
        shown[bright] = light[bright].clamp(max=1) ** (1 / gamma[bright])
    return light, shown


def _to_8_bits(image: Tensor) -> Tensor:
    return (image * 255).round().to(torch.uint8)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(-1, 1, 1, 1)


def _noise(like: Tensor, seed: int) -> Tensor:
    # A seed a sample, so that a patch's noise does not depend on the batch that it is in.
    return torch.randn(like.shape, generator=torch.Generator(like.device).manual_seed(seed), device=like.device)


def _moving_object(light: Tensor, truth: Tensor, poses: Array, blob: Array, cut: int) -> tuple[Tensor, Tensor]:
    """A mirrored copy of the scene, seen through a blob, moves over the still scene; ``light`` comes back cut."""
    size = light.shape[-2:]
    field = F.interpolate(torch.from_numpy(blob)[None, None].to(light.device), size, mode="bicubic", align_corners=True)
    mask = torch.sigmoid(20 * field[0])
    moving = warped(torch.cat([light.flip(-1) * mask, mask]), poses, cut).mean(0)
    still = light[:, cut : size[0] - cut, cut : size[1] - cut]
    return moving[:3] + still * (1 - moving[3:]), truth.flip(-1) * mask + truth * (1 - mask)
