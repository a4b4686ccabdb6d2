"""What quantization costs and brings: ours beside what the usual tools make of the same weights and photographs.

For each network: fp32, fp16 and int8 of ``deblur-export`` on every provider of this machine, ``quantize_static`` and
``quantize_dynamic`` of ONNX Runtime with their defaults, and NNCF with native OpenVINO.  Everybody calibrates on the
built-in photographs.  Quality is taken on centre crops of every pair, since the peers are compiled for one size; the
candidates of a network take turns when they are timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from common import PROVIDERS, Options, pairs, present, progress, save, script
from tables import int8_table

from deblur_deploy.errors import DeblurError
from deblur_deploy.evaluation.bench import Entry, Plan, Progress, measure_latency
from deblur_deploy.evaluation.latency import at_size
from deblur_deploy.evaluation.quality import Pair, psnr, usable_pairs
from deblur_deploy.evaluation.record import Row, new_record
from deblur_deploy.evaluation.sets import by_name
from deblur_deploy.files import sha256
from deblur_deploy.media.images import Image
from deblur_deploy.pipeline.config import Int8Config
from deblur_deploy.pipeline.export import Exporter
from deblur_deploy.pipeline.int8.budget import quantize
from deblur_deploy.pipeline.int8.coverage import int8_share
from deblur_deploy.pipeline.photos import builtin_calibration, calibration_from
from deblur_deploy.runtime.providers import find
from deblur_deploy.shipped import DEFAULT_CHECKPOINT
from deblur_deploy.training.checkpoint import load_checkpoint

CROP = 320
"""Height and width of the crops for quality: what the smallest photographs of the evaluation sets allow."""


@dataclass(frozen=True, kw_only=True)
class Quantization(Options):
    """Compare int8 with fp32, and with other tools' int8."""

    checkpoints: tuple[Path, ...] = (DEFAULT_CHECKPOINT,)
    """Weights of the networks."""
    data: tuple[Path, ...] = ()
    """Folders of pairs (blur/NAME and sharp/NAME), each a set of its own beside the built-in photographs."""
    max_drop_db: float = Int8Config().max_drop_db
    """The budget that our int8 must keep on the built-in pairs."""
    budget_s: float = 120
    """Seconds of timed calls for each network."""


def run(options: Quantization) -> int:
    """Prepare, measure and save; the rows are latencies, ``found`` has the quality on every set."""
    notes: list[str] = []
    on_progress = progress()
    sets = {"built-in": [pair.centre(CROP) for pair in pairs(options)]}
    for name, folder in by_name(options.data).items():
        found, failed = usable_pairs(folder)
        notes += failed
        sets[name] = [pair.centre(CROP) for pair in (found[:2] if options.quick else found)]
    size = (640, 352) if options.quick else (1280, 720)  # which no network here would have to pad
    plan = Plan(sizes=(size,), budget_s=options.budget_s / (12 if options.quick else 1))
    rows: list[Row] = []
    quality: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    for checkpoint in options.checkpoints:
        name = checkpoint.stem
        with tempfile.TemporaryDirectory(prefix="deblur-quantization-") as folder:
            entries, shares, chosen[name] = _ours(options, checkpoint, Path(folder), notes, on_progress)
            theirs, failed_rows = _theirs(options, checkpoint, Path(folder), size, notes, on_progress)
            quality[name] = {key: _quality([*entries, *theirs], of, on_progress) for key, of in sets.items()}
            timed = measure_latency([*entries, *theirs], sets["built-in"][0].blurred, plan, on_progress).rows
        for row in timed:
            share = shares.get((row.variant, row.provider))
            rows.append(msgspec.structs.replace(row, facts={**row.facts, "int8_macs": share}))
        rows += failed_rows
    settings = options.settings(
        checkpoints=[checkpoint.name for checkpoint in options.checkpoints],
        sets={name: [pair.name for pair in of] for name, of in sets.items()},
        crop_px=CROP,
        max_drop_db=options.max_drop_db,
    )
    record = new_record("quantization", settings, notes=notes, rows=rows, found={"quality": quality, "int8": chosen})
    record.found["tables"] = [msgspec.to_builtins(int8_table(record))]
    return save(record, options)


