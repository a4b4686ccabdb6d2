"""The stage that can fail the run: every variant is loaded, run and compared before anyone gets it.

fp32 is compared with torch, value by value; every other variant with fp32 and with the ground truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from deblur_deploy.errors import ProviderError, VerificationError
from deblur_deploy.evaluation.latency import at_size, take_turns
from deblur_deploy.evaluation.quality import Pair, Quality, Restorer, compare, mean_quality, psnr
from deblur_deploy.pipeline.artifact import Artifact, Measured, Run
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.runtime.media import Image
from deblur_deploy.training.unet import UNet
from deblur_deploy.training.validation import TorchRestorer


class VerifyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What must hold for a bundle to be written."""

    fp16_max_drop_db: float = 0.02
    """PSNR that fp16 may lose against fp32, mean over the pairs."""
    int8_max_drop_db: float = 0.05
    """PSNR that int8 may lose against fp32, mean over the pairs."""
    max_differing: float = 0.001
    """Share of uint8 values in which fp32 ONNX may differ from torch, by one level."""
    random_sizes: int = 6
    """Random images of random sizes, besides one of 1x1, on which fp32 ONNX is compared with torch."""
    width_px: int = 1280
    """Width of the image that is timed."""
    height_px: int = 720
    """Height of the image that is timed."""
    rounds: int = 10
    """Timed calls of each variant on each provider."""
    providers: tuple[str, ...] = ()
    """Providers to run every variant on; empty means all that are present."""

    def __post_init__(self) -> None:
        for name in ("fp16_max_drop_db", "int8_max_drop_db", "max_differing"):
            if not 0 <= getattr(self, name) <= 100:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 0 to 100")
        for name in ("width_px", "height_px", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")


def compare_with_torch(artifact: Artifact, unet: UNet, images: Sequence[Image], config: VerifyConfig) -> float:
    """Share of values in which ``artifact`` (fp32, uint8 images) differs from ``unet``, by one level at most.

    Compares on ``images`` and on random ones of random sizes.  Raises VerificationError beyond the limit.
    """
    engine, reference = DeblurEngine(artifact.path, provider="cpu"), TorchRestorer(unet)
    rng = np.random.default_rng()
    sizes = np.concatenate([[[1, 1]], rng.integers(1, 300, (config.random_sizes, 2))])
    random = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    differing = total = 0
    for image in [*random, *images]:
        difference = np.abs(engine(image).astype(np.int16) - reference(image))
        if difference.max() > 1:
            raise VerificationError(
                f"{artifact.name} differs from torch by {difference.max()} levels on an image of "
                f"{image.shape[1]}x{image.shape[0]}; 1 is allowed"
            )
        differing += int(np.count_nonzero(difference))
        total += difference.size
    if differing > config.max_differing * total:
        raise VerificationError(
            f"{artifact.name} differs from torch in {differing / total:.3%} of values; "
            f"{config.max_differing:.3%} is allowed"
        )
    return differing / total


def verify(
    artifacts: Sequence[Artifact],
    unet: UNet,
    pairs: Sequence[Pair],
    config: VerifyConfig,
    providers: Sequence[str],
    on_progress: Callable[[str], None] = lambda _: None,
) -> list[Measured]:
    """Measure every variant on ``pairs`` and on every provider, and time them in turn.

    ``artifacts`` begins with the fp32 variant.  Raises VerificationError that names what does not hold.
    """
    reference, *_ = artifacts
    on_progress("fp32 against torch")
    compare_with_torch(reference, unet, [pair.blurred for pair in pairs[:3]], config)
    baseline: list[tuple[Image, Quality]] = []
    results = []
    for artifact in artifacts:
        on_progress(f"quality of {artifact.name}")
        restorer = _restorer(artifact, "cpu")
        restored = [restorer(pair.blurred) for pair in pairs]
        rows = [compare(image, pair) for image, pair in zip(restored, pairs, strict=True)]
        baseline = baseline or list(zip(restored, rows, strict=True))
        drops = [fp32.psnr - row.psnr for (_, fp32), row in zip(baseline, rows, strict=True)]
        to_fp32 = [psnr(image, fp32) for image, (fp32, _) in zip(restored, baseline, strict=True)]
        results.append(
            Measured(
                artifact=artifact,
                size_bytes=artifact.path.stat().st_size,
                quality=mean_quality(rows),
                drop_db=float(np.mean(drops)),
                worst_drop_db=float(np.max(drops)),
                db_to_fp32=float(np.mean(to_fp32)),
            )
        )
        _check_drop(results[-1], config)
    photo = at_size(pairs[0].blurred, config.width_px, config.height_px)
    _run_everywhere(results, photo, config, providers, on_progress)
    return results


def _restorer(artifact: Artifact, provider: str) -> Restorer:
    engine = DeblurEngine(artifact.path, provider=provider)
    if artifact.io == "uint8":
        return engine
    return lambda image: np.rint(engine(image.astype(np.float32) / 255) * 255).astype(np.uint8)


def _check_drop(result: Measured, config: VerifyConfig) -> None:
    limits = {"fp32": 0.005, "fp16": config.fp16_max_drop_db, "int8": config.int8_max_drop_db}
    limit = limits[result.artifact.precision]
    if result.drop_db > limit:
        raise VerificationError(
            f"{result.artifact.name} loses {result.drop_db:.3f} dB against fp32, {limit} dB is allowed; "
            "calibrate on photographs like those in use, or allow more"
        )


def _run_everywhere(
    results: list[Measured],
    photo: Image,
    config: VerifyConfig,
    providers: Sequence[str],
    on_progress: Callable[[str], None],
) -> None:
    """Load and run every variant on every provider; compare each with the CPU's result, and time them in turn."""
    expected: dict[str, Image] = {}
    for provider in providers:
        engines = {}
        for result in results:
            artifact = result.artifact
            on_progress(f"{artifact.name} on {provider}")
            try:
                engines[artifact.name] = DeblurEngine(artifact.path, provider=provider)
            except ProviderError as error:
                raise VerificationError(f"{artifact.name} does not run on {provider}: {error}") from None
            restored = _restorer(artifact, provider)(photo)
            difference = psnr(restored, expected.setdefault(artifact.name, restored))
            if difference < 45:
                raise VerificationError(
                    f"{artifact.name} on {provider} is {difference:.1f} dB from its result on {providers[0]}; "
                    "45 or more is allowed"
                )
        floats = photo.astype(np.float32) / 255
        calls = {
            result.artifact.name: _call(
                engines[result.artifact.name], photo if result.artifact.io == "uint8" else floats
            )
            for result in results
        }
        on_progress(f"latency on {provider}")
        timings = take_turns(calls, rounds=config.rounds)
        for result in results:
            receipt, timing = engines[result.artifact.name].receipt, timings[result.artifact.name]
            result.runs.append(
                Run(
                    provider=receipt.provider,
                    device=receipt.device,
                    arithmetic=receipt.effective_precision,
                    median_ms=timing.median_ms,
                    p95_ms=timing.p95_ms,
                )
            )


def _call(engine: DeblurEngine, image: np.ndarray) -> Callable[[], object]:
    return lambda: engine(image)
