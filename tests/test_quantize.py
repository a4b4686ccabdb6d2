"""int8 keeps close to fp32, and really is int8."""

import re

import numpy as np
import onnx
import pytest

from deblur_deploy.evaluation.quality import psnr
from deblur_deploy.pipeline.config import Int8Config
from deblur_deploy.pipeline.graph import assemble
from deblur_deploy.pipeline.int8.calibrate import find_ranges
from deblur_deploy.pipeline.int8.probe import int8_ops
from deblur_deploy.pipeline.int8.quantize import layer_name, layers, quantize_body, quantize_with_nncf
from deblur_deploy.training.validation import TorchRestorer
from tests import strangers
from tests.photos import photo
from tests.small import CONFIGS, body, network, unet
from tests.test_graph import LAYOUTS, session

TILES = [photo(seed, 96, 96) for seed in range(4)]


def quantized(name, layout, method="minmax", **how):
    ops = [op for op, runs in int8_ops(body(name, layout)).items() if runs]
    ranges = find_ranges(body(name, layout), TILES, CONFIGS[name].stem, ops, method)
    return quantize_body(body(name, layout), ranges, ops, **how)


def in_int8(whole):
    """Layers whose convolution reads uint8 activations and int8 weights."""
    made_by = {node.output[0]: node for node in whole.graph.node}
    types = {value.name: value.data_type for value in whole.graph.initializer}
    found = set()
    for node in whole.graph.node:
        sources = [made_by.get(name) for name in node.input[:2]] if node.op_type == "Conv" else []
        if sources and all(source is not None and source.op_type == "DequantizeLinear" for source in sources):
            assert types[sources[0].input[2]] == onnx.TensorProto.UINT8
            assert types[sources[1].input[0]] == onnx.TensorProto.INT8
            found.add(re.sub(r"\.weight.*", "", sources[1].input[0]))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_int8_is_close_to_fp32_and_every_convolution_is_int8(name, layout):
    model = unet(name)
    whole = assemble(quantized(name, layout), network(name), layout=layout, io="uint8")
    onnx.checker.check_model(whole, full_check=True)
    image = photo(9, 75, 91)
    assert psnr(session(whole).run(None, {"image": image[None]})[0][0], TorchRestorer(model)(image)) > 38
    assert in_int8(whole) == set(layers(body(name, layout)))
    convolutions = sum(map(len, (*CONFIGS[name].encoder, *CONFIGS[name].decoder, CONFIGS[name].up))) + 1
    assert len(layers(body(name, layout))) == convolutions


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_stay_float_or_are_quantized_alone(layout):
    every = set(layers(body("stem4", layout)))
    for chosen in ("encoder.0.0", "up.0.conv", "head"):
        for how, expected in (({"in_float": [chosen]}, every - {chosen}), ({"only": [chosen]}, {chosen})):
            whole = assemble(quantized("stem4", layout, **how), network("stem4"), layout=layout, io="uint8")
            onnx.checker.check_model(whole, full_check=True)
            assert in_int8(whole) == expected
            image = photo(9, 64, 80)
            assert psnr(session(whole).run(None, {"image": image[None]})[0][0], TorchRestorer(unet())(image)) > 38


def test_rows_read_the_image_bytes_without_a_float_in_between():
    whole = assemble(quantized("stem4", "rows"), network("stem4"), layout="rows", io="uint8")
    readers = [node for node in whole.graph.node if "bytes" in node.input]
    assert {node.op_type for node in readers} == {"DequantizeLinear"}
    assert len(readers) == 2  # the first convolution, and the residual sum
    assert not [node for node in whole.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "blocks"]


@pytest.mark.parametrize("method", ["moving_average", "percentile", "entropy"])
def test_every_method_calibrates_and_says_nothing_on_standard_output(method, capsys):
    whole = assemble(quantized("flat", "planes", method), network("flat"), layout="planes", io="uint8")
    image = photo(9, 60, 60)
    assert psnr(session(whole).run(None, {"image": image[None]})[0][0], TorchRestorer(unet("flat"))(image)) > 30
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_nncf_reads_the_image_in_its_own_scale_and_its_weights_overflow_nothing():
    pytest.importorskip("nncf")
    whole = assemble(quantize_with_nncf(body("stem4", "rows"), TILES, 4), network("stem4"), layout="rows", io="uint8")
    image = photo(9, 64, 80)
    assert psnr(session(whole).run(None, {"image": image[None]})[0][0], TorchRestorer(unet())(image)) > 38
    weights = [onnx.numpy_helper.to_array(value) for value in whole.graph.initializer if len(value.dims) == 4]
    assert len(weights) == len(layers(body("stem4", "rows")))
    assert all(of.dtype == np.int8 and np.abs(of.astype(int)).max() <= 64 for of in weights)


@pytest.mark.parametrize(
    ("field", "value"),
    [("tiles", 0), ("tile_px", 8), ("max_drop_db", -0.1), ("max_image_drop_db", 101.0), ("min_macs", 1.5),
     ("sensitivity_crops", -1), ("max_drop_db", float("nan"))],
)  # fmt: skip
def test_config_names_field_value_and_range(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}; allowed"):
        Int8Config(**{field: value})


def test_the_probe_asks_the_runtime_and_not_a_list():
    stranger = onnx.ModelProto()
    stranger.CopyFrom(body("stem4", "planes"))
    next(node for node in stranger.graph.node if node.op_type == "Relu").op_type = "Softplus"
    assert int8_ops(stranger) == {**dict.fromkeys(("Conv", "Relu", "MaxPool", "DepthToSpace", "Concat"), True),
                                  "Softplus": False}  # fmt: skip
    weight = next(value for value in stranger.graph.initializer if value.name == "head.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(np.zeros((8, 48, 1, 1), np.float32), "head.weight"))
    next(node for node in stranger.graph.node if "head.weight" in node.input).op_type = "ConvTranspose"
    assert not int8_ops(stranger)["ConvTranspose"]


@pytest.mark.parametrize(
    ("weight", "layer"),
    [("encoder.0.0.weight", "encoder.0.0"), ("q_output_up.0.weight_quantized", "up.0"),
     ("weight_net.2.weight", "weight_net.2"), ("net.weights.0.weight", "net.weights.0"), ("kernel", "kernel")],
)  # fmt: skip
def test_a_layer_is_called_as_its_weights_are(weight, layer):
    assert layer_name(weight) == layer


def test_an_operation_of_several_results_is_tried_with_all_of_them() -> None:
    nodes = """
        a, b = Split<axis = 1>(blocks, parts)
        c = Relu(a)
        d = Concat<axis = 1>(c, b)
        correction = Relu(d)"""
    ends = "float[n, 4, h, w] blocks => (float[n, 4, h, w] correction)"
    stranger = strangers.graph(nodes, ends, {"parts": np.array([2, 2])})
    found = int8_ops(stranger)
    assert found["Relu"]
    assert isinstance(found["Split"], bool)
