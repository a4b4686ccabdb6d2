"""int8 keeps close to fp32, and really is int8."""

from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deblur_deploy.errors import InputError
from deblur_deploy.evaluation.quality import psnr
from deblur_deploy.pipeline.config import Int8Config
from deblur_deploy.pipeline.graph import assemble
from deblur_deploy.pipeline.quantize import calibration_tiles, quantize_body, to_blocks
from deblur_deploy.training.validation import TorchRestorer
from tests.photos import photo
from tests.small import CONFIGS, body, unet
from tests.test_graph import LAYOUTS, session

HOW = Int8Config(tiles=4, tile_px=64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_int8_is_close_to_fp32_and_every_convolution_is_int8(name, layout):
    model = unet(name)
    photos = [photo(seed, 80, 96) for seed in range(4)]
    quantized = quantize_body(body(name, layout), photos, model.config, layout, HOW)
    whole = assemble(quantized, model.config, layout=layout, io="uint8")
    onnx.checker.check_model(whole, full_check=True)
    image = photo(9, 75, 91)
    assert psnr(session(whole).run(None, {"image": image[None]})[0][0], TorchRestorer(model)(image)) > 38
    made_by = {node.output[0]: node for node in whole.graph.node}
    read_by = Counter(node.op_type for node in whole.graph.node if node.op_type == "Conv")
    types = {value.name: value.data_type for value in whole.graph.initializer}
    for node in whole.graph.node:
        if node.op_type == "Conv":
            sources = [made_by[name] for name in node.input[:2]]
            assert [source.op_type for source in sources] == ["DequantizeLinear"] * 2
            assert types[sources[0].input[2]] == onnx.TensorProto.UINT8
            assert types[sources[1].input[0]] == onnx.TensorProto.INT8
    assert read_by["Conv"] == sum(map(len, (*CONFIGS[name].encoder, *CONFIGS[name].decoder, CONFIGS[name].up))) + 1


def test_rows_read_the_image_bytes_without_a_float_in_between():
    model = unet()
    quantized = quantize_body(body("stem4", "rows"), [photo(0, 64, 64)], model.config, "rows", HOW)
    whole = assemble(quantized, model.config, layout="rows", io="uint8")
    readers = [node for node in whole.graph.node if "bytes" in node.input]
    assert {node.op_type for node in readers} == {"DequantizeLinear"}
    assert len(readers) == 2  # the first convolution, and the residual sum
    assert not [node for node in whole.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "blocks"]


@given(height=st.integers(16, 200), width=st.integers(16, 200))
def test_calibration_tiles_fit_the_network(height, width):
    tiles = calibration_tiles([photo(0, height, width)], 16, Int8Config(tiles=3, tile_px=100))
    assert len(tiles) == 3
    assert {tile.shape for tile in tiles} == {tiles[0].shape}
    assert tiles[0].shape[0] == min(96, min(height, width) // 16 * 16)


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_every_method_takes_photographs_of_different_sizes(method, capsys):
    photos = [photo(0, 64, 100), photo(1, 90, 70)]
    how = Int8Config(tiles=4, tile_px=64, method=method)
    quantized = quantize_body(body("flat", "planes"), photos, CONFIGS["flat"], "planes", how)
    assert any(node.op_type == "QuantizeLinear" for node in quantized.graph.node)
    assert capsys.readouterr().out == ""


def test_photographs_too_small_to_calibrate_on_are_refused():
    with pytest.raises(InputError, match="16 px that"):
        calibration_tiles([photo(0, 15, 200)], 16, HOW)


@pytest.mark.parametrize(("field", "value"), [("tiles", 0), ("tile_px", 8)])
def test_config_names_field_value_and_range(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}; allowed"):
        Int8Config(**{field: value})


def test_blocks_are_what_pixel_unshuffle_gives_with_colours_last():
    image = photo(0, 8, 12)
    blocks = to_blocks(image, 4)[0]
    assert blocks.shape == (48, 2, 3)
    np.testing.assert_allclose(blocks[(1 * 4 + 2) * 3 + 1, 1, 2] * 255, image[4 + 1, 8 + 2, 1], rtol=1e-6)
