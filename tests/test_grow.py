"""A grown network computes what it grew from, and all of it can learn."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deblur_deploy.errors import InputError
from deblur_deploy.shipped import DEFAULT_CHECKPOINT
from deblur_deploy.training.checkpoint import load_checkpoint
from deblur_deploy.training.grow import grown
from deblur_deploy.training.unet import PRESETS, UNet, UNetConfig
from tests.small import unet

WIDER = st.integers(0, 5)


def alive(config: UNetConfig) -> UNet:
    """With a head that shows what is behind it."""
    model = UNet(config)
    nn.init.normal_(model.head.weight, std=0.1)
    return model


@settings(max_examples=25, deadline=None)
@given(data=st.data(), stem=st.integers(1, 3), levels=st.integers(1, 3), residual=st.booleans())
def test_it_computes_the_same(data: st.DataObject, stem: int, levels: int, residual: bool) -> None:
    def wider(block: tuple[int, ...]) -> tuple[int, ...]:
        added = data.draw(st.lists(st.integers(block[-1], 9), max_size=2))
        return (*(width + data.draw(WIDER) for width in block), *(width + 4 for width in sorted(added)))

    blocks = st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple)
    small = UNetConfig(
        stem=stem,
        encoder=tuple(data.draw(blocks) for _ in range(levels)),
        up=tuple(data.draw(st.integers(1, 4)) for _ in range(levels - 1)),
        decoder=tuple(data.draw(blocks) for _ in range(levels - 1)),
        residual=residual,
    )
    large = msgspec.structs.replace(
        small,
        encoder=tuple(map(wider, small.encoder)),
        up=tuple(width + data.draw(WIDER) for width in small.up),
        decoder=tuple(map(wider, small.decoder)),
    )
    torch.manual_seed(0)
    model, image = alive(small), torch.rand(1, 3, 13, 22)
    with torch.no_grad():
        torch.testing.assert_close(grown(model, large)(image), model(image), rtol=1e-4, atol=1e-5)


def test_the_shipped_network_grows_into_the_larger_preset_and_every_new_channel_learns() -> None:
    small = load_checkpoint(DEFAULT_CHECKPOINT)
    large, image = grown(small, PRESETS["quality"]), torch.rand(1, 3, 96, 112)
    restored = large(image)
    with torch.no_grad():
        torch.testing.assert_close(restored, small(image), rtol=1e-4, atol=1e-5)
    (restored - torch.rand_like(image)).abs().mean().backward()  # type: ignore[no-untyped-call]
    assert large.head.weight.grad is not None
    learns = large.head.weight.grad.abs().sum((0, 2, 3)) > 0
    assert learns[small.head.in_channels :].float().mean() > 0.8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stem": 2}, "same stem"),
        ({"residual": False}, "same stem, levels and residual"),
        ({"up": (1, 1)}, "cannot grow into one of 1"),
        ({"encoder": ((4,),) * 3}, "cannot grow into one of"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, object], said: str) -> None:
    model = unet()
    with pytest.raises(InputError, match=said):
        grown(model, msgspec.structs.replace(model.config, **changes))
