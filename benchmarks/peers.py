"""What a user would pick instead: the same network in PyTorch, plain ONNX Runtime, native OpenVINO + NNCF, and ncnn.

Every candidate goes from a uint8 array to a uint8 array, in a process of its own, with the same number of threads, and
takes turns with the others; each has its own recommended settings, which its row states.  Preparation (export,
quantization, conversion) is not timed.  Quality is measured on crops of the built-in pairs, since some peers are
compiled for one size.  ``pip install 'deblur-deploy[peers]'`` brings the libraries; what is absent is skipped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import msgspec
import onnxruntime as ort
import torch
from common import Sized, pairs, present, product, progress, save, script, text_of

from deblur_deploy.bundles.manifest import Bundle
from deblur_deploy.errors import InputError, ModelError
from deblur_deploy.evaluation.bench import Entry, Plan, Progress, entries_of, measure_latency
from deblur_deploy.evaluation.record import Row, new_record
from deblur_deploy.evaluation.sets import measure
from deblur_deploy.files import existing, sha256
from deblur_deploy.media.images import Image
from deblur_deploy.pipeline.export import Exporter
from deblur_deploy.pipeline.int8.quantizer import plain_int8
from deblur_deploy.pipeline.photos import builtin_calibration
from deblur_deploy.pipeline.recipe import Recipe
from deblur_deploy.shipped import DEFAULT_CHECKPOINT
from deblur_deploy.training.checkpoint import load_checkpoint, save_checkpoint
from deblur_deploy.training.unet import PRESETS, Preset, UNet

SIZE = (1280, 720)
CROP = 352
"""Height and width of the crops for quality: the largest that all built-in photographs have."""
SHIPPED = "shipped"


@dataclass(frozen=True, kw_only=True)
class Peers(Sized):
    """Compare the bundle with what other tools make of the same checkpoint."""

    checkpoint: Path = DEFAULT_CHECKPOINT
    """The weights that the bundle was made from."""
    networks: tuple[str, ...] = (SHIPPED,)
    """What to compare on, one after the other: 'shipped' (the bundle), checkpoints, or presets (article, hd, quality)
    with weights drawn from a seed: as fast as trained ones, but without a PSNR that tells anything."""
    only: tuple[str, ...] = ()
    """Only these peers, such as 'eager fp32'; by default all."""
    quality: bool = True
    """Measure PSNR and SSIM too."""
    budget_s: float = 150
    """Seconds of timed calls, for each network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.networks or len(set(self.networks)) < len(self.networks):
            raise ValueError(f"networks is {self.networks}; allowed: one or more, each once")


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network, as the product's entries and as the checkpoint that the peers start from."""

    name: str
    checkpoint: Path
    ours: list[Entry]
    weights: str
    """``trained`` or ``seeded``."""


def run(options: Peers) -> int:
    """Prepare the peers, measure them beside the product, and save."""
    notes: list[str] = []
    crops = [pair.centre(CROP) for pair in pairs(options)]
    photo = pairs(options)[0].blurred
    budget_s = options.budget_s / 5 if options.quick else options.budget_s
    plan = Plan(sizes=options.sizes_or([SIZE]), budget_s=budget_s)
    on_progress = progress()
    rows: list[Row] = []
    about: dict[str, Any] = {}
    found: dict[str, Any] = {"networks": about}
    references: dict[str, float] = {}
    for at, name in enumerate(options.networks):
        with tempfile.TemporaryDirectory(prefix="deblur-peers-") as folder:
            network = _network(name, options, Path(folder), notes, on_progress)
            theirs, failed = _peers(network, options, Path(folder), notes, on_progress)
            entries = [*network.ours, *theirs]
            if options.quality:
                outcome = measure(entries, {"crops": crops}, photo, plan, on_progress)
            else:
                outcome = measure_latency(entries, photo, plan, on_progress)
            rows += [*outcome.rows, *failed]
            references = references or outcome.reference_ms
            about[network.name] = {"weights": network.weights, "machine_noise": outcome.machine_noise}
            about[network.name]["macs_per_pixel"] = load_checkpoint(network.checkpoint).config.macs_per_pixel
            if at == 0:
                on_progress("int8 and eager PyTorch in turn")
                found["product_model"] = network.name
                found["int8_cpu_against_eager_fp32"] = _int8_against_eager(entries, photo, plan)
    record = new_record(
        "peers",
        options.settings(
            sizes=text_of(plan.sizes),
            budget_s=plan.budget_s,
            data=f"{CROP}x{CROP} crops of the built-in photographs",
            pairs=[pair.name for pair in crops],
        ),
        reference_ms=references,
        notes=list(dict.fromkeys(notes)),
        rows=rows,
        found=found,
    )
    return save(record, options)


