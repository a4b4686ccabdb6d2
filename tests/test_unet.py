"""The network is what its config says: sizes, receptive field, cost."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from deblur_deploy.training.unet import PRESETS, UNet, UNetConfig

SMALL = UNetConfig(stem=2, encoder=((4,), (6, 5)), up=(3,), decoder=((4,),))


@st.composite
def configs(draw: st.DrawFn) -> UNetConfig:
    widths = st.lists(st.integers(1, 6), min_size=1, max_size=2).map(tuple)
    levels = draw(st.integers(1, 3))
    return UNetConfig(
        stem=draw(st.integers(1, 3)),
        encoder=tuple(draw(widths) for _ in range(levels)),
        up=tuple(draw(st.integers(1, 6)) for _ in range(levels - 1)),
        decoder=tuple(draw(widths) for _ in range(levels - 1)),
        residual=draw(st.booleans()),
    )


def alive(config: UNetConfig, seed: int = 0) -> UNet:
    """All weights positive, so that no path through a ReLU is dead and every reachable pixel shows."""
    torch.manual_seed(seed)
    model = UNet(config).eval().double()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, 0.05, 0.5)
    return model


@settings(max_examples=40, deadline=None)
@given(configs(), st.integers(1, 40), st.integers(1, 40), st.integers(1, 2))
def test_any_size_keeps_its_shape(config: UNetConfig, height: int, width: int, batch: int) -> None:
    image = torch.rand(batch, 3, height, width)
    restored = UNet(config)(image)
    assert restored.shape == image.shape
    if config.residual:
        assert torch.equal(restored, image), "a new residual network is the identity"


@settings(max_examples=25, deadline=None)
@given(configs(), st.data())
def test_no_pixel_reaches_farther_than_the_receptive_radius(config: UNetConfig, data: st.DataObject) -> None:
    radius, divisor = config.receptive_radius_px, config.size_divisor
    # Rows only, and as few columns as the network takes, to stay small.
    height = divisor * (2 * radius // divisor + 3)
    row = data.draw(st.integers(0, height - 1))
    model, image = alive(config), torch.rand(1, 3, height, divisor, dtype=torch.float64)
    changed = image.clone()
    changed[:, :, row] += 1
    with torch.no_grad():
        rows = (model(image) != model(changed)).any(dim=(0, 1, 3)).nonzero().flatten()
    assert (rows - row).abs().max() <= radius


@pytest.mark.parametrize("config", [SMALL, *PRESETS.values()], ids=["small", *PRESETS])
def test_the_receptive_radius_is_not_much_too_large(config: UNetConfig) -> None:
    radius, divisor = config.receptive_radius_px, config.size_divisor
    narrow = UNetConfig(
        stem=config.stem,
        encoder=tuple((1,) * len(block) for block in config.encoder),
        up=(1,) * len(config.up),
        decoder=tuple((1,) * len(block) for block in config.decoder),
        residual=config.residual,
    )
    height = divisor * (2 * radius // divisor + 4)
    model, image = alive(narrow), torch.rand(1, 3, height, divisor, dtype=torch.float64)
    reach = 0
    for row in range(height // 2, height // 2 + divisor):
        changed = image.clone()
        changed[:, :, row] += 10
        with torch.no_grad():
            rows = (model(image) != model(changed)).any(dim=(0, 1, 3)).nonzero().flatten()
        reach = max(reach, int((rows - row).abs().max()))
    assert radius - divisor < reach <= radius


@settings(max_examples=25, deadline=None)
@given(configs())
def test_macs_per_pixel_equals_an_independent_count(config: UNetConfig) -> None:
    side = config.size_divisor * 2
    with FlopCounterMode(display=False) as counter:
        UNet(config)(torch.rand(1, 3, side, side))
    assert config.macs_per_pixel == pytest.approx(counter.get_total_flops() / 2 / side**2)


@pytest.mark.parametrize(("preset", "limit"), [("hd", 30e3), ("quality", 250e3)])
def test_presets_keep_their_budgets(preset: str, limit: float) -> None:
    assert PRESETS[preset].macs_per_pixel <= limit


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"stem": 0}, "stem is 0"),
        ({"encoder": ()}, "encoder has 0 levels"),
        ({"up": ()}, "up and decoder have 0 and 1 levels"),
        ({"decoder": ((),)}, "decoder has a level without"),
        ({"up": (9000,)}, "up has a width outside the allowed 1 to 8192"),
    ],
)
def test_a_bad_config_is_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        msgspec.structs.replace(SMALL, **change)


def test_composed_features_are_the_forward_pass() -> None:
    model, image = alive(SMALL), torch.rand(1, 3, 8, 12, dtype=torch.float64)
    features = model.features(image)
    assert [feature.shape[-2:] for feature in features] == [(2, 3), (4, 6)]
    assert torch.equal(model.composed(image, features[-1]), model(image))
