"""benchmarks/serving.py and benchmarks/cluster.py: what they measure is what happened, and their records say so."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from deblur_deploy.evaluation.record import Row, new_record, read_record
from deblur_deploy.media.images import list_images, write_image
from tests.conftest import noise


def script(name: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
        return importlib.import_module(name)


@pytest.mark.slow
def test_a_load_loses_nothing_and_every_answer_is_counted(bundle: Path, tmp_path: Path) -> None:
    serving = script("serving")
    options = serving.Serving(model=bundle, out=tmp_path, quick=True, seconds=0.4, concurrency=(3,), provider="cpu")
    assert serving.run(options) == 0
    record = read_record(tmp_path / "serving.json")
    many, crowded = record.rows
    assert many.facts["statuses"] == {"200": many.calls}
    assert 0 < many.median_ms <= many.p95_ms
    assert record.found["counted_by_the_server"] == many.calls + 1
    assert set(crowded.facts["statuses"]) <= {"200", "503"}


@pytest.mark.parametrize(
    ("name", "facts", "found", "said"),
    [
        (
            "serving",
            {"per_second": 2.5, "statuses": {"200": 9, "503": 4}},
            {"without_a_server_ms": 320.0},
            ["many", "12.5", "20.0", "2.50", "9 x 200, 4 x 503"],
        ),
        (
            "cluster",
            {"seconds": 30.0, "first": 20.0, "last": 29.0},
            {"outcomes_per_s": 3862.5, "paper_not_measured": {"machines": 100, "images_per_s": 789.0}},
            ["many", "12.5", "30.0", "20.0", "29.0"],
        ),
    ],
)
def test_its_table_says_what_the_record_says(name: str, facts: dict, found: dict, said: list[str]) -> None:
    row = Row(model="hd", variant="many", provider="cpu", size="1280x720", median_ms=12.5, p95_ms=20.0, facts=facts)
    record = new_record(name, {"images": 100, "photos": "built-in"}, rows=[row], found=found)
    (table,) = script("tables").other_tables(record)
    assert table.rows == [said]
    assert any(text in table.note for text in ("320 ms", "789 images a second"))
    assert name in script("report").OTHERS


def test_what_is_lost_is_a_failure(bundle: Path) -> None:
    serving = script("serving")
    found = serving.Load(wall=1.0, lost=["ConnectError()"])
    row = found.row(serving.Serving(model=bundle), {"provider": "cpu"}, "1 at once")
    assert row.error.startswith("1 lost")


def test_a_cluster_whose_files_differ_is_a_failure(bundle: Path, tmp_path: Path, monkeypatch) -> None:
    cluster = script("cluster")
    sys.modules.pop("cluster")

    def plainly(options, folder, out):
        for path in list_images(folder):
            write_image(out / path.name, noise(4, 4, 3))
        return 4.0

    def by_ray(options, photos, out, threads):
        for path in photos:
            write_image(out / path.name, noise(4, 4, 3, seed=threads == 1))
        return {"first": 1.0, "last": 5.0, "all": 6.0}

    monkeypatch.setattr(cluster, "plainly", plainly)
    monkeypatch.setattr(cluster, "by_ray", by_ray)
    assert cluster.run(cluster.Cluster(model=bundle, out=tmp_path, quick=True, threads=2)) == 1
    record = read_record(tmp_path / "cluster.json")
    assert record.notes == ["--ray, 2 workers: files differ from plain deblur-run's"]
    assert [row.median_ms for row in record.rows] == [1000, 1500, 1500]
    # Eight outcomes in four seconds are fewer than 100 machines with an image a second.
    assert record.found["paper_not_measured"]["images_per_s"] == 2
