"""benchmarks/engine.py: its parts measure what they say, and one record holds them all."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from deblur_deploy.errors import InputError, ProviderError
from deblur_deploy.evaluation.record import read_record


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        yield importlib.import_module("engine")


def test_a_part_runs_in_a_process_of_its_own(script, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = script.Engine(model=bundle, provider="cpu", quick=True)
    assert script.measured("threads", options) == {"images": 160, "differing": 0}
    memory = script.measured("memory", options)
    assert 0 < memory["loaded_mb"] < memory["first_peak_mb"] <= memory["peak_mb"]
    assert memory["variant"] == "int8"
    with pytest.raises(ProviderError, match=r"threads failed: .*nonsense"):
        script.measured("threads", script.Engine(model=bundle, provider="nonsense", quick=True))


def test_one_record_holds_all_parts(script, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = {"variant": "int8", "provider": "cpu", "effective_precision": "int8", "threads": 2}
    parts = {part: {"found by": part} for part in script.PARTS}
    parts["overhead"] |= {"engine": 20.0, "receipt": receipt}
    monkeypatch.setattr(script, "measured", lambda part, options: dict(parts[part]))
    # The tiny bundle does not say what its network is, so there is nothing to hold against the limits.
    assert script.run(script.Engine(model=bundle, quick=True, out=tmp_path)) == 0
    record = read_record(tmp_path / "engine.json")
    assert {*script.PARTS, "limits"} == set(record.found)
    assert record.found["soak"] == {"found by": "soak"}
    assert record.rows[0].frames_per_s == 50
    assert "does not say what its network is" in record.notes[0]


def test_too_few_calls_are_refused(script) -> None:
    with pytest.raises(InputError, match="calls is 10"):
        script.run(script.Engine(calls=10))
    assert "engine_parts" not in sys.modules
