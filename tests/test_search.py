"""The share of the tiles that a range holds is the one with which the result changes least."""

import numpy as np
import pytest

from deblur_deploy.pipeline.int8.calibrate import ranges_of_each, run_body, spanning
from deblur_deploy.pipeline.int8.quantize import quantize_body
from deblur_deploy.pipeline.int8.search import SHARES, share_by_result
from tests.photos import photo
from tests.small import CONFIGS, body

OPS = ["Conv", "Relu"]
DARK = [photo(seed, 64, 64) // 8 for seed in range(9)]
BRIGHT = [photo(seed, 64, 64) for seed in range(9)]


def share(name, tiles):
    each = ranges_of_each(body(name, "rows"), tiles, CONFIGS[name].stem, OPS)
    residual = CONFIGS[name].residual
    return share_by_result(
        body(name, "rows"), body(name, "rows"), each, tiles, CONFIGS[name].stem, OPS, residual=residual
    )


@pytest.mark.parametrize("name", ["stem4", "classic"])
def test_the_result_is_nearest_to_fp32(name):
    tiles, plain, stem = [*DARK, BRIGHT[0]], body(name, "rows"), CONFIGS[name].stem
    (output,) = (value.name for value in plain.graph.output)

    def results(model):
        seen = list(run_body(model, tiles, stem, {output}))
        return np.stack([of[output] for of in seen]), np.stack([of["blocks"] for of in seen])

    exact, blocks = results(plain)
    change = exact if CONFIGS[name].residual else exact - blocks
    energy = np.square(change).mean((1, 2, 3, 4)) + 255.0**-2
    each = ranges_of_each(plain, tiles, stem, OPS)
    errors = {
        at: np.mean(
            np.square(results(quantize_body(plain, spanning(each, at), OPS))[0] - exact).mean((1, 2, 3, 4)) / energy
        )
        for at in SHARES
    }
    assert max(errors.values()) > 1.2 * min(errors.values())
    assert share(name, tiles) == min(errors, key=errors.__getitem__)


def test_equal_tiles_need_everything_and_what_many_need_is_held():
    assert spanning(ranges_of_each(body("stem4", "rows"), DARK, 4, OPS), 1.0)["blocks"].range_value[1] < 0.2
    assert share("stem4", [*DARK[:2], *BRIGHT]) >= 0.8
