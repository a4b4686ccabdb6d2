"""What is concatenated is rounded once."""

import pytest

from deblur_deploy.pipeline.int8.calibrate import ranges_of_each
from deblur_deploy.pipeline.int8.concat import joined
from deblur_deploy.pipeline.int8.quantize import quantize_body
from tests.photos import photo
from tests.small import CONFIGS, body
from tests.test_graph import LAYOUTS

OPS = ["Conv", "Relu", "Concat", "Transpose", "Reshape", "MaxPool"]
TILE = photo(7, 64, 64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_concatenated_is_rounded_once(layout):
    plain = body("stem4", layout)
    quantized = quantize_body(plain, joined(plain, ranges_of_each(plain, [TILE], 4, OPS)[0]), OPS)
    constants = {value.name: value.float_data or value.raw_data for value in quantized.graph.initializer}
    scales = {node.input[0]: node.input[1] for node in quantized.graph.node if node.op_type == "QuantizeLinear"}
    concatenations = [node for node in plain.graph.node if node.op_type == "Concat" and node.output[0] in scales]
    assert len(concatenations) == len(CONFIGS["stem4"].up)
    for node in concatenations:
        up, skip = (constants[scales[name]] for name in node.input)
        assert up == constants[scales[node.output[0]]]
        assert skip != up
