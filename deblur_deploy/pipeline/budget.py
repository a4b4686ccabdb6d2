"""int8 that keeps a promised PSNR: candidates are measured through the engine, and layers go back to float if needed.

A method of calibration is not chosen by reputation but by what the network loses with it on pairs that did not
calibrate.  If every method loses too much, the layers that regain most for their milliseconds return to float.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from onnx import ModelProto
from onnxruntime.quantization.calibrate import TensorsData

from deblur_deploy.errors import VerificationError
from deblur_deploy.evaluation.latency import at_size, take_turns
from deblur_deploy.evaluation.quality import Pair, psnr
from deblur_deploy.pipeline.artifact import Artifact
from deblur_deploy.pipeline.calibrate import Audit, clipped_shares, cut_tiles, find_ranges, make_audit
from deblur_deploy.pipeline.config import Int8Config, Layout, Method
from deblur_deploy.pipeline.coverage import int8_share, kernels_of, macs_of
from deblur_deploy.pipeline.export import Exporter
from deblur_deploy.pipeline.probe import int8_ops
from deblur_deploy.pipeline.quantize import layers, quantize_body, quantize_with_nncf
from deblur_deploy.pipeline.stages import Progress
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.runtime.media import Image
from deblur_deploy.runtime.providers import find
from deblur_deploy.training.checkpoint import load_checkpoint

_LAYOUTS: tuple[Layout, ...] = ("rows", "planes")
_NNCF = "nncf"
_CROP_PX = 192
_TIMED = (640, 360)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One way to quantize, measured on the CPU provider in both layouts: of each pair, the worse of the two."""

    method: str
    in_float: tuple[str, ...]
    """Layers that stay float."""
    macs: float
    """Share of the multiplications that really ran in int8."""
    drop_db: float
    worst_drop_db: float
    worst_image: str
    median_ms: float | None = None
    """Only measured where several candidates keep the budget."""
    noise: float = 0.0

    def keeps(self, how: Int8Config) -> bool:
        """Whether it is within the budget."""
        return self.drop_db <= how.max_drop_db and self.worst_drop_db <= how.max_image_drop_db


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What one layer costs and brings when it is the only one in int8, on a few crops."""

    layer: str
    macs: float
    """Share of the multiplications."""
    drop_db: float
    """PSNR lost; below zero where rounding happens to help."""
    error: float
    """Mean square of what it changes in the result, in squared levels."""
    ms_saved: float | None
    """Time of the layer in fp32 less that in int8, on the CPU provider; None where the profile does not tell."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Everything that was found out about int8: ``bundle.json`` and the report show it."""

    chosen: Trial
    trials: list[Trial]
    sensitivity: list[Sensitivity]
    audit: Audit
    float_ops: dict[Layout, list[str]] = field(default_factory=dict)
    """Types of operations without an int8 kernel in the installed ONNX Runtime, by layout: they stay float."""

    def row(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class _Quantizer:
    """Makes quantized bodies of one network, and calibrates no more often than needed."""

    def __init__(self, exporter: Exporter, tiles: Sequence[Image]) -> None:
        self.exporter, self.tiles, self.stem = exporter, tiles, exporter.unet.config.stem
        self._probed = {layout: int8_ops(exporter.body(layout), self._side()) for layout in _LAYOUTS}
        self.ops = {layout: [op for op, runs in found.items() if runs] for layout, found in self._probed.items()}
        self.float_ops = {
            layout: missing
            for layout, found in self._probed.items()
            if (missing := [op for op, runs in found.items() if not runs])
        }
        self._ranges: dict[tuple[str, Layout], TensorsData] = {}

    def _side(self) -> int:
        return 4 * self.exporter.unet.config.size_divisor // self.stem

    def body(self, method: str, layout: Layout, in_float: Sequence[str] = (), only: str | None = None) -> ModelProto:
        body = self.exporter.body(layout)
        if method == _NNCF:
            return quantize_with_nncf(body, self.tiles, self.stem)
        key = (method, layout)
        if key not in self._ranges:
            assert method in get_args(Method)
            self._ranges[key] = find_ranges(body, self.tiles, self.stem, self.ops[layout], method)  # type: ignore[arg-type]
        return quantize_body(body, self._ranges[key], self.ops[layout], in_float=in_float, only=only)


class _Bench:
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


def quantize_variants(
    checkpoint: Path,
    fp32: Artifact,
    folder: Path,
    photos: Mapping[str, Image],
    pairs: Sequence[Pair],
    how: Int8Config,
    on_progress: Progress,
) -> dict[str, Any]:
    """The stage that writes the int8 variants to ``folder``, from the bodies that lie beside ``fp32``."""
    exporter = Exporter(load_checkpoint(checkpoint), fp32.parent_sha256, folder, fp32.path.parent)
    artifacts, found = quantize(exporter, fp32, photos, pairs, how, on_progress)
    return {"artifacts": [artifact.about() for artifact in artifacts], "int8": found.row()}


def quantize(
    exporter: Exporter,
    fp32: Artifact,
    photos: Mapping[str, Image],
    pairs: Sequence[Pair],
    how: Int8Config,
    on_progress: Progress = lambda _: None,
) -> tuple[list[Artifact], Quantization]:
    """The int8 variants (``rows``, then ``planes``) that keep the budget of ``how``, and how they were found.

    ``photos`` calibrate, ``pairs`` are held out.  Raises VerificationError with a table if nothing keeps the budget,
    InputError if the photographs are too small.
    """
    divisor = exporter.unet.config.size_divisor
    tiles = cut_tiles(photos, divisor, how.tiles, how.tile_px)
    quantizer = _Quantizer(exporter, tiles.images)
    bench = _Bench(fp32, pairs)
    counts = macs_of(fp32.path)
    macs = {layer: count / sum(counts.values()) for layer, count in counts.items()}
    with tempfile.TemporaryDirectory(prefix="deblur-int8-") as name:
        folder = Path(name)

        def attempt(method: str, in_float: tuple[str, ...] = ()) -> Trial:
            on_progress(f"int8 by {method}" + (f", {len(in_float)} layers in float" if in_float else ""))
            losses, shares = [], []
            for layout in _LAYOUTS:
                path = exporter.int8(quantizer.body(method, layout, in_float), layout, folder).path
                path = path.replace(path.with_stem(f"{path.stem}-{method}-{len(in_float)}"))
                losses.append(bench.drops(path))
                shares.append(int8_share(path, find("cpu"), counts) or 0.0)
            drops = np.max(losses, axis=0)
            return Trial(
                method=method,
                in_float=in_float,
                macs=min(shares),
                drop_db=float(drops.mean()),
                worst_drop_db=float(drops.max()),
                worst_image=pairs[int(drops.argmax())].name,
            )

        trials = []
        for method in _order(how):
            trials.append(attempt(method))
            if how.search != "all" and trials[-1].keeps(how):
                break
        kept = [trial for trial in trials if trial.keeps(how)]
        if len(kept) > 1:
            kept = _timed(kept, folder, pairs)
            timed = {trial.method: trial for trial in kept}
            trials = [timed.get(trial.method, trial) for trial in trials]
        best = fastest(kept) if kept else min(trials, key=lambda trial: (trial.method == _NNCF, trial.drop_db))
        sensitivity: list[Sensitivity] = []
        if (how.sensitivity_crops or not kept) and best.method != _NNCF:
            on_progress("int8: what each layer loses")
            sensitivity = _sensitivity(quantizer, exporter, fp32, best, macs, pairs, how, folder)
        if not kept:
            best = _return_layers(best, sensitivity, trials, attempt, how)
    artifacts = [exporter.int8(quantizer.body(best.method, layout, best.in_float), layout) for layout in _LAYOUTS]
    held_out = {pair.name: _at_least(pair.blurred, divisor) for pair in pairs}
    held_out_tiles = cut_tiles(held_out, divisor, how.tiles, tiles.side_px)
    return artifacts, Quantization(
        chosen=best,
        trials=trials,
        sensitivity=sensitivity,
        audit=make_audit(
            best.method,
            photos,
            tiles,
            held_out,
            clipped_shares(
                exporter.body("planes"),
                quantizer.body(best.method, "planes", best.in_float),
                held_out_tiles.images,
                quantizer.stem,
            ),
            held_out_tiles,
        ),
        float_ops=quantizer.float_ops,
    )


def _at_least(image: Image, side: int) -> Image:
    bottom, right = (max(0, side - length) for length in image.shape[:2])
    return np.pad(image, ((0, bottom), (0, right), (0, 0)), mode="edge")


def _order(how: Int8Config) -> list[str]:
    others = [] if how.search == "one" else [method for method in get_args(Method) if method != how.method]
    return [how.method, *others, *([_NNCF] if how.nncf else [])]


def _timed(trials: Sequence[Trial], folder: Path, pairs: Sequence[Pair]) -> list[Trial]:
    """``trials`` with their latency in the layout that suits the CPU provider, taking turns."""
    photo = at_size(pairs[0].blurred, *_TIMED)
    engines = {trial.method: DeblurEngine(folder / f"int8-{trial.method}-0.onnx", provider="cpu") for trial in trials}
    timings = take_turns({name: partial(engine, photo) for name, engine in engines.items()}, rounds=10, warm_up=3)
    for engine in engines.values():
        engine.close()
    return [
        replace(trial, median_ms=timings[trial.method].median_ms, noise=timings[trial.method].noise) for trial in trials
    ]


def fastest(trials: Sequence[Trial]) -> Trial:
    """The one that loses least among those that no other beats in latency by more than the noise of the two."""
    if any(trial.median_ms is None for trial in trials):
        return min(trials, key=lambda trial: trial.drop_db)
    best = min(trials, key=lambda trial: trial.median_ms or 0)
    as_fast = [t for t in trials if (t.median_ms or 0) <= (best.median_ms or 0) * (1 + max(t.noise + best.noise, 0.02))]
    return min(as_fast, key=lambda trial: trial.drop_db)


def _sensitivity(
    quantizer: _Quantizer,
    exporter: Exporter,
    fp32: Artifact,
    best: Trial,
    macs: Mapping[str, float],
    pairs: Sequence[Pair],
    how: Int8Config,
    folder: Path,
) -> list[Sensitivity]:
    crops = [_crop(pair) for pair in pairs[:: -(-len(pairs) // (how.sensitivity_crops or 4))]]
    exact = _Bench(fp32, crops)
    whole = exporter.int8(quantizer.body(best.method, "rows"), "rows", folder)
    slow, fast = kernels_of(fp32.path), kernels_of(whole.path)
    found = []
    for layer in layers(exporter.body("rows")):
        alone = exporter.int8(quantizer.body(best.method, "rows", only=layer), "rows", folder)
        with DeblurEngine(alone.path, provider="cpu") as engine:
            restored = [engine(pair.blurred) for pair in crops]
        errors = [np.mean(np.square(a.astype(np.float32) - b)) for a, b in zip(restored, exact.fp32, strict=True)]
        drops = [of - psnr(a, pair.sharp) for of, a, pair in zip(exact.psnr, restored, crops, strict=True)]
        both = slow.get(layer), fast.get(layer)
        found.append(
            Sensitivity(
                layer=layer,
                macs=macs[layer],
                drop_db=float(np.mean(drops)),
                error=float(np.mean(errors)),
                ms_saved=both[0].ms - both[1].ms if both[0] and both[1] else None,
            )
        )
    return found


def _crop(pair: Pair) -> Pair:
    top, left = (max(0, side - _CROP_PX) // 2 for side in pair.blurred.shape[:2])
    window = slice(top, top + _CROP_PX), slice(left, left + _CROP_PX)
    return Pair(
        name=pair.name,
        blurred=np.ascontiguousarray(pair.blurred[window]),
        sharp=np.ascontiguousarray(pair.sharp[window]),
    )


def return_order(sensitivity: Sequence[Sensitivity]) -> list[str]:
    """Layers in the order in which they return to float: the most error taken away for each millisecond lost.

    The error counts and not the PSNR against ground truth, whose change in one layer on a few crops is of either sign.
    """
    known = all(row.ms_saved is not None for row in sensitivity)

    def gain(row: Sensitivity) -> float:
        cost = row.ms_saved if known and row.ms_saved is not None else row.macs
        return row.error / max(cost, 1e-3)

    return [row.layer for row in sorted(sensitivity, key=gain, reverse=True)]


def _return_layers(
    best: Trial,
    sensitivity: Sequence[Sensitivity],
    trials: list[Trial],
    attempt: Callable[[str, tuple[str, ...]], Trial],
    how: Int8Config,
) -> Trial:
    """The fewest layers in float that keep the budget, in their order, found by halving."""
    order, share = return_order(sensitivity), {row.layer: row.macs for row in sensitivity}
    most = 0
    while most < len(order) and 1 - sum(share[layer] for layer in order[: most + 1]) >= max(how.min_macs, 1e-9):
        most += 1

    def tried(count: int) -> Trial:
        trials.append(attempt(best.method, tuple(order[:count])))
        return trials[-1]

    good = tried(most) if most else best
    if not good.keeps(how):
        raise VerificationError(
            f"int8 loses more than {how.max_drop_db} dB (mean) or {how.max_image_drop_db} dB (one image) against fp32 "
            f"while at least {how.min_macs:.0%} of the multiplications stay int8; calibrate on photographs like those "
            f"in use, or allow more with --int8.max-drop-db\n{table_of(trials)}\n{sensitivity_table(sensitivity)}"
        )
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        trial = tried(middle)
        if trial.keeps(how):
            good, high = trial, middle
        else:
            low = middle
    return good


def table_of(trials: Sequence[Trial]) -> str:
    """The trials as lines of text."""
    lines = ["method           in float   MACs in int8   lost, dB   worst image, dB"]
    for trial in trials:
        lines.append(
            f"{trial.method:<16} {len(trial.in_float):8d} {trial.macs:14.1%} {trial.drop_db:10.4f} "
            f"{trial.worst_drop_db:10.4f} ({trial.worst_image})"
        )
    return "\n".join(lines)


def sensitivity_table(sensitivity: Sequence[Sensitivity]) -> str:
    """The layers as lines of text, the most sensitive first."""
    lines = ["only this layer in int8      MACs   lost, dB   squared error"]
    for row in sorted(sensitivity, key=lambda row: row.error, reverse=True):
        lines.append(f"{row.layer:<24} {row.macs:8.1%} {row.drop_db:10.4f} {row.error:15.4f}")
    return "\n".join(lines)
