"""The channels of an activation are given like ranges before it is quantized, which changes nothing but rounding.

An activation has one scale for all of its channels, so a channel that is a hundred times smaller than another is left
with two or three of the 256 levels.  Behind a ReLU, and behind the linear upsampling, a channel may be divided by any
positive number if what reads it multiplies by it: max-pooling, concatenation and rearrangement pass that on.  Weights
have a scale for each output channel, and what a channel contributes is what their rounding should be measured by.

Source: Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction (2019); here the ranges are
those of activations on photographs, as in Xiao et al., SmoothQuant (2023), with all of the migration that ``_FLOOR``
allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from deblur_deploy.media.images import Image
from deblur_deploy.pipeline.config import Layout
from deblur_deploy.pipeline.int8.quantize import layer_name
from deblur_deploy.training.unet import UNet, UNetConfig

Scales = dict[str, NDArray[np.float32]]

_SHARE = 0.8
"""Share of the tiles whose values a channel's range holds."""
_FLOOR = 0.2
"""Smallest range, as a share of the largest channel's: what hardly fires here may fire elsewhere."""


@torch.no_grad()
def channel_ranges(unet: UNet, tiles: Sequence[Image]) -> Scales:
    """The range of each channel behind every 3x3 and every transposed convolution, by its name, on ``tiles``."""
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in unet.named_modules():
        if name == "head" or not isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            continue

        def look(
            _module: nn.Module, _inputs: object, output: Tensor, name: str = name, relu: bool = name[:2] != "up"
        ) -> None:
            seen.setdefault(name, []).append((output.relu() if relu else output.abs()).amax((0, 2, 3)))

        hooks.append(module.register_forward_hook(look))
    try:
        for tile in tiles:
            unet(torch.from_numpy(tile).permute(2, 0, 1)[None].float() / 255)
    finally:
        for hook in hooks:
            hook.remove()
    ranges = {name: torch.stack(values).quantile(_SHARE, dim=0) for name, values in seen.items()}
    return {
        # A layer that never fires has nothing to equalize.
        name: (values.clamp_min(_FLOOR * values.max()) if values.max() > 0 else torch.ones_like(values)).numpy()
        for name, values in ranges.items()
    }


def equalized(body: ModelProto, config: UNetConfig, ranges: Scales, layout: Layout) -> ModelProto:
    """``body`` (fp32) with every channel divided by its range, and multiplied by it where it is read."""
    result = ModelProto()
    result.CopyFrom(body)
    constants = {value.name: value for value in result.graph.initializer}
    convolutions = {layer_name(node.input[1]): node for node in result.graph.node if node.op_type == "Conv"}
    # The exporter leaves out a bias of zeros.
    weights, biases = (
        {
            layer: numpy_helper.to_array(constants[node.input[place]]).copy()
            for layer, node in convolutions.items()
            if place < len(node.input)
        }
        for place in (1, 2)
    )
    for name, scale in ranges.items():
        made, layer = scale, name
        if name.startswith("up."):
            # As graph.Upsample orders what a transposed convolution gives.
            made, layer = (np.repeat(scale, 4) if layout == "planes" else np.tile(scale, 4)), f"{name}.conv"
        weights[layer] /= made[:, None, None, None]
        if layer in biases:
            biases[layer] /= made
        for reader, first in _readers(config, name):
            weights[reader][:, first : first + len(scale)] *= scale[:, None, None]
    # Each has constants of its own, since the exporter shares those that are equal.
    old = {name for node in convolutions.values() for name in node.input[1:3]}
    kept = [value for value in result.graph.initializer if value.name not in old]
    del result.graph.initializer[:]
    result.graph.initializer.extend(kept)
    for layer, node in convolutions.items():
        constant = {f"{layer}.{kind}": of[layer] for kind, of in (("weight", weights), ("bias", biases)) if layer in of}
        node.input[1:] = list(constant)
        result.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constant.items())
    return result


def _readers(config: UNetConfig, name: str) -> Iterator[tuple[str, int]]:
    """The convolutions that read what the one called ``name`` gives: (name, first of their input channels)."""
    part, level, index = name.split(".")[0], *map(int, (name + ".0").split(".")[1:3])
    blocks = config.encoder if part == "encoder" else config.decoder
    if part == "up":
        yield f"decoder.{level}.0", 0
    elif index + 2 < 2 * len(blocks[level]):
        yield f"{part}.{level}.{index + 2}", 0
    elif level + 1 < len(blocks):
        yield (f"encoder.{level + 1}.0" if part == "encoder" else f"up.{level + 1}.conv"), 0
    else:
        yield ("up.0.conv" if part == "encoder" and config.up else "head"), 0
    if part == "encoder" and index + 2 == 2 * len(blocks[level]) and level + 1 < len(blocks):
        # The skip connection is concatenated behind what comes up.
        below = len(blocks) - 2 - level
        yield f"decoder.{below}.0", config.up[below]
