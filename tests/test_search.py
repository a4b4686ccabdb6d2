"""The share of the tiles that a range holds is the one with which the result changes least."""

import numpy as np

from deblur_deploy.pipeline.graph import export_body
from deblur_deploy.pipeline.int8.calibrate import ranges_of_each, run_body, spanning
from deblur_deploy.pipeline.int8.quantize import quantize_body
from deblur_deploy.pipeline.int8.search import SHARES, ranges_by_result
from deblur_deploy.training.unet import UNet, UNetConfig

CONFIG = UNetConfig(encoder=((8, 6),), up=(), decoder=())
OPS = ["Conv", "Relu"]


def test_no_other_share_comes_nearer_to_fp32():
    unet = UNet(CONFIG).eval()
    unet.head.weight.data.normal_(std=0.1)
    body, rng = export_body(unet, "planes"), np.random.default_rng(0)
    tiles = [(rng.random((32, 32, 3)) * most).astype(np.uint8) for most in (40, 60, 80, 100, 255)]

    def result(model):
        (name,) = (value.name for value in model.graph.output)
        return np.array([seen[name] for seen in run_body(model, tiles, 1, {name})])

    exact = result(body)
    energy = np.square(exact).mean((1, 2, 3, 4)) + (1 / 255) ** 2

    def error(ranges):
        return float(np.mean(np.square(result(quantize_body(body, ranges, OPS)) - exact).mean((1, 2, 3, 4)) / energy))

    each = ranges_of_each(body, tiles, 1, OPS)
    assert error(ranges_by_result(body, body, tiles, 1, OPS)) == min(error(spanning(each, s)) for s in SHARES)
    widest, middle = spanning(each, 1.0), spanning(each, 0.5)
    assert any(widest[name].range_value[1] > 1.5 * middle[name].range_value[1] for name in widest.keys())  # noqa: SIM118
