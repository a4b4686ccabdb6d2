"""Weights that are rounded together lose less where inputs go together, and nothing more where they do not."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from deblur_deploy.pipeline.config import Layout
from deblur_deploy.pipeline.int8.calibrate import find_ranges, run_body
from deblur_deploy.pipeline.int8.quantize import layer_name, layers, quantize_body
from deblur_deploy.pipeline.int8.quantizer import Quantizer
from deblur_deploy.pipeline.int8.rounding import Weights, _columns, input_moments, round_weights, rounded_weights
from deblur_deploy.pipeline.nodes import with_constants
from tests import strangers
from tests.photos import photo
from tests.small import CONFIGS, body, exporter
from tests.test_graph import LAYOUTS

TILES = [cv2.GaussianBlur(photo(seed, 96, 96), None, 1) for seed in range(4)]


def in_pairs(whole: np.ndarray) -> np.ndarray:
    """The sums of the absolute values of the weights that are multiplied together: channels last, two by two."""
    last = np.abs(whole.transpose(0, 2, 3, 1).reshape(len(whole), -1))
    return np.pad(last, ((0, 0), (0, last.shape[1] % 2))).reshape(len(whole), -1, 2).sum(2)


def values_of(weights: Weights) -> dict[str, np.ndarray]:
    return {name: of.values for name, of in weights.items()}


def nearest(weights: np.ndarray) -> np.ndarray:
    return round_weights(weights, np.eye(weights[0].size)).values


def filters(rng: np.random.Generator, outputs: int, inputs: int, side: int = 1) -> np.ndarray:
    return rng.normal(size=(outputs, inputs, side, side)).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 20), st.sampled_from([1, 3]), st.integers(0, 2**32 - 1))
def test_all_lie_on_a_grid_and_no_pair_overflows_16_bits(outputs: int, inputs: int, side: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = filters(rng, outputs, inputs, side)
    values = rng.normal(size=(weights[0].size, 2 * weights[0].size)) + rng.normal(size=2 * weights[0].size)
    found = round_weights(weights, values @ values.T)
    whole = found.values / found.step[:, None, None, None]
    np.testing.assert_allclose(whole, np.rint(whole), atol=1e-3)
    assert np.abs(whole).max() < 127.01
    assert 255 * np.rint(in_pairs(whole)).max() <= 2**15 - 1
    # The grid is no coarser than that needs.
    to_nearest = np.abs(nearest(weights) / found.step[:, None, None, None])
    assert ((in_pairs(to_nearest).max(1) > 126) | (to_nearest.max((1, 2, 3)) > 126)).all()


def test_the_kernels_of_this_processor_lose_no_sum(tmp_path: Path) -> None:
    path = exporter(tmp_path).int8(Quantizer(exporter(tmp_path), TILES).body("result", "rows"), "rows").path
    white = np.full((1, 64, 64, 3), 255, np.uint8)
    image = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (1, 64, 64, 3))
    results = []
    for exact in ("0", "1"):
        options = ort.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", exact)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        results.append([session.run(None, {"image": of})[0] for of in (white, image)])
    np.testing.assert_array_equal(*results)


def test_values_that_have_nothing_in_common_are_rounded_to_the_nearest() -> None:
    weights = filters(np.random.default_rng(0), 5, 30)
    found = round_weights(weights, np.diag(np.arange(1.0, 31.0)))
    assert (np.abs(found.values - weights) <= 0.501 * found.step[:, None, None, None]).all()


@pytest.mark.parametrize(("common", "times"), [(1, 1.5), (10, 15)])
def test_values_that_go_together_lose_less(common: int, times: float) -> None:
    rng = np.random.default_rng(1)
    weights = filters(rng, 8, 200)
    values = rng.normal(size=(200, 1000)) + common * rng.normal(size=1000)

    def lost(rounded: np.ndarray) -> float:
        return float(np.square((rounded - weights)[..., 0, 0] @ values).sum())

    assert lost(round_weights(weights, values @ values.T).values) < lost(nearest(weights)) / times


def test_dead_inputs_and_dead_outputs_are_no_trouble() -> None:
    weights = np.array([[0, 0, 0], [1, -2, 0.3]], np.float32)[..., None, None]
    for moments in (np.zeros((3, 3)), np.diag([1.0, 0.0, 2.0])):
        found = round_weights(weights, moments).values
        assert not found[0].any()
        np.testing.assert_allclose(found[1:], nearest(weights[1:]), rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_who_quantizes_them_rounds_nothing_more(name: str, layout: Layout) -> None:
    weights = rounded_weights(body(name, layout), input_moments(body(name, "rows"), TILES, CONFIGS[name].stem))
    ranges = find_ranges(body(name, layout), TILES, CONFIGS[name].stem, ["Conv"], "minmax")
    steps = {of: weights[of].step for of in weights}
    quantized = quantize_body(with_constants(body(name, layout), values_of(weights)), ranges, ["Conv"], steps=steps)
    constants = {value.name: numpy_helper.to_array(value) for value in quantized.graph.initializer}
    assert {layer_name(weight) for weight in weights} == {*layers(body(name, layout))}
    for weight, of in weights.items():
        np.testing.assert_array_equal(constants[f"{weight}_scale"], of.step)
        whole = constants[f"{weight}_quantized"].astype(np.float32)
        np.testing.assert_allclose(whole * of.step[:, None, None, None], of.values, rtol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_network_errs_less_than_with_weights_rounded_to_the_nearest(name: str) -> None:
    plain, stem = body(name, "rows"), CONFIGS[name].stem
    (output,) = (value.name for value in plain.graph.output)
    unseen = [cv2.GaussianBlur(photo(seed, 96, 96), None, 2) for seed in (11, 12)]

    def error(weights: Weights) -> float:
        results = [
            [seen[output] for seen in run_body(model, unseen, stem, {output})]
            for model in (plain, with_constants(plain, values_of(weights)))
        ]
        return float(np.square(np.subtract(*results)).mean())

    together = rounded_weights(plain, input_moments(plain, TILES, stem))
    alone = rounded_weights(plain, None)
    assert error(together) < error(alone) / 2


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize(("kernel", "stride", "dilation", "padding"), [(3, 1, 1, 1), ((1, 5), 2, 1, 0), (3, 1, 2, 2)])
def test_moments_are_those_of_what_a_convolution_reads(
    groups: int, kernel: int | tuple[int, int], stride: int, dilation: int, padding: int
) -> None:
    values = torch.randn(1, 6, 9, 11)
    conv = torch.nn.Conv2d(6, 12, kernel, stride, padding, dilation, groups, bias=False)
    attributes = {"group": groups, "strides": [stride] * 2, "dilations": [dilation] * 2, "pads": [padding] * 4}
    node = helper.make_node("Conv", ["values", "weight"], ["given"], **attributes)
    columns = _columns(values.numpy(), node, tuple(conv.weight.shape[2:]), 1000, np.random.default_rng(1))
    expected = conv(values)[0].flatten(1)
    found = (conv.weight.reshape(groups, 12 // groups, -1) @ torch.from_numpy(columns)).flatten(0, 1)
    torch.testing.assert_close(found.sort(1).values, expected.sort(1).values)


def test_moments_are_those_of_what_a_matrix_reads() -> None:
    values = np.random.default_rng(0).normal(size=(1, 4, 5, 6)).astype(np.float32)
    node = helper.make_node("MatMul", ["values", "weight"], ["given"])
    columns = _columns(values, node, (), 1000, np.random.default_rng(1))
    np.testing.assert_allclose(columns[0] @ columns[0].T, np.einsum("abci,abcj->ij", values, values), rtol=1e-5)
    assert _columns(values, node, (), 10, np.random.default_rng(1)).shape == (1, 6, 10)


def test_layers_in_float_keep_their_weights(tmp_path: Path) -> None:
    quantizer = Quantizer(exporter(tmp_path), TILES)
    plain = {value.name: numpy_helper.to_array(value) for value in quantizer.plain("rows").graph.initializer}
    for how in ({"in_float": ["encoder.1.0", "head"]}, {"only": ["up.0.conv"]}):
        made = quantizer.body("minmax", "rows", **how)  # type: ignore[arg-type]
        kept = {value.name for value in made.graph.initializer} & {name for name in plain if name.endswith(".weight")}
        expected = how.get("in_float") or {*layers(body("stem4", "rows"))} - {"up.0.conv"}
        assert {layer_name(name) for name in kept} == {*expected}
        for value in made.graph.initializer:
            if value.name in kept:
                assert np.array_equal(numpy_helper.to_array(value), plain[value.name])


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        ('Conv<kernel_shape = [3, 3], auto_pad = "SAME_UPPER">(x, w)', (4, 3, 3, 3)),
        ("Conv<kernel_shape = [3], pads = [1, 1]>(x, w)", (4, 3, 3)),
        ("Conv<kernel_shape = [3, 3, 3]>(x, w)", (4, 3, 3, 3, 3)),
    ],
)
def test_layers_of_every_kind_stay_within_16_bits(node: str, shape: tuple[int, ...]) -> None:
    large = np.ones(shape, np.float32)
    model = strangers.graph(f"y = {node}", "float[1, 3, h, w] x => (float[1, 4, a, b] y)", {"w": large})
    found = rounded_weights(model, {})["w"]
    assert found.values.shape == shape
    assert (np.abs(np.rint(found.values / found.step.reshape(-1, *[1] * (len(shape) - 1)))) <= 64).all()
