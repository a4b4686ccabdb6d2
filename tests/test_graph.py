"""The deployed graph equals the network it came from."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, parser

from deblur_deploy.contract import INPUT
from deblur_deploy.pipeline.body import Body, export_body
from deblur_deploy.pipeline.graph import BLOCKS, CORRECTION, assemble, in_half_precision, oldest_onnxruntime
from deblur_deploy.pipeline.int8.quantize import to_blocks
from deblur_deploy.pipeline.network import Network
from deblur_deploy.training.validation import TorchRestorer
from tests.photos import photo
from tests.small import CONFIGS, body, network, unet

LAYOUTS = ("planes", "rows")


def session(model):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def exported():
    made = {}

    def get(name, layout, io="uint8", half=False):
        key = (name, layout, io, half)
        if key not in made:
            inside = in_half_precision(body(name, layout)) if half else body(name, layout)
            whole = assemble(inside, network(name), layout=layout, io=io)
            onnx.checker.check_model(whole, full_check=True)
            made[key] = session(whole)
        return made[key]

    return get


@pytest.mark.parametrize("name", CONFIGS)
def test_body_is_the_network_between_its_rearrangements(name):
    model = unet(name).double()
    divisor, stem = model.config.size_divisor, model.config.stem
    image = photo(0, 3 * divisor, 5 * divisor)
    blocks = torch.from_numpy(to_blocks(image, stem)).double()
    expected = model(torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255)[0]
    copy = unet(name).double()
    levels = Body(copy)(blocks) + (blocks if model.config.residual else 0)
    height, width = levels.shape[2:]
    found = levels[0].reshape(stem, stem, 3, height, width).permute(2, 3, 0, 4, 1).reshape(expected.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # to_blocks is float32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=12, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), batch=st.integers(1, 3))
def test_bytes_in_bytes_out_at_any_size(exported, name, layout, height, width, batch):
    images = np.stack([photo(seed, height, width) for seed in range(batch)])
    reference = TorchRestorer(unet(name))
    found = exported(name, layout).run(None, {"image": images})[0]
    expected = np.stack([reference(image) for image in images])
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= max(1, 1e-3 * difference.size)


@pytest.mark.parametrize("name", CONFIGS)
def test_floats_in_floats_out(exported, name):
    image = torch.rand(2, 3, 37, 51)
    found = exported(name, "planes", "float32").run(None, {"image": image.numpy()})[0]
    np.testing.assert_allclose(found, unet(name)(image).clamp(0, 1).detach().numpy(), atol=2e-6)


@pytest.mark.parametrize("value", [0, 255, None])
def test_half_precision_stays_within_a_level(exported, value):
    image = photo(0, 33, 47) if value is None else np.full((33, 47, 3), value, np.uint8)
    halves = exported("stem4", "planes", half=True).run(None, {"image": image[None]})[0][0]
    assert np.abs(halves.astype(int) - TorchRestorer(unet())(image)).max() <= 1


def test_float_images_have_no_rows_layout():
    with pytest.raises(ValueError, match="planes"):
        assemble(body("stem2", "rows"), network("stem2"), layout="rows", io="float32")


def test_export_leaves_the_network_as_it_was():
    model = unet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_body(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_what_only_a_branch_reads_stays():
    ends = "float[n,3,h,w]"
    branches = {
        "then_branch": f"one () => ({ends} y) {{ y = Mul({BLOCKS}, scale) }}",
        "else_branch": f"other () => ({ends} z) {{ z = Identity({BLOCKS}) }}",
    }
    graphs = {name: parser.parse_graph(text) for name, text in branches.items()}
    branching = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 18]> body ({ends} {BLOCKS}) => ({ends} {CORRECTION})
        <bool yes = {{1}}, float scale = {{0.5}}> {{ {CORRECTION} = Identity({BLOCKS}) }}"""
    )
    branching.graph.node[0].CopyFrom(helper.make_node("If", ["yes"], [CORRECTION], **graphs))
    facts = Network(size_divisor=1, receptive_radius_px=0, macs_per_pixel=0, parameters=0)
    run = session(assemble(branching, facts, layout="planes", io="uint8"))
    image = np.full((1, 4, 5, 3), 100, np.uint8)
    np.testing.assert_array_equal(run.run(None, {INPUT: image})[0], 50)


@pytest.mark.parametrize(
    ("opset", "oldest"), [(18, "1.15"), (19, "1.15"), (20, "1.17"), (21, "1.18"), (23, ort.__version__)]
)
def test_a_newer_set_of_operators_asks_for_a_newer_onnxruntime(opset, oldest):
    one = onnx.ModelProto(opset_import=[helper.make_opsetid("", opset)])
    assert oldest_onnxruntime(one) == oldest
