"""How many patches a second does training see: with blur made beside it or from the bank, alone or with others busy?

    python -m benchmarks.training PHOTOS_OR_PAIRS... [--frames ...] [--video ...] [--steps 40] [--json FILE]

``fresh`` makes each batch in a loader process while the step before it is trained on; ``bank`` draws crops of patches
made ahead, whose making is timed on its own and counted for as often as each patch is used.  ``busy`` has one process
of another kind beside it that never rests, as a test suite or an export would be.  Medians of the steps of one run.
``convolutions`` are forward and backward passes alone, with plain convolutions and with Winograd's, in turn.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import msgspec
import psutil
import torch
import tyro

from deblur_deploy.evaluation.record import new_record, write_json
from deblur_deploy.training.bank import RENEWED, Bank
from deblur_deploy.training.batches import Batches
from deblur_deploy.training.blur import BlurConfig
from deblur_deploy.training.config import Stage, TrainConfig
from deblur_deploy.training.discovery import find_sources
from deblur_deploy.training.sources import ImageCache
from deblur_deploy.training.train import Progress, Trainer
from deblur_deploy.training.unet import PRESETS, Preset, UNet
from deblur_deploy.training.winograd import Winograd

_SPIN = "import numpy as np\na = np.ones((600, 600))\nwhile True: a @ a"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure how training is fed."""

    inputs: tyro.conf.Positional[tuple[str, ...]] = ()
    """As for deblur-train."""
    frames: tuple[str, ...] = ()
    """As for deblur-train."""
    video: tuple[str, ...] = ()
    """As for deblur-train."""
    preset: Preset = "hd"
    """Which network."""
    steps: int = 40
    """Steps of each row; for memory, give 5000."""
    stages: tuple[str, ...] = ("1:16x128",)
    """SHARE:PATCHESxSIDE; the share is not used."""
    json: Path | None = None
    """Write the numbers here."""


def memory_mib() -> float:
    """Resident memory of this process and the loaders that it started."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_info().rss for process in family) / 2**20


def convolutions(preset: Preset, stage: Stage, rounds: int = 7) -> dict[str, object]:
    """Milliseconds of one gradient of ``preset``, with plain convolutions and with Winograd's; medians."""
    network = UNet(PRESETS[preset]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    image = torch.rand(stage.patches, 3, stage.side_px, stage.side_px).to(memory_format=torch.channels_last)
    took: dict[str, list[float]] = {"plain_ms": [], "winograd_ms": []}
    for _ in range(rounds + 1):
        for name, how in (("plain_ms", nullcontext()), ("winograd_ms", Winograd())):
            network.zero_grad()
            since = time.perf_counter()
            with how:
                network(image).square().mean().backward()
            took[name].append(1e3 * (time.perf_counter() - since))
    plain, winograd = (median(values[1:]) for values in took.values())
    pace = {"plain_ms": round(plain, 1), "winograd_ms": round(winograd, 1), "ratio": round(plain / winograd, 2)}
    shape = {"patches": stage.patches, "side_px": stage.side_px, "threads": torch.get_num_threads()}
    return {"preset": preset, **shape, **pace}


@contextmanager
def beside(busy: bool) -> Iterator[None]:
    """With a process of its own group that never rests, or none."""
    if not busy:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", _SPIN]) as other:
        try:
            yield
        finally:
            other.kill()


def measure(arguments: Arguments, feed: Batches | Bank, config: TrainConfig, out: Path) -> dict[str, object]:
    """Train a few steps and look at each."""
    stamps, shares, memory = [], [], []

    def watch(progress: Progress) -> None:
        stamps.append(time.perf_counter())
        if progress.processors:
            shares.append(progress.processors)
        if progress.step % max(config.steps // 20, 1) == 0:
            memory.append(round(memory_mib()))

    torch.manual_seed(0)
    Trainer(UNet(PRESETS[arguments.preset]), config, out).run(feed, {}, watch)
    pace = median(b - a for a, b in pairwise(stamps[2:]))
    row: dict[str, object] = {"s_per_step": round(pace, 4), "patches_per_s": round(feed.shape(0)[0] / pace, 1)}
    if shares:
        row |= {"network": round(shares[-1].network, 3), "others": round(shares[-1].others, 3)}
    return {**row, "memory_mib": memory}


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line a row and, with ``--json``, write the numbers."""
    arguments = tyro.cli(Arguments, args=argv)
    rows = []
    with TemporaryDirectory() as folder:
        out = Path(folder)
        found = find_sources(
            arguments.inputs, arguments.frames, arguments.video, frames_folder=out / "frames", cache=ImageCache()
        )
        weighted = [pair for item in found for pair in item.weighted()]
        for stage in map(Stage.parse, arguments.stages):
            config = TrainConfig(
                steps=arguments.steps,
                stages=(msgspec.structs.replace(stage, share=1.0),),
                log_every=max(arguments.steps // 2, 1),
                validate_every=arguments.steps,
                save_every_s=1e9,
            )
            batches = Batches(weighted, BlurConfig(), config.schedule(), seed=0)
            bank = Bank(batches, out / "bank", "benchmark", 2**28)
            filled: list[int] = []
            bank.watch = lambda made, _of, filled=filled: filled.append(made)
            since = time.perf_counter()
            next(bank.load(0, arguments.steps, 1))
            made = filled[-1] / (time.perf_counter() - since)
            for busy in (False, True):
                for name, feed in (("fresh", batches), ("bank", bank)):
                    row: dict[str, object] = {"feed": name, "beside": "a busy process" if busy else "nothing"}
                    row |= {"patches": stage.patches, "side_px": stage.side_px, "device": _device()}
                    with beside(busy):
                        row |= measure(arguments, feed, config, out)
                    if name == "bank":
                        row |= {"made_per_s": round(made, 1), "renewed_share": RENEWED}
                    print(json.dumps(row))
                    rows.append(row)
    gradients = [convolutions(preset, Stage.parse(arguments.stages[-1])) for preset in PRESETS]
    for row in gradients:
        print(json.dumps(row))
    if arguments.json:
        settings = {"preset": arguments.preset, "steps": arguments.steps}
        write_json(arguments.json, new_record("training", settings, found={"rows": rows, "convolutions": gradients}))
    return 0


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
