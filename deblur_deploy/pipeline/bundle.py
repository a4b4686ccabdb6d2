"""The main job: a checkpoint goes in, a verified bundle comes out, whole or not at all.

``bundle.json`` is written last and says what everything else is; ``runtime.bundle`` reads the part that engines need.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from deblur_deploy.errors import InputError
from deblur_deploy.evaluation.machine import machine, package_versions
from deblur_deploy.files import refuse_existing, sha256, writing_folder
from deblur_deploy.pipeline.artifact import Artifact, Measured
from deblur_deploy.pipeline.budget import quantize
from deblur_deploy.pipeline.export import Exporter
from deblur_deploy.pipeline.photos import calibration_from, pairs_from
from deblur_deploy.pipeline.recipe import Recipe, write_recipe
from deblur_deploy.pipeline.report import write_card, write_report
from deblur_deploy.pipeline.verify import Progress, compare_with_torch, usable, verify
from deblur_deploy.runtime.bundle import MANIFEST, SCHEMA
from deblur_deploy.runtime.media import Image
from deblur_deploy.runtime.providers import candidates, find
from deblur_deploy.training.checkpoint import load_checkpoint
from deblur_deploy.training.unet import parameter_count


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
    providers = _wished(recipe)
    unet = load_checkpoint(checkpoint)
    parent = sha256(checkpoint)
    if recipe.checkpoint_sha256 not in (None, parent):
        raise InputError(f"the recipe is for a checkpoint with sha256 {recipe.checkpoint_sha256}, not for {checkpoint}")
    recipe = msgspec.structs.replace(recipe, name=recipe.name or checkpoint.stem, checkpoint_sha256=parent)
    on_progress("photographs")
    pairs = pairs_from(recipe.pairs)
    photos = calibration_from(recipe.calibration, recipe.int8.tiles)
    source = {checkpoint.name: parent}
    journal = Journal(on_progress)
    with writing_folder(out, force=force) as folder:
        exporter = Exporter(unet, parent, folder)
        with journal.stage("export", source) as outputs:
            artifacts = [exporter.fp32(), exporter.fp16(), exporter.floats()]
            outputs |= _hashes(artifacts)
        truth = _digest(image for pair in pairs for image in (pair.blurred, pair.sharp))
        seen = {**source, "calibration": _digest(photos.values()), "pairs": truth}
        with journal.stage("quantize", seen, recipe.int8) as outputs:
            quantized, int8 = quantize(exporter, artifacts[0], photos, pairs, recipe.int8, on_progress)
            outputs |= _hashes(quantized)
        artifacts += quantized
        with journal.stage("verify", {**source, **_hashes(artifacts), "pairs": truth}, recipe.verify):
            on_progress("fp32 against torch")
            differing = compare_with_torch(artifacts[0], unet, [pair.blurred for pair in pairs[:3]], recipe.verify)
            if not recipe.verify.providers:
                providers = usable(artifacts[0], providers, on_progress)
            results = verify(artifacts, pairs, recipe.verify, recipe.int8, providers, on_progress)
        on_progress("report")
        write_recipe(recipe, folder / "recipe.toml")
        summary = {
            "name": recipe.name,
            "checkpoint": checkpoint.name,
            "checkpoint_sha256": parent,
            "network": msgspec.to_builtins(unet.config),
            "parameters": parameter_count(unet),
            "macs_per_pixel": unet.config.macs_per_pixel,
            "differing_from_torch": differing,
            "pairs": [pair.name for pair in pairs],
            "timed_at": f"{recipe.verify.width_px}x{recipe.verify.height_px}",
            "machine": machine(),
            "versions": package_versions(),
            "int8": int8.row(),
        }
        write_report(folder / "report.html", summary, results, pairs, shown=quantized[0])
        write_card(folder / "README.md", summary, results)
        manifest = {
            "schema": SCHEMA,
            **summary,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "stages": journal.stages,
            "variants": [result.row() for result in results],
        }
        text = json.dumps(manifest, indent=2, allow_nan=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return results


def _wished(recipe: Recipe) -> list[str]:
    """Providers to verify on, the CPU first.

    Raises InputError or ProviderError for one that the recipe names and that is unknown or absent.
    """
    for name in recipe.verify.providers:
        find(name)
    names = recipe.verify.providers or [provider.name for provider in candidates({})]
    return sorted(dict.fromkeys(names), key=lambda name: name != "cpu")


def _hashes(artifacts: Iterable[Artifact]) -> dict[str, str]:
    return {artifact.path.name: artifact.sha256 for artifact in artifacts}


def _digest(images: Iterable[Image]) -> str:
    """SHA-256 of decoded images, in order."""
    whole = hashlib.sha256()
    for image in images:
        whole.update(repr(image.shape).encode())
        whole.update(np.ascontiguousarray(image).data)
    return whole.hexdigest()
