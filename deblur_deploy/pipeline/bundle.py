"""The main job: a checkpoint goes in, a verified bundle comes out, whole or not at all.

``bundle.json`` is written last and says what everything else is; ``runtime.bundle`` reads the part that engines need.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from deblur_deploy.contract import Precision
from deblur_deploy.evaluation.machine import machine, package_versions
from deblur_deploy.files import refuse_existing, sha256, writing_folder
from deblur_deploy.pipeline.artifact import Artifact, Measured
from deblur_deploy.pipeline.export import Exporter
from deblur_deploy.pipeline.photos import calibration_from, pairs_from
from deblur_deploy.pipeline.recipe import Recipe, write_recipe
from deblur_deploy.pipeline.report import write_card, write_report
from deblur_deploy.pipeline.verify import verify
from deblur_deploy.runtime.bundle import MANIFEST, SCHEMA
from deblur_deploy.runtime.providers import candidates, find
from deblur_deploy.training.checkpoint import load_checkpoint
from deblur_deploy.training.unet import parameter_count

Progress = Callable[[str], None]


@dataclass
class Journal:
    """What each stage took in and gave out, in order."""

    on_progress: Progress
    stages: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def stage(
        self, name: str, inputs: dict[str, str], config: msgspec.Struct | None = None
    ) -> Iterator[dict[str, str]]:
        """Run a stage; the block fills the yielded dict with its outputs (name: sha256)."""
        self.on_progress(name)
        outputs: dict[str, str] = {}
        start = time.perf_counter()
        yield outputs
        self.stages.append(
            {
                "name": name,
                "inputs": inputs,
                "config": {} if config is None else msgspec.to_builtins(config),
                "outputs": outputs,
                "seconds": round(time.perf_counter() - start, 2),
            }
        )


def build_bundle(
    checkpoint: Path, recipe: Recipe, out: Path, *, force: bool = False, on_progress: Progress = lambda _: None
) -> list[Measured]:
    """Export, quantize, verify and measure ``checkpoint``; write the bundle to ``out``.

    Raises DeblurError leaves for a user's mistakes, and VerificationError if a variant does not hold what it must;
    ``out`` is then left as it was.
    """
    refuse_existing(out, force=force)
    providers = _providers(recipe)
    unet = load_checkpoint(checkpoint)
    parent = sha256(checkpoint)
    pairs, photos = pairs_from(recipe.pairs), calibration_from(recipe.calibration)
    journal = Journal(on_progress)
    with writing_folder(out, force=force) as folder:
        exporter = Exporter(unet, parent, folder)
        artifacts: list[Artifact] = []
        with journal.stage("export", {checkpoint.name: parent}) as outputs:
            artifacts += [exporter.fp32(), exporter.fp16(), exporter.floats()]
            outputs |= {artifact.path.name: artifact.sha256 for artifact in artifacts}
        with journal.stage("quantize", {checkpoint.name: parent}, recipe.int8) as outputs:
            quantized = [exporter.int8(photos, recipe.int8, "rows"), exporter.int8(photos, recipe.int8, "planes")]
            outputs |= {artifact.path.name: artifact.sha256 for artifact in quantized}
            artifacts += quantized
        with journal.stage("verify", {artifact.path.name: artifact.sha256 for artifact in artifacts}, recipe.verify):
            results = verify(artifacts, unet, pairs, recipe.verify, providers, on_progress)
        on_progress("report")
        write_recipe(recipe, folder / "recipe.toml")
        summary = {
            "name": recipe.name,
            "checkpoint": checkpoint.name,
            "checkpoint_sha256": parent,
            "network": msgspec.to_builtins(unet.config),
            "parameters": parameter_count(unet),
            "macs_per_pixel": unet.config.macs_per_pixel,
            "pairs": [pair.name for pair in pairs],
            "timed_at": f"{recipe.verify.width_px}x{recipe.verify.height_px}",
            "machine": machine(),
            "versions": package_versions(),
        }
        best = _by_precision(results, "int8") or results[0]
        write_report(folder / "report.html", summary, results, pairs, best.artifact)
        write_card(folder / "README.md", summary, results)
        manifest = {
            "schema": SCHEMA,
            **summary,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "stages": journal.stages,
            "variants": [_row(result) for result in results],
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return results


def _providers(recipe: Recipe) -> list[str]:
    """Providers to verify on, the CPU first: its results are what the others are compared with."""
    wanted = recipe.verify.providers
    found = [find(name) for name in wanted] if wanted else candidates({})
    return sorted((provider.name for provider in found), key=lambda name: name != "cpu")


def _by_precision(results: Sequence[Measured], precision: Precision) -> Measured | None:
    return next((result for result in results if result.artifact.precision == precision), None)


def _row(result: Measured) -> dict[str, Any]:
    artifact = result.artifact
    return {
        "name": artifact.name,
        "file": artifact.path.name,
        "sha256": artifact.sha256,
        "size_bytes": result.size_bytes,
        "precision": artifact.precision,
        "io": artifact.io,
        "layout": artifact.layout,
        "psnr_blurred": round(result.quality.psnr_blurred, 4),
        "psnr": round(result.quality.psnr, 4),
        "ssim": round(result.quality.ssim, 5),
        "drop_db": round(result.drop_db, 4),
        "worst_drop_db": round(result.worst_drop_db, 4),
        "db_to_fp32": round(result.db_to_fp32, 2) if math.isfinite(result.db_to_fp32) else None,
        "latency_ms": {run.provider: round(run.median_ms, 2) for run in result.runs},
        "runs": [msgspec.to_builtins(run) for run in result.runs],
    }
