"""The stage that can fail the run: every variant is loaded, run and compared before anyone gets it.

fp32 is compared with the network as it came, value by value; every other variant with fp32 and with the ground truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deblur_deploy.contract import INPUT
from deblur_deploy.errors import ProviderError, VerificationError
from deblur_deploy.evaluation.latency import take_turns
from deblur_deploy.evaluation.quality import Pair, Restorer, compare, mean_quality, psnr
from deblur_deploy.media.images import Image
from deblur_deploy.pipeline.artifact import Artifact, Measured, Run
from deblur_deploy.pipeline.config import VerifyConfig
from deblur_deploy.pipeline.recipe import Recipe
from deblur_deploy.pipeline.stages import Progress
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.runtime.providers import find

_SAME_RESULT_DB = 45
"""Providers round differently, and some compute in bf16; a wrong result is far below this."""
_LEAST_PX = 64
"""Height and width of what is looked at for values that fp16 cannot hold: more than border, though all of a network's
activations are kept at once."""
_TURNS_S = 30
"""Seconds after which no further round of timed calls begins, once there were three."""


def compare_with_source(
    artifact: Artifact, reference: Restorer, images: Sequence[Image], config: VerifyConfig
) -> float:
    """Share of values in which ``artifact`` (fp32, uint8 images) differs from ``reference``, by one level at most.

    ``reference`` is the network as it came: torch, or somebody's ONNX file.

    Compares on ``images`` and on random ones of random sizes.  Raises VerificationError beyond the limit.
    """
    engine = DeblurEngine(artifact.path, provider="cpu")
    rng = np.random.default_rng(0)
    sizes = np.concatenate([[[1, 1]], rng.integers(1, 300, (config.random_sizes, 2))])
    random = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    differing = total = 0
    for image in [*random, *images]:
        difference = np.abs(engine(image).astype(np.int16) - reference(image))
        if difference.max() > 1:
            raise VerificationError(
                f"{artifact.name} differs from its source by {difference.max()} levels on an image of "
                f"{image.shape[1]}x{image.shape[0]}; 1 is allowed"
            )
        differing += int(np.count_nonzero(difference))
        total += difference.size
    if differing > config.max_differing * total:
        raise VerificationError(
            f"{artifact.name} differs from its source in {differing / total:.3%} of values; "
            f"{config.max_differing:.3%} is allowed"
        )
    return differing / total


def restore(artifact: Artifact, pairs: Sequence[Pair]) -> list[Image]:
    """What ``artifact`` makes of each pair's blurred image on the CPU, as bytes."""
    with DeblurEngine(artifact.path, provider="cpu") as engine:
        return _restored(engine, artifact, pairs)


def measure(artifact: Artifact, fp32: Artifact, pairs: Sequence[Pair], baseline: Sequence[Image]) -> Measured:
    """Quality of ``artifact`` on the CPU: on ``pairs``, whose results by ``fp32`` are ``baseline``, and on extremes."""
    restored = baseline if artifact == fp32 else restore(artifact, pairs)
    rows = [compare(image, pair) for image, pair in zip(restored, pairs, strict=True)]
    drop, worst = _lost(restored, baseline, pairs)
    with DeblurEngine(fp32.path, provider="cpu") as exact, DeblurEngine(artifact.path, provider="cpu") as engine:
        extremes = extreme_images(max(4 * exact.contract.size_divisor, _LEAST_PX))
        extremes_db = {
            name: psnr(_to_bytes(engine(_as_input(image, artifact))), exact(image)) for name, image in extremes.items()
        }
    crops = [pair.centre(_LEAST_PX).blurred for pair in pairs]
    return Measured(
        artifact=artifact,
        size_bytes=artifact.path.stat().st_size,
        quality=mean_quality(rows),
        drop_db=drop,
        worst_drop_db=worst,
        db_to_fp32=float(np.mean([psnr(*two) for two in zip(restored, baseline, strict=True)])),
        extremes_db=extremes_db,
        peak_activation=peak_activation(fp32, [*extremes.values(), *crops]) if artifact.precision == "fp16" else None,
    )


def extreme_images(side_px: int) -> dict[str, Image]:
    """Square images that photographs are not: black, white, noise, and a checkerboard of single pixels."""
    board = (np.indices((side_px, side_px)).sum(0) % 2 * 255).astype(np.uint8)
    return {
        "black": np.zeros((side_px, side_px, 3), np.uint8),
        "white": np.full((side_px, side_px, 3), 255, np.uint8),
        "random": np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), np.uint8),
        "checkerboard": np.repeat(board[..., None], 3, axis=2),
    }


def peak_activation(fp32: Artifact, images: Sequence[Image]) -> float:
    """The largest absolute value inside of the network (infinite if there is one that is no number)."""
    import onnx

    from deblur_deploy.pipeline.nodes import observing

    whole = onnx.load(fp32.path)
    names = [name for node in whole.graph.node for name in node.output if name]
    session = observing(whole, names)
    # A node may also give a sequence.
    given = (value for image in images for value in session.run(names, {INPUT: image[None]}))
    values = (value for value in given if isinstance(value, np.ndarray))
    # numpy's maximum is no number if one of them is none; Python's is not.
    peak = np.max([np.abs(value).max() for value in values if value.dtype == np.float32 and value.size])
    return float(peak) if np.isfinite(peak) else float("inf")


