"""Tuned ranges and biases bring int8 nearer to fp32 than any share of the tiles, in either layout."""

from functools import cache

import numpy as np
import pytest
import torch
from onnx.numpy_helper import to_array
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import TensorsData

from deblur_deploy.pipeline.body import export_body
from deblur_deploy.pipeline.graph import CORRECTION
from deblur_deploy.pipeline.int8.calibrate import ranges_of_each, run_body, spanning, to_blocks
from deblur_deploy.pipeline.int8.concat import joined, tied
from deblur_deploy.pipeline.int8.quantize import quantize_body
from deblur_deploy.pipeline.int8.tuning import _FakeQuantized, _Rounded, affordable, tuned
from deblur_deploy.pipeline.network import EVERYTHING_PX, Network
from deblur_deploy.pipeline.nodes import with_constants
from deblur_deploy.pipeline.rows import in_rows
from tests.photos import photo
from tests.small import CONFIGS, unet

OPS = ["Conv", "Relu", "Concat", "Transpose", "Reshape", "MaxPool", "DepthToSpace"]
TILES = [photo(seed, 64, 64) // (1 if seed % 8 == 7 else 8) for seed in range(24)]


def results(model, stem):
    """In levels, as an image has them."""
    each = [seen[CORRECTION] for seen in run_body(model, TILES, stem, {CORRECTION})]
    return np.rint(np.concatenate(each) * 255) / 255


def quantized(plain, ranges, residual):
    # Weights of 63 steps, as ours have: of 127, two products are too much for the 16 bits of processors without VNNI.
    read = {node.input[1] for node in plain.graph.node if node.op_type == "Conv"}
    weights = {one.name: to_array(one) for one in plain.graph.initializer if one.name in read}
    steps = {name: np.abs(weight).max((1, 2, 3)) / np.float32(63) + 1e-12 for name, weight in weights.items()}
    return quantize_body(plain, joined(plain, ranges), OPS, steps=steps, residual=residual)


def with_biases(plain, found):
    return with_constants(plain, {f"{layer}.bias": of for layer, of in found.biases.items()})


@cache
def body(name, layout):
    """Of a network that changes an image by many levels."""
    model = unet(name)
    if CONFIGS[name].residual:
        model.head.weight.data *= 20
    else:
        model.head.bias.data += 0.5
    plain = export_body(model)
    return in_rows(plain, 64)[0] if layout == "rows" else plain


@pytest.mark.parametrize("name", ["stem4", "classic"])
def test_no_share_of_the_tiles_comes_as_near_to_fp32(name):
    config = CONFIGS[name]
    plain, stem, residual = body(name, "planes"), config.stem, config.residual
    exact = results(plain, stem)
    blocks = np.concatenate([to_blocks(tile, stem) for tile in TILES])
    energy = np.square(exact if residual else exact - blocks).mean((1, 2, 3)) + 255.0**-2

    def error(model):
        return np.sqrt(np.square(results(model, stem) - exact).mean((1, 2, 3)) / energy).mean()

    each = ranges_of_each(plain, TILES, stem, OPS)
    errors = [error(quantized(plain, spanning(each, share), residual)) for share in np.linspace(0.2, 1, 5)]
    start = quantized(plain, spanning(each, 0.7), residual)
    found = tuned(plain, start, TILES, stem, tied(plain), residual=residual)
    spans = {name: of.range_value for name, of in spanning(each, 0.7).items()} | found.ranges
    assert set(found.ranges) >= {"relu", "cat"}
    assert CORRECTION not in found.ranges
    ranges = TensorsData(CalibrationMethod.MinMax, spans)
    best = error(quantized(with_biases(plain, found), ranges, residual))
    assert best < 0.97 * min(errors)
    # The other layout has other operations, and the same arithmetic.
    rows, _ = in_rows(with_biases(plain, found), 64)
    spans = {name: of.range_value for name, of in spanning(ranges_of_each(rows, TILES, stem, OPS), 0.7).items()}
    ranges = TensorsData(CalibrationMethod.MinMax, spans | found.ranges)
    assert error(quantized(rows, ranges, residual)) == pytest.approx(best, rel=0.03)


@pytest.mark.parametrize(
    ("about", "side"),
    [
        ({"ours": True, "macs_per_pixel": 1e7}, 256),
        ({}, 256),
        ({"sees_everything": True}, 128),
        ({"sees_everything": True, "size_divisor": 256}, 256),
        ({"macs_per_pixel": 2e5}, 64),
        ({"values_per_pixel": 1e4}, 64),
        ({"macs_per_pixel": 2e5, "least_px": 128}, 0),
    ],
)
def test_the_networks_of_others_are_tuned_on_as_much_as_is_worth_its_time(about, side):
    facts = {"size_divisor": 8, "receptive_radius_px": EVERYTHING_PX, "macs_per_pixel": 1e3, "parameters": 1}
    tiles = affordable([photo(0, 256, 256)], Network(**facts | about))
    assert [tile.shape for tile in tiles] == [(side, side, 3)] * bool(side)


@pytest.mark.parametrize("name", ["stem4", "classic"])
def test_the_fake_is_what_the_runtime_computes(name):
    config = CONFIGS[name]
    plain = body(name, "planes")
    ranges = spanning(ranges_of_each(plain, TILES, config.stem, OPS), 0.9)
    real = quantized(plain, ranges, config.residual)
    blocks = torch.from_numpy(np.concatenate([to_blocks(tile, config.stem) for tile in TILES]))
    with torch.no_grad():
        fake = _FakeQuantized(real, tied(plain))(blocks).numpy()
    steps = (fake - results(real, config.stem)) * 255
    # The runtime rounds biases too, so that now and then a value falls to the other side.
    assert np.mean(np.abs(steps) > 0.5) < 0.05
    assert np.abs(steps).max() < 3.5


def test_a_range_that_cuts_values_off_is_told_to_widen():
    x, step = torch.tensor([-3.0, 0.3, 0.6, 700.0], requires_grad=True), torch.tensor(1.0, requires_grad=True)
    y = _Rounded.apply(x, step, 2)
    assert y.tolist() == [-2, 0, 1, 253]
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]
    assert step.grad.item() == pytest.approx(-2 + (0 - 0.3) + (1 - 0.6) + 253)


@pytest.mark.parametrize(("costs", "wider"), [(0.0, 99), (0.04, 2), (0.2, 0)])
def test_ranges_get_room_from_the_result_on_until_it_costs_too_much(costs, wider):
    plain = body("stem4", "planes")
    ranges = spanning(ranges_of_each(plain, TILES, 4, OPS), 0.7)
    network = _FakeQuantized(quantized(plain, ranges, residual=True), tied(plain))
    before = {name: scale.exp().item() for name, scale in network.scales.items()}

    def grown():
        return [scale.exp().item() / before[name] for name, scale in network.scales.items()]

    network.give_room(lambda: 1 + costs * sum(share > 1.5 for share in grown()))
    wider = min(wider, len(before))
    assert grown() == pytest.approx([1] * (len(before) - wider) + [2] * wider)
