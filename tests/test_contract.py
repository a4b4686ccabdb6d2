"""The contract travels through metadata unchanged, and damage is named."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deblur_deploy.contract import KEY, ModelContract
from deblur_deploy.errors import ModelError

CONTRACT = ModelContract(
    size_divisor=16, receptive_radius_px=95, macs_per_pixel=25984.0, parent_sha256="0" * 64, library_version="1"
)

WRONG = ({"io": "bogus"}, {"precision": 8}, {"size_divisor": "16"}, {"size_divisor": 0}, {"receptive_radius_px": -1})


@given(
    st.builds(
        ModelContract,
        io=st.sampled_from(["uint8", "float32"]),
        precision=st.sampled_from(["fp32", "fp16", "int8"]),
        size_divisor=st.integers(1, 64),
        receptive_radius_px=st.integers(0, 500),
        macs_per_pixel=st.floats(0, 1e9),
        parent_sha256=st.text(),
        library_version=st.text(),
    )
)
def test_round_trip(contract):
    assert ModelContract.from_metadata(contract.to_metadata(), "model.onnx") == contract


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "no deblur_deploy contract"),
        ({KEY: "{"}, "damaged"),
        ({KEY: "[]"}, "damaged"),
        ({KEY: "{}"}, "damaged"),
        ({KEY: json.dumps({"schema": 99})}, "schema 99"),
        ({KEY: json.dumps({"schema": 1})}, "damaged"),
        *(({KEY: json.dumps(asdict(CONTRACT) | wrong)}, "damaged") for wrong in WRONG),
    ],
)
def test_anything_else_is_refused_by_name(metadata, message):
    with pytest.raises(ModelError, match=message) as caught:
        ModelContract.from_metadata(metadata, "model.onnx")
    assert "model.onnx" in str(caught.value)
