"""The stages of pruning: what they give, what the cache spares, what a person is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from accelerate.state import AcceleratorState

from deblur_deploy.errors import InputError
from deblur_deploy.evaluation.latency import Timing
from deblur_deploy.files import sha256
from deblur_deploy.pipeline import inputs
from deblur_deploy.pipeline.cache import Cache
from deblur_deploy.pipeline.pruning import fit
from deblur_deploy.pipeline.pruning import report as prune_report
from deblur_deploy.pipeline.pruning.config import PruneConfig, RecoverConfig
from deblur_deploy.pipeline.pruning.shrink import Shrinking
from deblur_deploy.pipeline.recipe import Recipe, read_recipe, write_recipe
from deblur_deploy.pipeline.stages import Stages, digest
from deblur_deploy.training.checkpoint import load_checkpoint, save_checkpoint
from tests.photos import write_pairs
from tests.small import unet


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which a network takes a millisecond for each kMAC per pixel; exporting takes seconds."""

    def took(nets, *_: object) -> list[Timing]:  # type: ignore[no-untyped-def]
        return [Timing.of([net.config.macs_per_pixel / 1000]) for net in nets]

    monkeypatch.setattr(fit, "time_exported", took)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shrink")
    save_checkpoint(unet(), folder / "small.safetensors")
    write_pairs(folder / "pairs", 2)
    return folder


def shrunk(room: Path, work: Path, config: PruneConfig) -> tuple[Path, dict, list[str], Stages]:  # type: ignore[type-arg]
    said: list[str] = []
    stages = Stages(Cache(room / "cache"), work, said.append)
    work.mkdir()
    checkpoint = room / "small.safetensors"
    shrinking = Shrinking(
        stages=stages,
        checkpoint=checkpoint,
        parent=sha256(checkpoint),
        config=config,
        pairs=inputs.pairs(room / "pairs"),
    )
    return (*shrinking.run(), said, stages)


def choice(room: Path, **more: object) -> PruneConfig:
    data = (str(room / "pairs"),)
    recover = RecoverConfig(data=data, steps=4, patches=2, side_px=32, precision="fp32", workers=0)
    return msgspec.structs.replace(PruneConfig(recover=recover, multiple=4), **more)


def test_rounds_end_at_the_share_and_a_second_run_does_nothing(room: Path, tmp_path: Path) -> None:
    config = choice(room, macs=0.5, rounds=2)
    path, record, _, stages = shrunk(room, tmp_path / "first", config)
    small = load_checkpoint(path)
    assert small.config.macs_per_pixel <= 0.5 * unet().config.macs_per_pixel
    assert list(record["macs_per_pixel"]) == [unet().config.macs_per_pixel, small.config.macs_per_pixel]
    assert set(record["psnr"]) == {"dense", "pruned", "recovered"}
    assert record["recovery"]["steps"] == 2, "half of the steps in each round"
    assert record["notes"] == []
    names = [stage["name"] for stage in stages.journal]
    assert [name for name in names if "round" in name] == [
        f"{what}, round {number} of 2" for number in (1, 2) for what in ("prune", "recover")
    ]
    again, second, _, stages = shrunk(room, tmp_path / "second", config)
    assert sha256(again) == sha256(path)
    assert digest(second) == digest(record)
    assert all(stage["cached"] for stage in stages.journal)


def test_a_latency_is_found_and_the_report_has_all_figures(room: Path, tmp_path: Path) -> None:
    dense_ms = unet().config.macs_per_pixel / 1000
    path, record, said, _ = shrunk(room, tmp_path / "first", choice(room, target_ms=dense_ms / 2))
    assert 0.45 * dense_ms <= record["latency"]["ms"] <= 0.5 * dense_ms
    assert record["latency"]["dense_ms"] == pytest.approx(dense_ms)
    assert record["fit"]["ms"] == pytest.approx(load_checkpoint(path).config.macs_per_pixel / 1000)
    assert any("kMAC per pixel take" in line for line in said)
    with pytest.raises(InputError, match="but the smallest network"):
        shrunk(room, tmp_path / "second", choice(room, target_ms=dense_ms / 1000))
    table = prune_report.outcome(record | {"notes": ["weak"]})
    assert [row[0] for row in table.rows][:2] == ["kMAC per pixel", "parameters"]
    assert table.note == "Weak."
    assert f"{record['psnr']['recovered']:.3f}" in table.rows[-1]
    assert next(row[0] for row in prune_report.widths(record).rows) == "encoder.0.0"
    assert "encoder.0.0" in prune_report.sensitivity_figure(record)


def test_without_data_a_person_is_told_that_recovery_is_weak(room: Path, tmp_path: Path) -> None:
    config = choice(room, macs=0.7)
    config = msgspec.structs.replace(config, recover=msgspec.structs.replace(config.recover, data=(), steps=1))
    _, record, said, _ = shrunk(room, tmp_path / "work", config)
    assert "built-in photographs only, which is weak" in record["notes"][0]
    assert f"note: {record['notes'][0]}" in said


def test_a_recipe_keeps_the_choices(room: Path, tmp_path: Path) -> None:
    recipe = Recipe(prune=choice(room, macs=0.5))
    write_recipe(recipe, tmp_path / "recipe.toml")
    assert read_recipe(tmp_path / "recipe.toml").prune == recipe.prune
    (tmp_path / "wrong.toml").write_text("[prune]\nmacs = 2.0")
    with pytest.raises(InputError, match=r"macs is 2; allowed: .* - at `\$\.prune\.macs`"):
        read_recipe(tmp_path / "wrong.toml")
