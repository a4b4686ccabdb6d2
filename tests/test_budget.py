"""int8 keeps its budget, gives layers back until it does, or says why it cannot."""

import json
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import get_args

import numpy as np
import onnx
import pytest

from deblur_deploy.errors import InputError, VerificationError
from deblur_deploy.evaluation.quality import Pair
from deblur_deploy.pipeline.config import Int8Config, Method
from deblur_deploy.pipeline.export import Exporter
from deblur_deploy.pipeline.int8.budget import _affordable, quantize
from deblur_deploy.pipeline.int8.coverage import int8_share
from deblur_deploy.pipeline.int8.quantize import layers
from deblur_deploy.pipeline.int8.quantizer import NNCF
from deblur_deploy.pipeline.int8.search import Trial, fastest, return_layers
from deblur_deploy.pipeline.int8.sensitivity import Sensitivity, return_order
from deblur_deploy.pipeline.network import Network
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.runtime.providers import find
from tests import small
from tests.photos import photo
from tests.small import body

PHOTOS = {str(seed): photo(seed, 80, 96) for seed in range(3)}
HOW = Int8Config(
    method="minmax", tiles=3, tile_px=64, max_drop_db=100, max_image_drop_db=100, sensitivity_crops=1, search="one"
)


@pytest.fixture(scope="module")
def exporter(tmp_path_factory):
    return small.exporter(tmp_path_factory.mktemp("budget"))


@pytest.fixture(scope="module")
def fp32(exporter):
    return exporter.fp32()


@pytest.fixture(scope="module")
def pairs(fp32):
    """Their truth is fp32's own result, so whatever int8 changes is a loss."""
    with DeblurEngine(fp32.path, provider="cpu") as engine:
        return [Pair(name=f"p{s}", blurred=photo(s, 90, 70), sharp=engine(photo(s, 90, 70))) for s in (7, 8)]


@pytest.fixture(scope="module")
def generous(exporter, fp32, pairs):
    return quantize(exporter, fp32, PHOTOS, pairs, HOW)


def test_the_first_method_within_the_budget_is_taken_with_everything_that_was_found(generous, pairs):
    artifacts, found = generous
    assert [artifact.path.name for artifact in artifacts] == ["int8.onnx", "int8-planes.onnx"]
    assert found.trials == [found.chosen]
    assert (found.chosen.method, found.chosen.macs, found.float_ops) == ("minmax", 1, {})
    assert [row.layer for row in found.sensitivity] == list(layers(body("stem4", "rows")))
    assert sum(row.macs for row in found.sensitivity) == pytest.approx(1)
    with DeblurEngine(artifacts[0].path, provider="cpu") as engine:
        whole = np.square(engine(pairs[0].blurred).astype(float) - pairs[0].sharp).mean()
    # Errors far below a level change some values by one: as many as the worst layer, at most those of all layers.
    errors = [row.error for row in found.sensitivity]
    assert 0.7 * max(errors) < whole < sum(errors)
    assert json.loads(json.dumps(asdict(found)))["audit"]["tiles"] == 3


def test_layers_go_back_to_float_until_the_budget_is_kept(exporter, fp32, pairs, generous, monkeypatch):
    # Times of microseconds are noise on a busy machine, and so would be the order of the layers.
    monkeypatch.setattr("deblur_deploy.pipeline.int8.sensitivity.kernels_of", lambda _: {})
    lost = generous[1].chosen.drop_db
    how = replace_struct(HOW, max_drop_db=lost - 2, min_macs=0.05)
    artifacts, found = quantize(exporter, fp32, PHOTOS, pairs, how)
    assert 0 < len(found.chosen.in_float) < len(found.sensitivity)
    assert found.chosen.drop_db <= lost - 2
    assert found.chosen.in_float == tuple(return_order(found.sensitivity)[: len(found.chosen.in_float)])
    for artifact in artifacts:
        assert int8_share(artifact.path, find("cpu")) == pytest.approx(found.chosen.macs)


def test_a_budget_that_cannot_be_kept_fails_with_the_table(exporter, fp32, pairs):
    how = replace_struct(HOW, max_drop_db=0.01, min_macs=0.5)
    with pytest.raises(VerificationError, match="at least 50% of the multiplications stay int8") as caught:
        quantize(exporter, fp32, PHOTOS, pairs, how)
    text = str(caught.value)
    assert text.count("minmax") >= 2
    assert all(layer in text for layer in layers(body("stem4", "rows")))


def test_all_methods_are_measured_and_timed_when_asked_for(exporter, fp32, pairs):
    _, found = quantize(exporter, fp32, PHOTOS, pairs, replace_struct(HOW, search="all", sensitivity_crops=0))
    assert {trial.method for trial in found.trials} == set(get_args(Method))
    assert all(trial.median_ms > 0 for trial in found.trials)
    assert found.chosen in found.trials
    assert found.sensitivity == []


