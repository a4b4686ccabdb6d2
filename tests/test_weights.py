"""A file of somebody's weights is recognised, or refused in one line; nothing in it is ever run."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deblur_deploy.errors import DeblurError, MissingExtraError, ModelError
from deblur_deploy.pipeline import inputs
from deblur_deploy.pipeline.config import InputConfig, NetworkConfig
from deblur_deploy.pipeline.doors.source import open_door
from deblur_deploy.pipeline.doors.weights import import_spandrel, load_weights, unwrapped
from tests.photos import photo

PAIRS = inputs.pairs(None)


@pytest.fixture(scope="module")
def spandrel() -> Any:
    """The package; skips where it is absent."""
    try:
        return import_spandrel()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"spandrel does not load: {error}")


@pytest.fixture(scope="module")
def nafnet(spandrel: Any) -> Any:
    """A small NAFNet with random weights."""
    from spandrel.architectures.NAFNet import NAFNet

    torch.manual_seed(0)
    return NAFNet(img_channel=3, width=8, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]).eval()


def test_wrappers_and_prefixes_come_off_and_are_told() -> None:
    state, notes = unwrapped({"epoch": 3, "state_dict": {"module._orig_mod.a.weight": torch.ones(2).half()}})
    assert list(state) == ["a.weight"]
    assert state["a.weight"].dtype == torch.float32
    assert [note.split("'")[1] for note in notes] == ["state_dict", "module.", "_orig_mod."]


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_architecture_is_recognised_and_restores_as_it_does(nafnet: Any, wrapped: bool, tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in nafnet.state_dict().items()}
    path = tmp_path / "net.pth"
    torch.save({"params": state, "epoch": 3} if wrapped else nafnet.state_dict(), path)
    source = open_door(path, NetworkConfig(), PAIRS, tmp_path)
    assert source.path == path
    assert source.convention is not None
    image = photo(0, 40, 56)
    with torch.no_grad():
        expected = nafnet(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)[0].permute(1, 2, 0).numpy()
    found = source.reference(source.convention)(image)
    assert np.abs(found - np.rint(expected.clip(0, 1) * 255)).max() <= 1
    ready = source.prepare()
    assert ready.network.sees_everything
    assert ready.network.residual
    told = open_door(path, NetworkConfig(input=InputConfig(colour="bgr")), PAIRS, tmp_path)
    assert told.convention is not None
    assert np.array_equal(told.reference(told.convention)(image[..., ::-1])[..., ::-1], found)
    said = " ".join(ready.notes)
    assert "net.pth is NAFNet, by spandrel" in said
    assert ("were inside of 'params'" in said) == wrapped


@pytest.mark.parametrize("prefix", ["", "generator."])
def test_a_prefix_stays_where_it_is_the_architectures_own(spandrel: Any, tmp_path: Path, prefix: str) -> None:
    from spandrel.architectures.DnCNN import DnCNN

    state = DnCNN(in_nc=3, out_nc=3, nc=8, nb=8, act_mode="R").state_dict()
    assert all(name.startswith("model.") for name in state)
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "net.pth")
    _, notes = load_weights(tmp_path / "net.pth")
    assert "net.pth is DnCNN" in notes[-1]
    assert not any("'model.'" in note for note in notes)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("touched"),))


def files(folder: Path) -> dict[str, Path]:
    made = {name: folder / name for name in ("evil.pth", "cut.pth", "text.pth", "list.pth", "plain.safetensors")}
    torch.save({"model": Evil()}, made["evil.pth"])
    torch.save({"a": torch.ones(1000)}, made["cut.pth"])
    made["cut.pth"].write_bytes(made["cut.pth"].read_bytes()[:700])
    made["text.pth"].write_text("these are not weights")
    torch.save([1, 2], made["list.pth"])
    save_file({"some.weight": torch.zeros(1)}, made["plain.safetensors"])
    (folder / "net.h5").write_bytes(pickle.dumps({}))
    return made | {"net.h5": folder / "net.h5"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "evil.pth",
            r"a pickle that holds more than weights.*if you trust it, convert it: python -c .*evil\.safetensors",
        ),
        ("cut.pth", "not a whole file of weights"),
        ("text.pth", "not a whole file of weights|a pickle that holds more"),
        ("list.pth", "holds no weights that have names"),
        ("plain.safetensors", r"holds no deblur_deploy U-Net.*(some\.weight|pip install 'deblur-deploy\[networks\]')"),
        ("net.h5", "is no network; give .onnx, .pth"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(
    name: str, said: str, spandrel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = files(tmp_path)[name]
    with pytest.raises(DeblurError, match=said) as caught:
        open_door(path, NetworkConfig(), PAIRS, tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "touched").exists()


def test_a_network_that_enlarges_is_named_with_its_factor(spandrel: Any, tmp_path: Path) -> None:
    from spandrel.architectures.Compact import Compact

    net = Compact(num_feat=8, num_conv=1, upscale=4)
    save_file(net.state_dict(), tmp_path / "up.safetensors")
    with pytest.raises(DeblurError, match=r"which makes images 4 times as large"):
        load_weights(tmp_path / "up.safetensors")


@pytest.mark.parametrize("installed", [False, True])
def test_architectures_of_restrictive_licences_are_known_where_they_are_installed(
    installed: bool, spandrel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    extra = SimpleNamespace(install=lambda ignore_duplicates: asked.append(ignore_duplicates))
    monkeypatch.setitem(sys.modules, "spandrel_extra_arches", extra if installed else None)
    save_file({"some.weight": torch.zeros(1)}, tmp_path / "net.safetensors")
    with pytest.raises(ModelError, match=r"--model package.module:build") as caught:
        load_weights(tmp_path / "net.safetensors")
    assert ("pip install spandrel_extra_arches" in str(caught.value)) == (not installed)
    assert asked == [True] * installed


def test_without_spandrel_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    save_file({"some.weight": torch.zeros(1)}, tmp_path / "net.safetensors")
    with pytest.raises(MissingExtraError, match=r"pip install 'deblur-deploy\[networks\]'"):
        load_weights(tmp_path / "net.safetensors")


def test_weights_that_are_not_finite_are_refused(nafnet: Any, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in nafnet.state_dict().items()}
    state["intro.weight"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises((ModelError, DeblurError), match=r"weights that are NaN"):
        load_weights(tmp_path / "nan.pth")
