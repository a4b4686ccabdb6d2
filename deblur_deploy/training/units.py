"""Channels that never fire: found, told, and given a new start.

Without normalization a ReLU network loses channels for good when its learning rate is too high early on: a channel
whose value is negative everywhere has no gradient that could bring it back.  Nothing else shows it, since the loss goes
on falling with what is left.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from deblur_deploy.training.unet import UNet

_FIRES = 5e-4
"""Share of the pixels in which a live channel is above zero."""


@torch.no_grad()
def dead_channels(unet: UNet, images: Tensor) -> dict[str, Tensor]:
    """Which channels of each 3x3 convolution are (next to) never above zero, as a mask by the convolution's name.

    ``images``: float (N, 3, H, W) in [0, 1]; take enough of them to speak for what the network will see.
    """
    found: dict[str, Tensor] = {}
    hooks = []
    for name, _, block, index in _convolutions(unet):

        def look(_module: nn.Module, _inputs: object, output: Tensor, name: str = name) -> None:
            found[name] = (output > 0).float().mean((0, 2, 3)) < _FIRES

        hooks.append(block[index + 1].register_forward_hook(look))
    try:
        unet(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def dead_share(unet: UNet, images: Tensor) -> float:
    """Share of all channels of all 3x3 convolutions that are dead."""
    masks = torch.cat(list(dead_channels(unet, images).values()))
    return float(masks.float().mean())


@torch.no_grad()
def revive(unet: UNet, images: Tensor, *, seed: int = 0) -> int:
    """Give every dead channel new weights, in place; answers how many there were.

    What comes in is initialised anew and what goes out set to zero, so the network computes the same as before (apart
    from what the rare firing added), and training can use the channel again.
    """
    dead = dead_channels(unet, images)
    generator = torch.Generator().manual_seed(seed)
    for name, conv, _, _ in _convolutions(unet):
        which = dead[name].nonzero()[:, 0]
        fresh = torch.empty(conv.weight.shape)
        nn.init.kaiming_normal_(fresh, nonlinearity="relu", generator=generator)
        conv.weight[which] = fresh.to(conv.weight)[which]
        assert conv.bias is not None
        conv.bias[which] = 0
        for weight, dim, offset in _readers(unet, name):
            weight.index_fill_(dim, which + offset, 0)
    return int(sum(mask.sum() for mask in dead.values()))


def _convolutions(unet: UNet) -> Iterator[tuple[str, nn.Conv2d, nn.Sequential, int]]:
    """(name, convolution, its block, its place there) of every convolution that a ReLU follows, in order."""
    for part, blocks in (("encoder", unet.encoder), ("decoder", unet.decoder)):
        for level, block in enumerate(blocks):
            assert isinstance(block, nn.Sequential)
            for index in range(0, len(block), 2):
                conv = block[index]
                assert isinstance(conv, nn.Conv2d)
                yield f"{part}.{level}.{index}", conv, block, index


def _readers(unet: UNet, name: str) -> list[tuple[Tensor, int, int]]:
    """Weights that read the channels of a convolution: (weight, its dimension of input channels, first channel)."""
    part, level, index = name.split(".")[0], *map(int, name.split(".")[1:])
    block = getattr(unet, part)[level]
    if index + 2 < len(block):
        return [(block[index + 2].weight, 1, 0)]
    if part == "decoder":
        last = level + 1 == len(unet.decoder)
        return [(unet.head.weight, 1, 0) if last else (_weight(unet.up[level + 1]), 0, 0)]
    below = len(unet.encoder) - 2 - level
    if below < 0:
        return [(_weight(unet.up[0]), 0, 0) if len(unet.up) else (unet.head.weight, 1, 0)]
    # The skip connection is concatenated behind what comes up.
    return [
        (_weight(unet.encoder[level + 1], 0), 1, 0),
        (_weight(unet.decoder[below], 0), 1, unet.config.up[below]),
    ]


def _weight(module: nn.Module, index: int | None = None) -> Tensor:
    inner = module if index is None else module[index]  # type: ignore[index]
    assert isinstance(inner.weight, Tensor)
    return inner.weight
