"""Channels that can never fire are counted, and counting leaves nothing behind."""

import pytest
import torch

from deblur_deploy.training.unet import UNet, UNetConfig
from deblur_deploy.training.units import dead_share

SMALL = UNetConfig(stem=2, encoder=((8, 6), (10, 12), (9,)), up=(7, 5), decoder=((6, 8), (4,)))
FLAT = UNetConfig(encoder=((8, 6),), up=(), decoder=())


@pytest.mark.parametrize("config", [SMALL, FLAT], ids=["small", "flat"])
def test_the_share_of_dead_channels_is_counted(config: UNetConfig) -> None:
    torch.manual_seed(0)
    unet = UNet(config).eval()
    images = torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(1))
    before, result = dead_share(unet, images), unet(images)
    killed = total = 0
    for block in (*unet.encoder, *unet.decoder):
        for conv in block[::2]:
            conv.weight.data.zero_()
            conv.bias.data.fill_(1)[::2] = -1
            killed, total = killed + len(conv.bias[::2]), total + len(conv.bias)
    assert before < 0.3
    assert dead_share(unet, images) == pytest.approx(killed / total)
    assert not any(module._forward_hooks for module in unet.modules())
    assert result.shape == images.shape
