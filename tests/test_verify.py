"""Verification fails a model that is wrong."""

from dataclasses import replace

import onnx
import pytest

from deblur_deploy.errors import VerificationError
from deblur_deploy.evaluation.quality import Pair
from deblur_deploy.pipeline import verify as verify_module
from deblur_deploy.pipeline.budget import quantize
from deblur_deploy.pipeline.export import Exporter
from deblur_deploy.pipeline.quantize import Int8Config
from deblur_deploy.pipeline.verify import VerifyConfig, check_half_precision, compare_with_torch, usable, verify
from deblur_deploy.runtime.engine import DeblurEngine
from tests import small
from tests.photos import photo
from tests.small import RECIPE, unet

PAIRS = [Pair(name=str(seed), blurred=photo(seed), sharp=photo(seed)) for seed in range(2)]


@pytest.fixture(scope="module")
def exporter(tmp_path_factory):
    return small.exporter(tmp_path_factory.mktemp("verify"))


@pytest.fixture(scope="module")
def fp32(exporter):
    return exporter.fp32()


def test_an_honest_export_passes_with_every_figure(exporter, fp32):
    int8, _ = quantize(exporter, fp32, {"a": photo(0, 80, 80)}, PAIRS, RECIPE.int8)
    results = verify([fp32, exporter.floats(), int8[0]], PAIRS, RECIPE.verify, RECIPE.int8, ["cpu"])
    assert [result.artifact.name for result in results] == ["fp32", "float", "int8"]
    assert results[0].drop_db == 0
    for result in results:
        assert result.size_bytes == result.artifact.path.stat().st_size
        assert [(run.provider, run.median_ms > 0) for run in result.runs] == [("cpu", True)]
        assert result.runs[0].drop_db == result.drop_db
        assert result.slower_than_fp32_on == (
            ["cpu"] if result is not results[1] and result.runs[0].median_ms > results[0].runs[0].median_ms else []
        )
    assert [result.runs[0].int8_macs for result in results] == [0, 0, 1]
    assert results[2].db_to_fp32 < results[1].db_to_fp32


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
    with pytest.raises(VerificationError, match=r"int8 loses .* dB on average against fp32"):
        verify([fp32, broken], PAIRS, RECIPE.verify, RECIPE.int8, ["cpu"])


def test_a_provider_that_cannot_run_a_variant_is_named(fp32):
    with pytest.raises(VerificationError, match="fp32 does not run on cuda"):
        verify([fp32], PAIRS, RECIPE.verify, RECIPE.int8, ["cuda"])


def test_a_provider_with_another_result_than_the_cpu_is_found_though_it_be_the_only_one(fp32, monkeypatch):
    class Wrong(DeblurEngine):
        def __init__(self, model, provider="cpu"):
            super().__init__(model, "cpu")
            self.wrong = provider != "cpu"

        def __call__(self, image):
            return 255 - super().__call__(image) if self.wrong else super().__call__(image)

    monkeypatch.setattr(verify_module, "DeblurEngine", Wrong)
    with pytest.raises(VerificationError, match=r"fp32 on openvino is .* dB from its result on the CPU"):
        verify([fp32], PAIRS, RECIPE.verify, RECIPE.int8, ["openvino"])


def test_a_provider_that_was_not_asked_for_is_left_out(fp32):
    said = []
    assert usable(fp32, ["cpu", "cuda"], said.append) == ["cpu"]
    assert said[0].startswith("cuda is left out: ")


@pytest.mark.parametrize(
    ("field", "value"), [("fp16_max_drop_db", -1.0), ("rounds", 0), ("random_sizes", -1), ("max_differing", 2.0)]
)
def test_config_names_field_value_and_range(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}; allowed"):
        VerifyConfig(**{field: value})


def test_half_precision_holds_on_images_that_photographs_are_not(exporter, fp32):
    check_half_precision(fp32, exporter.fp16(), 60)


def test_weights_that_overflow_half_precision_are_found(fp32, exporter, tmp_path):
    model = onnx.load(fp32.path)
    for value in model.graph.initializer:
        if value.name in ("encoder.0.0.weight", "encoder.0.2.weight"):
            value.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(value) * 3000, value.name))
    onnx.save(model, tmp_path / "fp32.onnx")
    with pytest.raises(VerificationError, match=r"fp16 cannot hold activation \S+, which reaches .* on a white image"):
        check_half_precision(replace(fp32, path=tmp_path / "fp32.onnx"), exporter.fp16(), 60)


def test_half_precision_that_is_another_network_is_found(fp32, tmp_path):
    other = Exporter(unet(seed=1), "0" * 64, tmp_path).fp16()
    with pytest.raises(VerificationError, match=r"fp16 is .* dB from fp32 on a \w+ image"):
        check_half_precision(fp32, other, 60)


def test_one_image_that_loses_too_much_is_found(exporter, fp32):
    tight = Int8Config(max_drop_db=100, max_image_drop_db=0)
    lossy = [replace(pair, sharp=DeblurEngine(fp32.path, provider="cpu")(pair.blurred)) for pair in PAIRS]
    int8, _ = quantize(exporter, fp32, {"a": photo(0, 80, 80)}, PAIRS, RECIPE.int8)
    with pytest.raises(VerificationError, match="dB on one image against fp32 on cpu, 0 dB is allowed"):
        verify([fp32, int8[0]], lossy, RECIPE.verify, tight, ["cpu"])
