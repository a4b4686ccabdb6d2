"""Small networks: every path of the real ones, in milliseconds."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from onnx import ModelProto

from deblur_deploy.pipeline.body import export_body
from deblur_deploy.pipeline.config import Int8Config, Layout, VerifyConfig
from deblur_deploy.pipeline.export import Exporter
from deblur_deploy.pipeline.network import Network
from deblur_deploy.pipeline.recipe import Recipe
from deblur_deploy.pipeline.rows import in_rows
from deblur_deploy.training.unet import UNet, UNetConfig

CONFIGS = {
    "stem4": UNetConfig(stem=4, encoder=((8, 12), (16,), (20, 16)), up=(12, 8), decoder=((16, 12), (8,))),
    "stem2": UNetConfig(stem=2, encoder=((8,), (12, 8)), up=(8,), decoder=((8, 8),)),
    "classic": UNetConfig(encoder=((8, 8), (12,)), up=(8,), decoder=((8,),), residual=False),
    "flat": UNetConfig(stem=3, encoder=((8,),), up=(), decoder=()),
}

RECIPE = Recipe(
    name="small",
    int8=Int8Config(tiles=2, tile_px=64, max_drop_db=3, max_image_drop_db=3, sensitivity_crops=1),
    verify=VerifyConfig(width_px=64, height_px=48, rounds=1, random_sizes=2, fp16_max_drop_db=1),
)


def unet(name: str = "stem4", seed: int = 0) -> UNet:
    """A network with weights that do something: a fresh one's head is zero."""
    torch.manual_seed(seed)
    model = UNet(CONFIGS[name]).eval()
    torch.nn.init.normal_(model.head.weight, std=0.02)
    torch.nn.init.normal_(model.head.bias, std=0.02)
    return model


def exporter(folder: Path, name: str = "stem4") -> Exporter:
    """An exporter of :func:`unet` whose body is made already."""
    return Exporter(network(name), body(name, "planes"), "0" * 64, folder)


def network(name: str) -> Network:
    """The facts about :func:`unet`."""
    return Network.of(unet(name))


@cache
def body(name: str, layout: Layout) -> ModelProto:
    """The exported body of :func:`unet`; torch's exporter takes seconds, so each is made once."""
    return in_rows(body(name, "planes"), 64)[0] if layout == "rows" else export_body(unet(name))