def _network(name: str, options: Peers, folder: Path, notes: list[str], on_progress: Progress) -> Network:
    """The shipped bundle, or the float and int8 variants of another network, written into ``folder``."""
    if name == SHIPPED:
        _same_weights(options)
        ours = product(options, notes)
        return Network(name=options.model.name, checkpoint=options.checkpoint, ours=ours, weights="trained")
    on_progress(f"exporting {name}")
    checkpoint, weights = Path(name), "trained"
    if name in PRESETS:
        checkpoint, weights = folder / f"{name}.safetensors", "seeded"
        save_checkpoint(_seeded(cast("Preset", name)), checkpoint)
        name = f"{name}, seeded"
    elif not checkpoint.is_file():
        raise InputError(f"networks has {name!r}; allowed: {SHIPPED}, {', '.join(PRESETS)} or a checkpoint")
    else:
        name = checkpoint.stem
    exporter = Exporter.of(load_checkpoint(checkpoint), sha256(checkpoint), folder)
    photos, how = builtin_calibration(), Recipe().int8
    if weights == "seeded":
        how = msgspec.structs.replace(how, method="minmax", rounding="nearest")  # Only their time is looked at.
    made = {
        "fp32": exporter.fp32,
        "fp16": exporter.fp16,
        "int8": lambda: plain_int8(exporter, photos, how, "rows"),
        "int8-planes": lambda: plain_int8(exporter, photos, how, "planes"),
    }
    files = [make() for variant, make in made.items() if variant in (options.variants or made)]
    providers = present(options.providers, notes)
    entries = [entry for file in files for entry in entries_of(file.path, providers, threads=options.threads)]
    ours = sorted((replace(entry, model=name) for entry in entries), key=lambda entry: providers.index(entry.provider))
    return Network(name=name, checkpoint=checkpoint, ours=ours, weights=weights)


def _seeded(preset: Preset) -> UNet:
    """The preset with weights from a seed everywhere, also in the head, which starts as zero."""
    torch.manual_seed(0)
    unet = UNet(PRESETS[preset])
    torch.nn.init.normal_(unet.head.weight, std=0.01)
    return unet


def _same_weights(options: Peers) -> None:
    given = sha256(existing(options.checkpoint, kind="file"))
    from deblur_deploy.runtime.engine import DeblurEngine

    variant = next(iter(Bundle.read(options.model).variants.values()))
    with DeblurEngine(variant.path, provider="cpu") as engine:
        parent = engine.contract.parent_sha256
    if parent != given:
        raise ModelError(
            f"{options.model} was made from another checkpoint than {options.checkpoint}; give --checkpoint"
        )


