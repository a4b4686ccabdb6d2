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
import onnx

from deblur_deploy.errors import DeblurError, VerificationError
from deblur_deploy.evaluation.latency import at_size, take_turns
from deblur_deploy.evaluation.quality import Pair
from deblur_deploy.media.images import Image
from deblur_deploy.pipeline.artifact import Artifact
from deblur_deploy.pipeline.config import Int8Config, Layout, Method
from deblur_deploy.pipeline.export import BODY, Exporter
from deblur_deploy.pipeline.int8.calibrate import Audit, clipped_shares, cut_tiles, make_audit
from deblur_deploy.pipeline.int8.coverage import int8_share, macs_of
from deblur_deploy.pipeline.int8.quantizer import NNCF, Breadth, Quantizer
from deblur_deploy.pipeline.int8.sensitivity import (
    AgainstFp32,
    Sensitivity,
    measure_sensitivity,
    return_order,
    sensitivity_table,
)
from deblur_deploy.pipeline.network import Network
from deblur_deploy.pipeline.stages import Progress
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.runtime.providers import find

_CROP_PX = 192
_TIMED = (640, 360)
_HEAVY = 1e5
"""Multiplications a pixel beyond which somebody else's network is given one method only."""
_MOST_WORK = 2e12
"""Multiplications that one pass over the calibration tiles may take: some twenty seconds of two cores."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One way to quantize, measured on the CPU provider in both layouts: of each pair, the worse of the two."""

    method: str
    breadth: Breadth = "all"
    """Which operations are quantized: all that have a kernel, or the layers and what lies between them."""
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


def quantize_variants(
    network: Network,
    fp32: Artifact,
    folder: Path,
    photos: Mapping[str, Image],
    pairs: Sequence[Pair],
    how: Int8Config,
    on_progress: Progress,
) -> dict[str, Any]:
    """The stage that writes the int8 variants to ``folder``, from the body that lies beside ``fp32``.

    If a network of somebody else's does not keep the budget, there are none, and the record says why.
    """
    exporter = Exporter(network, onnx.load(fp32.path.parent / BODY), fp32.parent_sha256, folder)
    try:
        artifacts, found = quantize(exporter, fp32, photos, pairs, how, on_progress)
    except VerificationError as error:
        if network.ours:
            raise
        why, _, table = str(error).partition("\n")
        return {"artifacts": [], "int8": {"left_out": why, "table": table}}
    except DeblurError:
        raise
    except Exception as error:  # quantizers meet graphs here that their authors never saw
        if network.ours:
            raise
        why = f"it cannot be quantized: {' '.join(str(error).split()) or type(error).__name__}"
        return {"artifacts": [], "int8": {"left_out": why, "table": ""}}
    return {"artifacts": [artifact.about() for artifact in artifacts], "int8": found.row()}


def quantize(
    exporter: Exporter,
    fp32: Artifact,
    photos: Mapping[str, Image],
    pairs: Sequence[Pair],
    how: Int8Config,
    on_progress: Progress = lambda _: None,
) -> tuple[list[Artifact], Quantization]:
    """The int8 variants, one for each of the exporter's layouts, that keep the budget of ``how``, and how they were
    found.

    ``photos`` calibrate, ``pairs`` are held out.  Raises VerificationError with a table if nothing keeps the budget, or
    if too few multiplications have an int8 kernel here; InputError if the photographs are too small.
    """
    network, layouts = exporter.network, exporter.layouts
    divisor = max(network.size_divisor, network.least_px)
    tiles = cut_tiles(photos, divisor, _affordable(how, network), how.tile_px)
    quantizer = Quantizer(exporter, tiles.images, how.rounding)
    narrow = quantizer.narrower()
    quantizers: dict[Breadth, Quantizer] = {"all": quantizer}
    if narrow:
        quantizers["layers"] = narrow
    bench = AgainstFp32(fp32, pairs)
    counts = macs_of(fp32.path)
    macs = {layer: count / sum(counts.values()) for layer, count in counts.items()}
    with tempfile.TemporaryDirectory(prefix="deblur-int8-") as name:
        folder = Path(name)

        def attempt(method: str, in_float: tuple[str, ...] = (), breadth: Breadth = "all") -> Trial:
            what = f"int8 by {method}" + (", layers only" if breadth == "layers" else "")
            on_progress(what + (f", {len(in_float)} layers in float" if in_float else ""))
            losses, shares = [], []
            for layout in layouts:
                path = exporter.int8(quantizers[breadth].body(method, layout, in_float), layout, folder).path
                path = path.replace(path.with_stem(_trial_name(path.stem, method, breadth, len(in_float))))
                losses.append(bench.drops(path))
                shares.append(int8_share(path, find("cpu"), counts) or 0.0)
            drops = np.max(losses, axis=0)
            return Trial(
                method=method,
                breadth=breadth,
                in_float=in_float,
                macs=min(shares),
                drop_db=float(drops.mean()),
                worst_drop_db=float(drops.max()),
                worst_image=pairs[int(drops.argmax())].name,
            )

        trials = []
        for method in _order(how, network):
            trials += [attempt(method, (), breadth) for breadth in quantizers]
            if how.search != "all" and any(trial.keeps(how) for trial in trials):
                break
        if how.nncf:
            trials.append(attempt(NNCF))
        kept = [trial for trial in trials if trial.keeps(how)]
        if len(kept) > 1:
            kept = _timed(kept, folder, pairs)
            timed = {(trial.method, trial.breadth): trial for trial in kept}
            trials = [timed.get((trial.method, trial.breadth), trial) for trial in trials]
        best = fastest(kept) if kept else min(trials, key=lambda trial: (trial.method == NNCF, trial.drop_db))
        sensitivity: list[Sensitivity] = []
        if (how.sensitivity_crops or not kept) and best.method != NNCF and not (kept and _is_heavy(network)):
            on_progress("int8: what each layer loses")
            sensitivity = measure_sensitivity(
                quantizers[best.breadth],
                best.method,
                fp32,
                pairs,
                macs,
                crops=how.sensitivity_crops or 4,
                folder=folder,
            )
        if not kept:
            best = _return_layers(best, sensitivity, trials, attempt, how)
    chosen = quantizers[best.breadth]
    float_ops = {layout: ops for layout in layouts if (ops := quantizer.float_ops(layout))}
    if best.macs < 0.99:
        names = ", ".join(sorted({name for ops in float_ops.values() for name in ops}))
        why = f"; without an int8 kernel here: {names}" if names else ""
        said = f"{best.macs:.1%} of the multiplications run in int8{why}"
        if best.macs < how.min_macs:
            raise VerificationError(f"only {said}; at least {how.min_macs:.0%} are wanted (--int8.min-macs)")
        on_progress(f"note: {said}")
    artifacts = [exporter.int8(chosen.body(best.method, layout, best.in_float), layout) for layout in layouts]
    held_out = {pair.name: _at_least(pair.blurred, divisor) for pair in pairs}
    held_out_tiles = cut_tiles(held_out, divisor, len(tiles.images), tiles.side_px)
    clipped = clipped_shares(
        chosen.plain("planes"), chosen.body(best.method, "planes", best.in_float), held_out_tiles.images, chosen.stem
    )
    held = chosen.held() if best.method == "result" else None
    return artifacts, Quantization(
        chosen=best,
        trials=trials,
        sensitivity=sensitivity,
        audit=make_audit(best.method, held, photos, tiles, held_out, clipped, held_out_tiles),
        float_ops=float_ops,
    )


