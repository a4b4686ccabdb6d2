"""Is the device kept busy, and does memory stay flat?  Share of each stage's steps spent in network and optimizer.

    python -m benchmarks.training PHOTOS_OR_PAIRS... [--frames ...] [--preset hd] [--steps 40] [--json FILE]

A step is waiting for a batch plus training on it; validation and saving are not part of it.  Two ways of looking:
``busy`` is 1 - waiting / total with the loader processes running beside, as a user has it; ``synthesis`` is what a
batch costs one core when nothing else runs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
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
from deblur_deploy.training.batches import Batches
from deblur_deploy.training.blur import BlurConfig
from deblur_deploy.training.config import Stage, TrainConfig
from deblur_deploy.training.discovery import find_sources
from deblur_deploy.training.sources import ImageCache
from deblur_deploy.training.train import Progress, Trainer
from deblur_deploy.training.unet import PRESETS, Preset, UNet


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure the data pipeline."""

    inputs: tyro.conf.Positional[tuple[str, ...]] = ()
    """As for deblur-train."""
    frames: tuple[str, ...] = ()
    """As for deblur-train."""
    preset: Preset = "hd"
    """Which network."""
    steps: int = 40
    """Steps of each stage; for memory, give 5000."""
    workers: int = 1
    """Loader processes."""
    cache_gb: float = 2.0
    """Memory for decoded images."""
    stages: tuple[str, ...] = tuple(str(stage) for stage in TrainConfig().stages)
    """SHARE:PATCHESxSIDE; the share is not used."""
    json: Path | None = None
    """Write the numbers here."""


def memory_mib() -> float:
    """Resident memory of this process and the loaders that it started."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_info().rss for process in family) / 2**20


def measure_stage(arguments: Arguments, batches: Batches, config: TrainConfig, out: Path) -> dict[str, object]:
    """Run one stage and look at every step."""
    waiting, memory, stamps = [], [], []

    def watch(progress: Progress) -> None:
        stamps.append(time.perf_counter())
        waiting.append(progress.waiting)
        if progress.step % max(config.steps // 20, 1) == 0:
            memory.append(round(memory_mib()))

    torch.manual_seed(0)
    Trainer(UNet(PRESETS[arguments.preset]), config, out).run(batches, {}, watch)
    # The log's clock restarts with each line, so the last step before a line has that line's share.
    ends = range(config.log_every - 1, config.steps, config.log_every)
    busy = [1 - waiting[i] for i in ends][1:] or [1 - waiting[-1]]
    paces = [b - a for a, b in pairwise(stamps)]
    return {"busy": round(median(busy), 4), "s_per_step": round(median(paces), 4), "memory_mib": memory}


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line a stage and, with ``--json``, write the numbers."""
    arguments = tyro.cli(Arguments, args=argv)
    rows = []
    with TemporaryDirectory() as folder:
        out = Path(folder)
        cache = ImageCache(int(arguments.cache_gb * 2**30) // max(arguments.workers, 1))
        found = find_sources(arguments.inputs, arguments.frames, frames_folder=out / "frames", cache=cache)
        weighted = [pair for item in found for pair in item.weighted()]
        for text in arguments.stages:
            stage = Stage.parse(text)
            config = TrainConfig(
                steps=arguments.steps,
                stages=(msgspec.structs.replace(stage, share=1.0),),
                workers=arguments.workers,
                log_every=max(arguments.steps // 8, 1),
                validate_every=arguments.steps,
                save_every_s=1e9,
            )
            batches = Batches(weighted, BlurConfig(), config.schedule(), seed=0)
            row = {"patches": stage.patches, "side_px": stage.side_px, "device": "cpu"}
            if torch.cuda.is_available():
                row["device"] = torch.cuda.get_device_name()
            row |= measure_stage(arguments, batches, config, out)
            row["synthesis_s"] = round(_one_core(batches), 4)
            print(json.dumps(row))
            rows.append(row)
    if arguments.json:
        settings = {"preset": arguments.preset, "steps": arguments.steps, "workers": arguments.workers}
        write_json(arguments.json, new_record("training", settings, found={"stages": rows}))
    return 0


def _one_core(batches: Batches) -> float:
    """Median seconds that one core takes for a batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    took = []
    for step in range(6):
        since = time.perf_counter()
        batches[step]
        took.append(time.perf_counter() - since)
    torch.set_num_threads(threads)
    return median(took[1:])


if __name__ == "__main__":
    sys.exit(main())