def _peers(
    network: Network, options: Peers, folder: Path, notes: list[str], on_progress: Progress
) -> tuple[list[Entry], list[Row]]:
    """The peers that are ready, and a row for each that could not be prepared."""
    found: list[Entry] = []
    failed: list[Row] = []
    threads, checkpoint = options.threads, str(network.checkpoint.resolve())
    timed = options.sizes_or([SIZE])

    def add(variant: str, library: str, factory: str, prepare: Callable[[], dict[str, Any]]) -> None:
        if variant not in (options.only or (variant,)):
            return
        on_progress(f"preparing {library}, {variant}")
        entry = Entry(
            model=network.name,
            variant=variant,
            provider=library,
            factory=factory,
            arguments={},
            # ncnn and torch read the number of their OpenMP threads when they are loaded.
            environment={"OMP_NUM_THREADS": str(threads)},
        )
        try:
            found.append(replace(entry, arguments={"threads": threads, **prepare()}))
        except Exception as error:  # Whatever another tool fails with, its row says it and the others stand.
            said = f"{type(error).__name__}: {str(error)[:300]}"
            failed.extend(entry.row(size, error=said) for size in text_of(timed))

    def torch_peer(variant: str, **how: Any) -> None:
        add(variant, "PyTorch", "peer_torch:load", lambda: {"checkpoint": checkpoint, **how})

    torch_peer("eager fp32")
    torch_peer("eager fp32 channels_last", channels_last=True)
    torch_peer("eager bf16 channels_last", channels_last=True, half="bfloat16")
    if not options.quick:
        torch_peer("compile fp32", channels_last=True, compiled="default")
        torch_peer("compile bf16", channels_last=True, half="bfloat16", compiled="default")
    if torch.cuda.is_available():
        cuda = {"device": "cuda", "channels_last": True}
        torch_peer("GPU eager fp32", device="cuda")
        torch_peer("GPU eager fp32 channels_last", **cuda)
        torch_peer("GPU eager fp16", **cuda, half="float16")
        torch_peer("GPU compile fp16", **cuda, half="float16", compiled="default")
        torch_peer("GPU compile fp16, CUDA graphs", **cuda, half="float16", compiled="reduce-overhead")
    else:
        notes.append("PyTorch on a GPU skipped: torch finds no CUDA device")

    from peer_torch import export

    sizes = dict(zip(text_of(timed), timed, strict=True)) | {f"{CROP}x{CROP}": (CROP, CROP)}
    plain: dict[str, str] = {}

    def exported() -> dict[str, str]:
        for size, (width, height) in sizes.items():
            if size not in plain:
                plain[size] = str(export(Path(checkpoint), folder / f"{size}.onnx", height, width))
        return plain

    def quantized(how: Callable[[Path, Path, Sequence[Image]], Path], suffix: str) -> dict[str, Any]:
        from deblur_deploy.evaluation.latency import at_size

        photos = builtin_calibration()[:: 4 if options.quick else 1]
        files = {}
        for size, path in exported().items():
            tiles = [at_size(photo, *sizes[size]) for photo in photos[: 4 if size != f"{CROP}x{CROP}" else None]]
            files[size] = str(how(Path(path), folder / f"{size}{suffix}", tiles))
        return {"files": files}

    import peer_onnx

    add("defaults fp32", "ONNX Runtime", "peer_onnx:onnxruntime_defaults", lambda: {"files": exported()})
    add(
        "quantize_static defaults",
        "ONNX Runtime",
        "peer_onnx:onnxruntime_defaults",
        lambda: quantized(peer_onnx.quantize_onnxruntime, ".ort-int8.onnx"),
    )
    if "CUDAExecutionProvider" in ort.get_available_providers():
        on_gpu = lambda: {"files": exported(), "provider": "CUDAExecutionProvider"}  # noqa: E731
        add("GPU defaults fp32", "ONNX Runtime", "peer_onnx:onnxruntime_defaults", on_gpu)
    else:
        notes.append("ONNX Runtime on a GPU skipped: onnxruntime has no CUDA provider")
    if _installed("openvino", notes):
        add("defaults", "OpenVINO", "peer_onnx:openvino_native", lambda: {"files": exported()})
        if _installed("nncf", notes):
            nncf = lambda: quantized(peer_onnx.quantize_nncf, ".nncf.xml")  # noqa: E731
            add("NNCF int8", "OpenVINO", "peer_onnx:openvino_native", nncf)
    if _installed("ncnn", notes) and _installed("pnnx", notes):

        def converted() -> dict[str, Any]:
            (width, height), *_ = timed
            param, weights = peer_onnx.export_ncnn(Path(checkpoint), folder, height, width)
            return {"param": str(param), "weights": str(weights)}

        add("defaults fp32", "ncnn", "peer_onnx:ncnn_native", converted)
    return found, failed


def _installed(name: str, notes: list[str]) -> bool:
    if find_spec(name) is None:
        notes.append(f"{name} skipped: not installed; pip install 'deblur-deploy[peers]'")
        return False
    return True


def _int8_against_eager(entries: Sequence[Entry], photo: Image, plan: Plan) -> dict[str, Any]:
    """These two alone, A B A B: what the int8 file gains on ONNX Runtime's own kernels over eager PyTorch."""
    pair = [
        next((entry for entry in entries if (entry.variant, entry.provider) == wanted), None)
        for wanted in (("int8", "cpu"), ("eager fp32", "PyTorch"))
    ]
    chosen = [entry for entry in pair if entry is not None]
    if len(chosen) < 2:
        return {"error": "one of the two is missing"}
    rows = measure_latency(chosen, photo, replace(plan, sizes=plan.sizes[:1], budget_s=plan.budget_s / 5)).rows
    if any(row.median_ms is None for row in rows):
        return {"error": "; ".join(row.error or "" for row in rows)}
    int8, eager = rows
    assert int8.median_ms is not None
    assert eager.median_ms is not None
    return {
        "size": int8.size,
        "ratio": eager.median_ms / int8.median_ms,
        "int8_ms": int8.median_ms,
        "eager_fp32_ms": eager.median_ms,
        "calls": int8.calls,
        "noise": (int8.noise or 0) + (eager.noise or 0),
        "receipt": int8.facts.get("receipt"),
    }


if __name__ == "__main__":
    script(Peers, run)
