"""The stages of pruning: what they give, what the cache spares, what a person is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from accelerate.state import AcceleratorState

from deblur_deploy.errors import InputError, MissingFileError
from deblur_deploy.evaluation.latency import Timing
from deblur_deploy.files import sha256
from deblur_deploy.media.images import list_images
from deblur_deploy.pipeline import inputs
from deblur_deploy.pipeline.cache import Cache
from deblur_deploy.pipeline.pruning import fit, recover
from deblur_deploy.pipeline.pruning import report as prune_report
from deblur_deploy.pipeline.pruning.config import PruneConfig, RecoverConfig
from deblur_deploy.pipeline.pruning.shrink import Shrinking, data_digest
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


def test_a_damaged_half_of_a_recovery_is_begun_again(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = choice(room, macs=0.6)
    real, calls = recover.recover, list[str]()

    def interrupted(*arguments: object) -> object:
        real(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(recover, "recover", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shrunk(room, tmp_path / "first", config)
    monkeypatch.setattr(recover, "recover", lambda *arguments: calls.append("again") or real(*arguments))
    (state,) = (room / "cache").rglob("*.part/run/state.safetensors")
    state.write_bytes(state.read_bytes()[:1000])
    _, record, said, _ = shrunk(room, tmp_path / "second", config)
    assert record["recovery"]["steps"] == 4
    assert len(calls) == 2
    assert any("damaged" in line and "begun again" in line for line in said)


def test_where_the_data_lie_and_how_many_load_them_is_no_reason_to_recover_again(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = choice(room, macs=0.55)
    shrunk(room, tmp_path / "first", config)
    monkeypatch.chdir(room)
    moved = msgspec.structs.replace(config.recover, data=("pairs",), workers=1)
    *_, stages = shrunk(room, tmp_path / "second", msgspec.structs.replace(config, recover=moved))
    assert all(stage["cached"] for stage in stages.journal)
    other = msgspec.structs.replace(config.recover, data=("pairs=0.5",))
    assert data_digest(other) != data_digest(config.recover)


def test_a_list_of_pairs_stands_for_what_it_lists(tmp_path: Path) -> None:
    write_pairs(tmp_path, 1)
    (blurred,), (sharp,) = (list_images(tmp_path / kind) for kind in ("blur", "sharp"))
    (tmp_path / "pairs.csv").write_text(f"{blurred},{sharp}\n")
    config = RecoverConfig(data=(str(tmp_path / "pairs.csv"),))
    before = data_digest(config)
    assert data_digest(config) == before
    sharp.write_bytes(sharp.read_bytes() + b"\0")
    assert data_digest(config) != before


def test_training_data_that_are_not_there_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "rglob", lambda *_: pytest.fail("nothing is searched"))
    with pytest.raises(MissingFileError, match="no such file or folder: photoz"):
        data_digest(RecoverConfig(data=("photoz",)))


def test_frames_that_blur_longer_give_other_samples(room: Path, tmp_path: Path) -> None:
    config = choice(room, macs=0.55)
    shrunk(room, tmp_path / "first", config)
    other = msgspec.structs.replace(config.recover, frames_window=(7, 9))
    *_, stages = shrunk(room, tmp_path / "second", msgspec.structs.replace(config, recover=other))
    assert [stage["cached"] for stage in stages.journal if stage["name"].startswith("prune")] == [False]


def test_a_network_that_is_small_enough_does_not_recover(room: Path, tmp_path: Path) -> None:
    path, record, _, _ = shrunk(room, tmp_path / "work", choice(room, macs=1.0))
    assert "recovery" not in record
    assert load_checkpoint(path).config == unet().config


def test_a_share_out_of_reach_is_said_before_the_first_recovery(room: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a share of 0\.001 of the multiply-accumulates is out of reach"):
        shrunk(room, tmp_path / "work", choice(room, macs=0.001, rounds=4))


def test_a_network_that_turns_out_slower_than_wished_is_said_to_be(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slower_together(nets, *_: object) -> list[Timing]:  # type: ignore[no-untyped-def]
        return [Timing.of([len(nets) * net.config.macs_per_pixel / 1000]) for net in nets]

    monkeypatch.setattr(fit, "time_exported", slower_together)
    wished = 0.6 * unet().config.macs_per_pixel / 1000
    _, record, *_ = shrunk(room, tmp_path / "work", choice(room, target_ms=wished, importance="magnitude"))
    assert "timed again" in record["notes"][-1]


def test_a_recipe_finds_its_data_beside_it(room: Path) -> None:
    (room / "own.toml").write_text('[prune]\nmacs = 0.5\n[prune.recover]\ndata = ["pairs=0.7"]')
    assert read_recipe(room / "own.toml").prune.recover.data == (f"{room / 'pairs'}=0.7",)
