"""Ranges are those with which the result changes least, and what is concatenated is rounded once."""

import numpy as np
import pytest

from deblur_deploy.pipeline.int8.calibrate import ranges_of_each, run_body, spanning
from deblur_deploy.pipeline.int8.quantize import quantize_body
from deblur_deploy.pipeline.int8.search import SHARES, joined, shares_by_result
from tests.photos import photo
from tests.small import CONFIGS, body
from tests.test_graph import LAYOUTS

OPS = ["Conv", "Relu", "Concat", "Transpose", "Reshape", "MaxPool"]
TILES = [*(photo(seed, 64, 64) // 8 for seed in range(7)), photo(7, 64, 64)]


@pytest.mark.parametrize("name", ["stem4", "classic"])
def test_no_share_that_is_the_same_for_all_comes_as_near_to_fp32(name):
    plain, stem, residual = body(name, "rows"), CONFIGS[name].stem, CONFIGS[name].residual
    (output,) = (value.name for value in plain.graph.output)

    def results(model):
        seen = list(run_body(model, TILES, stem, {output}))
        return np.stack([of[output] for of in seen]), np.stack([of["blocks"] for of in seen])

    exact, blocks = results(plain)
    energy = np.square(exact if residual else exact - blocks).mean((1, 2, 3, 4)) + 255.0**-2
    each = ranges_of_each(plain, TILES, stem, OPS)

    def error(shares):
        rounded, _ = results(quantize_body(plain, joined(plain, spanning(each, shares)), OPS))
        return np.mean(np.square(rounded - exact).mean((1, 2, 3, 4)) / energy)

    errors = [error(share) for share in SHARES]
    shares = shares_by_result(plain, {}, each, TILES, stem, OPS, residual=residual)
    assert {*shares.values()} <= {*SHARES}
    assert shares.keys() == each[0].data.keys()
    assert error(shares) <= min(errors)
    assert max(errors) > 1.2 * min(errors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_concatenated_is_rounded_once(layout):
    plain = body("stem4", layout)
    quantized = quantize_body(plain, joined(plain, ranges_of_each(plain, TILES[-1:], 4, OPS)[0]), OPS)
    constants = {value.name: value.float_data or value.raw_data for value in quantized.graph.initializer}
    scales = {node.input[0]: node.input[1] for node in quantized.graph.node if node.op_type == "QuantizeLinear"}
    concatenations = [node for node in plain.graph.node if node.op_type == "Concat" and node.output[0] in scales]
    assert len(concatenations) == len(CONFIGS["stem4"].up)
    for node in concatenations:
        up, skip = (constants[scales[name]] for name in node.input)
        assert up == constants[scales[node.output[0]]]
        assert skip != up
