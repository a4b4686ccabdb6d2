"""The stages of one export, each with everything that decides its result; see ``pipeline.stages``.

What a stage does is imported only when it is really done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import msgspec

from deblur_deploy.errors import MemoryLimitError, ProviderError
from deblur_deploy.evaluation.latency import at_size
from deblur_deploy.evaluation.machine import package_versions, this_machine
from deblur_deploy.evaluation.quality import Pair
from deblur_deploy.files import sha256
from deblur_deploy.media.images import Image
from deblur_deploy.pipeline import verify
from deblur_deploy.pipeline.artifact import Artifact, Measured, Run
from deblur_deploy.pipeline.convention import Convention
from deblur_deploy.pipeline.doors.source import Source
from deblur_deploy.pipeline.inputs import DECODERS, Photos
from deblur_deploy.pipeline.network import Network
from deblur_deploy.pipeline.recipe import Recipe
from deblur_deploy.pipeline.stages import Done, Record, Stages, digest, from_record, to_record
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.wheels import ONNXRUNTIMES, versions

_EXPORT, _VERIFY = "deblur_deploy.pipeline.export", "deblur_deploy.pipeline.verify"
_DOORS = ("deblur_deploy.pipeline.doors.source",)
_PHOTOS, _REPORT = "deblur_deploy.pipeline.photos", "deblur_deploy.pipeline.report"
_BUDGET = "deblur_deploy.pipeline.int8.budget"


@dataclass(frozen=True, kw_only=True)
class Build:
    """The stages, each with what decides its result."""

    stages: Stages
    source: Source
    recipe: Recipe
    pairs: Photos[Pair]
    calibration: Photos[tuple[str, Image]]

    def artifacts(self, done: Done) -> list[Artifact]:
        """The variants that a stage wrote."""
        return [Artifact.of(about, done.folder, self.source.parent) for about in done.record["artifacts"]]

    def export(self) -> Done:
        def make(folder: Path) -> Record:
            from deblur_deploy.pipeline.export import export_variants

            return export_variants(self.source.prepare(), self.source.parent, folder)

        return self.stages.run(
            "export",
            make,
            code=(_EXPORT, *_DOORS),
            # How somebody else's network takes images may be guessed on the pairs.
            inputs={"checkpoint": self.source.parent, **({"pairs": self.pairs.digest} if self.source.runner else {})},
            config=self.recipe.network,
            environment=versions(
                "torch", "onnx", "onnx-ir", "onnxscript", "numpy", *ONNXRUNTIMES, *self._recognising()
            ),
        )

    def _recognising(self) -> tuple[str, ...]:
        """Packages that somebody else's network needs besides."""
        return () if self.source.runner is None else ("spandrel", "spandrel-extra-arches")

    def quantize(self, exported: Done) -> Done:
        def make(folder: Path) -> Record:
            from deblur_deploy.pipeline.int8.budget import quantize_variants

            fp32, photos = self.artifacts(exported)[0], dict(self.calibration.images)
            network = from_record(exported.record["body"], Network)
            wish, say = self.recipe.int8, self.stages.on_progress
            return quantize_variants(network, fp32, folder, photos, self.pairs.images, wish, say)

        return self.stages.run(
            "quantize",
            make,
            code=(_BUDGET, _PHOTOS),
            inputs={**exported.outputs, "calibration": self.calibration.digest, "pairs": self.pairs.digest},
            config=self.recipe.int8,
            environment={**computing(), **versions("nncf")},
        )

    def compare(self, fp32: Artifact, exported: Done) -> Done:
        def make(_: Path) -> Record:
            from deblur_deploy.pipeline.verify import compare_with_source

            blurred = [pair.blurred for pair in self.pairs.images[:3]]
            reference = self.source.reference(from_record(exported.record["convention"], Convention))
            differing = compare_with_source(fp32, reference, blurred, self.recipe.verify)
            return {"differing_from_source": differing, "pairs": [pair.name for pair in self.pairs.images]}

        return self.stages.run(
            "fp32 against its source",
            make,
            code=(_VERIFY, *_DOORS, _PHOTOS),
            inputs={"checkpoint": self.source.parent, fp32.path.name: fp32.sha256, "pairs": self.pairs.digest},
            config=_some(self.recipe.verify, "max_differing", "random_sizes"),
            environment=computing(),
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
                environment=computing(),
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
                environment={**package_versions(), **versions("openvino"), **this_machine()},
            )
        except (ProviderError, MemoryLimitError) as error:  # others may have filled the memory of a GPU
            if wish.providers:
                raise
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
            environment={**computing(), **versions("jinja2", "matplotlib"), **_templates()},
        )


def computing() -> Record:
    """What decides the numbers that a model gives: libraries, and the processor's instructions."""
    packages = versions("onnx", *ONNXRUNTIMES, "torch")
    return {**DECODERS, **packages, **{name: this_machine()[name] for name in ("processor", "instructions")}}


def _templates() -> Record:
    return {path.name: sha256(path) for path in sorted(Path(__file__).parents[1].rglob("templates/*"))}


def _some(config: msgspec.Struct, *names: str) -> Record:
    return {name: getattr(config, name) for name in names}
