"""Checkpoints: safetensors whose metadata holds the config, so that loading builds the network and never unpickles."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from deblur_deploy.contract import CHECKPOINT_KEY
from deblur_deploy.errors import ModelError
from deblur_deploy.files import existing, writing_file
from deblur_deploy.training.unet import UNet, UNetConfig

CONFIG_KEY = CHECKPOINT_KEY


def save_checkpoint(model: UNet, path: Path, notes: dict[str, str] | None = None) -> None:
    """Write weights and config to ``path``, whole or not at all; ``notes`` become further metadata.

    Weights keep their type: ``model.half()`` makes a file of half the size, which loads as fp32 like any other.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_tensors(tensors, path, {CONFIG_KEY: msgspec.json.encode(model.config).decode(), **(notes or {})})


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


def load_checkpoint(path: Path) -> UNet:
    """The network stored at ``path``, in fp32 and eval mode on the CPU.

    Raises MissingFileError if there is no such file, ModelError if it is not a whole checkpoint of ours.
    """
    existing(path, kind="file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if CONFIG_KEY not in metadata:
                raise ModelError(f"{path} is safetensors but holds no deblur_deploy U-Net; train one with deblur-train")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except SafetensorError as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); train or copy it again") from None
    try:
        model = UNet(msgspec.json.decode(metadata[CONFIG_KEY], type=UNetConfig))
        model.load_state_dict(tensors)
    except (msgspec.MsgspecError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path} does not hold the weights that its config describes: {reason}") from None
    if not all(torch.isfinite(value).all() for value in tensors.values()):
        raise ModelError(f"{path} holds weights that are not finite; train it again or use an earlier checkpoint")
    return model.eval()
