"""Verification fails a model that is wrong."""

from dataclasses import replace

import numpy as np
import onnx
import pytest

from deblur_deploy.errors import VerificationError
from deblur_deploy.evaluation.quality import Pair
from deblur_deploy.pipeline import verify as verify_module
from deblur_deploy.pipeline.artifact import Run
from deblur_deploy.pipeline.config import VerifyConfig
from deblur_deploy.pipeline.verify import (
    check_drop,
    check_loss,
    compare_with_source,
    mark_slower,
    measure,
    peak_activation,
    restore,
    time_on,
)
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.training.validation import TorchRestorer
from tests import small
from tests.photos import photo
from tests.small import RECIPE, unet
from tests.test_quantize import quantized

PAIRS = [Pair(name=str(seed), blurred=photo(seed), sharp=photo(seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def exporter(tmp_path_factory):
    return small.exporter(tmp_path_factory.mktemp("verify"))


@pytest.fixture(scope="module")
def fp32(exporter):
    return exporter.fp32()


def test_an_honest_export_passes_with_every_figure(exporter, fp32):
    artifacts = [fp32, exporter.floats(), exporter.int8(quantized("stem4", "rows"), "rows")]
    baseline = restore(fp32, PAIRS)
    results = [measure(artifact, fp32, PAIRS, baseline) for artifact in artifacts]
    assert results[0].drop_db == 0
    for result in results:
        check_drop(result, RECIPE)
        assert result.size_bytes == result.artifact.path.stat().st_size
    assert results[2].db_to_fp32 < results[1].db_to_fp32
    runs = time_on("cpu", artifacts, photo(0), PAIRS, 1)
    assert [(run.provider, run.arithmetic, run.median_ms > 0, run.int8_macs) for run in runs] == [
        ("cpu", "fp32", True, 0),
        ("cpu", "fp32", True, 0),
        ("cpu", "int8", True, 1),
    ]


def test_other_weights_than_the_checkpoint_are_found(fp32):
    with pytest.raises(VerificationError, match="differs from its source by"):
        compare_with_source(fp32, TorchRestorer(unet(seed=1)), [photo(0)], RECIPE.verify)


def test_one_level_in_too_many_values_is_found(fp32):
    model = unet()
    model.head.bias.data += 0.5 / 255
    with pytest.raises(VerificationError, match="differs from its source in"):
        compare_with_source(fp32, TorchRestorer(model), [photo(0)], RECIPE.verify)


def test_a_variant_that_lost_too_much_is_named(fp32, tmp_path):
    model = onnx.load(fp32.path)
    for value in model.graph.initializer:
        if value.name == "head.bias":
            value.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(value) + 0.1, value.name))
    onnx.save(model, tmp_path / "int8.onnx")
    broken = replace(fp32, name="int8", path=tmp_path / "int8.onnx", precision="int8")
    with pytest.raises(VerificationError, match=r"int8 loses .* dB on average against fp32 on cpu"):
        check_drop(measure(broken, fp32, PAIRS, restore(fp32, PAIRS)), RECIPE)


def test_a_provider_that_cannot_run_a_variant_is_named(fp32):
    with pytest.raises(VerificationError, match="fp32 does not run on cuda"):
        time_on("cuda", [fp32], photo(0), PAIRS, 1)


def test_a_provider_with_another_result_than_the_cpu_is_found_though_it_be_the_only_one(fp32, monkeypatch):
    class Wrong(DeblurEngine):
        def __init__(self, model, provider="cpu"):
            super().__init__(model, "cpu")
            self.wrong = provider != "cpu"

        def __call__(self, image):
            return 255 - super().__call__(image) if self.wrong else super().__call__(image)

    monkeypatch.setattr(verify_module, "DeblurEngine", Wrong)
    with pytest.raises(VerificationError, match=r"fp32 on openvino is .* dB from its result on the CPU"):
        time_on("openvino", [fp32], photo(0), PAIRS, 1)


@pytest.mark.parametrize(
    ("field", "value"), [("fp16_max_drop_db", -1.0), ("rounds", 0), ("random_sizes", -1), ("max_differing", 2.0)]
)
def test_config_names_field_value_and_range(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}; allowed"):
        VerifyConfig(**{field: value})


@pytest.fixture(scope="module")
def fp16(exporter, fp32):
    return measure(exporter.fp16(), fp32, PAIRS, restore(fp32, PAIRS))


def test_half_precision_holds_on_images_that_photographs_are_not(fp16):
    check_drop(fp16, RECIPE)
    assert fp16.extremes_db.keys() == {"black", "white", "random", "checkerboard"}
    assert min(fp16.db_to_fp32, *fp16.extremes_db.values()) >= 60
    assert 1 <= fp16.peak_activation < 1000


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peak_activation": 70000.0}, "fp16 overflows: an activation reaches 7e\\+04"),
        ({"peak_activation": float("inf")}, "an activation reaches inf"),
        ({"extremes_db": {"white": 59.0}}, "fp16 is 59.0 dB from fp32 on white; 60 dB is required"),
        ({"db_to_fp32": 30.0}, "30.0 dB from fp32 on the pairs"),
    ],
)
def test_half_precision_that_does_not_hold_is_refused(fp16, change, says):
    with pytest.raises(VerificationError, match=says):
        check_drop(replace(fp16, **change), RECIPE)


@pytest.mark.parametrize(("factor", "least"), [(3000, 65504), (np.nan, 1e300)])
def test_weights_that_overflow_half_precision_are_found_on_a_cpu_too(fp32, tmp_path, factor, least):
    model = onnx.load(fp32.path)
    for value in model.graph.initializer:
        if value.name in ("encoder.0.0.weight", "encoder.0.2.weight"):
            more = np.float32(factor) * onnx.numpy_helper.to_array(value)
            value.CopyFrom(onnx.numpy_helper.from_array(more, value.name))
    onnx.save(model, tmp_path / "fp32.onnx")
    assert peak_activation(replace(fp32, path=tmp_path / "fp32.onnx"), [photo(0)]) > least


def test_int8_is_held_to_its_budget_on_every_provider_and_on_every_image(fp16):
    int8 = replace(fp16.artifact, name="int8", precision="int8")
    check_loss(int8, 3, 3, "openvino", RECIPE)
    with pytest.raises(VerificationError, match=r"int8 loses 3.100 dB on average against fp32 on openvino, 3.* dB is"):
        check_loss(int8, 3.1, 3, "openvino", RECIPE)
    with pytest.raises(VerificationError, match=r"int8 loses 4\.000 dB on one image against fp32 on openvino"):
        check_loss(int8, 0, 4, "openvino", RECIPE)
    with pytest.raises(VerificationError, match="loses nan dB"):
        check_loss(int8, float("nan"), 0, "cpu", RECIPE)


def test_a_variant_slower_than_fp32_is_marked_on_that_provider_only(fp32, fp16):
    def timed(artifact, **milliseconds):
        runs = [
            Run(provider=name, device="", arithmetic="", median_ms=value, p95_ms=value)
            for name, value in milliseconds.items()
        ]
        return replace(fp16, artifact=artifact, runs=runs, slower_than_fp32_on=[])

    results = [timed(fp32, cpu=10, cuda=5), timed(fp16.artifact, cpu=12, cuda=3)]
    mark_slower(results)
    assert [result.row()["slower_than_fp32_on"] for result in results] == [[], ["cpu"]]
