"""int8 that keeps a promised PSNR: the stage that writes the int8 variants, with the record of how they were found."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from deblur_deploy.errors import DeblurError, VerificationError
from deblur_deploy.evaluation.quality import Pair
from deblur_deploy.media.images import Image
from deblur_deploy.pipeline.artifact import Artifact
from deblur_deploy.pipeline.config import Int8Config, Layout
from deblur_deploy.pipeline.export import BODY, Exporter
from deblur_deploy.pipeline.int8.calibrate import Audit, Tiles, clipped_shares, cut_tiles, make_audit
from deblur_deploy.pipeline.int8.quantizer import Quantizer
from deblur_deploy.pipeline.int8.search import Search, Trial
from deblur_deploy.pipeline.int8.sensitivity import Sensitivity
from deblur_deploy.pipeline.network import Network
from deblur_deploy.pipeline.stages import Progress

_MOST_WORK = 2e11
"""Work, in multiplications, that each of several passes over the calibration tiles may take: seconds of two cores."""
_MOST_BYTES, _LEAST_PX = 3 * 2**32, 64
"""What all values that a network computes for a tile may take, though they are looked at a part at a time; and the
least side of a tile that is made smaller for that."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Everything that was found out about int8: ``bundle.json`` and the report show it."""

    chosen: Trial
    trials: list[Trial]
    sensitivity: list[Sensitivity]
    audit: Audit
    float_ops: dict[Layout, list[str]] = field(default_factory=dict)
    """Types of operations without an int8 kernel in the installed ONNX Runtime, by layout: they stay float."""


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
    return {"artifacts": [artifact.about() for artifact in artifacts], "int8": asdict(found)}


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
    tiles = cut_tiles(photos, divisor, *_affordable(how, network))
    with tempfile.TemporaryDirectory(prefix="deblur-int8-") as name:
        search = Search(exporter, fp32, tiles.images, pairs, how, Path(name), on_progress)
        best = search.run()
    chosen = search.quantizers[best.breadth]
    float_ops = {layout: ops for layout in layouts if (ops := chosen.float_ops(layout))}
    _check_share(best, float_ops, how, on_progress)
    artifacts = [exporter.int8(chosen.body(best.method, layout, best.in_float), layout) for layout in layouts]
    return artifacts, Quantization(
        chosen=best,
        trials=search.trials,
        sensitivity=search.sensitivity,
        audit=_audited(chosen, best, photos, tiles, pairs, divisor),
        float_ops=float_ops,
    )


def _affordable(how: Int8Config, network: Network) -> tuple[int, int]:
    """How many tiles calibration looks at, and their side: less of somebody else's network that is costly."""
    side, least = how.tile_px, max(_LEAST_PX, network.size_divisor, network.least_px)
    if network.ours:
        return how.tiles, side
    while side // 2 >= least and 4 * network.values_per_pixel * side**2 > _MOST_BYTES:
        side //= 2
    return max(1, min(how.tiles, max(8, int(_MOST_WORK / (side**2 * network.work_per_pixel))))), side


def _check_share(best: Trial, float_ops: Mapping[Layout, list[str]], how: Int8Config, on_progress: Progress) -> None:
    """Tell if some multiplications do not run in int8; raises VerificationError if too few do."""
    if best.macs >= 0.99:
        return
    names = ", ".join(sorted({name for ops in float_ops.values() for name in ops}))
    why = f"; without an int8 kernel here: {names}" if names else ""
    said = f"{best.macs:.1%} of the multiplications run in int8{why}"
    if best.macs < how.min_macs:
        raise VerificationError(f"only {said}; at least {how.min_macs:.0%} are wanted (--int8.min-macs)")
    on_progress(f"note: {said}")


def _audited(
    chosen: Quantizer, best: Trial, photos: Mapping[str, Image], tiles: Tiles, pairs: Sequence[Pair], divisor: int
) -> Audit:
    """How well the calibration tiles stand for the pairs."""
    held_out = {pair.name: _at_least(pair.blurred, divisor) for pair in pairs}
    held_out_tiles = cut_tiles(held_out, divisor, len(tiles.images), tiles.side_px)
    body = chosen.body(best.method, "planes", best.in_float)
    clipped = clipped_shares(chosen.plain("planes"), body, held_out_tiles.images, chosen.stem)
    held = chosen.held() if best.method == "result" else None
    return make_audit(best.method, held, photos, tiles, held_out, clipped, held_out_tiles)


def _at_least(image: Image, side: int) -> Image:
    bottom, right = (max(0, side - length) for length in image.shape[:2])
    return np.pad(image, ((0, bottom), (0, right), (0, 0)), mode="edge")
