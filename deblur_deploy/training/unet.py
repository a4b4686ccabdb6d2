"""The network, as data.

A ``UNetConfig`` lists the width of every convolution, so a pruned network is only another config with other weights.
The blocks are plain 3x3 convolution + ReLU: nothing here is hard to quantize or unknown to any execution provider.
Upsampling is a 2x2 transposed convolution because structured pruning follows its channels; export rewrites it.

Source of the shape: Ronneberger et al., U-Net (2015); pixel-unshuffle stem: Shi et al. (2016), Zhang et al. (2018).
"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deblur_deploy.errors import check_bounds

Widths = tuple[int, ...]
Preset = Literal["article", "hd", "quality"]


class UNetConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shape of one network."""

    stem: int = 1
    """Pixel-unshuffle factor in front of the first convolution (and pixel-shuffle behind the last); 1 is none."""
    encoder: tuple[Widths, ...]
    """Output channels of each 3x3 convolution, level by level; the last level is the bottleneck."""
    up: Widths
    """Output channels of each 2x2 transposed convolution, deepest first."""
    decoder: tuple[Widths, ...]
    """Output channels of each 3x3 convolution behind the skip concatenation, deepest level first."""
    residual: bool = True
    """Add the input to the output, so that the network only learns what to change."""

    def __post_init__(self) -> None:
        levels = len(self.encoder)
        check_bounds(self, stem=(1, 8))
        if not 1 <= levels <= 8:
            raise ValueError(f"encoder has {levels} levels; allowed: 1 to 8")
        if not len(self.up) == len(self.decoder) == levels - 1:
            raise ValueError(
                f"up and decoder have {len(self.up)} and {len(self.decoder)} levels; "
                f"allowed: {levels - 1}, one less than encoder"
            )
        for name, blocks in (("encoder", self.encoder), ("up", (self.up,)), ("decoder", self.decoder)):
            if name != "up" and not all(blocks):
                raise ValueError(f"{name} has a level without convolutions; allowed: one or more widths a level")
            if any(not 1 <= width <= 8192 for block in blocks for width in block):
                raise ValueError(f"{name} has a width outside the allowed 1 to 8192: {blocks}")

    @property
    def size_divisor(self) -> int:
        """The network works on heights and widths that are multiples of this."""
        return self.stem << (len(self.encoder) - 1)

    @property
    def receptive_radius_px(self) -> int:
        """Rows or columns beyond which an input pixel cannot change an output pixel.

        Every 3x3 convolution reaches one of its own pixels further; pooling, upsampling and the stem can shift a
        pixel inside one cell of the coarsest grid, which adds less than one ``size_divisor``.
        """
        levels = len(self.encoder)
        convolutions = sum(len(block) << level for level, block in enumerate(self.encoder))
        convolutions += sum(len(block) << (levels - 2 - i) for i, block in enumerate(self.decoder))
        return self.stem * convolutions + self.size_divisor - 1

    @property
    def macs_per_pixel(self) -> float:
        """Multiply-accumulate operations of all convolutions, per pixel of an input that needs no padding."""
        total = 0.0
        channels, skips = 3 * self.stem**2, []
        for level, block in enumerate(self.encoder):
            area = (self.stem * 2**level) ** 2
            total += sum(9 * a * b for a, b in pairwise((channels, *block))) / area
            channels = block[-1]
            skips.append(channels)
        for i, (up, block) in enumerate(zip(self.up, self.decoder, strict=True)):
            level = len(self.encoder) - 2 - i
            area = (self.stem * 2**level) ** 2
            total += channels * up / area
            total += sum(9 * a * b for a, b in pairwise((up + skips[level], *block))) / area
            channels = block[-1]
        return total + channels * 3


PRESETS: dict[Preset, UNetConfig] = {
    "article": UNetConfig(encoder=((64, 64), (128, 128)), up=(64,), decoder=((64, 64),), residual=False),
    "hd": UNetConfig(
        stem=4,
        encoder=((64, 64), (128, 128), (256, 256)),
        up=(128, 64),
        decoder=((128, 128), (64, 64)),
    ),
    "quality": UNetConfig(
        stem=4,
        encoder=((128, 128, 128), (192, 192, 192), (256, 256, 256, 256)),
        up=(192, 128),
        decoder=((192, 192, 192), (128, 128, 128)),
    ),
}


def _block(channels: int, widths: Widths) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise((channels, *widths)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """The network that a ``UNetConfig`` describes.

    Call it with float NCHW RGB in [0, 1], any height and width from 1; the result has the same shape and is not
    clamped.  Sizes that are no multiple of ``size_divisor`` are padded below and to the right with the edge pixels.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, skips = 3 * config.stem**2, []
        self.encoder = nn.ModuleList()
        for widths in config.encoder:
            self.encoder.append(_block(channels, widths))
            channels = widths[-1]
            skips.append(channels)
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        for up, widths, skip in zip(config.up, config.decoder, reversed(skips[:-1]), strict=True):
            self.up.append(nn.ConvTranspose2d(channels, up, 2, stride=2))
            self.decoder.append(_block(up + skip, widths))
            channels = widths[-1]
        self.head = nn.Conv2d(channels, 3 * config.stem**2, 1)
        self.apply(_initialise)
        # Pixels are around 0.5, and what the first convolution makes of them shall be around 0.
        first = self.first
        assert first.bias is not None
        first.bias.data = -0.5 * first.weight.data.sum((1, 2, 3))
        if config.residual:
            # A residual network starts as the identity, so that training never first has to unlearn noise.
            nn.init.zeros_(self.head.weight)

    @property
    def first(self) -> nn.Conv2d:
        """The convolution that reads the image."""
        return next(module for module in self.encoder.modules() if isinstance(module, nn.Conv2d))

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        padded = pad_to_multiple(image, self.config.size_divisor)
        return self.core(padded)[..., :height, :width]

    def core(self, image: Tensor) -> Tensor:
        """``forward`` for heights and widths that are already multiples of ``size_divisor``."""
        return self.composed(image, self.features(image)[-1])

    def composed(self, image: Tensor, feature: Tensor) -> Tensor:
        """The restored image, from the last of ``features``."""
        restored = to_image(self.head(feature), self.config.stem)
        return image + restored if self.config.residual else restored

    def features(self, image: Tensor) -> list[Tensor]:
        """Bottleneck and decoder outputs, coarsest first, for an image whose size is a multiple."""
        x = F.pixel_unshuffle(image, self.config.stem) if self.config.stem > 1 else image
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        outputs = [skips.pop()]
        for up, block in zip(self.up, self.decoder, strict=True):
            outputs.append(block(torch.cat([up(outputs[-1]), skips.pop()], dim=1)))
        return outputs


def to_image(head: Tensor, stem: int) -> Tensor:
    """(N, 3 stem^2, H, W) as an image (N, 3, stem H, stem W)."""
    return F.pixel_shuffle(head, stem) if stem > 1 else head


def pad_to_multiple(image: Tensor, divisor: int) -> Tensor:
    """NCHW padded below and to the right with edge pixels, to multiples of ``divisor``."""
    bottom, right = (-image.shape[-2]) % divisor, (-image.shape[-1]) % divisor
    return F.pad(image, (0, right, 0, bottom), mode="replicate")


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        assert module.bias is not None
        nn.init.zeros_(module.bias)


def parameter_count(model: nn.Module) -> int:
    """Number of trained scalars."""
    return sum(prod(parameter.shape) for parameter in model.parameters())