def check_drop(result: Measured, recipe: Recipe) -> None:
    """Raise VerificationError if ``result`` lost more than its precision may."""
    artifact, limit = result.artifact, recipe.verify.fp16_min_db
    check_loss(artifact, result.drop_db, result.worst_drop_db, "cpu", recipe)
    if artifact.precision != "fp16":
        return
    # The CPU provider computes fp16 in fp32, so overflow does not show in its results.
    most = float(np.finfo(np.float16).max)
    if result.peak_activation is not None and not result.peak_activation < most:
        raise VerificationError(
            f"{artifact.name} overflows: an activation reaches {result.peak_activation:.3g}, fp16 holds {most:.0f} at "
            "most; train with smaller weights"
        )
    for where, found in {"the pairs": result.db_to_fp32, **result.extremes_db}.items():
        if not found >= limit:
            raise VerificationError(f"{artifact.name} is {found:.1f} dB from fp32 on {where}; {limit} dB is required")


def check_loss(artifact: Artifact, drop: float | None, worst: float | None, provider: str, recipe: Recipe) -> None:
    """Raise VerificationError if ``artifact`` lost more against fp32 on ``provider`` than its precision may.

    Away from the CPU only int8 has a limit: the others may run in another precision there, by the user's wish.
    """
    int8, inf = recipe.int8, float("inf")
    limits = {"fp32": (0.005, inf), "fp16": (recipe.verify.fp16_max_drop_db, inf)} if provider == "cpu" else {}
    limits["int8"] = (int8.max_drop_db, int8.max_image_drop_db)
    for lost, limit, where in zip(
        (drop, worst), limits.get(artifact.precision, (inf, inf)), ("on average", "on one image"), strict=True
    ):
        if lost is not None and not lost <= limit:
            raise VerificationError(
                f"{artifact.name} loses {lost:.3f} dB {where} against fp32 on {provider}, {limit} dB is allowed; "
                "calibrate on photographs like those in use, or allow more"
            )


def mark_slower(results: Sequence[Measured]) -> None:
    """Note on which providers a variant is slower than fp32, the first of ``results``."""
    fp32 = {run.provider: run.median_ms for run in results[0].runs}
    for result in results:
        if result.artifact.precision != "fp32":
            result.slower_than_fp32_on[:] = [r.provider for r in result.runs if r.median_ms > fp32[r.provider]]


def time_on(
    provider: str,
    artifacts: Sequence[Artifact],
    photo: Image,
    pairs: Sequence[Pair],
    rounds: int,
    on_progress: Progress = lambda _: None,
) -> list[Run]:
    """Run every variant on ``provider``, compare it with its result on the CPU, and time them in turn on ``photo``.

    Elsewhere than on the CPU, what they lose on ``pairs`` is measured again.

    The answer has one run for each of ``artifacts``, in their order.

    Raises VerificationError that names the variant that does not run, or gives something else.
    """
    from deblur_deploy.pipeline.int8.coverage import int8_share

    engines: dict[str, DeblurEngine] = {}
    calls: dict[str, Callable[[], object]] = {}
    for artifact in artifacts:
        on_progress(f"{artifact.name} on {provider}")
        image = _as_input(photo, artifact)
        engines[artifact.name] = _agreeing(artifact, provider, image)
        calls[artifact.name] = partial(engines[artifact.name], image)
    on_progress(f"latency on {provider}")
    timings = take_turns(calls, rounds=rounds, warm_up=1, budget_s=_TURNS_S)  # each has run once already
    baseline = [] if provider == "cpu" else restore(artifacts[0], pairs)
    runs = []
    for artifact in artifacts:
        engine, timing = engines[artifact.name], timings[artifact.name]
        drop: float | None = None
        worst: float | None = None
        if baseline:
            on_progress(f"quality of {artifact.name} on {provider}")
            drop, worst = _lost(_restored(engine, artifact, pairs), baseline, pairs)
        runs.append(
            Run(
                provider=provider,
                device=engine.receipt.device,
                arithmetic=engine.receipt.effective_precision,
                median_ms=timing.median_ms,
                p95_ms=timing.p95_ms,
                int8_macs=int8_share(artifact.path, find(provider)) if artifact.precision == "int8" else 0.0,
                drop_db=drop,
                worst_drop_db=worst,
            )
        )
    return runs


def _agreeing(artifact: Artifact, provider: str, image: NDArray[Any]) -> DeblurEngine:
    """An engine on ``provider`` that makes of ``image`` what the CPU makes of it, or a VerificationError."""
    try:
        engine = DeblurEngine(artifact.path, provider=provider)
        restored = _to_bytes(engine(image))
    except ProviderError as error:
        raise VerificationError(f"{artifact.name} does not run on {provider}: {error}") from None
    if provider == "cpu":
        return engine
    with DeblurEngine(artifact.path, provider="cpu") as reference:
        on_cpu = _to_bytes(reference(image))
    agreement = psnr(restored, on_cpu)
    if agreement < _SAME_RESULT_DB:
        raise VerificationError(
            f"{artifact.name} on {provider} is {agreement:.1f} dB from its result on the CPU; "
            f"{_SAME_RESULT_DB} or more is allowed"
        )
    return engine


def _restored(engine: DeblurEngine, artifact: Artifact, pairs: Sequence[Pair]) -> list[Image]:
    return [_to_bytes(engine(_as_input(pair.blurred, artifact))) for pair in pairs]


def _lost(restored: Sequence[Image], baseline: Sequence[Image], pairs: Sequence[Pair]) -> tuple[float, float]:
    """PSNR that ``restored`` lost against ``baseline``, on average and at most."""
    drops = [
        psnr(exact, pair.sharp) - psnr(image, pair.sharp)
        for image, exact, pair in zip(restored, baseline, pairs, strict=True)
    ]
    return float(np.mean(drops)), max(drops)


def _as_input(image: Image, artifact: Artifact) -> NDArray[Any]:
    return image if artifact.io == "uint8" else image.astype(np.float32) / 255


def _to_bytes(image: NDArray[Any]) -> Image:
    return image if image.dtype == np.uint8 else np.rint(image * 255).astype(np.uint8)
