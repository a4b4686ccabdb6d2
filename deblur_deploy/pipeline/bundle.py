"""The main job: a network goes in, a verified bundle comes out, whole or not at all.

``bundle.json`` is written last and says what everything else is; ``bundles.manifest`` reads the part that engines need.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from deblur_deploy.bundles.manifest import MANIFEST, SCHEMA
from deblur_deploy.errors import DeblurError, InputError, ModelError, OutputError, VerificationError
from deblur_deploy.evaluation.machine import package_versions, this_machine
from deblur_deploy.files import refuse_existing, writing_folder
from deblur_deploy.pipeline import inputs, verify
from deblur_deploy.pipeline.artifact import Artifact, Measured
from deblur_deploy.pipeline.build import Build
from deblur_deploy.pipeline.cache import Cache
from deblur_deploy.pipeline.doors.source import Source, open_door
from deblur_deploy.pipeline.pruning.roads import pruned
from deblur_deploy.pipeline.recipe import Recipe, write_recipe
from deblur_deploy.pipeline.stages import Progress, Record, Stages
from deblur_deploy.runtime.providers import candidates, short_name
from deblur_deploy.runtime.variants import suits


def build_bundle(
    checkpoint: Path | None,
    recipe: Recipe,
    out: Path,
    *,
    force: bool = False,
    cached: bool = True,
    on_progress: Progress = lambda _: None,
) -> list[Measured]:
    """Export, quantize, verify and measure the network in ``checkpoint``; write the bundle to ``out``.

    ``checkpoint`` is one of ours, somebody's ``.onnx`` or weights; or None, or weights, if ``recipe.network`` names a
    module.  What an earlier run has done already is taken from the cache, unless ``cached`` is False.
    Raises DeblurError leaves for a user's mistakes, and VerificationError if a variant does not hold what it must;
    ``out`` is then left as it was.
    """
    refuse_existing(out, force=force)
    recipe = _with_short_names(recipe)
    providers = _wished(recipe)
    with writing_folder(out, force=force) as folder, TemporaryDirectory(prefix=".work-", dir=folder) as work:
        stages = Stages(_cache(Path(work), cached, on_progress), Path(work), on_progress)
        pairs = inputs.pairs(recipe.pairs)
        first = open_door(checkpoint, recipe.network, pairs, Path(work))
        recipe = _completed(recipe, first)
        smaller = pruned(first, recipe.prune, recipe.network, stages, pairs)
        build = Build(
            stages=stages,
            source=smaller.source,
            recipe=recipe,
            pairs=pairs,
            calibration=inputs.calibration(recipe.calibration, recipe.int8.tiles),
        )
        exported = build.export()
        for note in exported.record["notes"]:
            on_progress(f"note: {note}")
        floats = build.artifacts(exported)
        # First, since it takes a second, and quantizing what is wrong takes minutes.
        compared = build.compare(floats[0], exported)
        quantized = build.quantize(exported)
        artifacts = [*floats, *build.artifacts(quantized)]
        choosing = _Choosing(build=build, strict=exported.record["body"]["ours"], left_out={})
        if why := quantized.record["int8"].get("left_out"):
            choosing.leave_out("int8", why)
        results = choosing.measured(artifacts, providers)
        summary = _summary(build, first, [exported.record, compared.record], quantized.record, choosing.left_out)
        if smaller.record:
            summary["pruning"] = smaller.record
        shown = next((one.artifact for one in results if one.artifact.precision == "int8"), results[0].artifact)
        pages = build.report(summary, results, shown=shown)
        kept = [result.artifact.path for result in results]
        for path in (*kept, *(pages.folder / name for name in pages.outputs)):
            path.rename(folder / path.name)
        if smaller.file:
            shutil.copy(smaller.file, folder / smaller.file.name)
        write_recipe(recipe, folder / "recipe.toml")
        _write_manifest(folder / MANIFEST, summary, stages, results)
    return results


def _write_manifest(path: Path, summary: Record, stages: Stages, results: Sequence[Measured]) -> None:
    manifest = {
        "schema": SCHEMA,
        **summary,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "stages": stages.journal,
        "variants": [result.row() for result in results],
    }
    path.write_text(json.dumps(manifest, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _summary(
    build: Build, first: Source, facts: Sequence[Record], quantized: Record, left_out: dict[str, str]
) -> Record:
    """What there is to say of the whole bundle, for its manifest and its pages."""
    recipe, int8 = build.recipe, dict(quantized["int8"])
    if "int8" in left_out:
        int8["left_out"] = left_out["int8"]
    return {
        "name": recipe.name,
        "checkpoint": first.path.name if first.path else recipe.network.model,
        "checkpoint_sha256": first.parent,
        **{key: value for record in facts for key, value in record.items() if key != "artifacts"},
        "int8": int8,
        "left_out": left_out,
        "timed_at": f"{recipe.verify.width_px}x{recipe.verify.height_px}",
        "machine": this_machine(),
        "versions": package_versions(),
    }


def _completed(recipe: Recipe, source: Source) -> Recipe:
    """``recipe`` with the name and, where there is a file, its hash; raises InputError if it is for another one."""
    parent = source.parent if source.path else None
    if recipe.checkpoint_sha256 not in (None, parent):
        raise InputError(
            f"the recipe is for a checkpoint with sha256 {recipe.checkpoint_sha256}, "
            f"not for {source.path or source.name}"
        )
    return msgspec.structs.replace(recipe, name=recipe.name or source.name, checkpoint_sha256=parent)


@dataclass(frozen=True, kw_only=True)
class _Choosing:
    """Measures variants, and decides which of them the bundle has.

    A variant of one of our networks that does not hold what it must is a failure (``strict``).  Nobody promised that
    of somebody else's network: there such a variant is left out, and ``left_out`` says why.
    """

    build: Build
    strict: bool
    left_out: dict[str, str]
    """Reasons, by variant or provider."""

    def measured(self, artifacts: Sequence[Artifact], providers: Sequence[str]) -> list[Measured]:
        """The variants that are kept, fp32 first, with their latency on every provider."""
        measuring, results = self.build.measuring(artifacts), list[Measured]()
        for artifact in artifacts:
            try:
                results.append(measuring(artifact))
            except (VerificationError, ModelError) as error:  # or this runtime has no kernel for such a type
                self.leave_out(artifact.name, error, needed=artifact.precision == "fp32")
        not_there = {provider: self._timed(results, provider) for provider in providers}
        verify.mark_slower(results)
        for provider, names in not_there.items():
            for result in results:
                if result.artifact.name in names:
                    result.slower_than_fp32_on.append(provider)
        return results if self.strict else self._worth_it(results)

    def leave_out(self, name: str, why: DeblurError | str, *, needed: bool = False) -> None:
        """Note that the bundle goes without ``name``; raises ``why`` where that may not be."""
        if isinstance(why, DeblurError) and (self.strict or needed):
            raise why
        self.left_out[name] = str(why)
        self.build.stages.on_progress(f"{name} is left out: {why}")

    def _timed(self, results: Sequence[Measured], provider: str) -> list[str]:
        """Time ``results`` on ``provider``; names of those that it does not run as the CPU does."""
        there = [result for result in results if suits(result.artifact.layout, provider)]
        try:
            self._time(there, provider)
        except VerificationError as error:
            self.leave_out(f"all but fp32 on {provider}", error)
        else:
            return []
        for result in there:
            result.runs[:] = [run for run in result.runs if run.provider != provider]
        try:
            self._time(there[:1], provider)
        except VerificationError as error:
            self.leave_out(provider, error)
        return [result.artifact.name for result in there[1:]]

    def _time(self, results: Sequence[Measured], provider: str) -> None:
        runs = self.build.time(provider, [one.artifact for one in results])
        for result, run in zip(results, runs, strict=False):
            result.runs.append(run)
            verify.check_loss(result.artifact, run.drop_db, run.worst_drop_db, run.provider, self.build.recipe)

    def _worth_it(self, results: list[Measured]) -> list[Measured]:
        """``results`` without an int8 that is nowhere faster than fp32."""
        kept = []
        for result in results:
            slower = result.slower_than_fp32_on
            if result.artifact.precision != "int8" or any(run.provider not in slower for run in result.runs):
                kept.append(result)
                continue
            fp32 = {run.provider: run.median_ms for run in results[0].runs}
            times = ", ".join(f"{r.median_ms:.1f} ms on {r.provider}, fp32 {fp32[r.provider]:.1f}" for r in result.runs)
            self.leave_out(result.artifact.name, f"it is nowhere faster than fp32 here ({times or 'not timed'})")
        return kept


def _cache(work: Path, cached: bool, on_progress: Progress) -> Cache:
    """The user's cache, or one that ends with this run."""
    if cached:
        try:
            return Cache.usual()
        except OutputError as error:
            on_progress(f"{error}; nothing is kept for another run")
    return Cache(work / ".cache")


def _wished(recipe: Recipe) -> list[str]:
    """Providers to verify on: the CPU first, since everything is compared with what it makes."""
    names = recipe.verify.providers or [provider.name for provider in candidates({})]
    return sorted(dict.fromkeys(names), key=lambda name: name != "cpu")


def _with_short_names(recipe: Recipe) -> Recipe:
    """``recipe`` with its providers as records call them.

    Raises InputError or ProviderError for one that is unknown or absent.
    """
    providers = tuple(short_name(name) for name in recipe.verify.providers)
    prune = recipe.prune
    if prune:
        prune = msgspec.structs.replace(prune, provider=short_name(prune.provider))
    verified = msgspec.structs.replace(recipe.verify, providers=providers)
    return msgspec.structs.replace(recipe, prune=prune, verify=verified)
