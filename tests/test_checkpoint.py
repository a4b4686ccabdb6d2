"""A checkpoint comes back exactly, or says in one line why it does not."""

from __future__ import annotations

import pickle
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deblur_deploy.contract import CHECKPOINT_KEY
from deblur_deploy.errors import MissingFileError, ModelError, OutputError
from deblur_deploy.training.checkpoint import load_checkpoint, save_checkpoint
from deblur_deploy.training.unet import UNet, UNetConfig
from tests.conftest import reading_as_nobody, unprivileged

CONFIG = UNetConfig(stem=2, encoder=((4,), (6,)), up=(3,), decoder=((4,),))
JSON = msgspec.json.encode(CONFIG).decode()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_checkpoint(UNet(CONFIG), tmp_path / "net.safetensors", {"step": "7"})
    return tmp_path / "net.safetensors"


def test_round_trip_is_exact(saved: Path, tmp_path: Path) -> None:
    model = load_checkpoint(saved)
    torch.manual_seed(0)
    fresh = UNet(CONFIG)
    assert model.config == CONFIG
    assert not model.training
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items())
    save_checkpoint(model, tmp_path / "again.safetensors", {"step": "7"})
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


def test_half_precision_takes_half_the_room_and_loads_as_fp32(saved: Path, tmp_path: Path) -> None:
    model = load_checkpoint(saved)
    rounded = {name: value.half().float() for name, value in model.state_dict().items()}
    save_checkpoint(model.half(), tmp_path / "half.safetensors", {"step": "7"})
    small = load_checkpoint(tmp_path / "half.safetensors")
    assert {value.dtype for value in small.state_dict().values()} == {torch.float32}
    assert all(torch.equal(value, rounded[name]) for name, value in small.state_dict().items())
    sizes = [sum(value.numel() for value in model.state_dict().values()) * width for width in (2, 4)]
    assert (tmp_path / "half.safetensors").stat().st_size - sizes[0] == pytest.approx(
        saved.stat().st_size - sizes[1], abs=64
    )


def broken(kind: str, path: Path) -> None:
    tensors = UNet(CONFIG).state_dict()
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("these are not the weights\n" * 50)
        case "pickled":
            path.write_bytes(pickle.dumps({"a": 1}))
        case "torch":
            torch.save(tensors, path)
        case "foreign":
            save_file(tensors, path)
        case "no config":
            save_file(tensors, path, {CHECKPOINT_KEY: "{"})
        case "wrong config":
            other = msgspec.structs.replace(CONFIG, stem=1)
            save_file(tensors, path, {CHECKPOINT_KEY: msgspec.json.encode(other).decode()})
        case "impossible config":
            save_file(tensors, path, {CHECKPOINT_KEY: JSON.replace('"stem":2', '"stem":99')})
        case "unknown key":
            save_file(tensors, path, {CHECKPOINT_KEY: JSON.replace('"stem":2', '"stem":2,"depth":3')})
        case "missing weight":
            save_file(
                {name: value for name, value in tensors.items() if name != "head.weight"}, path, {CHECKPOINT_KEY: JSON}
            )
        case "nan":
            tensors["head.bias"][0] = torch.nan
            save_file(tensors, path, {CHECKPOINT_KEY: JSON})


KINDS = ["empty", "text", "pickled", "torch", "foreign", "no config", "wrong config", "impossible config"]
KINDS += ["unknown key", "missing weight", "nan"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_file_is_a_model_error_of_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    broken(kind, path)
    with pytest.raises(ModelError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 0.999))
def test_a_truncated_file_is_a_model_error(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("truncated")
    save_checkpoint(UNet(CONFIG), folder / "net.safetensors")
    data = (folder / "net.safetensors").read_bytes()
    (folder / "net.safetensors").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ModelError):
        load_checkpoint(folder / "net.safetensors")


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(MissingFileError, match=path.name):
            load_checkpoint(path)


@pytest.mark.parametrize("how", ["new", "old", "in state_dict"])
def test_a_pickle_names_the_command_that_converts_it(how: str, tmp_path: Path) -> None:
    path, weights = tmp_path / "it's my net.pth", {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(1)}
    content = {"state_dict": weights, "epoch": 3} if how == "in state_dict" else weights
    torch.save(content, path, _use_new_zipfile_serialization=how != "old")
    with pytest.raises(ModelError, match=r"is a pickle; only safetensors are read; convert it: python -c") as caught:
        load_checkpoint(path)
    command = shlex.split(str(caught.value).partition("convert it: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True)
    converted = load_file(path.with_suffix(".safetensors"))
    assert converted.keys() == weights.keys()
    assert all(torch.equal(converted[name], weights[name]) for name in weights)


def test_a_header_whose_length_looks_like_a_pickle_is_none(tmp_path: Path) -> None:
    for pad in range(640):
        save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"pad": "x" * pad})
        if (tmp_path / "a.safetensors").read_bytes()[:2] == b"\x80\2":
            break
    else:
        raise AssertionError("no header was as long")
    with pytest.raises(ModelError, match="holds no deblur_deploy U-Net"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_a_locked_checkpoint_is_one_line(saved: Path) -> None:
    with unprivileged() as room:
        path = Path(shutil.copy(saved, room))
        path.chmod(0)
        with reading_as_nobody(), pytest.raises(MissingFileError, match=r"cannot read .*: Permission denied"):
            load_checkpoint(path)


def test_a_full_disk_keeps_the_earlier_checkpoint(saved: Path) -> None:
    before, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OutputError, match=str(saved)):
            save_checkpoint(UNet(CONFIG), saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
