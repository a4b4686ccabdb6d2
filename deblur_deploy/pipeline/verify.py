"""The stage that can fail the run: every variant is loaded, run and compared before anyone gets it.

fp32 is compared with torch, value by value; every other variant with fp32 and with the ground truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from deblur_deploy.contract import INPUT
from deblur_deploy.errors import ProviderError, VerificationError
from deblur_deploy.evaluation.latency import at_size, take_turns
from deblur_deploy.evaluation.quality import Pair, compare, mean_quality, psnr
from deblur_deploy.pipeline.artifact import Artifact, Measured, Run
from deblur_deploy.pipeline.coverage import int8_share
from deblur_deploy.pipeline.quantize import Int8Config
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.runtime.media import Image
from deblur_deploy.runtime.providers import find
from deblur_deploy.training.unet import UNet
from deblur_deploy.training.validation import TorchRestorer

Progress = Callable[[str], None]

_SAME_RESULT_DB = 45
"""Providers round differently, and some compute in bf16; a wrong result is far below this."""


class VerifyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What must hold for a bundle to be written."""

    fp16_max_drop_db: float = 0.02
    """PSNR that fp16 may lose against fp32, mean over the pairs."""
    fp16_min_db: float = 60
    """PSNR of fp16's results taken against those of fp32, at least, on the pairs and on black, white, random and
    checkered images; and no activation may grow beyond what fp16 can hold."""
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
        for name, most in (("fp16_max_drop_db", 100), ("fp16_min_db", 100), ("max_differing", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 0 to {most}")
        for name, least in (("random_sizes", 0), ("width_px", 1), ("height_px", 1), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {least} or more")


def compare_with_torch(artifact: Artifact, unet: UNet, images: Sequence[Image], config: VerifyConfig) -> float:
    """Share of values in which ``artifact`` (fp32, uint8 images) differs from ``unet``, by one level at most.

    Compares on ``images`` and on random ones of random sizes.  Raises VerificationError beyond the limit.
    """
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


def extreme_images(side_px: int) -> dict[str, Image]:
    """Square images that photographs are not: black, white, noise, and a checkerboard of single pixels."""
    board = (np.indices((side_px, side_px)).sum(0) % 2 * 255).astype(np.uint8)
    return {
        "black": np.zeros((side_px, side_px, 3), np.uint8),
        "white": np.full((side_px, side_px, 3), 255, np.uint8),
        "random": np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), np.uint8),
        "checkerboard": np.repeat(board[..., None], 3, axis=2),
    }


def check_half_precision(fp32: Artifact, fp16: Artifact, least_db: float) -> None:
    """On extreme images fp16 must come as close to fp32 as ``least_db``, and no activation may overflow it.

    The CPU provider computes fp16 in fp32, so overflow is looked for in the activations of fp32.  Raises
    VerificationError that names the image.
    """
    whole = onnx.load(fp32.path)
    names = [name for node in whole.graph.node for name in node.output]
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
    most = float(np.finfo(np.float16).max)
    with DeblurEngine(fp32.path, provider="cpu") as exact, DeblurEngine(fp16.path, provider="cpu") as half:
        side = 4 * exact.contract.size_divisor
        for kind, image in extreme_images(side).items():
            for name, value in zip(names, session.run(names, {INPUT: image[None]}), strict=True):
                if value.dtype == np.float32 and not np.abs(value).max() < most:
                    raise VerificationError(
                        f"{fp16.name} cannot hold activation {name}, which reaches {np.abs(value).max():.3g} on a "
                        f"{kind} image; {most:.0f} is the most of fp16. Train with less weight, or use fp32 or int8"
                    )
            found = psnr(half(image), exact(image))
            if found < least_db:
                raise VerificationError(
                    f"{fp16.name} is {found:.1f} dB from fp32 on a {kind} image; {least_db} or more is allowed"
                )


def verify(
    artifacts: Sequence[Artifact],
    pairs: Sequence[Pair],
    config: VerifyConfig,
    int8: Int8Config,
    providers: Sequence[str],
    on_progress: Progress = lambda _: None,
) -> list[Measured]:
    """Measure every variant on ``pairs`` and on every one of ``providers``, and time them in turn.

    ``artifacts`` begins with the fp32 variant.  Raises VerificationError that names what does not hold.
    """
    photo = at_size(pairs[0].blurred, config.width_px, config.height_px)
    fp32: list[Image] = []
    on_cpu: dict[str, Image] = {}
    results: list[Measured] = []
    for artifact in artifacts:
        on_progress(f"quality of {artifact.name}")
        with DeblurEngine(artifact.path, provider="cpu") as engine:
            restored = _restored(engine, artifact, pairs)
            on_cpu[artifact.name] = _to_bytes(engine(_as_input(photo, artifact)))
        fp32 = fp32 or restored
        drop, worst, to_fp32 = _losses(restored, fp32, pairs)
        _check_drop(artifact, drop, worst, "cpu", config, int8)
        if artifact.precision == "fp16":
            check_half_precision(artifacts[0], artifact, config.fp16_min_db)
            if to_fp32 < config.fp16_min_db:
                raise VerificationError(
                    f"{artifact.name} is {to_fp32:.1f} dB from fp32 on the pairs; {config.fp16_min_db} is allowed"
                )
        results.append(
            Measured(
                artifact=artifact,
                size_bytes=artifact.path.stat().st_size,
                quality=mean_quality(compare(image, pair) for image, pair in zip(restored, pairs, strict=True)),
                drop_db=drop,
                worst_drop_db=worst,
                db_to_fp32=to_fp32,
            )
        )
    for provider in providers:
        engines = _engines(provider, results, photo, on_cpu, on_progress)
        on_progress(f"latency on {provider}")
        calls = {
            result.artifact.name: partial(engines[result.artifact.name], _as_input(photo, result.artifact))
            for result in results
        }
        timings = take_turns(calls, rounds=config.rounds)
        for result in results:
            artifact = result.artifact
            engine, timing = engines[artifact.name], timings[artifact.name]
            drop, worst, to_fp32 = result.drop_db, result.worst_drop_db, result.db_to_fp32
            if provider != "cpu":
                on_progress(f"quality of {artifact.name} on {provider}")
                drop, worst, to_fp32 = _losses(_restored(engine, artifact, pairs), fp32, pairs)
                if artifact.precision == "int8":
                    _check_drop(artifact, drop, worst, provider, config, int8)
            result.runs.append(
                Run(
                    provider=provider,
                    device=engine.receipt.device,
                    arithmetic=engine.receipt.effective_precision,
                    median_ms=timing.median_ms,
                    p95_ms=timing.p95_ms,
                    drop_db=drop,
                    worst_drop_db=worst,
                    db_to_fp32=to_fp32,
                    int8_macs=int8_share(artifact.path, find(provider)) if artifact.precision == "int8" else 0.0,
                )
            )
            if artifact.precision != "fp32" and timing.median_ms > timings[artifacts[0].name].median_ms:
                result.slower_than_fp32_on.append(provider)
    return results


def usable(artifact: Artifact, providers: Sequence[str], on_progress: Progress) -> list[str]:
    """Those of ``providers`` that load and run ``artifact``; a GPU build without a GPU, say, does not."""
    found = []
    for provider in providers:
        try:
            DeblurEngine(artifact.path, provider=provider).close()
            found.append(provider)
        except ProviderError as error:
            on_progress(f"{provider} is left out: {error}")
    return found


def _as_input(image: Image, artifact: Artifact) -> NDArray[Any]:
    return image if artifact.io == "uint8" else image.astype(np.float32) / 255


def _to_bytes(image: NDArray[Any]) -> Image:
    return image if image.dtype == np.uint8 else np.rint(image * 255).astype(np.uint8)


def _restored(engine: DeblurEngine, artifact: Artifact, pairs: Sequence[Pair]) -> list[Image]:
    return [_to_bytes(engine(_as_input(pair.blurred, artifact))) for pair in pairs]


def _losses(restored: Sequence[Image], fp32: Sequence[Image], pairs: Sequence[Pair]) -> tuple[float, float, float]:
    """PSNR lost against fp32 on average and at most, and the mean PSNR of ``restored`` taken against ``fp32``."""
    drops = [
        psnr(exact, pair.sharp) - psnr(image, pair.sharp)
        for image, exact, pair in zip(restored, fp32, pairs, strict=True)
    ]
    return float(np.mean(drops)), max(drops), float(np.mean([psnr(*two) for two in zip(restored, fp32, strict=True)]))


def _check_drop(
    artifact: Artifact, drop: float, worst: float, provider: str, config: VerifyConfig, int8: Int8Config
) -> None:
    limits = {"fp32": 0.005, "fp16": config.fp16_max_drop_db, "int8": int8.max_drop_db}
    worst_limits = {"int8": int8.max_image_drop_db}
    for lost, limit, where in (
        (drop, limits[artifact.precision], "on average"),
        (worst, worst_limits.get(artifact.precision, float("inf")), "on one image"),
    ):
        if not lost <= limit:
            raise VerificationError(
                f"{artifact.name} loses {lost:.3f} dB {where} against fp32 on {provider}, {limit} dB is allowed; "
                "calibrate on photographs like those in use, or allow more"
            )


def _engines(
    provider: str,
    results: Sequence[Measured],
    photo: Image,
    on_cpu: dict[str, Image],
    on_progress: Progress,
) -> dict[str, DeblurEngine]:
    """An engine on ``provider`` for every variant, whose result agrees with that on the CPU."""
    engines: dict[str, DeblurEngine] = {}
    for result in results:
        artifact = result.artifact
        on_progress(f"{artifact.name} on {provider}")
        try:
            engine = DeblurEngine(artifact.path, provider=provider)
            restored = _to_bytes(engine(_as_input(photo, artifact)))
        except ProviderError as error:
            raise VerificationError(f"{artifact.name} does not run on {provider}: {error}") from None
        agreement = psnr(restored, on_cpu[artifact.name])
        if agreement < _SAME_RESULT_DB:
            raise VerificationError(
                f"{artifact.name} on {provider} is {agreement:.1f} dB from its result on the CPU; "
                f"{_SAME_RESULT_DB} or more is allowed"
            )
        engines[artifact.name] = engine
    return engines
