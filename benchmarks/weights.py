"""How good a checkpoint is, for its model card: gain on pairs (after the best shift too), harm to sharp photographs,
and whether it makes photographs darker or brighter.

python -m benchmarks.weights CHECKPOINT --val PAIRS... --sharp FOLDER... --blurry FOLDER... --json FILE
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import cv2
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from deblur_deploy.evaluation.quality import PairSet, Restorer, compare, psnr, psnr_shifted
from deblur_deploy.evaluation.record import new_record, write_json
from deblur_deploy.evaluation.sets import by_name
from deblur_deploy.files import sha256
from deblur_deploy.media.images import list_images, read_image
from deblur_deploy.training.checkpoint import load_checkpoint
from deblur_deploy.training.unet import parameter_count
from deblur_deploy.training.validation import TorchRestorer


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure a checkpoint."""

    checkpoint: tyro.conf.Positional[Path]
    """What deblur-train wrote."""
    val: tuple[Path, ...] = ()
    """Folders or CSV files of pairs."""
    sharp: tuple[Path, ...] = ()
    """Folders of sharp photographs, compared with themselves after restoring."""
    blurry: tuple[Path, ...] = ()
    """Folders of blurred photographs without truth: how much brighter and how different they come out."""
    json: Path | None = None
    """Write all numbers here, image by image."""


def measure_pairs(restorer: Restorer, pairs: PairSet) -> dict[str, Any]:
    """Mean and worst gain, without and with the best shift of at most 2 pixels (of the input, of the result)."""
    images: list[dict[str, Any]] = []
    for pair in pairs:
        restored = restorer(pair.blurred)
        quality = compare(restored, pair)
        shifted = psnr_shifted(pair.blurred, pair.sharp), psnr_shifted(restored, pair.sharp)
        images.append(
            {
                "name": pair.name,
                "psnr_blurred": quality.psnr_blurred,
                "psnr": quality.psnr,
                "ssim": quality.ssim,
                "gain_db": quality.gain_db,
                "shifted_psnr_blurred": shifted[0],
                "shifted_psnr": shifted[1],
                "shifted_gain_db": shifted[1] - shifted[0],
            }
        )
    keys = [key for key in images[0] if key != "name"]
    worst = min(images, key=lambda image: float(image["gain_db"]))
    mean = {key: fmean(float(image[key]) for image in images) for key in keys}
    return {**mean, "worst_gain_db": worst["gain_db"], "worst": worst["name"], "images": images}


def measure_sharp(restorer: Restorer, folder: Path) -> dict[str, Any]:
    """PSNR of restored sharp photographs against themselves."""
    images: list[dict[str, Any]] = []
    for path in list_images(folder):
        image = read_image(path)
        images.append({"name": path.name, "psnr": psnr(restorer(image), image)})
    worst = min(images, key=lambda image: float(image["psnr"]))
    mean = fmean(float(image["psnr"]) for image in images)
    return {"psnr": mean, "worst_psnr": worst["psnr"], "worst": worst["name"], "images": images}


def measure_blurry(restorer: Restorer, folder: Path, longest_px: int = 1600) -> dict[str, Any]:
    """Change of the mean level and mean absolute change, in levels of 255; large photographs are scaled down first."""
    images: list[dict[str, Any]] = []
    for path in list_images(folder):
        image = read_image(path)
        scale = min(1.0, longest_px / max(image.shape[:2]))
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else image
        change = restorer(image).astype(np.float32) - image
        images.append({"name": path.name, "brighter": float(change.mean()), "changed": float(np.abs(change).mean())})
    return {key: fmean(image[key] for image in images) for key in ("brighter", "changed")} | {"images": images}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and, with ``--json``, write every number."""
    arguments = tyro.cli(Arguments, args=argv)
    model = load_checkpoint(arguments.checkpoint)
    restorer = TorchRestorer(model)
    result: dict[str, Any] = {
        "checkpoint": arguments.checkpoint.name,
        "sha256": sha256(arguments.checkpoint),
        "parameters": parameter_count(model),
        "macs_per_pixel": model.config.macs_per_pixel,
        "pairs": {name: measure_pairs(restorer, PairSet(path)) for name, path in by_name(arguments.val).items()},
        "blurry": {name: measure_blurry(restorer, path) for name, path in by_name(arguments.blurry).items()},
        "sharp": {"/".join(path.parts[-2:]): measure_sharp(restorer, path) for path in arguments.sharp},
    }
    table = Table("set", "PSNR", "gain", "SSIM", "gain, best shift", "worst image", box=None)
    for name, row in result["pairs"].items():
        worst = f"{row['worst_gain_db']:+.2f} {row['worst']}"
        numbers = f"{row['psnr']:.2f}", f"{row['gain_db']:+.2f}", f"{row['ssim']:.4f}", f"{row['shifted_gain_db']:+.2f}"
        table.add_row(name, *numbers, worst)
    for name, row in result["sharp"].items():
        table.add_row(f"{name} (sharp)", f"{row['psnr']:.2f}", "", "", "", f"{row['worst_psnr']:.2f} {row['worst']}")
    for name, row in result["blurry"].items():
        table.add_row(
            f"{name} (blurred)", "", "", "", "", f"{row['brighter']:+.2f} levels, {row['changed']:.2f} changed"
        )
    Console().print(table)
    if arguments.json:
        write_json(arguments.json, new_record("weights", {"checkpoint": arguments.checkpoint.name}, found=result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
