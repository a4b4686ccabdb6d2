"""Weights that are rounded together lose less where inputs go together, and nothing more where they do not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from deblur_deploy.pipeline.config import Layout
from deblur_deploy.pipeline.graph import export_body
from deblur_deploy.pipeline.int8.calibrate import find_ranges
from deblur_deploy.pipeline.int8.quantize import quantize_body
from deblur_deploy.pipeline.int8.rounding import round_weights, rounded_weights, with_weights
from deblur_deploy.training.unet import UNet, UNetConfig

CONFIG = UNetConfig(stem=2, encoder=((8, 6), (10,)), up=(7,), decoder=((6,),))
TILES = list(np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8))


def nearest(weights: np.ndarray) -> np.ndarray:
    step = np.abs(weights).max(1, keepdims=True) / 127
    return np.rint(weights / step) * step


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_the_largest_weight_stays_and_all_lie_on_its_grid(outputs: int, inputs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(outputs, inputs)).astype(np.float32)
    values = rng.normal(size=(inputs, 2 * inputs)) + rng.normal(size=2 * inputs)
    found = round_weights(weights, values @ values.T)
    step = np.abs(weights).max(1) / 127
    whole = found / step[:, None]
    np.testing.assert_allclose(whole, np.rint(whole), atol=1e-3)
    assert np.abs(whole).max() < 127.01
    rows = np.arange(outputs), np.abs(weights).argmax(1)
    np.testing.assert_allclose(found[rows], weights[rows], rtol=1e-6)


def test_values_that_have_nothing_in_common_are_rounded_to_the_nearest() -> None:
    weights = np.random.default_rng(0).normal(size=(5, 30)).astype(np.float32)
    np.testing.assert_allclose(round_weights(weights, np.diag(np.arange(1.0, 31.0))), nearest(weights), rtol=1e-5)


@pytest.mark.parametrize("common", [1, 10])
def test_values_that_go_together_lose_many_times_less(common: int) -> None:
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(8, 200)).astype(np.float32)
    values = rng.normal(size=(200, 1000)) + common * rng.normal(size=1000)

    def lost(rounded: np.ndarray) -> float:
        return float(np.square((rounded - weights) @ values).sum())

    assert lost(round_weights(weights, values @ values.T)) < lost(nearest(weights)) / (1.5 * common)


def test_dead_inputs_and_dead_outputs_are_no_trouble() -> None:
    weights = np.array([[0, 0, 0], [1, -2, 0.3]], np.float32)
    for moments in (np.zeros((3, 3)), np.diag([1.0, 0.0, 2.0])):
        found = round_weights(weights, moments)
        assert not found[0].any()
        np.testing.assert_allclose(found[1:], nearest(weights[1:]), rtol=1e-5)


@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_who_quantizes_them_rounds_nothing_more(layout: Layout) -> None:
    body = export_body(UNet(CONFIG).eval(), layout)
    weights = rounded_weights(body, TILES, CONFIG.stem)
    ranges = find_ranges(body, TILES, CONFIG.stem, ["Conv"], "minmax")
    quantized = quantize_body(with_weights(body, weights), ranges, ["Conv"])
    constants = {value.name: numpy_helper.to_array(value) for value in quantized.graph.initializer}
    assert len(weights) == sum(node.op_type == "Conv" for node in body.graph.node)
    for name, values in weights.items():
        step = constants[f"{name}_scale"].reshape(-1, 1, 1, 1)
        np.testing.assert_allclose(constants[f"{name}_quantized"] * step, values, atol=step.max() * 1e-3)
