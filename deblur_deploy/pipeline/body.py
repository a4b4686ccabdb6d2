"""From torch to ONNX: the float body of one of our U-Nets, and the graph of any module."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from onnx import ModelProto
from torch import Tensor, nn

from deblur_deploy.pipeline.graph import BLOCKS, CORRECTION, OPSET
from deblur_deploy.pipeline.nodes import drop_notes
from deblur_deploy.pipeline.rewrite import split_upsampling
from deblur_deploy.training.unet import UNet


class Body(nn.Module):
    """``UNet`` from blocks to correction."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.encoder, self.up, self.decoder, self.head = unet.encoder, unet.up, unet.decoder, unet.head
        stem = unet.config.stem
        order = torch.arange(3 * stem**2).reshape(3, stem, stem).permute(1, 2, 0).flatten()
        unet.first.weight.data = unet.first.weight.data[:, order]
        for parameter in self.head.parameters():
            parameter.data = parameter.data[order]

    def forward(self, blocks: Tensor) -> Tensor:
        x, skips = blocks, []
        for level, convolutions in enumerate(self.encoder):
            x = convolutions(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        x = skips.pop()
        for up, convolutions in zip(self.up, self.decoder, strict=True):
            x = convolutions(torch.cat([up(x), skips.pop()], dim=1))
        return self.head(x)


def export_body(unet: UNet) -> ModelProto:
    """The fp32 body of ``unet`` in ONNX, with free batch, height and width.  ``unet`` is not changed."""
    twin = UNet(unet.config)
    twin.load_state_dict(unet.state_dict())
    side = 2 ** (len(unet.config.encoder) - 1)
    dim = torch.export.Dim
    example = torch.zeros(2, 3 * unet.config.stem**2, 4 * side, 6 * side)
    sizes = {0: dim("batch"), 2: side * dim("h"), 3: side * dim("w")}
    body = to_onnx(Body(twin).eval(), example, sizes, BLOCKS, CORRECTION)
    split_upsampling(body)
    return body


def to_onnx(
    module: nn.Module, example: Tensor, sizes: dict[int, Any], source: str, target: str, *, strict: bool = False
) -> ModelProto:
    """``module`` in ONNX, its input called ``source`` and its output ``target``; ``sizes``: its free dimensions.

    ``strict`` follows its bytecode, which takes longer.  Raises what torch raises.
    """
    # Torch's own deprecations, and its remark that torchvision is absent: nothing a caller could do anything about.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.export.export(module, (example,), dynamic_shapes=(sizes,), strict=True) if strict else module
        how: dict[str, Any] = {"input_names": [source], "output_names": [target], "opset_version": OPSET}
        program = torch.onnx.export(traced, (example,), dynamo=True, dynamic_shapes=(sizes,), verbose=False, **how)
    assert program is not None
    model: ModelProto = program.model_proto
    drop_notes(model)
    return model
