"""Tuning: what is kept, when it counts, and that a kept choice is what runs."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deblur_deploy import DeblurEngine
from deblur_deploy.bundles.manifest import MANIFEST
from deblur_deploy.cli import bench as command
from deblur_deploy.cli import common
from deblur_deploy.errors import MissingFileError, OutputError, ProviderError
from deblur_deploy.evaluation import tune as tune_module
from deblur_deploy.evaluation.record import Row
from deblur_deploy.evaluation.tune import Trial, candidate, tune
from deblur_deploy.runtime import tuned
from deblur_deploy.runtime.providers import find
from deblur_deploy.runtime.restoring import plan_for
from deblur_deploy.runtime.tuned import Tuned, load, save
from deblur_deploy.system.folders import cache_folder
from tests import tiny
from tests.conftest import noise

CHOICE = Tuned(variant="fp32", provider="cpu", threads=1, fixed=False, tile_pixels=4096, date="2026-01-02T03:04:05")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEBLUR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_engine_runs_what_was_kept_and_says_so(bundle: Path) -> None:
    plain = DeblurEngine(bundle)
    assert (plain.receipt.variant, plain.receipt.tuned) == ("int8", None)
    save(bundle, CHOICE)
    engine, image = DeblurEngine(bundle), noise(90, 110, 3)
    receipt = engine.receipt
    assert (receipt.variant, receipt.provider, receipt.threads, receipt.tuned) == ("fp32", "cpu", 1, CHOICE.date)
    assert "tuned 2026-01-02" in str(receipt)
    for _ in range(3):
        np.testing.assert_array_equal(engine(image), DeblurEngine(bundle, "cpu", "fp32")(image))
    assert engine._main is not None
    assert not engine._main._fixed
    assert plan_for(engine._main, image, budget=engine._budget, tile_pixels=4096).pixels > 90 * 110
    seen: list[int] = []
    run = engine._main.run
    engine._main.run = lambda batch, **kw: seen.append(batch[0, ..., 0].size) or run(batch, **kw)  # type: ignore
    engine(image)
    assert len(seen) > 1
    assert max(seen) <= 4096


@pytest.mark.parametrize(
    ("arguments", "variant", "threads", "date"),
    [
        ({"provider": "cpu"}, "int8", None, None),
        ({"precision": "fp16"}, "fp16", None, None),
        ({"threads": 3}, "fp32", 3, CHOICE.date),
        ({"max_memory_mb": 64}, "fp32", 1, CHOICE.date),
    ],
)
def test_what_is_asked_for_wins(
    bundle: Path, arguments: dict[str, object], variant: str, threads: int | None, date: str | None
) -> None:
    save(bundle, CHOICE)
    engine = DeblurEngine(bundle, **arguments)  # type: ignore[arg-type]
    assert (engine.receipt.variant, engine.receipt.tuned) == (variant, date)
    assert threads in (None, engine.receipt.threads)
    if "max_memory_mb" in arguments:
        assert engine._main is not None
        calls: list[int] = []
        run = engine._main.run
        engine._main.run = lambda batch, **kw: calls.append(1) or run(batch, **kw)  # type: ignore
        engine(noise(90, 110, 3))
        assert calls == [1]


KEPT = {
    "no JSON": lambda kept: b"\xff{",
    "empty": lambda kept: b"",
    "a list": lambda kept: b"[]",
    "deep": lambda kept: b"[" * 60_000,
    "endless": lambda kept: b" " * 2**17 + json.dumps(kept).encode(),
    "another schema": lambda kept: json.dumps({**kept, "schema": 0}).encode(),
    "another machine": lambda kept: json.dumps({**kept, "key": {**kept["key"], "machine": {}}}).encode(),
    "other versions": lambda kept: json.dumps({**kept, "key": {**kept["key"], "versions": {}}}).encode(),
    "no choice": lambda kept: json.dumps({**kept, "tuned": None}).encode(),
    "threads of 0": lambda kept: json.dumps({**kept, "tuned": {**kept["tuned"], "threads": 0}}).encode(),
    "threads of true": lambda kept: json.dumps({**kept, "tuned": {**kept["tuned"], "threads": True}}).encode(),
    "fixed as text": lambda kept: json.dumps({**kept, "tuned": {**kept["tuned"], "fixed": "no"}}).encode(),
    "tiles of a half": lambda kept: json.dumps({**kept, "tuned": {**kept["tuned"], "tile_pixels": 0.5}}).encode(),
}


@pytest.mark.parametrize("damage", KEPT)
def test_what_makes_no_sense_is_ignored(bundle: Path, damage: str) -> None:
    path = save(bundle, CHOICE)
    path.write_bytes(KEPT[damage](json.loads(path.read_text())))
    assert load(bundle) is None
    assert DeblurEngine(bundle).receipt.variant == "int8"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), new=st.binary(max_size=6))
def test_any_damage_is_ignored_or_harmless(bundle: Path, at: int, new: bytes) -> None:
    path = save(bundle, CHOICE)
    content = bytearray(path.read_bytes())
    content[at % len(content) :][: len(new)] = new
    del content[at % len(content) :]
    path.write_bytes(bytes(content) + new)
    assert load(bundle) in (None, CHOICE)


@pytest.mark.parametrize("change", ["model", "cores", "version"])
def test_it_counts_for_one_model_machine_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    model = tiny.write_model(tmp_path / "m.onnx")
    save(model, CHOICE)
    assert load(model) == CHOICE
    if change == "model":
        model.write_bytes(model.read_bytes() + b" ")
    elif change == "cores":
        monkeypatch.setattr(tuned, "usable_cores", lambda: 99)
    else:
        monkeypatch.setattr(tuned, "versions", lambda *names: dict.fromkeys(names, "0"))
    assert load(model) is None


@pytest.mark.parametrize("bad", [{"provider": "coreml"}, {"provider": "nonsense"}, {"variant": "int4"}])
def test_a_choice_that_does_not_run_gives_way_with_one_warning(bundle: Path, bad: dict[str, str]) -> None:
    save(bundle, replace(CHOICE, **bad))
    with pytest.warns(RuntimeWarning, match="what was tuned is not used") as caught:
        engine = DeblurEngine(bundle)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert (engine.receipt.variant, engine.receipt.tuned) == ("int8", None)
    assert "tuned" in engine.receipt.skipped
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ProviderError):
            candidate(str(bundle))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("DEBLUR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "deblur-deploy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "deblur-deploy"

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    assert load(bundle) is None
    with pytest.raises(OutputError, match="DEBLUR_CACHE"):
        save(bundle, CHOICE)


def test_the_fastest_wins_only_beyond_the_noise() -> None:
    def row(ms: float, noise: float) -> Row:
        return Row(model="", variant="", provider="", size="", median_ms=ms, noise=noise)

    assert tune_module._beats(row(90, 0.01), row(100, 0.01))
    assert not tune_module._beats(row(97, 0.02), row(100, 0.02))


def test_every_file_within_the_budget_is_tried_the_engines_own_first(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["variants"][1]["drop_db"] = 0.2  # fp16
    (folder / MANIFEST).write_text(json.dumps(manifest))
    cpu = {"cpu": find("cpu")}
    assert [choice.variant for choice in tune_module._files(folder, cpu)] == ["int8", "fp32"]
    assert [choice.variant for choice in tune_module._files(bundle / "fp16.onnx", cpu)] == ["fp16"]


def test_each_answer_goes_into_the_next_question(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[Tuned]] = []

    def measured(model: Path, choices: list[Tuned], size: tuple[int, int], *_: object) -> list[Trial]:
        asked.append(choices)
        rows = [Row(model="", variant="", provider="", size="", median_ms=100 / (i + 1)) for i in range(len(choices))]
        return [Trial(choice=c, row=row, won=c is choices[-1]) for c, row in zip(choices, rows, strict=True)]

    monkeypatch.setattr(tune_module, "_measured", measured)
    monkeypatch.setattr(tune_module, "usable_cores", lambda: 8)
    outcome = tune(bundle, providers=["cpu"])
    assert [choice.variant for choice in asked[0]] == ["int8", "fp32", "fp16"]
    assert {choice.variant for choice in asked[1] + asked[2]} == {"fp16"}
    assert [(c.threads, c.fixed) for c in asked[1]] == [(n, fixed) for n in (8, 4, 2) for fixed in (True, False)]
    assert {(c.threads, c.fixed) for c in asked[2]} == {(2, False)}
    assert [c.tile_pixels for c in asked[2]] == [None, *tune_module.TILES]
    assert outcome.best is asked[2][-1]
    assert outcome.faster == pytest.approx(3 * 6)


@pytest.mark.slow
def test_what_is_fastest_here_is_kept(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = bundle / "int8.onnx"
    monkeypatch.setattr(tune_module, "usable_cores", lambda: 1)  # fewer candidates
    outcome = tune(model, providers=["cpu"], budget_s=1, size=(64, 48), large=(1100, 1000))
    assert all(trial.row.error is None and trial.row.median_ms for trial in outcome.trials)
    assert [trial.won for trial in outcome.trials].count(True) == 3
    assert len(outcome.trials) == 1 + 2 + 2
    assert not cache.exists()  # candidates are tried in places of their own
    monkeypatch.setattr("deblur_deploy.cli.tune.tune", lambda model, **options: outcome)
    assert command.run(command.parse([str(model), "--tune", "--providers", "cpu"])) == common.OK
    assert "kept in " in capsys.readouterr().out
    assert DeblurEngine(model).receipt.tuned == outcome.best.date


@pytest.mark.parametrize(
    ("model", "providers", "error"), [("none", (), MissingFileError), ("bundle", ("tensorrt",), ProviderError)]
)
def test_what_cannot_be_tuned_is_named(
    bundle: Path, tmp_path: Path, model: str, providers: tuple[str, ...], error: type[Exception]
) -> None:
    with pytest.raises(error):
        tune(bundle if model == "bundle" else tmp_path / model, providers=providers)