def test_an_operation_without_an_int8_kernel_stays_float_and_is_named(tmp_path, pairs):
    stranger = onnx.ModelProto.FromString(body("stem4", "planes").SerializeToString())
    next(node for node in stranger.graph.node if node.op_type == "Relu").op_type = "Softplus"
    exporter = Exporter(small.network("stem4"), stranger, "0" * 64, tmp_path)
    artifacts, found = quantize(exporter, exporter.fp32(), PHOTOS, pairs, replace_struct(HOW, sensitivity_crops=0))
    assert found.float_ops == {"rows": ["Softplus"], "planes": ["Softplus"]}
    with DeblurEngine(artifacts[0].path, provider="cpu") as engine:
        assert engine(photo(0)).shape == photo(0).shape


def test_too_few_multiplications_in_int8_are_a_failure_or_a_note(exporter, fp32, pairs, monkeypatch):
    monkeypatch.setattr("deblur_deploy.pipeline.int8.search.int8_share", lambda *_: 0.6)
    said: list[str] = []
    _, found = quantize(exporter, fp32, PHOTOS, pairs, replace_struct(HOW, sensitivity_crops=0), said.append)
    assert found.chosen.macs == 0.6
    assert "note: 60.0% of the multiplications run in int8" in said
    with pytest.raises(VerificationError, match=r"only 60\.0% .*; at least 90% are wanted"):
        quantize(exporter, fp32, PHOTOS, pairs, replace_struct(HOW, sensitivity_crops=0, min_macs=0.9))


def test_nncf_competes_whenever_it_is_asked_to(exporter, fp32, pairs):
    how = replace_struct(HOW, sensitivity_crops=0, nncf=True)
    if find_spec("nncf"):
        _, found = quantize(exporter, fp32, PHOTOS, pairs, how)
        assert [trial.method for trial in found.trials] == ["minmax", NNCF]
    else:
        with pytest.raises(InputError, match="needs NNCF"):
            quantize(exporter, fp32, PHOTOS, pairs, how)


def test_latency_decides_only_beyond_the_noise():
    trial = Trial(
        method="a", in_float=(), macs=1, drop_db=0.01, worst_drop_db=0, worst_image="", median_ms=10, noise=0.03
    )
    assert fastest([trial, replace(trial, method="b", drop_db=0.0, median_ms=10.5)]).method == "b"
    assert fastest([trial, replace(trial, method="b", drop_db=0.0, median_ms=12)]).method == "a"


def test_the_order_is_error_regained_for_each_millisecond():
    row = Sensitivity(layer="slow", macs=0.5, drop_db=0.1, error=4.0, ms_saved=10)
    rows = [row, replace(row, layer="cheap", error=1.0, ms_saved=0.5), replace(row, layer="idle", error=0.0)]
    assert return_order(rows) == ["cheap", "slow", "idle"]
    # Where one time is unknown, multiplications stand for all of them.
    assert return_order([replace(r, ms_saved=None if r is row else r.ms_saved) for r in rows]) == [
        "slow",
        "cheap",
        "idle",
    ]


def replace_struct(how, **changes):
    return Int8Config(**{**{name: getattr(how, name) for name in how.__struct_fields__}, **changes})


def test_pairs_smaller_than_the_network_works_on_still_count(exporter, fp32):
    little = Pair(name="little", blurred=photo(3, 12, 50), sharp=photo(3, 12, 50))
    _, found = quantize(exporter, fp32, PHOTOS, [little], replace_struct(HOW, sensitivity_crops=0))
    assert np.isfinite(found.chosen.drop_db)


def test_a_layer_too_large_to_return_does_not_keep_others_from_returning():
    big = Sensitivity(layer="big", macs=0.8, drop_db=0.1, error=90.0, ms_saved=None)
    rows = [big, replace(big, layer="small", macs=0.1, error=1.0), replace(big, layer="idle", macs=0.1, error=0.0)]
    assert return_order(rows)[0] == "big"

    def attempt(method, in_float, breadth="all"):
        drop = 0.01 if "small" in in_float else 1.0
        return Trial(method=method, in_float=in_float, macs=1, drop_db=drop, worst_drop_db=drop, worst_image="")

    how = Int8Config(min_macs=0.5)
    assert return_layers(attempt("minmax", ()), rows, [], attempt, how).in_float == ("small",)


@pytest.mark.parametrize(
    ("values", "divisor", "ours", "side"),
    [(5_000, 16, False, 256), (60_000, 16, False, 128), (60_000, 16, True, 256), (1_000_000, 128, False, 128)],
)
def test_tiles_of_networks_that_hold_much_are_smaller(values, divisor, ours, side):
    network = Network(
        size_divisor=divisor,
        receptive_radius_px=10,
        macs_per_pixel=1e6,
        values_per_pixel=values,
        parameters=1,
        ours=ours,
    )
    count, found = _affordable(Int8Config(), network)
    assert found == side
    assert count == (128 if ours else 8)
