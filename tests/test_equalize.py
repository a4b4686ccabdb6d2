"""Equalizing channels changes no result, and gives them like ranges."""

import numpy as np
import onnxruntime as ort
import pytest
import torch

from deblur_deploy.pipeline.body import export_body
from deblur_deploy.pipeline.config import Layout
from deblur_deploy.pipeline.graph import BLOCKS
from deblur_deploy.pipeline.int8.calibrate import run_body
from deblur_deploy.pipeline.int8.equalize import channel_ranges, equalized, scalable
from deblur_deploy.pipeline.rows import in_rows
from deblur_deploy.training.unet import UNet, UNetConfig
from tests import strangers

CONFIGS = {
    "three levels": UNetConfig(stem=2, encoder=((8, 6), (10, 12), (9,)), up=(7, 5), decoder=((6, 8), (4,))),
    "one level": UNetConfig(encoder=((8, 6),), up=(), decoder=()),
}
TILES = list(np.random.default_rng(0).integers(0, 256, (4, 32, 48, 3), dtype=np.uint8))


def uneven(config: UNetConfig) -> UNet:
    torch.manual_seed(0)
    unet = UNet(config).eval()
    torch.nn.init.normal_(unet.head.weight, std=0.1)
    for module in unet.encoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data *= torch.logspace(-1, 1, module.out_channels)[:, None, None, None]
    return unet


@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_function_stays_and_ranges_become_one(config: UNetConfig, layout: Layout) -> None:
    unet = uneven(config)
    plain = export_body(unet)
    ranges = channel_ranges(plain, TILES, config.stem)
    before, after = plain, equalized(plain, ranges)
    if layout == "rows":
        before, after = (in_rows(model, 64)[0] for model in (before, after))
    blocks = np.random.default_rng(1).random((1, 3 * config.stem**2, 16, 24), dtype=np.float32)
    one, two = (
        ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {BLOCKS: blocks})
        for model in (before, after)
    )
    np.testing.assert_allclose(one[0], two[0], rtol=1e-4, atol=1e-4 * np.abs(one[0]).max())
    activations = [node.output[0] for node in after.graph.node if node.op_type == "Relu"]
    for model, even in ((before, False), (after, True)):
        seen = list(run_body(model, TILES, config.stem, activations))
        for name in activations:
            held = np.quantile([of[name][0].max((1, 2)) for of in seen], 0.8, axis=0)
            assert even == (held.max() == pytest.approx(1, rel=1e-3)), name
    assert all(values.max() / values.min() <= 5.001 for values in ranges.values())


def test_a_network_that_never_fires_is_left_alone() -> None:
    unet = uneven(CONFIGS["one level"])
    for parameter in unet.parameters():
        parameter.data.zero_()
    ranges = channel_ranges(export_body(unet), TILES, 1)
    assert ranges
    assert all((values == 1).all() for values in ranges.values())


def test_a_convolution_of_lines_is_left_alone() -> None:
    text = "a = Conv(x, w)\nb = Relu(a)\ny = Conv(b, w)"
    weights = {"w": np.ones((2, 2, 1), np.float32)}
    assert scalable(strangers.graph(text, "float[n,2,l] x => (float[n,2,l] y)", weights)) == []
