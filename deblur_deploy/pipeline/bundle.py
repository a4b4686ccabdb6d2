"""The main job: a checkpoint goes in, a verified bundle comes out, whole or not at all.

Each stage is asked for by one ``stages.run``, with everything that decides its result; see ``pipeline.stages``.  What
a stage does is imported only when it is really done.  ``bundle.json`` is written last and says what everything else
is; ``runtime.bundle`` reads the part that engines need.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from deblur_deploy.contract import OLDEST_ONNXRUNTIME
from deblur_deploy.errors import InputError, OutputError, ProviderError
from deblur_deploy.evaluation.latency import at_size
from deblur_deploy.evaluation.machine import machine, package_versions
from deblur_deploy.evaluation.quality import Pair
from deblur_deploy.files import existing, refuse_existing, sha256, writing_folder
from deblur_deploy.media.images import Image
from deblur_deploy.pipeline import inputs, verify
from deblur_deploy.pipeline.artifact import Artifact, Measured, Run
from deblur_deploy.pipeline.cache import Cache
from deblur_deploy.pipeline.inputs import DECODERS, Photos
from deblur_deploy.pipeline.pruning.shrink import PRUNED, Shrinking
from deblur_deploy.pipeline.recipe import Recipe, write_recipe
from deblur_deploy.pipeline.stages import Done, Progress, Record, Stages, digest, from_record, to_record, versions
from deblur_deploy.runtime.bundle import MANIFEST, SCHEMA
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.runtime.providers import candidates, find
from deblur_deploy.runtime.variants import suits

_EXPORT, _VERIFY = "deblur_deploy.pipeline.export", "deblur_deploy.pipeline.verify"
_PHOTOS, _REPORT = "deblur_deploy.pipeline.photos", "deblur_deploy.pipeline.report"
_BUDGET = "deblur_deploy.pipeline.int8.budget"


def build_bundle(
    checkpoint: Path,
    recipe: Recipe,
    out: Path,
    *,
    force: bool = False,
    cached: bool = True,
    on_progress: Progress = lambda _: None,
) -> list[Measured]:
    """Export, quantize, verify and measure ``checkpoint``; write the bundle to ``out``.

    What an earlier run has done already is taken from the cache, unless ``cached`` is False.
    Raises DeblurError leaves for a user's mistakes, and VerificationError if a variant does not hold what it must;
    ``out`` is then left as it was.
    """
    refuse_existing(out, force=force)
    providers = _wished(recipe)
    parent = sha256(existing(checkpoint, kind="file"))
    if recipe.checkpoint_sha256 not in (None, parent):
        raise InputError(f"the recipe is for a checkpoint with sha256 {recipe.checkpoint_sha256}, not for {checkpoint}")
    recipe = msgspec.structs.replace(recipe, name=recipe.name or checkpoint.stem, checkpoint_sha256=parent)
    with writing_folder(out, force=force) as folder, TemporaryDirectory(prefix=".work-", dir=folder) as work:
        stages = Stages(_cache(Path(work), cached, on_progress), Path(work), on_progress)
        pairs, source, pruning = inputs.pairs(recipe.pairs), checkpoint, Record()
        if recipe.prune:
            shrinking = Shrinking(stages=stages, checkpoint=checkpoint, parent=parent, config=recipe.prune, pairs=pairs)
            source, pruning = shrinking.run()
        build = _Build(
            stages=stages,
            checkpoint=source,
            parent=sha256(source),
            recipe=recipe,
            pairs=pairs,
            calibration=inputs.calibration(recipe.calibration, recipe.int8.tiles),
        )
        exported = build.export()
        quantized = build.quantize(exported)
        artifacts = [*build.artifacts(exported), *build.artifacts(quantized)]
        compared = build.compare(artifacts[0])
        measuring = build.measuring(artifacts)
        results = [measuring(artifact) for artifact in artifacts]
        for provider in providers:
            there = [result for result in results if suits(result.artifact.layout, provider)]
            for result, run in zip(there, build.time(provider, [one.artifact for one in there]), strict=False):
                result.runs.append(run)
                verify.check_loss(result.artifact, run.drop_db, run.worst_drop_db, run.provider, recipe)
        verify.mark_slower(results)
        facts = {key: value for key, value in exported.record.items() if key != "artifacts"}
        summary = {
            "name": recipe.name,
            "onnxruntime": f">={OLDEST_ONNXRUNTIME}",
            "checkpoint": checkpoint.name,
            "checkpoint_sha256": parent,
            **facts,
            **compared.record,
            "int8": quantized.record["int8"],
            "timed_at": f"{recipe.verify.width_px}x{recipe.verify.height_px}",
            "machine": _machine(),
            "versions": package_versions(),
            **({"pruning": {**pruning, "checkpoint": PRUNED, "sha256": build.parent}} if pruning else {}),
        }
        pages = build.report(summary, results, shown=build.artifacts(quantized)[0])
        for path in (*(artifact.path for artifact in artifacts), *(pages.folder / name for name in pages.outputs)):
            path.rename(folder / path.name)
        if pruning:
            shutil.copy(source, folder / PRUNED)
        write_recipe(recipe, folder / "recipe.toml")
        manifest = {
            "schema": SCHEMA,
            **summary,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "stages": stages.journal,
            "variants": [result.row() for result in results],
        }
        text = json.dumps(manifest, indent=2, allow_nan=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return results


@dataclass(frozen=True, kw_only=True)
class _Build:
    """The stages, each with what decides its result."""

    stages: Stages
    checkpoint: Path
    parent: str
    """SHA-256 of the checkpoint."""
    recipe: Recipe
    pairs: Photos[Pair]
    calibration: Photos[tuple[str, Image]]

    def artifacts(self, done: Done) -> list[Artifact]:
        """The variants that a stage wrote."""
        return [Artifact.of(about, done.folder, self.parent) for about in done.record["artifacts"]]

    def export(self) -> Done:
        def make(folder: Path) -> Record:
            from deblur_deploy.pipeline.export import export_variants

            return export_variants(self.checkpoint, self.parent, folder)

        return self.stages.run(
            "export",
            make,
            code=(_EXPORT,),
            inputs={"checkpoint": self.parent},
            environment=versions("torch", "onnx", "onnx-ir", "onnxscript", "numpy"),
        )

    def quantize(self, exported: Done) -> Done:
        def make(folder: Path) -> Record:
            from deblur_deploy.pipeline.int8.budget import quantize_variants

            fp32, photos = self.artifacts(exported)[0], dict(self.calibration.images)
            wish, say = self.recipe.int8, self.stages.on_progress
            return quantize_variants(self.checkpoint, fp32, folder, photos, self.pairs.images, wish, say)

        return self.stages.run(
            "quantize",
            make,
            code=(_BUDGET, _PHOTOS),
            inputs={**exported.outputs, "calibration": self.calibration.digest, "pairs": self.pairs.digest},
            config=self.recipe.int8,
            environment={**_computing(), **versions("nncf")},
        )

    def compare(self, fp32: Artifact) -> Done:
        def make(_: Path) -> Record:
            from deblur_deploy.pipeline.verify import compare_with_torch
            from deblur_deploy.training.checkpoint import load_checkpoint

            blurred = [pair.blurred for pair in self.pairs.images[:3]]
            differing = compare_with_torch(fp32, load_checkpoint(self.checkpoint), blurred, self.recipe.verify)
            return {"differing_from_torch": differing, "pairs": [pair.name for pair in self.pairs.images]}

        return self.stages.run(
            "fp32 against torch",
            make,
            code=(_VERIFY, _PHOTOS),
            inputs={"checkpoint": self.parent, fp32.path.name: fp32.sha256, "pairs": self.pairs.digest},
            config=_some(self.recipe.verify, "max_differing", "random_sizes"),
            environment=_computing(),
        )

    def measuring(self, artifacts: Sequence[Artifact]) -> Callable[[Artifact], Measured]:
        """Measures one of ``artifacts``: a stage for each, so that another int8 is no reason to measure fp32 again."""
        fp32 = artifacts[0]
        baseline = cache(lambda: verify.restore(fp32, self.pairs.images))

        def measured(artifact: Artifact) -> Measured:
            done = self.stages.run(
                f"quality of {artifact.name}",
                lambda _: to_record(verify.measure(artifact, fp32, self.pairs.images, baseline())),
                code=(_VERIFY, _PHOTOS),
                inputs={fp32.path.name: fp32.sha256, artifact.path.name: artifact.sha256, "pairs": self.pairs.digest},
                environment=_computing(),
            )
            result = replace(from_record(done.record, Measured), artifact=artifact)
            # What is allowed decides nothing that is measured: to allow more is no reason to measure again.
            verify.check_drop(result, self.recipe)
            return result

        return measured

    def time(self, provider: str, artifacts: Sequence[Artifact]) -> list[Run]:
        """Latency on one provider; nothing if it was not asked for by name and does not work here.

        It belongs to this machine and to everything installed on it.
        """
        wish = self.recipe.verify

        def make(_: Path) -> Record:
            if not wish.providers:
                DeblurEngine(artifacts[0].path, provider=provider).close()  # a GPU build without a GPU fails here
            photo = at_size(self.pairs.images[0].blurred, wish.width_px, wish.height_px)
            pairs, say = self.pairs.images, self.stages.on_progress
            return {"runs": to_record(verify.time_on(provider, artifacts, photo, pairs, wish.rounds, say))}

        try:
            done = self.stages.run(
                f"latency on {provider}",
                make,
                code=(_VERIFY, _PHOTOS),
                inputs={artifact.path.name: artifact.sha256 for artifact in artifacts} | {"pairs": self.pairs.digest},
                config=_some(wish, "width_px", "height_px", "rounds"),
                environment={**package_versions(), **versions("openvino"), **_machine()},
            )
        except ProviderError as error:
            self.stages.on_progress(f"{provider} is left out: {error}")
            return []
        runs = from_record(done.record["runs"], list[Run])
        return [replace(run, measured=done.made, cached=done.cached) for run in runs]

    def report(self, summary: Record, results: Sequence[Measured], shown: Artifact) -> Done:
        def make(folder: Path) -> Record:
            from deblur_deploy.pipeline.report import write_card, write_report

            write_report(folder / "report.html", summary, results, self.pairs.images, shown=shown)
            write_card(folder / "README.md", summary, results)
            return {}

        rows = [result.row() | {"runs": [], "timed": [run.measured for run in result.runs]} for result in results]
        return self.stages.run(
            "report",
            make,
            code=(_REPORT, _PHOTOS),
            inputs={"summary": digest(summary), "results": digest(rows), "pairs": self.pairs.digest},
            environment={**_computing(), **versions("jinja2", "matplotlib"), **_templates()},
        )


_machine = cache(machine)  # it asks other programs, and every stage asks it


def _computing() -> Record:
    """What decides the numbers that a model gives: libraries, and the processor's instructions."""
    packages = versions("onnx", "onnxruntime", "onnxruntime-gpu", "torch")
    return {**DECODERS, **packages, **{name: _machine()[name] for name in ("processor", "instructions")}}


def _templates() -> Record:
    return {path.name: sha256(path) for path in sorted(Path(__file__).parents[1].rglob("templates/*"))}


def _some(config: msgspec.Struct, *names: str) -> Record:
    return {name: getattr(config, name) for name in names}


def _cache(work: Path, cached: bool, on_progress: Progress) -> Cache:
    """The user's cache, or one that ends with this run."""
    if cached:
        try:
            return Cache.usual()
        except OutputError as error:
            on_progress(f"{error}; nothing is kept for another run")
    return Cache(work / ".cache")


def _wished(recipe: Recipe) -> list[str]:
    """Providers to verify on, the CPU first.

    Raises InputError or ProviderError for one that the recipe names and that is unknown or absent.
    """
    for name in (*recipe.verify.providers, *((recipe.prune.provider,) if recipe.prune else ())):
        find(name)
    names = recipe.verify.providers or [provider.name for provider in candidates({})]
    return sorted(dict.fromkeys(names), key=lambda name: name != "cpu")
