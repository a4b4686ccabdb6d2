"""Losses on float NCHW in [0, 1], and their weighted sums: ``--loss "l1=1,fft=0.05"``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from deblur_deploy.errors import InputError, one_line
from deblur_deploy.files import existing
from deblur_deploy.training.config import loss_terms

Loss = Callable[[Tensor, Tensor], Tensor]


def charbonnier(image: Tensor, truth: Tensor, epsilon: float = 1e-3) -> Tensor:
    """A smooth L1 (Charbonnier et al. 1994; Lai et al. 2017)."""
    return ((image - truth).square() + epsilon**2).sqrt().mean()


def psnr(image: Tensor, truth: Tensor, floor: float = 1e-4) -> Tensor:
    """Decibels lost to an error that nobody sees, image by image (Chen et al., Simple Baselines, 2022).

    Evaluations report the mean PSNR, which is that of the logarithm.  ``floor`` is the squared error at 40 dB, below
    which little is left to gain; without it, photographs that are sharp already would be all that counts.
    """
    error = (image - truth).square().mean((1, 2, 3))
    return 10 * torch.log10(1 + error / floor).mean()


def fft(image: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute difference of the spectra (Cho et al., MIMO-UNet, 2021), scaled by 1 / sqrt(pixels)."""
    spectrum: Tensor = torch.fft.rfft2(image - truth, norm="ortho")
    return spectrum.abs().mean()


def ssim(image: Tensor, truth: Tensor) -> Tensor:
    """1 - SSIM with Wang's 11x11 Gaussian window, sigma 1.5 (2004)."""
    x = torch.arange(-5, 6, dtype=image.dtype, device=image.device)
    line = torch.exp(-(x**2) / (2 * 1.5**2))
    line = line / line.sum()
    channels = image.shape[1]

    def blur(value: Tensor) -> Tensor:
        value = F.conv2d(value, line.view(1, 1, 11, 1).expand(channels, 1, 11, 1), groups=channels)
        return F.conv2d(value, line.view(1, 1, 1, 11).expand(channels, 1, 1, 11), groups=channels)

    a, b = blur(image), blur(truth)
    aa, bb, ab = blur(image * image) - a * a, blur(truth * truth) - b * b, blur(image * truth) - a * b
    c1, c2 = 0.01**2, 0.03**2
    return 1 - ((2 * a * b + c1) * (2 * ab + c2) / ((a * a + b * b + c1) * (aa + bb + c2))).mean()


class Perceptual(nn.Module):
    """Mean squared difference of VGG19 features behind relu3_3 (Johnson et al. 2016).

    ``weights``: a state dict in torchvision's layout (``features.0.weight`` ...), as .pth or .safetensors.
    """

    mean: Tensor
    std: Tensor
    _widths = (64, 64, 0, 128, 128, 0, 256, 256, 256)

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in self._widths:
            if width:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        wanted = self.state_dict()
        if missing := [name for name in wanted if name not in weights]:
            raise InputError(f"VGG19 weights lack {missing[0]}; torchvision's vgg19 state dict is needed")
        try:
            self.load_state_dict({name: weights[name] for name in wanted})
        except RuntimeError as error:
            raise InputError(f"these are not VGG19's weights: {one_line(error)}") from None
        self.requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, image: Tensor, truth: Tensor) -> Tensor:
        a, b = (self.features((value - self.mean) / self.std) for value in (image, truth))
        return F.mse_loss(a, b)


def load_vgg(path: Path | None) -> dict[str, Tensor]:
    """VGG19 weights given by the user, since none can be shipped; never unpickles code."""
    if path is None:
        raise InputError("the perceptual loss needs VGG19 weights: give --vgg-weights FILE (torchvision's vgg19)")
    existing(path, kind="file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch and pickle make of a damaged file
        raise InputError(f"cannot read VGG19 weights from {path}: {one_line(error)}") from None
    if not isinstance(weights, dict):
        raise InputError(f"{path} holds no state dict; torchvision's vgg19 state dict is needed")
    return {str(name): value for name, value in weights.items()}


LOSSES: dict[str, Loss] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "charbonnier": charbonnier,
    "psnr": psnr,
    "ssim": ssim,
    "fft": fft,
}


class WeightedLoss(nn.Module):
    """Weighted sum of losses; a module, so that a perceptual term's network moves to the device with it."""

    def __init__(self, terms: list[tuple[float, Loss]]) -> None:
        super().__init__()
        self.terms = terms
        self.networks = nn.ModuleList(loss for _, loss in terms if isinstance(loss, nn.Module))

    def forward(self, image: Tensor, truth: Tensor) -> Tensor:
        return torch.stack([weight * loss(image, truth) for weight, loss in self.terms]).sum()


def parse_loss(text: str, vgg_weights: Path | None = None) -> WeightedLoss:
    """The weighted sum that ``text`` ("l1=1,fft=0.05") describes.

    Raises InputError for an unknown name, a weight that is no positive number, or perceptual without weights.
    """
    terms: list[tuple[float, Loss]] = []
    for name, weight in loss_terms(text):
        terms.append((weight, Perceptual(load_vgg(vgg_weights)) if name == "perceptual" else LOSSES[name]))
    return WeightedLoss(terms)
