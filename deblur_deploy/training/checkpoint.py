"""Checkpoints: safetensors whose metadata holds the config, so that loading builds the network and never unpickles."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from deblur_deploy.contract import CHECKPOINT_KEY
from deblur_deploy.errors import ModelError, one_line
from deblur_deploy.files import existing, writing_file
from deblur_deploy.training.unet import UNet, UNetConfig


def save_checkpoint(model: UNet, path: Path, notes: dict[str, str] | None = None) -> None:
    """Write weights and config to ``path``, whole or not at all; ``notes`` become further metadata.

    Weights keep their type: ``model.half()`` makes a file of half the size, which loads as fp32 like any other.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_tensors(tensors, path, {CHECKPOINT_KEY: msgspec.json.encode(model.config).decode(), **(notes or {})})


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write safetensors whole or not at all; raises OutputError if the disk is full or the folder not writable."""
    data = save(tensors, metadata)
    # The library writes its header in random order; sorted, equal weights are equal files, whose hashes say so.
    end = 8 + int.from_bytes(data[:8], "little")
    header = msgspec.json.encode(msgspec.json.decode(data[8:end]), order="sorted")
    header += b" " * (-len(header) % 8)
    with writing_file(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        file.write(memoryview(data)[end:])


def refuse_pickle(path: Path) -> None:
    """Raise ModelError, with the command that converts it, if ``path`` is what ``torch.save`` writes.

    Unpickling runs whatever code the file names, so nothing here does.
    """
    with path.open("rb") as file:
        start = file.read(9)
    # A zip archive; or a bare pickle of protocol 2 to 5, unless these bytes are the length of a safetensors header.
    if start.startswith(b"PK\3\4") or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5" and start[8:] != b"{"):
        raise ModelError(f"{path} is a pickle; only safetensors are read; convert it: {conversion(path)}")


def conversion(path: Path) -> str:
    """The command that makes safetensors of the state dict in ``path``, which torch saved, alone or inside a dict."""
    given, wanted = (json.dumps(str(name)) for name in (path, path.with_suffix(".safetensors")))
    code = (
        f'import torch, safetensors.torch as s; d = torch.load({given}, map_location="cpu", weights_only=True); '
        'd = d.get("state_dict", d.get("params", d)); '
        f"s.save_file({{k: v.clone().contiguous() for k, v in d.items()}}, {wanted})"
    )
    return f"python -c {shlex.quote(code)}"


def load_checkpoint(path: Path) -> UNet:
    """The network stored at ``path``, in fp32 and eval mode on the CPU.

    Raises MissingFileError if there is no such file, ModelError if it is not a whole checkpoint of ours.
    """
    refuse_pickle(existing(path, kind="file"))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if CHECKPOINT_KEY not in metadata:
                raise ModelError(f"{path} is safetensors but holds no deblur_deploy U-Net; train one with deblur-train")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file ({one_line(error)}); train or copy it again"
        ) from None
    try:
        model = UNet(msgspec.json.decode(metadata[CHECKPOINT_KEY], type=UNetConfig))
        model.load_state_dict(tensors)
    except (msgspec.MsgspecError, RuntimeError, MemoryError) as error:
        raise ModelError(f"{path} does not hold the weights that its config describes: {one_line(error)}") from None
    if not all(torch.isfinite(value).all() for value in tensors.values()):
        raise ModelError(f"{path} holds weights that are not finite; train it again or use an earlier checkpoint")
    return model.eval()
