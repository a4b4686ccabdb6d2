"""Quantized bodies of one network, by any method, in any layout; nothing is probed or calibrated twice."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Literal, cast

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
from deblur_deploy.pipeline.int8.probe import PROBE_SIDE, int8_ops
from deblur_deploy.pipeline.int8.quantize import layer_name, quantize_body, quantize_with_nncf
from deblur_deploy.pipeline.int8.rounding import Weights, input_moments, rounded_weights
from deblur_deploy.pipeline.int8.tuning import Tuned, affordable, tuned
from deblur_deploy.pipeline.nodes import with_constants
from deblur_deploy.pipeline.rewrite import LAYERS
from deblur_deploy.pipeline.rows import in_rows
from deblur_deploy.runtime.tiling import up

NNCF = "nncf"
_HELD = 0.7
"""Share of the tiles whose values a range holds before it is tuned."""
_HELD_UNTUNED = 0.98
"""The same where it stays as it is."""

Breadth = Literal["all", "layers"]
"""Which operations are quantized: all that have an int8 kernel, or the layers and what lies between two of them."""
_PASSES = {
    *LAYERS, "Relu", "LeakyRelu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Split", "Slice",
    "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Gather", "Pad", "Resize", "DepthToSpace",
    "SpaceToDepth", "Identity",
}  # fmt: skip


class Quantizer:
    """Quantizes the bodies of ``exporter``, calibrated on ``tiles`` (uint8 HxWx3 RGB, all of one size)."""

    def __init__(
        self, exporter: Exporter, tiles: Sequence[Image], rounding: Rounding = "together", breadth: Breadth = "all"
    ) -> None:
        self.exporter, self.tiles, self.network, self.stem = exporter, tiles, exporter.network, exporter.network.stem
        self._rounding, self.breadth = rounding, breadth
        self._ops = cache(self._probe)
        self.plain = cache(self._plain)
        """The equalized body in fp32, which is what is quantized."""
        self._tuned = cache(self._tune)
        self._each = cache(lambda layout: ranges_of_each(self.plain(layout), tiles, self.stem, self._int8_ops(layout)))
        self._on_grid = cache(self._rounded)
        self._ranges = cache(self._found)

    def narrower(self) -> Quantizer | None:
        """The same for fewer operations; None if there is nothing to leave out."""
        if all(set(self._int8_ops(layout)) <= _PASSES for layout in ("planes", "rows")):
            return None
        narrow = Quantizer(self.exporter, self.tiles, self._rounding, "layers")
        # Weights, channels and kernels do not depend on it, and of more operations more ranges are known.
        narrow._ops, narrow.plain, narrow._on_grid, narrow._each = self._ops, self.plain, self._on_grid, self._each
        return narrow

    def _plain(self, layout: Layout) -> ModelProto:
        if layout == "rows":
            return in_rows(self.plain("planes"), self.network.multiple)[0]
        body = self.exporter.body(layout)
        return equalized(body, channel_ranges(body, self.tiles, self.stem))

    def _probe(self, layout: Layout) -> dict[str, bool]:
        # All that it computes is kept at once, so the image is small.
        side = up(max(PROBE_SIDE, self.network.least_px // self.stem), self.network.multiple)
        return int8_ops(self.exporter.body(layout), side)

    def _int8_ops(self, layout: Layout) -> list[str]:
        # Of a Gemm, which is a gate's and small, weights are not rounded here, so it would not be the same everywhere.
        runs = [op for op, runs in self._ops(layout).items() if runs and op != "Gemm"]
        return [op for op in runs if self.breadth == "all" or op in _PASSES]

    def float_ops(self, layout: Layout) -> list[str]:
        """Types of operations that stay float, since ONNX Runtime has no int8 kernel for them here."""
        return [op for op, runs in self._ops(layout).items() if not runs]

    def _rounded(self) -> Weights:
        body = self.plain("planes")
        together = self._rounding == "together"
        return rounded_weights(body, input_moments(body, self.tiles, self.stem) if together else None)

    def held(self) -> tuple[float, float] | None:
        """Least and largest share of the tiles that a range holds, by the method ``result``."""
        ranges, each = self._ranges("result", "planes"), self._each("planes")
        shares = [np.mean([_within(of[name], ranges[name]) for of in each]) for name in self._tuned().ranges]
        return (float(min(shares)), float(max(shares))) if shares else None

    def _tune(self) -> Tuned:
        network, body = self.network, self.plain("planes")
        tiles = cut_smaller(self.tiles, network.receptive_radius_px, network.size_divisor)
        tiles = affordable(tiles, network)
        if not tiles:
            return Tuned(ranges={}, biases={})
        quantized = self._quantized(self._spanning("planes"), "planes", self._on_grid(), {})
        try:
            return tuned(body, quantized, tiles, self.stem, tied(body), residual=network.residual)
        except (NotImplementedError, RuntimeError, TypeError, KeyError):  # an operation that has no gradient here
            if network.ours:
                raise
            return Tuned(ranges={}, biases={})

    def _spanning(self, layout: Layout, held: float = _HELD) -> TensorsData:
        return joined(self.plain(layout), spanning(self._each(layout), held))

    def _found(self, method: str, layout: Layout) -> TensorsData:
        if method == "result":
            # Both layouts call the same activations the same, and take the others from those by joining.
            by_gradient = self._tuned().ranges
            held = _HELD if by_gradient else _HELD_UNTUNED
            spans = {name: of.range_value for name, of in self._spanning(layout, held).items()} | by_gradient
            return joined(self.plain(layout), TensorsData(CalibrationMethod.MinMax, spans))
        return find_ranges(self.plain(layout), self.tiles, self.stem, self._int8_ops(layout), cast("Statistic", method))

    def body(
        self, method: str, layout: Layout, in_float: Sequence[str] = (), only: Collection[str] | None = None
    ) -> ModelProto:
        """The body by ``method`` (one of ``Method``, or ``nncf``); ``in_float``, ``only``: see ``quantize_body``."""
        if method == NNCF:
            return quantize_with_nncf(self.plain(layout), self.tiles, self.stem)
        # Ranges first: they say it if the network gives no finite numbers.
        ranges = self._ranges(method, layout)
        chosen = {
            name: weights
            for name, weights in self._on_grid().items()
            if layer_name(name) not in in_float and (only is None or layer_name(name) in only)
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
        only: Collection[str] | None = None,
    ) -> ModelProto:
        values = {name: of.values for name, of in weights.items()} | {
            f"{layer}.bias": of for layer, of in biases.items()
        }
        body = with_constants(self.plain("planes"), values)
        steps = {name: of.step for name, of in weights.items()}
        if layout == "rows":
            body, orders = in_rows(body, self.network.multiple)
            steps |= {name: steps[name][order] for name, order in orders.items() if name in steps}
        return quantize_body(
            body,
            ranges,
            self._int8_ops(layout),
            steps=steps,
            in_float=in_float,
            only=only,
            residual=self.network.residual,
        )


def _within(inner: TensorData, outer: TensorData) -> bool:
    (low, high), (least, most) = (np.ravel(of.range_value) for of in (inner, outer))
    # Half a step further still rounds to a value that exists.
    slack = (most - least) / 510
    return bool(least - slack <= low and high <= most + slack)


def plain_int8(exporter: Exporter, photos: Sequence[Image], how: Int8Config, layout: Layout) -> Artifact:
    """The int8 variant by ``how.method``, with no look at pairs: for timing, and for comparisons."""
    named = {str(number): photo for number, photo in enumerate(photos)}
    tiles = cut_tiles(named, exporter.network.size_divisor, how.tiles, how.tile_px).images
    return exporter.int8(Quantizer(exporter, tiles, how.rounding).body(how.method, layout), layout)
