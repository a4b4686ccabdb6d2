"""int8 after training: static scales, uint8 activations, int8 weights per channel, in QDQ form.

Only the body is quantized, and in it only what has an int8 kernel.  The residual sum stays exact: it is formed from
the image's own bytes.  (U8S8, since OpenVINO refuses S8S8 and VNNI instructions multiply u8 by s8.)
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from deblur_deploy.errors import InputError
from deblur_deploy.pipeline.config import Int8Config, Layout
from deblur_deploy.pipeline.graph import BLOCKS, BYTE_SCALE
from deblur_deploy.runtime.media import Image
from deblur_deploy.training.unet import UNetConfig

_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}

# What has an int8 kernel, or only moves int8 values, in each layout.
_OPS: dict[Layout, list[str]] = {
    "rows": ["Conv", "Relu", "MaxPool", "Concat", "Transpose", "Reshape"],
    "planes": ["Conv", "Relu", "MaxPool", "Concat", "DepthToSpace"],
}


def quantize_body(
    body: ModelProto, images: Sequence[Image], config: UNetConfig, layout: Layout, how: Int8Config
) -> ModelProto:
    """``body`` (fp32) with Q/DQ pairs, calibrated on ``images`` (blurred uint8 HxWx3 RGB)."""
    tiles = calibration_tiles(images, config.size_divisor, how)
    byte = {"quant_type": QuantType.QUInt8, "scale": _SCALE, "zero_point": _ZERO}
    with tempfile.TemporaryDirectory(prefix="deblur-int8-") as folder:
        source, target = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
        onnx.save(body, source)
        level = logging.root.level
        logging.root.setLevel(logging.ERROR)  # It advises a pre-processing step that this body does not need.
        try:
            with contextlib.redirect_stdout(sys.stderr):  # where its histograms report their progress
                quantize_static(
                    source,
                    target,
                    _Reader(to_blocks(tile, config.stem) for tile in tiles),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=_OPS[layout],
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    calibrate_method=_METHODS[how.method],
                    extra_options={"TensorQuantOverrides": {BLOCKS: [byte]}},
                )
        finally:
            logging.root.setLevel(level)
        return onnx.load(target)


_SCALE, _ZERO = np.array(BYTE_SCALE, dtype=np.float32), np.array(0, dtype=np.uint8)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, blocks: Iterator[NDArray[np.float32]]) -> None:
        self.blocks = blocks

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        blocks = next(self.blocks, None)
        return None if blocks is None else {BLOCKS: blocks}


def calibration_tiles(images: Sequence[Image], divisor: int, how: Int8Config) -> list[Image]:
    """``how.tiles`` tiles of one size, a multiple of ``divisor``, taken from ``images`` in turn, each at random.

    The size is ``how.tile_px``, or what the smallest image allows.  Raises InputError if that is less than ``divisor``.
    """
    smallest = min((min(image.shape[:2]) for image in images), default=0)
    side = min(how.tile_px, smallest) // divisor * divisor
    if side == 0:
        raise InputError(
            f"calibration tiles of {how.tile_px} px, from images of {smallest} px or more, are smaller than the "
            f"{divisor} px that the network works on; give larger ones"
        )
    rng = np.random.default_rng(0)
    tiles = []
    for index in range(how.tiles):
        image = images[index % len(images)]
        top, left = (rng.integers(length - side + 1) for length in image.shape[:2])
        tiles.append(image[top : top + side, left : left + side])
    return tiles


def to_blocks(image: Image, stem: int) -> NDArray[np.float32]:
    """What the graph hands to the body for uint8 (H, W, 3), H and W multiples of ``stem``: (1, 3 stem^2, h, w)."""
    height, width, _ = image.shape
    rows = image.reshape(height // stem, stem, width // stem, 3 * stem).transpose(0, 2, 1, 3)
    blocks = rows.reshape(1, height // stem, width // stem, -1).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(blocks).astype(np.float32) * np.float32(BYTE_SCALE)
