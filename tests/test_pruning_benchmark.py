"""``benchmarks/pruning.py``: its arithmetic, and whose networks it takes from its work folder."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from deblur_deploy.errors import InputError
from deblur_deploy.evaluation.record import Row, new_record
from deblur_deploy.pipeline.pruning.config import PruneConfig
from deblur_deploy.training.checkpoint import save_checkpoint
from tests.small import unet

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def pruning() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("pruning")


def test_it_says_what_it_does_and_refuses_what_makes_no_sense(
    pruning: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, status, said in ((["--help"], 0, "--steps"), (["--threads", "0"], 2, "allowed: 1 or more")):
        monkeypatch.setattr(sys, "argv", ["pruning.py", *words])
        with pytest.raises(SystemExit) as caught:
            pruning.script(pruning.Pruning, pruning.run)
        assert caught.value.code == status
        printed = capsys.readouterr()
        assert said in printed.out + printed.err


def test_networks_of_other_settings_are_not_taken(pruning: ModuleType, tmp_path: Path) -> None:
    save_checkpoint(unet(), tmp_path / "small.safetensors")
    options = pruning.Pruning(checkpoint=tmp_path / "small.safetensors", work=tmp_path / "work", steps=10)
    how, training = PruneConfig(), options.training()
    pruning._claim(options, how, training)
    pruning._claim(options, how, msgspec.structs.replace(training, workers=7))
    for other in ((how, msgspec.structs.replace(training, steps=11)), (PruneConfig(balance=0.5), training)):
        with pytest.raises(InputError, match="networks of another checkpoint or other settings"):
            pruning._claim(options, *other)


def test_the_summary_is_against_the_dense_network(pruning: ModuleType) -> None:
    def row(share: float, variant: str, provider: str, psnr: float, ms: float | None = None) -> Row:
        facts = {"share": share, "macs_per_pixel": 1000 * share}
        where = {"model": "m", "variant": variant, "provider": provider, "size": "1280x720"}
        return Row(**where, psnr=psnr, psnr_blurred=28, median_ms=ms, facts=facts)

    rows = [row(1, "dense", "torch", 30), row(1, "trained on", "torch", 30.2), row(1, "dense, int8", "cpu", 29.9, 100)]
    shares = (0.75, 0.5, 0.25)
    for share in shares:
        kinds = {"pruned": 29.0, "recovered": 29.95, "scratch": 29.5}
        rows += [row(share, kind, "torch", psnr) for kind, psnr in kinds.items()]
        rows.append(row(share, "recovered, int8", "cpu", 29.85, 100 * share))
    summary = pruning._summary(rows)
    for share, line in zip(shares, summary, strict=True):
        assert {name: pytest.approx(value) for name, value in line.items()} == {
            "share": share, "pruned_db": -1.0, "recovered_db": -0.05, "scratch_db": -0.5,
            "recovered_to_trained_on_db": -0.25, "cpu_speedup": 1 / share, "cpu_int8_db": -0.05,
        }  # fmt: skip
    settings = {"checkpoint": "m", "sets": {"a": [], "b": []}, "training": {"steps": 9, "patches": 2, "side_px": 64}}
    table = pruning.pruning_table(new_record("pruning", settings, rows=rows, found={"summary": summary}))
    assert table.rows[0] == ["100%", "1.0", "", "", "", "", "100"]
    assert table.rows[2] == ["50%", "0.5", "-1.00", "-0.05", "-0.50", "-0.05", "50.0 (2.00x)"]
    for text in ("30.00 dB", "mean of a and b", "9 steps of 2 patches of 64 px", "trained on for as long: +0.20 dB"):
        assert text in table.note
    fewer = [row for row in rows if row.variant != "scratch"]
    table = pruning.pruning_table(
        new_record("pruning", settings, rows=fewer, found={"summary": pruning._summary(fewer)})
    )
    assert "from scratch, dB" not in table.columns
    assert {len(row) for row in table.rows} == {len(table.columns)}
