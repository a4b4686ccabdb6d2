"""What ran in int8 is read from the graph that ran."""

import pytest

from deblur_deploy.pipeline.int8.coverage import int8_share, kernels_of, macs_of
from deblur_deploy.pipeline.int8.quantize import layers
from deblur_deploy.runtime.providers import Provider, find
from tests import small
from tests.small import CONFIGS, body
from tests.test_graph import LAYOUTS
from tests.test_quantize import quantized

OPENVINO = Provider(name="openvino", ort_name="OpenVINOExecutionProvider", device="")


@pytest.mark.parametrize("name", CONFIGS)
def test_multiplications_are_those_of_the_network_in_every_form(name, tmp_path):
    exporter = small.exporter(tmp_path, name)
    paths = [
        exporter.fp32(),
        exporter.floats(),
        *(exporter.int8(quantized(name, layout), layout) for layout in LAYOUTS),
    ]
    for artifact in paths:
        assert sum(macs_of(artifact.path).values()) == pytest.approx(CONFIGS[name].macs_per_pixel)


def test_the_share_is_what_the_optimized_graph_has(tmp_path):
    exporter, cpu = small.exporter(tmp_path), find("cpu")
    fp32 = exporter.fp32().path
    assert int8_share(fp32, cpu) == 0
    assert int8_share(exporter.int8(quantized("stem4", "rows"), "rows").path, cpu) == 1
    macs = macs_of(fp32)
    assert macs.keys() == layers(body("stem4", "rows")).keys()
    mixed = exporter.int8(quantized("stem4", "rows", in_float=["encoder.0.2"]), "rows").path
    assert int8_share(mixed, cpu) == pytest.approx(1 - macs["encoder.0.2"] / sum(macs.values()))
    assert int8_share(mixed, Provider(name="cuda", ort_name="", device="")) == 0
    assert int8_share(mixed, Provider(name="coreml", ort_name="", device="")) is None


@pytest.mark.parametrize("layer", ["encoder.0.0", "encoder.0.2", "up.0.conv", "head"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["stem4", "classic"])
def test_a_layer_that_stays_float_is_float_when_it_runs(name, layout, layer, tmp_path):
    mixed = small.exporter(tmp_path, name).int8(quantized(name, layout, in_float=[layer]), layout).path
    kernels = kernels_of(mixed, 64)
    assert {name for name, kernel in kernels.items() if not kernel.int8} == {layer}
    assert all(kernel.ms > 0 for kernel in kernels.values())


def test_openvino_tells_what_it_compiled(tmp_path):
    pytest.importorskip("openvino")
    exporter = small.exporter(tmp_path)
    assert int8_share(exporter.fp32().path, OPENVINO) == 0
    assert int8_share(exporter.int8(quantized("stem4", "planes"), "planes").path, OPENVINO) > 0.9
