"""Which way to quantize keeps the budget: each is written, run through the engine, and measured on the pairs.

A method of calibration is not chosen by reputation but by what the network loses with it on pairs that did not
calibrate.  If every method loses too much, the layers that regain most for their milliseconds return to float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np

from deblur_deploy.errors import VerificationError
from deblur_deploy.evaluation.latency import at_size, take_turns
from deblur_deploy.evaluation.quality import Pair
from deblur_deploy.media.images import Image
from deblur_deploy.pipeline.artifact import Artifact
from deblur_deploy.pipeline.config import Int8Config, Method
from deblur_deploy.pipeline.export import Exporter
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

_TIMED = (640, 360)
_HEAVY = 1e5
"""Work a pixel, in multiplications, beyond which somebody else's network is given one method only."""


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


class Search:
    """Ways to quantize one network, tried in ``folder``: calibrated on ``tiles``, measured on ``pairs``."""

    def __init__(
        self,
        exporter: Exporter,
        fp32: Artifact,
        tiles: Sequence[Image],
        pairs: Sequence[Pair],
        how: Int8Config,
        folder: Path,
        on_progress: Progress,
    ) -> None:
        self.trials: list[Trial] = []
        """All that were measured, in order."""
        self.sensitivity: list[Sensitivity] = []
        """What each layer loses, where that was measured."""
        quantizer = Quantizer(exporter, tiles, how.rounding)
        narrow = quantizer.narrower()
        self.quantizers: dict[Breadth, Quantizer] = {"all": quantizer}
        if narrow:
            self.quantizers["layers"] = narrow
        self._exporter, self._fp32, self._pairs, self._how = exporter, fp32, pairs, how
        self._folder, self._say = folder, on_progress
        self._bench, self._counts = AgainstFp32(fp32, pairs), macs_of(fp32.path)

    def run(self) -> Trial:
        """The trial that is chosen; raises VerificationError with tables if nothing keeps the budget."""
        how, network = self._how, self._exporter.network
        for method in _order(how, network):
            for breadth in self.quantizers:
                self.attempt(method, (), breadth)
            if how.search != "all" and any(trial.keeps(how) for trial in self.trials):
                break
        if how.nncf:
            self.attempt(NNCF)
        kept = [trial for trial in self.trials if trial.keeps(how)]
        if len(kept) > 1:
            kept = self._timed(kept)
        best = fastest(kept) if kept else min(self.trials, key=lambda trial: (trial.method == NNCF, trial.drop_db))
        if (how.sensitivity_crops or not kept) and best.method != NNCF and not (kept and _is_heavy(network)):
            self._measure_layers(best)
        return best if kept else return_layers(best, self.sensitivity, self.trials, self.attempt, how)

    def attempt(self, method: str, in_float: tuple[str, ...] = (), breadth: Breadth = "all") -> Trial:
        """Quantize and measure in one way."""
        what = f"int8 by {method}" + (", layers only" if breadth == "layers" else "")
        self._say(what + (f", {len(in_float)} layers in float" if in_float else ""))
        losses, shares = [], []
        for layout in self._exporter.layouts:
            body = self.quantizers[breadth].body(method, layout, in_float)
            path = self._exporter.int8(body, layout, self._folder).path
            path = path.replace(path.with_stem(_trial_name(path.stem, method, breadth, len(in_float))))
            losses.append(self._bench.drops(path))
            shares.append(int8_share(path, find("cpu"), self._counts) or 0.0)
        drops = np.max(losses, axis=0)
        trial = Trial(
            method=method,
            breadth=breadth,
            in_float=in_float,
            macs=min(shares),
            drop_db=float(drops.mean()),
            worst_drop_db=float(drops.max()),
            worst_image=self._pairs[int(drops.argmax())].name,
        )
        self.trials.append(trial)
        return trial

    def _timed(self, kept: Sequence[Trial]) -> list[Trial]:
        """``kept`` with their latency in the layout that suits the CPU provider, taking turns; noted in ``trials``."""
        photo = at_size(self._pairs[0].blurred, *_TIMED)
        names = [_trial_name("int8", trial.method, trial.breadth, 0) for trial in kept]
        engines = {name: DeblurEngine(self._folder / f"{name}.onnx", provider="cpu") for name in names}
        timings = take_turns({name: partial(engine, photo) for name, engine in engines.items()}, rounds=10, warm_up=3)
        for engine in engines.values():
            engine.close()
        found = [
            replace(trial, median_ms=timings[name].median_ms, noise=timings[name].noise)
            for name, trial in zip(names, kept, strict=True)
        ]
        timed = {(trial.method, trial.breadth): trial for trial in found}
        self.trials[:] = [timed.get((trial.method, trial.breadth), trial) for trial in self.trials]
        return found

    def _measure_layers(self, best: Trial) -> None:
        self._say("int8: what each layer loses")
        whole = sum(self._counts.values())
        self.sensitivity = measure_sensitivity(
            self.quantizers[best.breadth],
            best.method,
            self._fp32,
            self._pairs,
            {layer: count / whole for layer, count in self._counts.items()},
            crops=self._how.sensitivity_crops or 4,
            folder=self._folder,
        )


def _trial_name(stem: str, method: str, breadth: Breadth, in_float: int) -> str:
    return f"{stem}-{method}-{breadth}-{in_float}"


def _is_heavy(network: Network) -> bool:
    return not network.ours and network.work_per_pixel > _HEAVY


def _order(how: Int8Config, network: Network) -> list[str]:
    one = how.search == "one" or (how.search == "first" and _is_heavy(network))
    others = [] if one else [method for method in get_args(Method) if method != how.method]
    return [how.method, *others]


def fastest(trials: Sequence[Trial]) -> Trial:
    """The one that loses least among those that no other beats in latency by more than the noise of the two."""
    if any(trial.median_ms is None for trial in trials):
        return min(trials, key=lambda trial: trial.drop_db)
    best = min(trials, key=lambda trial: trial.median_ms or 0)
    as_fast = [t for t in trials if (t.median_ms or 0) <= (best.median_ms or 0) * (1 + max(t.noise + best.noise, 0.02))]
    return min(as_fast, key=lambda trial: trial.drop_db)


def return_layers(
    best: Trial,
    sensitivity: Sequence[Sensitivity],
    trials: Sequence[Trial],
    attempt: Callable[[str, tuple[str, ...], Breadth], Trial],
    how: Int8Config,
) -> Trial:
    """The fewest layers in float that keep the budget, in their order, found by halving with ``attempt``.

    Raises VerificationError with ``trials`` and ``sensitivity`` as tables if none are enough.
    """
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
        return attempt(best.method, chosen, best.breadth)

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
