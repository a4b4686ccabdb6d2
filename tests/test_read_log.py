"""The log of a training: read back, or named with the row that is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from deblur_deploy.errors import InputError
from deblur_deploy.training.log import Log, read_log

ROWS = "step,loss,learning_rate,images_per_s,waiting,dead\n50,0.1,0.001,9,0.1,\n100,0.05,0.002,9,0.1,0.2\n"


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
