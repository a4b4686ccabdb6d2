"""Bundles by name: what ships, what the user installed, and every command that takes a model."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from deblur_deploy import DeblurEngine
from deblur_deploy.bundles import names
from deblur_deploy.cli import bench, run, tune
from deblur_deploy.cluster.work import packed
from deblur_deploy.errors import MissingFileError
from deblur_deploy.evaluation.bench import entries_of
from deblur_deploy.media.images import write_image
from deblur_deploy.system.folders import data_folder
from tests import tiny
from tests.conftest import noise


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``shipped`` with the bundles hd and hd-quarter, ``own`` with hd-half; the working folder is empty."""
    for place in ("shipped/hd", "shipped/hd-quarter", "own/hd-half", "own/.hd-half-12345678"):
        tiny.write_bundle(tmp_path / place)
    (tmp_path / "own" / "no bundle").mkdir()
    (tmp_path / "shipped" / "hd.safetensors").touch()
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(names, "MODELS", tmp_path / "shipped")
    monkeypatch.setenv("DEBLUR_BUNDLES", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.parametrize(("name", "place"), [("hd-quarter", "shipped/hd-quarter"), ("hd-half", "own/hd-half")])
def test_a_name_is_the_bundle_that_ships_or_was_installed(homes: Path, name: str, place: str) -> None:
    assert list(names.bundles()) == ["hd", "hd-half", "hd-quarter"]
    assert names.located(name) == names.located(Path(name)) == homes / place
    with DeblurEngine(name, "cpu") as engine, DeblurEngine(homes / place, "cpu") as expected:
        np.testing.assert_array_equal(engine(noise(9, 7, 3)), expected(noise(9, 7, 3)))
        pickled = pickle.dumps(engine)
    assert entries_of(Path(name), ["cpu"])[0].model == name
    assert packed(Path(name)) == packed(homes / place)
    # Also where nothing is known by that name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEBLUR_BUNDLES", str(homes / "none"))
        patch.setattr(names, "MODELS", homes / "none")
        assert pickle.loads(pickled).receipt.model == "tiny"


def test_what_lies_here_comes_before_names_and_own_before_shipped(homes: Path) -> None:
    own = tiny.write_bundle(homes / "own" / "hd")
    assert names.located("hd") == own
    tiny.write_bundle(homes / "work" / "hd")
    assert names.located("hd") == Path("hd")


def test_the_commands_take_names(homes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(homes / "photo.png", noise(20, 30, 3))
    assert run.command([str(homes / "photo.png"), "--model", "hd-quarter", "--provider", "cpu"]) == 0
    assert (homes / "work" / "restored" / "photo.png").is_file()
    made = bench._entries(bench.parse(["hd-quarter", "hd-half", "--providers", "cpu", "--variants", "int8"]), [])
    assert [entry.name for entry in made] == ["hd-quarter/int8 on cpu", "hd-half/int8 on cpu"]
    tuned: list[Path] = []

    def tune_(model: Path, **_: object) -> None:
        tuned.append(model)
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "tune", tune_)
    with pytest.raises(KeyboardInterrupt):
        tune.run([Path("hd-half")], providers=(), budget_s=1, console=Console(quiet=True))
    assert tuned == [homes / "own" / "hd-half"]


@pytest.mark.parametrize("name", ["hd-hlaf", "absent.onnx", ".hd-half-12345678", "hd.safetensors"])
def test_an_unknown_name_is_one_line_that_lists_the_known(homes: Path, name: str) -> None:
    line = (
        f"no such model: {name}; give a bundle folder or an .onnx file of deblur-export, or a name: hd, hd-half, hd-q"
    )
    for asked in (DeblurEngine, lambda name: entries_of(Path(name), ["cpu"]), lambda name: packed(Path(name))):
        with pytest.raises(MissingFileError) as caught:
            asked(name)
        assert str(caught.value).startswith(line)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["./hd", "folder/hd", "hf://user/hd", "hd/"])
def test_a_path_is_no_name(homes: Path, path: str) -> None:
    assert names.located(path) == Path(path)


def test_where_the_users_own_are(monkeypatch: pytest.MonkeyPatch, homes: Path) -> None:
    monkeypatch.delenv("DEBLUR_BUNDLES")
    monkeypatch.setenv("XDG_DATA_HOME", str(homes / "data"))
    assert data_folder() == homes / "data" / "deblur-deploy" / "bundles"
    assert list(names.bundles()) == ["hd", "hd-quarter"]
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert data_folder() is None
    assert list(names.bundles()) == ["hd", "hd-quarter"]
    monkeypatch.setattr(names, "MODELS", homes / "none")
    with pytest.raises(MissingFileError, match="or a name: none is installed"):
        names.located("hd")
