"""The stage that can fail the run: every variant is loaded, run and compared before anyone gets it.

fp32 is compared with torch, value by value; every other variant with fp32 and with the ground truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deblur_deploy.errors import ProviderError, VerificationError
from deblur_deploy.evaluation.latency import take_turns
from deblur_deploy.evaluation.quality import Pair, compare, mean_quality, psnr
from deblur_deploy.pipeline.artifact import Artifact, Measured, Run
from deblur_deploy.pipeline.config import VerifyConfig
from deblur_deploy.pipeline.stages import Progress
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.runtime.media import Image

if TYPE_CHECKING:
    from deblur_deploy.training.unet import UNet

_SAME_RESULT_DB = 45
"""Providers round differently, and some compute in bf16; a wrong result is far below this."""


def compare_with_torch(artifact: Artifact, unet: UNet, images: Sequence[Image], config: VerifyConfig) -> float:
    """Share of values in which ``artifact`` (fp32, uint8 images) differs from ``unet``, by one level at most.

    Compares on ``images`` and on random ones of random sizes.  Raises VerificationError beyond the limit.
    """
    from deblur_deploy.training.validation import TorchRestorer  # the only need for torch here

    engine, reference = DeblurEngine(artifact.path, provider="cpu"), TorchRestorer(unet)
    rng = np.random.default_rng(0)
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


def restore(artifact: Artifact, pairs: Sequence[Pair]) -> list[Image]:
    """What ``artifact`` makes of each pair's blurred image on the CPU, as bytes."""
    with DeblurEngine(artifact.path, provider="cpu") as engine:
        return [_to_bytes(engine(_as_input(pair.blurred, artifact))) for pair in pairs]


def measure(artifact: Artifact, pairs: Sequence[Pair], baseline: Sequence[Image]) -> Measured:
    """Quality of ``artifact`` on ``pairs``, on the CPU, against the truth and against ``baseline``, fp32's results."""
    restored = restore(artifact, pairs)
    rows = [compare(image, pair) for image, pair in zip(restored, pairs, strict=True)]
    fp32 = [psnr(image, pair.sharp) for image, pair in zip(baseline, pairs, strict=True)]
    drops = [before - row.psnr for before, row in zip(fp32, rows, strict=True)]
    to_fp32 = [psnr(image, before) for image, before in zip(restored, baseline, strict=True)]
    return Measured(
        artifact=artifact,
        size_bytes=artifact.path.stat().st_size,
        quality=mean_quality(rows),
        drop_db=float(np.mean(drops)),
        worst_drop_db=float(np.max(drops)),
        db_to_fp32=float(np.mean(to_fp32)),
    )


def check_drop(result: Measured, config: VerifyConfig) -> None:
    """Raise VerificationError if ``result`` lost more than its precision may."""
    limits = {"fp32": 0.005, "fp16": config.fp16_max_drop_db, "int8": config.int8_max_drop_db}
    limit = limits[result.artifact.precision]
    if not result.drop_db <= limit:
        raise VerificationError(
            f"{result.artifact.name} loses {result.drop_db:.3f} dB against fp32, {limit} dB is allowed; "
            "calibrate on photographs like those in use, or allow more"
        )


def time_on(
    provider: str, artifacts: Sequence[Artifact], photo: Image, rounds: int, on_progress: Progress = lambda _: None
) -> list[Run]:
    """Run every variant on ``provider``, compare it with its result on the CPU, and time them in turn on ``photo``.

    The answer has one run for each of ``artifacts``, in their order.

    Raises VerificationError that names the variant that does not run, or gives something else.
    """
    engines: dict[str, DeblurEngine] = {}
    calls: dict[str, Callable[[], object]] = {}
    for artifact in artifacts:
        on_progress(f"{artifact.name} on {provider}")
        image = _as_input(photo, artifact)
        with DeblurEngine(artifact.path, provider="cpu") as engine:
            on_cpu = _to_bytes(engine(image))
        try:
            engine = DeblurEngine(artifact.path, provider=provider)
            restored = _to_bytes(engine(image))
        except ProviderError as error:
            raise VerificationError(f"{artifact.name} does not run on {provider}: {error}") from None
        agreement = psnr(restored, on_cpu)
        if agreement < _SAME_RESULT_DB:
            raise VerificationError(
                f"{artifact.name} on {provider} is {agreement:.1f} dB from its result on the CPU; "
                f"{_SAME_RESULT_DB} or more is allowed"
            )
        engines[artifact.name] = engine
        calls[artifact.name] = partial(engine, image)
    on_progress(f"latency on {provider}")
    timings = take_turns(calls, rounds=rounds)
    return [
        Run(
            provider=provider,
            device=engine.receipt.device,
            arithmetic=engine.receipt.effective_precision,
            median_ms=timings[name].median_ms,
            p95_ms=timings[name].p95_ms,
        )
        for name, engine in engines.items()
    ]


def _as_input(image: Image, artifact: Artifact) -> NDArray[Any]:
    return image if artifact.io == "uint8" else image.astype(np.float32) / 255


def _to_bytes(image: NDArray[Any]) -> Image:
    return image if image.dtype == np.uint8 else np.rint(image * 255).astype(np.uint8)
