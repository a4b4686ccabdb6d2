"""benchmarks/video.py: a real clip through the real code, and the arithmetic of shares and bounds."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from deblur_deploy.errors import InputError
from deblur_deploy.evaluation.record import read_record


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        yield importlib.import_module("video")


def test_a_clip_is_made_restored_and_timed(script, bundle: Path, tmp_path: Path) -> None:
    options = script.Video(model=bundle, provider="cpu", quick=True, out=tmp_path, width_px=64, height_px=48)
    assert script.run(options) == 0
    record = read_record(tmp_path / "video.json")
    found, (row,) = record.found, record.rows
    assert (row.size, row.variant, row.calls) == ("64x48", "int8", 12)
    assert sum(found["shares"].values()) == pytest.approx(1, rel=1e-4)
    assert found["slowest"] in script.PARTS
    assert found["command_s"] > 0
    assert all(found["processor_ms"][part] > 0 for part in (*script.PARTS, "whole"))


def test_the_bound_is_the_slowest_part_or_all_cores(script) -> None:
    def cost(decode: float, restore: float, encode: float, whole: float, cpu: float) -> dict[str, object]:
        walls = {"decode": decode, "restore": restore, "encode": encode, "whole": whole}
        return {part: script.Cost(wall, wall * cpu) for part, wall in walls.items()}

    alone = script.summary([cost(1, 6, 3, 9, 1.0)], 10, 2)
    assert (alone["slowest"], alone["bound_by"], alone["bound_ms"]) == ("restore", "restore", 600)
    assert alone["shares"] == {"decode": 0.1, "restore": 0.6, "encode": 0.3}
    assert (alone["whole_over_bound"], alone["whole_over_one_by_one"]) == (1.5, 0.9)
    # Each of them keeps both cores busy: there is nothing that they could do at the same time.
    busy = script.summary([cost(1, 6, 3, 10, 2.0)], 10, 2)
    assert (busy["bound_by"], busy["bound_ms"], busy["whole_over_bound"]) == ("2 cores", 1000, 1.0)


def test_an_encoder_that_is_not_here_is_one_line(script, bundle: Path) -> None:
    with pytest.raises(InputError, match=r"no clip can be made with nonsense: .*; choose another --codec"):
        script.run(script.Video(model=bundle, quick=True, width_px=64, height_px=48, codec="nonsense"))
