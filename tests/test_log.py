"""The log is read back or named with the row that is damaged, and its clock tells who had the processors."""

from pathlib import Path

import pytest

from deblur_deploy.errors import InputError
from deblur_deploy.training import log
from deblur_deploy.training.log import Clock, Log, Processors, read_log

ROWS = "step,loss,learning_rate,images_per_s,waiting,dead\n50,0.1,0.001,9,0.1,\n100,0.05,0.002,9,0.1,0.2\n"


def test_waiting_and_pauses_are_not_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"wall": 0.0, "own": 0.0, "family": 0.0, "machine": 0.0}

    def spend(wall: float, own: float, loaders: float = 0.0, others: float = 0.0) -> None:
        now["wall"] += wall
        now["own"] += own
        now["family"] += own + loaders
        now["machine"] += own + loaders + others

    monkeypatch.setattr(log.time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(log.time, "process_time", lambda: now["own"])
    monkeypatch.setattr(log, "_seconds", lambda: (now["own"], now["family"], now["machine"]))
    monkeypatch.setattr(log, "usable_cores", lambda: 2)
    monkeypatch.setattr(log.psutil, "cpu_count", lambda: 2)
    clock = Clock(started=0.0)
    spend(6.0, 12.0)
    with clock.waiting():
        spend(4.0, 1.0, loaders=5.0, others=2.0)
    with clock.paused():
        spend(10.0, 20.0)
    assert clock.processors() == Processors(network=pytest.approx(12 / 20), others=pytest.approx(2 / 40))
    assert clock.share_waiting == pytest.approx(0.4)


def test_in_a_container_that_may_not_use_all_cores_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "usable_cores", lambda: 1)
    monkeypatch.setattr(log.psutil, "cpu_count", lambda: 64)
    assert Clock().processors() is None


def test_the_machine_has_at_least_what_this_process_had() -> None:
    own, family, machine = log._seconds()
    assert 0 < own <= family + 0.02  # two clocks of different grain
    assert machine > 0


def test_a_log_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    assert read_log(path) == []
    path.write_text(ROWS)
    Log(path, [], from_step=50)
    assert [(row["step"], row["dead"]) for row in read_log(path)] == [("50", "")]


@pytest.mark.parametrize(
    ("old", "new"),
    [("100,", "1O0,"), ("0.05", ""), ("0.002", "fast"), (",0.2\n", ",\xff\n"), ("step,", "stop,"), ("0.05,", '"0.05,')],
)
def test_a_damaged_log_is_one_line(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(ROWS.replace(old, new).encode("latin-1"))
    with pytest.raises(InputError, match=r"log\.csv is damaged after row [012] \(.*; repair it, or move it away$"):
        read_log(path)
