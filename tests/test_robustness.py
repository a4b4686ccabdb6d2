"""A small share of what ``benchmarks/robustness.py`` and ``benchmarks/soak.py`` do for hours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import kills, robustness, services, soak
from benchmarks.kills import KINDS_OF_FAILURE, Command, Result
from deblur_deploy.evaluation.record import new_record


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("image", 0),
        ("video", 20),
        ("onnx", 945),
        ("onnx", 1370),
        ("bundle", 0),
        ("checkpoint", 0),
        ("recipe", 0),
        ("csv", 0),
    ],
)
def test_damaged_files_give_our_errors_only(kind: str, first: int) -> None:
    outcomes, failures = robustness.sweep(kind, 12, first)
    assert not failures
    assert outcomes.total() == 12
    assert set(outcomes) <= {"accepted", "InputError", "ModelError", "ProviderError", "MissingFileError"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_a_command_that_is_killed_loses_nothing() -> None:
    result = kills.kill("run", 2)
    assert result.failures == []
    assert result.outcomes["killed"] == 2
    assert result.outcomes["left alone"] >= 1


WRITER = """
import sys, time
from pathlib import Path
out = Path("out")
out.mkdir(exist_ok=True)
{}
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("(out / 'a').write_text('whole')", None),
        ("1 / 0", "tracebacks"),
        ("sys.exit('no such thing')", "crashes"),
        ("time.sleep(60)", "hangs"),
        ("(out / 'a').write_text('half')", "half files"),
        ("(out / 'a').write_text('whole'); (out / '.a-12345678').touch()", "half files"),
        ("(out / 'b').write_text('whole')", "silent losses"),
    ],
)
def test_what_goes_wrong_is_counted_as_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, kind: str | None
) -> None:
    def digest(out: Path) -> dict[str, str]:
        found = {path.name: path.read_text() for path in kills._files(out)}
        if "half" in found.values():
            raise ValueError("half a file")
        return found

    command = Command(name="run", prepare=lambda room: None, arguments=lambda room: [], digest=digest)
    popen = kills.subprocess.Popen
    monkeypatch.setattr(
        kills.subprocess,
        "Popen",
        lambda arguments, **options: popen([sys.executable, "-c", WRITER.format(code)], **options),
    )
    result = Result()
    kills._alone(command, tmp_path, {"a": "whole"}, result, limit_s=1 if kind == "hangs" else 60)
    found = result.record()
    assert [name for name in KINDS_OF_FAILURE if found[name]][:1] == ([kind] if kind else [])


def test_a_record_keeps_what_was_not_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "robustness.json"
    robustness.keep(path, {"count": 1}, {"image": {"accepted": 1}})
    robustness.keep(path, {"count": 2}, {"csv": {"accepted": 2}})
    found = json.loads(path.read_text())["found"]
    for part in found.values():
        assert part.pop("date")
        part.pop("commit")
    assert found == {"image": {"accepted": 1}, "csv": {"accepted": 2}}


def test_a_soak_of_two_seconds(tmp_path: Path, bundle: Path) -> None:
    options = soak.SoakOptions(model=bundle, out=tmp_path, minutes=0.03, sizes=2, largest_px=60)
    found = soak.Soak(options)
    found.cases[0] = soak.Case(image=found.cases[0].image, expected=255 - found.cases[0].expected)
    found.run()
    right = [line for line in found.wrong if "differs by" not in line]
    assert found.wrong, "the wrong result is seen"
    assert right == []
    figures = found.found()
    assert figures["called"] > 0
    assert len(figures["closed_mb"]) == 2
    assert figures["running_mb"][1] > 0
    assert soak.Case(image=np.zeros((2, 2), "u1"), expected=np.zeros((2, 2), "u1")).wrong(np.zeros((2, 2), "u2"))


@pytest.mark.parametrize(
    ("name", "settings", "found", "rows"),
    [
        (
            "robustness",
            {},
            {
                "image": {"InputError": 1900, "accepted": 100, "OutputError": 7, "failures": []},
                "csv": {"accepted": 9, "FAILED": 1, "failures": [[3, "FAILED: IndexError()"]]},
                "kill run": {"killed": 200, "left alone": 40, "crashes": 1, "failures": ["crashes: ended with 1"]},
            },
            [
                ["image, damaged", "2,007", "100 opened, 1,900 InputError, 7 OutputError", "0"],
                ["csv, damaged", "10", "9 opened", "1"],
                ["deblur-run, killed", "200", "40 runs that were then left alone ended whole", "1"],
            ],
        ),
        (
            "soak",
            {"minutes": 30, "workers": 4, "sizes": 8},
            {
                "called": 1000, "streamed": 20, "engines opened": 3, "running_mb": [800.0, 808.0],
                "closed_mb": [500.0, 501.0],
            },
            [
                ["while it works", "800", "808"],
                ["all engines closed", "500", "501"],
            ],
        ),
    ],
)  # fmt: skip
def test_its_table_says_what_the_record_says(name: str, settings: dict, found: dict, rows: list[list[str]]) -> None:
    table = services.TABLES[name](new_record(name, settings, found=found))
    assert table.rows == rows
