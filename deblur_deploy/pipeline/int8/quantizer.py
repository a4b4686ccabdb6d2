"""Quantized bodies of one network, by any method, in any layout; nothing is probed or calibrated twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import cast

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import TensorData, TensorsData

from deblur_deploy.media.images import Image
from deblur_deploy.pipeline.artifact import Artifact
from deblur_deploy.pipeline.config import Int8Config, Layout, Rounding, Statistic
from deblur_deploy.pipeline.export import Exporter
from deblur_deploy.pipeline.int8.calibrate import cut_smaller, cut_tiles, find_ranges, ranges_of_each, spanning
from deblur_deploy.pipeline.int8.concat import joined, tied
from deblur_deploy.pipeline.int8.equalize import channel_ranges, equalized
from deblur_deploy.pipeline.int8.probe import int8_ops
from deblur_deploy.pipeline.int8.quantize import layer_name, quantize_body, quantize_with_nncf
from deblur_deploy.pipeline.int8.rounding import Weights, input_moments, rounded_weights, with_weights
from deblur_deploy.pipeline.int8.tuning import Tuned, tuned, with_biases

NNCF = "nncf"
_HELD = 0.7
"""Share of the tiles whose values a range holds before it is tuned."""


class Quantizer:
    """Quantizes the bodies of ``exporter``, calibrated on ``tiles`` (uint8 HxWx3 RGB, all of one size)."""

    def __init__(self, exporter: Exporter, tiles: Sequence[Image], rounding: Rounding = "together") -> None:
        self.exporter, self.tiles, self.stem = exporter, tiles, exporter.unet.config.stem
        self._rounding = rounding
        self._ops = cache(self._probe)
        self.plain = cache(self._plain)
        """The equalized body in fp32, which is what is quantized."""
        self._tuned = cache(self._tune)
        self._channels = cache(lambda: channel_ranges(exporter.unet, tiles))
        self._each = cache(lambda layout: ranges_of_each(self.plain(layout), tiles, self.stem, self._int8_ops(layout)))
        self._moments = cache(lambda: input_moments(self.plain("rows"), tiles, self.stem))
        self._on_grid = cache(self._rounded)
        self._ranges = cache(self._found)

    def _plain(self, layout: Layout) -> ModelProto:
        return equalized(self.exporter.body(layout), self.exporter.unet.config, self._channels(), layout)

    def _probe(self, layout: Layout) -> dict[str, bool]:
        return int8_ops(self.exporter.body(layout), 4 * self.exporter.unet.config.size_divisor // self.stem)

    def _int8_ops(self, layout: Layout) -> list[str]:
        return [op for op, runs in self._ops(layout).items() if runs]

    def float_ops(self, layout: Layout) -> list[str]:
        """Types of operations that stay float, since ONNX Runtime has no int8 kernel for them here."""
        return [op for op, runs in self._ops(layout).items() if not runs]

    def _rounded(self, layout: Layout) -> Weights:
        return rounded_weights(self.plain(layout), self._moments() if self._rounding == "together" else None)

    def held(self) -> tuple[float, float]:
        """Least and largest share of the tiles that a range holds, by the method ``result``."""
        ranges, each = self._ranges("result", "planes"), self._each("planes")
        shares = [np.mean([_within(of[name], ranges[name]) for of in each]) for name in self._tuned().ranges]
        return float(min(shares)), float(max(shares))

    def _tune(self) -> Tuned:
        body, weights = self.plain("planes"), self._on_grid("planes")
        quantized = self._quantized(self._spanning("planes"), "planes", weights, {})
        config = self.exporter.unet.config
        tiles = cut_smaller(self.tiles, config.receptive_radius_px, config.size_divisor)
        return tuned(body, quantized, tiles, self.stem, tied(body), residual=config.residual)

    def _spanning(self, layout: Layout) -> TensorsData:
        return joined(self.plain(layout), spanning(self._each(layout), _HELD))

    def _found(self, method: str, layout: Layout) -> TensorsData:
        if method == "result":
            # Both layouts call the same activations the same, and take the others from those by joining.
            spans = {name: of.range_value for name, of in self._spanning(layout).items()} | self._tuned().ranges
            return joined(self.plain(layout), TensorsData(CalibrationMethod.MinMax, spans))
        return find_ranges(self.plain(layout), self.tiles, self.stem, self._int8_ops(layout), cast("Statistic", method))

    def body(self, method: str, layout: Layout, in_float: Sequence[str] = (), only: str | None = None) -> ModelProto:
        """The body by ``method`` (one of ``Method``, or ``nncf``); ``in_float``, ``only``: see ``quantize_body``."""
        body = self.plain(layout)
        if method == NNCF:
            return quantize_with_nncf(body, self.tiles, self.stem)
        # Ranges first: they say it if the network gives no finite numbers.
        ranges = self._ranges(method, layout)
        chosen = {
            name: weights
            for name, weights in self._on_grid(layout).items()
            if layer_name(name) not in in_float and only in (None, layer_name(name))
        }
        # One layer alone has no errors of others to make up for.
        biases = self._tuned().biases if method == "result" and only is None else {}
        return self._quantized(ranges, layout, chosen, biases, in_float=in_float, only=only)

    def _quantized(
        self,
        ranges: TensorsData,
        layout: Layout,
        weights: Weights,
        biases: Mapping[str, NDArray[np.float32]],
        *,
        in_float: Sequence[str] = (),
        only: str | None = None,
    ) -> ModelProto:
        return quantize_body(
            with_biases(with_weights(self.plain(layout), weights), biases, layout),
            ranges,
            self._int8_ops(layout),
            steps={name: of.step for name, of in weights.items()},
            in_float=in_float,
            only=only,
            residual=self.exporter.unet.config.residual,
        )


def _within(inner: TensorData, outer: TensorData) -> bool:
    (low, high), (least, most) = (np.ravel(of.range_value) for of in (inner, outer))
    # Half a step further still rounds to a value that exists.
    slack = (most - least) / 510
    return bool(least - slack <= low and high <= most + slack)


def plain_int8(exporter: Exporter, photos: Sequence[Image], how: Int8Config, layout: Layout) -> Artifact:
    """The int8 variant by ``how.method``, with no look at pairs: for timing, and for comparisons."""
    named = {str(number): photo for number, photo in enumerate(photos)}
    tiles = cut_tiles(named, exporter.unet.config.size_divisor, how.tiles, how.tile_px).images
    return exporter.int8(Quantizer(exporter, tiles, how.rounding).body(how.method, layout), layout)
