"""What int8 costs against fp32, whole or in one layer alone, measured through the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deblur_deploy.evaluation.quality import Pair, psnr
from deblur_deploy.pipeline.artifact import Artifact
from deblur_deploy.pipeline.int8.coverage import kernels_of
from deblur_deploy.pipeline.int8.quantize import layers
from deblur_deploy.pipeline.int8.quantizer import Quantizer
from deblur_deploy.runtime.engine import DeblurEngine

_CROP_PX = 192


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What one layer costs and brings when it is the only one in int8, on a few crops.

    Of a network of many layers, several in a row count as one.
    """

    layer: str
    macs: float
    """Share of the multiplications."""
    drop_db: float
    """PSNR lost; below zero where rounding happens to help."""
    error: float
    """Mean square of what it changes in the result, in squared levels."""
    ms_saved: float | None
    """Time of the layer in fp32 less that in int8, on the CPU provider; None where the profile does not tell."""
    members: tuple[str, ...] = ()
    """The layers, where it stands for several."""

    @property
    def names(self) -> tuple[str, ...]:
        """All layers that this is about."""
        return self.members or (self.layer,)


class AgainstFp32:
    """Measures candidates against fp32 on the pairs."""

    def __init__(self, fp32: Artifact, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        with DeblurEngine(fp32.path, provider="cpu") as engine:
            self.fp32 = [engine(pair.blurred) for pair in pairs]
        self.psnr = [psnr(image, pair.sharp) for image, pair in zip(self.fp32, pairs, strict=True)]

    def drops(self, path: Path) -> list[float]:
        with DeblurEngine(path, provider="cpu") as engine:
            found = [psnr(engine(pair.blurred), pair.sharp) for pair in self.pairs]
        return [fp32 - value for fp32, value in zip(self.psnr, found, strict=True)]


def measure_sensitivity(
    quantizer: Quantizer,
    method: str,
    fp32: Artifact,
    pairs: Sequence[Pair],
    macs: Mapping[str, float],
    *,
    crops: int,
    folder: Path,
) -> list[Sensitivity]:
    """What each layer alone costs when calibrated by ``method``, on a crop of each of ``crops`` of the pairs.

    ``macs``: share of the multiplications by layer; trial files go to ``folder``.
    """
    exporter = quantizer.exporter
    layout = exporter.layouts[0]
    parts = [pair.centre(_CROP_PX) for pair in pairs[:: -(-len(pairs) // crops)]]
    exact = AgainstFp32(fp32, parts)
    whole = exporter.int8(quantizer.body(method, layout), layout, folder)
    slow, fast = kernels_of(fp32.path), kernels_of(whole.path)
    found = []
    known = [name for name in layers(exporter.body(layout)) if name in macs]
    for unit in units(known):
        alone = exporter.int8(quantizer.body(method, layout, only=unit), layout, folder)
        with DeblurEngine(alone.path, provider="cpu") as engine:
            restored = [engine(pair.blurred) for pair in parts]
        errors = [np.mean(np.square(a.astype(np.float32) - b)) for a, b in zip(restored, exact.fp32, strict=True)]
        drops = [of - psnr(a, pair.sharp) for of, a, pair in zip(exact.psnr, restored, parts, strict=True)]
        saved = [a.ms - b.ms for layer in unit if (a := slow.get(layer)) and (b := fast.get(layer))]
        found.append(
            Sensitivity(
                layer=unit[0] if len(unit) == 1 else f"{unit[0]} to {unit[-1]}",
                members=() if len(unit) == 1 else unit,
                macs=sum(macs[layer] for layer in unit),
                drop_db=float(np.mean(drops)),
                error=float(np.mean(errors)),
                ms_saved=sum(saved) if len(saved) == len(unit) else None,
            )
        )
    return found


_UNITS = 32
"""Layers, or runs of layers, that are measured at most."""


def units(names: Sequence[str]) -> list[tuple[str, ...]]:
    """``names``, each alone or, where they are many, several in a row together."""
    count = -(-len(names) // _UNITS)
    return [tuple(names[start : start + count]) for start in range(0, len(names), count)]


def return_order(sensitivity: Sequence[Sensitivity]) -> list[str]:
    """Layers in the order in which they return to float: the most error taken away for each millisecond lost.

    The error counts and not the PSNR against ground truth, whose change in one layer on a few crops is of either sign.
    """
    known = all(row.ms_saved is not None for row in sensitivity)

    def gain(row: Sensitivity) -> float:
        cost = row.ms_saved if known and row.ms_saved is not None else row.macs
        return row.error / max(cost, 1e-3)

    return [row.layer for row in sorted(sensitivity, key=gain, reverse=True)]


def sensitivity_table(sensitivity: Sequence[Sensitivity]) -> str:
    """The layers as lines of text, the most sensitive first."""
    lines = ["only this layer in int8      MACs   lost, dB   squared error"]
    for row in sorted(sensitivity, key=lambda row: row.error, reverse=True):
        lines.append(f"{row.layer:<24} {row.macs:8.1%} {row.drop_db:10.4f} {row.error:15.4f}")
    return "\n".join(lines)
