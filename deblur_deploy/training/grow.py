"""A larger network that begins as the function of a smaller one, so that no training is thrown away.

What comes into a new channel is random, and what leaves it is zero; a convolution that is added to a block passes on
what it gets, which the ReLU behind it leaves alone, since it comes from a ReLU.

Source: Chen et al., Net2Net (2016).
"""

from __future__ import annotations

import torch
from torch import nn

from deblur_deploy.errors import InputError
from deblur_deploy.training.unet import UNet, UNetConfig

Parts = list[tuple[int, int]]
"""Of what is concatenated in front of a convolution: channels in the small network, and in the large one."""


@torch.no_grad()
def grown(small: UNet, config: UNetConfig) -> UNet:
    """A network of ``config`` that computes what ``small`` does; its new weights come from torch's random numbers.

    Raises InputError if ``small`` does not fit into it.
    """
    old = small.config
    if (old.stem, old.residual, len(old.encoder)) != (config.stem, config.residual, len(config.encoder)):
        raise InputError("only a network with the same stem, levels and residual can grow into another")
    large = UNet(config)
    skips: list[Parts] = []
    parts: Parts = [(3 * old.stem**2, 3 * config.stem**2)]
    for before, after in zip(small.encoder, large.encoder, strict=True):
        parts = _fill(before, after, parts)
        skips.append(parts)
    parts = skips.pop()
    for up, wider, before, after in zip(small.up, large.up, small.decoder, large.decoder, strict=True):
        assert isinstance(up, nn.ConvTranspose2d)
        assert isinstance(wider, nn.ConvTranspose2d)
        _place(up, wider, parts, outputs=1)
        parts = _fill(before, after, [(up.out_channels, wider.out_channels), *skips.pop()])
    _place(small.head, large.head, parts)
    return large


def _fill(small: nn.Module, large: nn.Module, parts: Parts) -> Parts:
    """Put a block's convolutions into the larger one; answers the channels that it gives."""
    old, new = ([layer for layer in block.modules() if isinstance(layer, nn.Conv2d)] for block in (small, large))
    if len(old) > len(new):
        raise InputError(f"a block of {len(old)} convolutions cannot grow into one of {len(new)}")
    for before, after in zip(old, new, strict=False):
        _place(before, after, parts)
        parts = [(before.out_channels, after.out_channels)]
    for added in new[len(old) :]:
        identity = nn.Conv2d(parts[0][0], parts[0][0], 3)
        nn.init.dirac_(identity.weight)
        assert identity.bias is not None
        nn.init.zeros_(identity.bias)
        _place(identity, added, parts)
        parts = [(parts[0][0], added.out_channels)]
    return parts


def _place(
    small: nn.Conv2d | nn.ConvTranspose2d, large: nn.Conv2d | nn.ConvTranspose2d, parts: Parts, *, outputs: int = 0
) -> None:
    """Weights of ``small`` where its channels are in ``large``; its outputs get nothing from new inputs.

    ``outputs``: the axis of the weights along which they lie, 1 in a transposed convolution.
    """
    count = small.out_channels
    if count > large.out_channels or any(was > now for was, now in parts):
        raise InputError(f"a layer of {count} channels cannot grow into one of {large.out_channels}")
    source, target = (layer.weight.transpose(0, outputs) for layer in (small, large))
    target[:count] = 0
    was_at = now_at = 0
    for was, now in parts:
        target[:count, now_at : now_at + was] = source[:, was_at : was_at + was]
        was_at, now_at = was_at + was, now_at + now
    assert small.bias is not None
    assert large.bias is not None
    large.bias[:count] = small.bias
