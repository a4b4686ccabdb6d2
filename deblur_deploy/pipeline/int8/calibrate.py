"""Calibration: which tiles of which photographs, the ranges that activations take on them, and whether that was enough.

Histograms are ONNX Runtime's; least and largest values are taken here, as its calibrator holds all activations at once.
The audit says what a bad calibration would hide: how many values of photographs that were held out lie outside of the
ranges, and what kinds of photographs were missing.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
from skimage.util import view_as_blocks

from deblur_deploy.errors import InputError
from deblur_deploy.media.images import Image
from deblur_deploy.pipeline.config import Statistic
from deblur_deploy.pipeline.graph import BLOCKS, BYTE_SCALE
from deblur_deploy.pipeline.nodes import constants_of, observing

_HISTOGRAMS: dict[Statistic, CalibrationMethod] = {
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
"""Statistics that ONNX Runtime's own calibrators find."""

_KINDS = ("dark", "bright", "sharp", "blurred")
_DARK, _BRIGHT = 64, 176
"""Mean luminance, in levels."""
_LEAST_PX = 16
"""Height and width of a tile at least: to run thousands of single pixels would take longer than all else."""
_MOST_BYTES, _MANY_CHANNELS = 2**31, 512
"""What values that are looked at together may take; and channels that hardly any of them has more of."""
_BLURRED, _SHARP = 2.0, 6.0
"""Mean absolute Laplacian of the luminance, in levels."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Equal squares cut from photographs."""

    images: list[Image]
    photos: dict[str, int]
    """How many tiles each photograph gave."""
    left_out: list[str]
    """Photographs smaller than a tile."""
    side_px: int


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What int8 was calibrated on, and how well that stands for photographs that were held out."""

    method: str
    photos: dict[str, int]
    """Calibration tiles by photograph."""
    left_out: list[str]
    """Photographs that are smaller than a tile."""
    tiles: int
    tile_px: int
    held: tuple[float, float] | None
    """Least and largest share of the tiles whose values a range holds, where that was chosen by the result."""
    kinds: dict[str, float]
    """Share of the calibration tiles that are dark, bright, sharp, blurred."""
    held_out_kinds: dict[str, float]
    """The same of as many tiles of the pairs."""
    missing: list[str]
    """Kinds that the pairs have and the calibration has not."""
    shared_with_pairs: list[str]
    """Calibration photographs that are also among the pairs: the measured loss is then too good."""
    clipped: dict[str, float]
    """Share of the values outside of the range, by tensor, on the tiles of the pairs."""


def cut_tiles(photos: Mapping[str, Image], divisor: int, count: int, side_px: int) -> Tiles:
    """``count`` tiles, each a multiple of ``divisor``, from ``photos`` in turn, each at random.

    Their side is ``side_px``, or the shorter side of the median photograph; smaller photographs are left out.
    Raises InputError if that is less than ``divisor``.
    """
    shorter = {name: min(photo.shape[:2]) for name, photo in photos.items()}
    median = sorted(shorter.values())[len(shorter) // 2] if shorter else 0
    side = min(side_px, median) // divisor * divisor
    if side == 0:
        raise InputError(
            f"calibration tiles of {side_px} px, from photographs of {median} px, are smaller than the "
            f"{divisor} px that the network works on; give larger ones"
        )
    names = [name for name in photos if shorter[name] >= side]
    rng = np.random.default_rng(0)
    taken = [names[index % len(names)] for index in range(count)]
    images = []
    for name in taken:
        top, left = (rng.integers(length - side + 1) for length in photos[name].shape[:2])
        images.append(photos[name][top : top + side, left : left + side])
    return Tiles(
        images=images,
        photos={name: taken.count(name) for name in names if name in taken},
        left_out=[name for name in photos if shorter[name] < side],
        side_px=side,
    )


def cut_smaller(tiles: Sequence[Image], radius_px: int, divisor: int) -> list[Image]:
    """``tiles`` in quarters, and those again, while a network that sees ``radius_px`` far loses little by it."""
    side = len(tiles[0])
    while side % (2 * divisor) == 0 and side // 2 >= max(8 * radius_px, _LEAST_PX):
        side //= 2
    return [part for tile in tiles for part in view_as_blocks(tile, (side, side, 3)).reshape(-1, side, side, 3)]


def to_blocks(image: Image, stem: int) -> NDArray[np.float32]:
    """What the graph hands to the body for uint8 (H, W, 3), H and W multiples of ``stem``: (1, 3 stem^2, h, w)."""
    height, width, _ = image.shape
    rows = image.reshape(height // stem, stem, width // stem, 3 * stem).transpose(0, 2, 1, 3)
    blocks = rows.reshape(1, height // stem, width // stem, -1).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(blocks).astype(np.float32) * np.float32(BYTE_SCALE)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, blocks: Iterator[NDArray[np.float32]]) -> None:
        self.blocks = blocks

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        blocks = next(self.blocks, None)
        return None if blocks is None else {BLOCKS: blocks}


def find_ranges(
    body: ModelProto, tiles: Sequence[Image], stem: int, op_types: Sequence[str], method: Statistic
) -> TensorsData:
    """The range of every activation that nodes of ``op_types`` read or write, by ``method``."""
    if method not in _HISTOGRAMS:
        each = ranges_of_each(body, tiles, stem, op_types)
        low, high = (np.mean, np.mean) if method == "moving_average" else (np.min, np.max)
        return _joined(each, lambda lows, highs: (low(lows), high(highs)))
    # Standard output is for results: what libraries print about their progress goes to standard error.
    with tempfile.TemporaryDirectory(prefix="deblur-ranges-") as folder, contextlib.redirect_stdout(sys.stderr):
        source = Path(folder, "body.onnx")
        onnx.save(body, source)
        # Ranges around zero would spend half of uint8 on negative values, which no ReLU gives.
        augmented, options = str(source.with_stem("augmented")), {"symmetric": False}
        calibrator = create_calibrator(source, op_types, augmented, _HISTOGRAMS[method], extra_options=options)
        # It keeps every activation of what it is given at once, and merges histograms afterwards.
        for tile in tiles:
            calibrator.collect_data(_Reader(iter([to_blocks(tile, stem)])))
        return _checked(calibrator.compute_data())


def ranges_of_each(body: ModelProto, tiles: Sequence[Image], stem: int, op_types: Sequence[str]) -> list[TensorsData]:
    """The least and the largest value of the same activations, on each tile."""
    constants = constants_of(body).keys()
    nodes = [node for node in body.graph.node if node.op_type in op_types]
    names = {name for node in nodes for name in (*node.input, *node.output) if name} - constants
    each: list[dict[str, tuple[np.float32, np.float32]]] = [{} for _ in tiles]
    for number, seen in enumerate(run_body(body, tiles, stem, names)):
        for name in sorted(names & seen.keys()):
            value = seen[name]
            if isinstance(value, np.ndarray) and value.dtype == np.float32 and value.size:
                each[number % len(tiles)][name] = value.min(), value.max()
    return [_checked(TensorsData(CalibrationMethod.MinMax, ranges)) for ranges in each]


def spanning(each: Sequence[TensorsData], share: float) -> TensorsData:
    """The ranges whose ends are not passed by ``share`` of the tiles."""
    return _joined(each, lambda lows, highs: (np.quantile(lows, 1 - share), np.quantile(highs, share)))


def _joined(each: Sequence[TensorsData], ends: Callable[[Any, Any], tuple[Any, Any]]) -> TensorsData:
    """One range for each activation, of the lows and the highs of all tiles."""
    spans = {}
    for name in each[0]:
        lows, highs = np.transpose([np.ravel(ranges[name].range_value) for ranges in each])
        low, high = ends(lows, highs)
        spans[name] = np.float32(low), np.float32(high)
    return TensorsData(CalibrationMethod.MinMax, spans)


def _checked(ranges: TensorsData) -> TensorsData:
    for name, data in ranges.items():
        if not np.all(np.isfinite(data.range_value)):
            raise InputError(f"activation {name} is not finite on the calibration photographs; the weights are broken")
    return ranges


def run_body(
    body: ModelProto, tiles: Sequence[Image], stem: int, names: Collection[str]
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """What ``body`` reads (``BLOCKS``) and computes for each tile: the values called ``names``.

    Where they are too large to be held together, some of them come for all tiles, then others, and so on.
    """
    wanted = sorted({*names} - {BLOCKS})
    groups = _together(body, tiles[0], stem, wanted)
    for number, group in enumerate(groups):
        session = observing(body, group, arena=len(groups) == 1) if group else None
        for tile in tiles:
            blocks = to_blocks(tile, stem)
            found = dict(zip(group, session.run(group, {BLOCKS: blocks}), strict=True)) if session else {}
            yield {BLOCKS: blocks, **found} if number == 0 else found


def _together(body: ModelProto, tile: Image, stem: int, names: list[str]) -> list[list[str]]:
    """``names`` in groups whose values, for a tile, fit into memory together."""
    pixels = (len(tile) // stem) ** 2
    if len(names) * pixels * _MANY_CHANNELS * 4 <= _MOST_BYTES:
        return [names]
    session, sizes = observing(body, names), dict[str, int]()
    for part in (8, 4, 2):
        # Of a part of the tile, if the network takes one of that size.
        side = len(tile) // part
        with contextlib.suppress(Exception):  # ONNX Runtime's
            blocks = to_blocks(tile[:side, :side], stem)
            values = session.run(names, {BLOCKS: blocks})
            sizes = {name: part**2 * value.nbytes for name, value in zip(names, values, strict=True)}
            break
    groups, held = [list[str]()], 0
    for name in names:
        size = sizes.get(name, pixels * _MANY_CHANNELS * 4)
        if groups[-1] and held + size > _MOST_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def clipped_shares(body: ModelProto, quantized: ModelProto, tiles: Sequence[Image], stem: int) -> dict[str, float]:
    """Share of the values of ``body`` that lie outside of what ``quantized`` can hold, by tensor."""
    constants = constants_of(quantized)
    made = {name for node in body.graph.node for name in node.output}
    limits: dict[str, tuple[float, float]] = {}
    for node in quantized.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in made:
            scale, zero = (constants[name] for name in node.input[1:3])
            least, most = np.iinfo(zero.dtype).min, np.iinfo(zero.dtype).max
            # Half a step further still rounds to a value that exists.
            low, high = (float(scale) * (end - int(zero)) for end in (least - 0.5, most + 0.5))
            limits[node.input[0]] = low, high
    outside = dict.fromkeys(limits, 0)
    total = dict.fromkeys(limits, 0)
    for seen in run_body(body, tiles, stem, set(limits)):
        for name in seen.keys() & limits.keys():
            (low, high), value = limits[name], seen[name]
            outside[name] += int(np.count_nonzero((value < low) | (value > high)))
            total[name] += value.size
    return {name: outside[name] / total[name] for name in limits}


def kinds_of(tiles: Sequence[Image]) -> dict[str, float]:
    """Share of ``tiles`` that are dark, bright, sharp and blurred."""
    counts = dict.fromkeys(_KINDS, 0)
    for tile in tiles:
        gray = cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY)
        luminance, detail = float(gray.mean()), float(np.abs(cv2.Laplacian(gray, cv2.CV_32F)).mean())
        counts["dark"] += luminance < _DARK
        counts["bright"] += luminance > _BRIGHT
        counts["sharp"] += detail > _SHARP
        counts["blurred"] += detail < _BLURRED
    return {kind: count / len(tiles) for kind, count in counts.items()}


def make_audit(
    method: str,
    held: tuple[float, float] | None,
    photos: Mapping[str, Image],
    tiles: Tiles,
    held_out: Mapping[str, Image],
    clipped: dict[str, float],
    held_out_tiles: Tiles,
) -> Audit:
    """Put the record together; ``held_out`` are the blurred images of the pairs, by name."""
    kinds, held_out_kinds = kinds_of(tiles.images), kinds_of(held_out_tiles.images)
    same = {image.tobytes() for image in held_out.values()}
    return Audit(
        method=method,
        held=held,
        photos=tiles.photos,
        left_out=tiles.left_out,
        tiles=len(tiles.images),
        tile_px=tiles.side_px,
        kinds=kinds,
        held_out_kinds=held_out_kinds,
        missing=[kind for kind in _KINDS if held_out_kinds[kind] and not kinds[kind]],
        shared_with_pairs=[name for name, photo in photos.items() if photo.tobytes() in same],
        clipped=clipped,
    )
