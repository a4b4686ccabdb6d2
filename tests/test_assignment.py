"""Shares of the work by provider."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from deblur_deploy import DeblurEngine
from deblur_deploy.runtime import assignment as module
from deblur_deploy.runtime.assignment import assignment, macs_by_node, shares_of_macs
from deblur_deploy.shipped import DEFAULT_BUNDLE
from tests import tiny
from tests.conftest import noise


@pytest.mark.parametrize("name", ["fp32", "int8", "float"])
def test_macs_are_those_of_the_contract(bundle: Path, name: str) -> None:
    shape = (1, 3, 64, 64) if name == "float" else (1, 64, 64, 3)
    image = np.zeros(shape, np.float32 if name == "float" else np.uint8)
    macs = macs_by_node((bundle / f"{name}.onnx").read_bytes(), image)
    assert sum(macs.values()) == tiny.CONTRACT.macs_per_pixel * 64 * 64
    assert len(macs) == 5


def test_macs_of_the_shipped_model_are_those_of_its_contract() -> None:
    if not DEFAULT_BUNDLE.is_dir():
        pytest.skip("no model ships with this checkout")
    path = DEFAULT_BUNDLE / "fp32.onnx"
    contract = DeblurEngine(path, "cpu").contract
    side = contract.size_divisor
    macs = macs_by_node(path.read_bytes(), np.zeros((1, side, side, 3), np.uint8))
    assert sum(macs.values()) == contract.macs_per_pixel * side * side


def session(parts: dict[str, list[tuple[str, str]]]) -> Any:
    """A session that was assigned so: nodes, as operator and name, by provider."""

    def info() -> list[Any]:
        return [
            SimpleNamespace(
                ep_name=provider,
                get_nodes=lambda nodes=nodes: [SimpleNamespace(op_type=kind, name=name) for kind, name in nodes],
            )
            for provider, nodes in parts.items()
        ]

    return SimpleNamespace(get_provider_graph_assignment_info=info)


def test_a_shared_graph_is_weighed_by_macs(bundle: Path) -> None:
    data, image = (bundle / "fp32.onnx").read_bytes(), noise(1, 16, 16, 3)
    macs = macs_by_node(data, image)
    first, *others = macs
    shared = session(
        {
            "CUDAExecutionProvider": [("Conv", first), ("Relu", "r")],
            "CPUExecutionProvider": [("Conv", name) for name in others],
        }
    )
    found = assignment(shared, data, image)
    assert found.macs == pytest.approx(
        {"cuda": macs[first] / sum(macs.values()), "cpu": 1 - macs[first] / sum(macs.values())}
    )
    assert found.macs["cuda"] != pytest.approx(1 / 5, abs=0.02)  # what counting alone would have said
    assert found.nodes == pytest.approx({"cuda": 2 / 6, "cpu": 4 / 6})


def test_a_renamed_convolution_counts_as_an_average_one() -> None:
    pairs = [("cpu", "a"), ("cuda", "b"), ("cuda", "fused")]
    assert shares_of_macs(pairs, {"a": 10.0, "b": 30.0}) == pytest.approx({"cpu": 10 / 60, "cuda": 50 / 60})
    assert shares_of_macs(pairs, {}) == pytest.approx({"cpu": 1 / 3, "cuda": 2 / 3})


def test_one_provider_has_exactly_all_and_nothing_is_run(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "macs_by_node", lambda *_: pytest.fail("the model was run"))
    receipt = DeblurEngine(bundle, "cpu").receipt
    assert receipt.macs == {"cpu": 1.0}
    assert receipt.nodes == {"cpu": 1.0}


def test_openvino_and_the_cpu_really_share_a_graph(tmp_path: Path, openvino: str) -> None:
    """An operator that only ONNX Runtime's own CPU kernels know, in the middle of the graph."""
    path = tiny.write_model(tmp_path / "m.onnx")
    model = onnx.load(path)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    for convolution in convolutions[1:3]:
        passed = f"{convolution.name}_passed"
        at = list(model.graph.node).index(convolution)
        model.graph.node.insert(
            at, helper.make_node("SampleOp", [convolution.input[0]], [passed], domain="com.microsoft", name=passed)
        )
        convolution.input[0] = passed
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)
    engine, image = DeblurEngine(path, openvino, "fp32"), noise(40, 48, 3)
    assert engine.receipt.nodes["cpu"] > 0
    assert engine.receipt.nodes["openvino"] > 0
    assert sum(engine.receipt.macs.values()) == pytest.approx(1)
    assert engine.receipt.macs["openvino"] > 0.5
    expected = DeblurEngine(path, "cpu")(image).astype(int)
    assert np.abs(engine(image) - expected).max() <= 1