def _trial_name(stem: str, method: str, breadth: Breadth, in_float: int) -> str:
    return f"{stem}-{method}-{breadth}-{in_float}"


def _is_heavy(network: Network) -> bool:
    return not network.ours and network.macs_per_pixel > _HEAVY


def _affordable(how: Int8Config, network: Network) -> int:
    """Tiles that calibration looks at: fewer of somebody else's network that is costly."""
    if network.ours:
        return how.tiles
    return max(1, min(how.tiles, max(8, int(_MOST_WORK / (how.tile_px**2 * network.macs_per_pixel)))))


def _at_least(image: Image, side: int) -> Image:
    bottom, right = (max(0, side - length) for length in image.shape[:2])
    return np.pad(image, ((0, bottom), (0, right), (0, 0)), mode="edge")


def _order(how: Int8Config, network: Network) -> list[str]:
    one = how.search == "one" or (how.search == "first" and _is_heavy(network))
    others = [] if one else [method for method in get_args(Method) if method != how.method]
    return [how.method, *others]


def _timed(trials: Sequence[Trial], folder: Path, pairs: Sequence[Pair]) -> list[Trial]:
    """``trials`` with their latency in the layout that suits the CPU provider, taking turns."""
    photo = at_size(pairs[0].blurred, *_TIMED)
    engines = {
        f"{trial.method} {trial.breadth}": DeblurEngine(
            folder / f"{_trial_name('int8', trial.method, trial.breadth, 0)}.onnx", provider="cpu"
        )
        for trial in trials
    }
    timings = take_turns({name: partial(engine, photo) for name, engine in engines.items()}, rounds=10, warm_up=3)
    for engine in engines.values():
        engine.close()
    found = [(trial, timings[f"{trial.method} {trial.breadth}"]) for trial in trials]
    return [replace(trial, median_ms=timing.median_ms, noise=timing.noise) for trial, timing in found]


def fastest(trials: Sequence[Trial]) -> Trial:
    """The one that loses least among those that no other beats in latency by more than the noise of the two."""
    if any(trial.median_ms is None for trial in trials):
        return min(trials, key=lambda trial: trial.drop_db)
    best = min(trials, key=lambda trial: trial.median_ms or 0)
    as_fast = [t for t in trials if (t.median_ms or 0) <= (best.median_ms or 0) * (1 + max(t.noise + best.noise, 0.02))]
    return min(as_fast, key=lambda trial: trial.drop_db)


def _return_layers(
    best: Trial,
    sensitivity: Sequence[Sensitivity],
    trials: list[Trial],
    attempt: Callable[[str, tuple[str, ...], Breadth], Trial],
    how: Int8Config,
) -> Trial:
    """The fewest layers in float that keep the budget, in their order, found by halving."""
    order: list[str] = []
    left, share = 1.0, {row.layer: row.macs for row in sensitivity}
    names = {row.layer: row.names for row in sensitivity}
    for layer in return_order(sensitivity):
        # One that is too large to return does not keep those behind it from returning.
        if left - share[layer] >= max(how.min_macs, 1e-9):
            order.append(layer)
            left -= share[layer]
    most = len(order)

    def tried(count: int) -> Trial:
        chosen = tuple(name for unit in order[:count] for name in names[unit])
        trials.append(attempt(best.method, chosen, best.breadth))
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
