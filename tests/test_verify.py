"""Verification fails a model that is wrong."""

from dataclasses import replace

import onnx
import pytest

from deblur_deploy.errors import VerificationError
from deblur_deploy.evaluation.quality import Pair
from deblur_deploy.pipeline import verify as verify_module
from deblur_deploy.pipeline.config import VerifyConfig
from deblur_deploy.pipeline.export import Exporter
from deblur_deploy.pipeline.verify import check_drop, compare_with_torch, measure, restore, time_on
from deblur_deploy.runtime.engine import DeblurEngine
from tests.photos import photo
from tests.small import RECIPE, unet

PAIRS = [Pair(name=str(seed), blurred=photo(seed), sharp=photo(seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def exporter(tmp_path_factory):
    return Exporter(unet(), "0" * 64, tmp_path_factory.mktemp("verify"))


@pytest.fixture(scope="module")
def fp32(exporter):
    return exporter.fp32()


def test_an_honest_export_passes_with_every_figure(exporter, fp32):
    artifacts = [fp32, exporter.floats(), exporter.int8([photo(0, 80, 80)], RECIPE.int8, "rows")]
    baseline = restore(fp32, PAIRS)
    results = [measure(artifact, PAIRS, baseline) for artifact in artifacts]
    assert results[0].drop_db == 0
    for result in results:
        check_drop(result, RECIPE.verify)
        assert result.size_bytes == result.artifact.path.stat().st_size
    assert results[2].db_to_fp32 < results[1].db_to_fp32
    runs = time_on("cpu", artifacts, photo(0), 1)
    assert [(run.provider, run.arithmetic, run.median_ms > 0) for run in runs] == [
        ("cpu", "fp32", True),
        ("cpu", "fp32", True),
        ("cpu", "int8", True),
    ]


def test_other_weights_than_the_checkpoint_are_found(fp32):
    with pytest.raises(VerificationError, match="differs from torch by"):
        compare_with_torch(fp32, unet(seed=1), [photo(0)], RECIPE.verify)


def test_one_level_in_too_many_values_is_found(fp32):
    model = unet()
    model.head.bias.data += 0.5 / 255
    with pytest.raises(VerificationError, match="differs from torch in"):
        compare_with_torch(fp32, model, [photo(0)], RECIPE.verify)


def test_a_variant_that_lost_too_much_is_named(fp32, tmp_path):
    model = onnx.load(fp32.path)
    for value in model.graph.initializer:
        if value.name == "head.bias":
            value.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(value) + 0.1, value.name))
    onnx.save(model, tmp_path / "int8.onnx")
    broken = replace(fp32, name="int8", path=tmp_path / "int8.onnx", precision="int8")
    with pytest.raises(VerificationError, match=r"int8 loses .* dB against fp32"):
        check_drop(measure(broken, PAIRS, restore(fp32, PAIRS)), RECIPE.verify)


def test_a_provider_that_cannot_run_a_variant_is_named(fp32):
    with pytest.raises(VerificationError, match="fp32 does not run on cuda"):
        time_on("cuda", [fp32], photo(0), 1)


def test_a_provider_with_another_result_than_the_cpu_is_found_though_it_be_the_only_one(fp32, monkeypatch):
    class Wrong(DeblurEngine):
        def __init__(self, model, provider="cpu"):
            super().__init__(model, "cpu")
            self.wrong = provider != "cpu"

        def __call__(self, image):
            return 255 - super().__call__(image) if self.wrong else super().__call__(image)

    monkeypatch.setattr(verify_module, "DeblurEngine", Wrong)
    with pytest.raises(VerificationError, match=r"fp32 on openvino is .* dB from its result on the CPU"):
        time_on("openvino", [fp32], photo(0), 1)


@pytest.mark.parametrize(
    ("field", "value"), [("int8_max_drop_db", -1.0), ("rounds", 0), ("random_sizes", -1), ("max_differing", 2.0)]
)
def test_config_names_field_value_and_range(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}; allowed"):
        VerifyConfig(**{field: value})
