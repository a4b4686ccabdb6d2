"""Quantized bodies of one network, by any method, in any layout; nothing is probed or calibrated twice."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import cast

from onnx import ModelProto
from onnxruntime.quantization.calibrate import TensorsData

from deblur_deploy.pipeline.artifact import Artifact
from deblur_deploy.pipeline.config import Int8Config, Layout, Method, Rounding
from deblur_deploy.pipeline.export import Exporter
from deblur_deploy.pipeline.int8.calibrate import cut_tiles, find_ranges
from deblur_deploy.pipeline.int8.equalize import channel_ranges, equalized
from deblur_deploy.pipeline.int8.probe import int8_ops
from deblur_deploy.pipeline.int8.quantize import layer_name, quantize_body, quantize_with_nncf
from deblur_deploy.pipeline.int8.rounding import Weights, rounded_weights, with_weights
from deblur_deploy.pipeline.int8.search import ranges_by_result
from deblur_deploy.runtime.media import Image

NNCF = "nncf"


class Quantizer:
    """Quantizes the bodies of ``exporter``, calibrated on ``tiles`` (uint8 HxWx3 RGB, all of one size)."""

    def __init__(self, exporter: Exporter, tiles: Sequence[Image], rounding: Rounding = "together") -> None:
        self.exporter, self.tiles, self.stem = exporter, tiles, exporter.unet.config.stem
        self._ops = cache(self._probe)
        self.plain = cache(self._plain)
        """The equalized body in fp32, which is what is quantized."""
        self._rounding = rounding
        self._on_grid = cache(self._rounded)
        self._ranges: dict[tuple[str, Layout], TensorsData] = {}

    def _plain(self, layout: Layout) -> ModelProto:
        ranges = channel_ranges(self.exporter.unet, self.tiles)
        return equalized(self.exporter.body(layout), self.exporter.unet.config, ranges, layout)

    def _rounded(self, layout: Layout) -> Weights:
        return rounded_weights(self.plain(layout), self.tiles, self.stem) if self._rounding == "together" else {}

    def _probe(self, layout: Layout) -> dict[str, bool]:
        return int8_ops(self.exporter.body(layout), 4 * self.exporter.unet.config.size_divisor // self.stem)

    def float_ops(self, layout: Layout) -> list[str]:
        """Types of operations that stay float, since ONNX Runtime has no int8 kernel for them here."""
        return [op for op, runs in self._ops(layout).items() if not runs]

    def body(self, method: str, layout: Layout, in_float: Sequence[str] = (), only: str | None = None) -> ModelProto:
        """The body by ``method`` (one of ``Method``, or ``nncf``); ``in_float``, ``only``: see ``quantize_body``."""
        body = self.plain(layout)
        if method == NNCF:
            return quantize_with_nncf(body, self.tiles, self.stem)
        ops = [op for op, runs in self._ops(layout).items() if runs]
        on_grid = self._on_grid(layout)
        if (method, layout) not in self._ranges:
            self._ranges[method, layout] = (
                ranges_by_result(body, with_weights(body, on_grid), self.tiles, self.stem, ops)
                if method == "result"
                else find_ranges(body, self.tiles, self.stem, ops, cast("Method", method))
            )
        chosen = {
            name: values
            for name, values in on_grid.items()
            if layer_name(name) not in in_float and only in (None, layer_name(name))
        }
        return quantize_body(
            with_weights(body, chosen), self._ranges[method, layout], ops, in_float=in_float, only=only
        )


def plain_int8(exporter: Exporter, photos: Sequence[Image], how: Int8Config, layout: Layout) -> Artifact:
    """The int8 variant by ``how.method``, with no look at what it loses: for timing, and for comparisons."""
    named = {str(number): photo for number, photo in enumerate(photos)}
    tiles = cut_tiles(named, exporter.unet.config.size_divisor, how.tiles, how.tile_px).images
    return exporter.int8(Quantizer(exporter, tiles, how.rounding).body(how.method, layout), layout)
