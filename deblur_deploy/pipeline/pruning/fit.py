"""The largest pruned network that is fast enough: found by exporting a few and timing what was exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deblur_deploy.contract import Precision
from deblur_deploy.errors import InputError
from deblur_deploy.evaluation.latency import Timing, at_size, take_turns
from deblur_deploy.media.images import Image
from deblur_deploy.pipeline.config import Int8Config, Layout
from deblur_deploy.pipeline.export import Exporter
from deblur_deploy.pipeline.int8.quantizer import plain_int8
from deblur_deploy.pipeline.pruning.config import PruneConfig
from deblur_deploy.pipeline.pruning.prune import Plan, network_of
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.training.unet import UNet

Measure = Callable[[Any], float]
"""Milliseconds of a network."""

CLOSE = 0.1
"""A network is close enough when it is at most this share faster than asked for."""
_MOST = 8
"""Networks that are measured at most."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What the search found."""

    share: float
    """Of the multiply-accumulates, to be kept."""
    ms: float
    """Of the network that keeps this share."""
    dense_ms: float
    tried: tuple[tuple[float, float], ...]
    """(share, ms) of every network that was measured, in order."""
    note: str = ""
    """Why it is not as close to the target as it should be, if it is not."""


def fit(plan: Plan, target_ms: float, measure: Measure, network: Callable[[Plan, float], Any] = network_of) -> Fit:
    """The largest network of ``plan`` that takes at most ``target_ms``, and at least 90 % of it where one exists.

    ``network``: the one that keeps at most a share, in whatever form ``measure`` wants it.
    Interpolates between what was measured.  Raises InputError that says what the best is, if nothing is fast enough.
    """
    tried: dict[float, float] = {}

    def ms(share: float) -> float:
        if share not in tried:
            tried[share] = measure(network(plan, share))
        return tried[share]

    def found(note: str = "") -> Fit:
        share = max(share for share, took in tried.items() if took <= target_ms)
        return Fit(share=share, ms=tried[share], dense_ms=tried[1.0], tried=tuple(tried.items()), note=note)

    if ms(1.0) <= target_ms:
        return found(f"the network takes {tried[1.0]:.1f} ms as it is; nothing is pruned for a target of {target_ms:g}")
    low, high = plan.smallest, 1.0
    if ms(low) > target_ms:
        raise InputError(
            f"target_ms is {target_ms:g}, but the smallest network, with {low:.3g} of the multiply-accumulates, takes "
            f"{tried[low]:.1f} ms; that is the best, allow more or a smaller image"
        )
    while tried[low] < (1 - CLOSE) * target_ms and len(tried) < _MOST:
        aim = (1 - CLOSE / 2) * target_ms
        share = low + (high - low) * (aim - tried[low]) / max(tried[high] - tried[low], 1e-9)
        # Away from the ends, so that a curve that is no line still closes in.
        share = min(max(share, low + 0.1 * (high - low)), high - 0.1 * (high - low))
        share = plan.share(plan.widths(share))
        if share <= low:
            # No network lies between here and there; the next larger one may.
            share = next((more for widths in reversed(plan.path) if low < (more := plan.share(widths)) < high), low)
        if share in tried:
            break
        if ms(share) <= target_ms:
            low = share
        else:
            high = share
    if tried[low] < (1 - CLOSE) * target_ms:
        return found(
            f"no network comes closer to {target_ms:g} ms: the next larger one that was measured takes "
            f"{tried[high]:.1f} ms, with {high:.3g} of the multiply-accumulates"
        )
    return found()


def time_exported(nets: Sequence[UNet], config: PruneConfig, photos: Sequence[Image]) -> list[Timing]:
    """Latency of each network, exported and run as ``config`` says; they take turns.

    ``photos`` calibrate int8.  Raises ProviderError if the provider is absent or does not run them.
    """
    return time_files(
        [partial(export_for, unet, config.provider, config.precision, photos) for unet in nets], config, photos[0]
    )


def time_files(makes: Sequence[Callable[[Path], Path]], config: PruneConfig, photo: Image) -> list[Timing]:
    """Latency of the file that each of ``makes`` writes to a folder, on ``photo`` as ``config`` says, in turn."""
    photo, calls = at_size(photo, *config.size()), dict[str, Callable[[], object]]()
    with TemporaryDirectory(prefix="deblur-fit-") as folder, ExitStack() as engines:
        for number, make in enumerate(makes):
            path = Path(folder, str(number))
            path.mkdir()
            engine = engines.enter_context(DeblurEngine(make(path), provider=config.provider))
            calls[str(number)] = partial(engine, photo)
        return list(take_turns(calls).values())


def export_for(unet: UNet, provider: str, precision: Precision, photos: Sequence[Image], folder: Path) -> Path:
    """The file of ``unet`` that suits ``provider``: a bundle has more, and would choose this one too."""
    exporter = Exporter.of(unet, "0" * 64, folder)
    if precision == "int8":
        # Scales and rounding decide nothing about time.
        how = Int8Config(tiles=2, tile_px=128, method="minmax", rounding="nearest")
        return plain_int8(exporter, photos, how, int8_layout(provider)).path
    return (exporter.fp16() if precision == "fp16" else exporter.fp32()).path


def int8_layout(provider: str) -> Layout:
    """The layout of the int8 graph that is usually the fastest on ``provider``."""
    return "rows" if provider == "cpu" else "planes"