def _ours(
    options: Quantization, checkpoint: Path, folder: Path, notes: list[str], on_progress: Progress
) -> tuple[list[Entry], dict[tuple[str, str], float | None], dict[str, Any]]:
    """Entries of our variants, their shares of multiplications in int8, and what was found out about int8."""
    on_progress(f"{checkpoint.name}: export")
    exporter = Exporter.of(load_checkpoint(checkpoint), sha256(checkpoint), folder)
    artifacts = [exporter.fp32(), exporter.fp16()]
    how = Int8Config(max_drop_db=options.max_drop_db, sensitivity_crops=0)
    try:
        int8, about = quantize(exporter, artifacts[0], calibration_from(None, 0), pairs(options), how, on_progress)
        artifacts += int8
        found = asdict(about)
    except DeblurError as error:
        notes.append(f"{checkpoint.stem}: no int8, {error}")
        found = {"error": str(error)}
    entries, shares = [], {}
    for provider in present(PROVIDERS, notes):
        for artifact in artifacts:
            arguments = {"model": str(artifact.path), "provider": provider, "threads": options.threads}
            entries.append(
                Entry(
                    model=checkpoint.stem,
                    variant=artifact.name,
                    provider=provider,
                    factory="deblur_deploy.evaluation.worker:engine",
                    arguments=arguments,
                )
            )
            shares[artifact.name, provider] = int8_share(artifact.path, find(provider))
    return entries, shares, found


def _theirs(
    options: Quantization,
    checkpoint: Path,
    folder: Path,
    size: tuple[int, int],
    notes: list[str],
    on_progress: Progress,
) -> tuple[list[Entry], list[Row]]:
    """Entries of the usual tools, and a row for each that could not be prepared."""
    import peer_onnx
    import peer_torch

    sizes = {f"{width}x{height}": (width, height) for width, height in (size, (CROP, CROP))}
    plain = {key: peer_torch.export(checkpoint, folder / f"{key}.onnx", wh[1], wh[0]) for key, wh in sizes.items()}
    photos = builtin_calibration()[:: 5 if options.quick else 1]
    entries: list[Entry] = []
    failed: list[Row] = []

    def add(variant: str, library: str, factory: str, make: Callable[[Path, Path, Sequence[Image]], Path]) -> None:
        on_progress(f"{checkpoint.name}: {variant}")
        entry = Entry(model=checkpoint.stem, variant=variant, provider=library, factory=factory, arguments={})
        suffix = ".nncf.xml" if library == "OpenVINO" else f".{variant.split()[0]}.onnx"
        files = {}
        try:
            for key, path in plain.items():
                tiles = [at_size(photo, *sizes[key]) for photo in (photos if key == f"{CROP}x{CROP}" else photos[:4])]
                files[key] = str(make(Path(path), folder / f"{key}{suffix}", tiles))
        except Exception as error:  # Whatever another tool fails with, its row says it and the others stand.
            said = f"{type(error).__name__}: {str(error)[:300]}"
            failed.append(entry.row(f"{size[0]}x{size[1]}", error=said))
            return
        entries.append(replace(entry, arguments={"files": files, "threads": options.threads}))

    runs = "peer_onnx:onnxruntime_defaults"
    add("quantize_static defaults", "ONNX Runtime", runs, peer_onnx.quantize_onnxruntime)
    add("quantize_dynamic defaults", "ONNX Runtime", runs, _dynamic)
    if find_spec("nncf") and find_spec("openvino"):
        add("NNCF int8", "OpenVINO", "peer_onnx:openvino_native", peer_onnx.quantize_nncf)
    else:
        notes.append("NNCF with OpenVINO skipped: not installed; pip install 'deblur-deploy[peers]'")
    return entries, failed


def _dynamic(source: Path, target: Path, tiles: Sequence[Image]) -> Path:  # noqa: ARG001
    """``quantize_dynamic``, whose convolutions only have a kernel for unsigned weights."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, weight_type=QuantType.QUInt8)
    return target


def _quality(entries: Sequence[Entry], of: Sequence[Pair], on_progress: Progress) -> dict[str, Any]:
    """PSNR, and what is lost to fp32 on the CPU on average and on the worst image, by entry; or its ``error``."""
    exact: list[float] = []
    found: dict[str, Any] = {}
    for entry in entries:  # fp32 on the CPU is the first
        on_progress(f"quality of {entry.name}")
        try:
            with entry.start() as worker:
                values = [psnr(worker.restore(pair.blurred), pair.sharp) for pair in of]
        except DeblurError as error:
            found[entry.name] = {"error": str(error)}
            continue
        exact = exact or values
        drops = [before - after for before, after in zip(exact, values, strict=True)]
        worst = int(np.argmax(drops))
        found[entry.name] = {
            "psnr": float(np.mean(values)),
            "drop_db": float(np.mean(drops)),
            "worst_drop_db": drops[worst],
            "worst_image": of[worst].name,
        }
    return found


if __name__ == "__main__":
    script(Quantization, run)
