"""benchmarks/nodes.py: what each node takes, and that convolutions are matched with what they cost."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from deblur_deploy.errors import InputError
from deblur_deploy.evaluation.record import read_record
from deblur_deploy.runtime.providers import find
from tests import tiny
from tests.conftest import noise


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        yield importlib.import_module


def test_a_variant_is_profiled_on_the_command_line(script, bundle: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    latency, limits = script("latency"), script("limits")
    ceilings = {"int8_tops": {"rate": 2.0, "library": "x"}, "fp32_tops": {"rate": 1.0, "library": "x"}}
    monkeypatch.setattr(limits, "cpu_ceilings", lambda *_: ceilings)
    options = {"model": bundle, "quick": True, "out": tmp_path}
    for variant, arithmetic in (("int8", "int8"), ("fp32", "fp32")):
        assert latency.run(latency.Latency(profile=variant, **options)) == 0
        record = read_record(tmp_path / f"nodes_{variant}_cpu.json")
        found, convolutions = record.found, [node for node in record.found["nodes"] if "Conv" in node["type"]]
        assert record.settings["arithmetic"] == arithmetic
        assert len(convolutions) == 5
        assert sum(node["giga_macs"] for node in convolutions) == pytest.approx(found["giga_macs"])
        assert found["giga_macs"] == pytest.approx(tiny.CONTRACT.macs_per_pixel * 320 * 180 / 1e9, rel=1e-4)
        assert found["ceiling_giga_macs_per_s"] == (1000 if variant == "int8" else 500)
        for node in convolutions:
            assert node["giga_macs_per_s"] == pytest.approx(1e3 * node["giga_macs"] / node["ms"], rel=1e-3)
            assert node["of_ceiling"] == pytest.approx(
                node["giga_macs_per_s"] / found["ceiling_giga_macs_per_s"], rel=1e-3
            )
        assert not [node for node in found["nodes"] if node["giga_macs"] and node not in convolutions]
        assert sum(node["share"] for node in found["nodes"]) == pytest.approx(1, rel=1e-4)
        assert sum(line["share"] for line in found["by_type"]) == pytest.approx(1, rel=1e-4)
        assert {line["type"]: line["nodes"] for line in found["by_type"]}[convolutions[0]["type"]] == 5
        printed = capsys.readouterr().out
        assert "of ceiling" in printed
        assert convolutions[0]["type"] in printed
    with pytest.raises(InputError, match="profile is 'float'; allowed: fp32, fp16, int8"):
        latency.run(latency.Latency(profile="float", **options))


def test_what_the_shapes_contradict_is_matched_with_nothing(script) -> None:
    nodes, data = script("nodes"), tiny._model_bytes("uint8", "fp32")
    how = {"precision": "fp32", "threads": 1, "runs": 2}
    costs = nodes.costs_of(nodes.profiled(data, find("cpu"), noise(32, 48, 3), optimised=False, **how))
    events = nodes.profiled(data, find("cpu"), noise(32, 48, 3), **how)
    for given in (costs[:-1], costs[::-1], []):
        assert not any(node.giga_macs for node in nodes.nodes_of(events, given, 1e12))
    matched = nodes.nodes_of(events, costs, None)
    assert sum(node.giga_macs or 0 for node in matched) == pytest.approx(tiny.CONTRACT.macs_per_pixel * 32 * 48 / 1e9)
    assert not any(node.of_ceiling for node in matched)
