"""Dead channels are found, and a new start changes nothing that the network computes."""

import pytest
import torch

from deblur_deploy.training.unet import PRESETS, UNet, UNetConfig
from deblur_deploy.training.units import dead_channels, dead_share, revive

SMALL = UNetConfig(stem=2, encoder=((8, 6), (10, 12), (9,)), up=(7, 5), decoder=((6, 8), (4,)))
FLAT = UNetConfig(encoder=((8, 6),), up=(), decoder=())


def with_dead(config: UNetConfig, every: int = 3) -> tuple[UNet, int]:
    """A network of random weights in which every so many channels of each convolution can never fire."""
    torch.manual_seed(0)
    unet = UNet(config).eval()
    torch.nn.init.normal_(unet.head.weight, std=0.1)
    count = 0
    for block in (*unet.encoder, *unet.decoder):
        for conv in block[::2]:
            conv.bias.data[::every] = -1e3
            count += len(conv.bias[::every])
    return unet, count


@pytest.mark.parametrize(
    "config", [SMALL, FLAT, PRESETS["hd"], PRESETS["article"]], ids=["small", "flat", "hd", "article"]
)
def test_a_new_start_keeps_the_function_and_leaves_nothing_dead(config: UNetConfig) -> None:
    unet, count = with_dead(config)
    images = torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(1))
    dead = dead_channels(unet, images)
    assert all(mask[::3].all() for mask in dead.values())
    before = unet(images).detach()
    assert revive(unet, images) == sum(int(mask.sum()) for mask in dead.values()) >= count
    assert torch.allclose(unet(images), before, atol=1e-5)
    assert dead_share(unet, images) < dead_share(with_dead(config)[0], images) / 3


def test_revived_channels_learn() -> None:
    unet, _ = with_dead(SMALL)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    revive(unet, images)
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-3)
    start = {name: value.detach().clone() for name, value in unet.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        (unet(images) - images.flip(-1)).square().mean().backward()
        optimizer.step()
    for name, value in unet.named_parameters():
        if name.startswith(("encoder", "decoder")) and name.endswith("weight"):
            assert (value != start[name]).flatten(1).any(1)[::3].float().mean() > 0.5, name
