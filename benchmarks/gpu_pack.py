"""What must travel to a machine with a GPU but no registry, in one folder: training data made small, wheels, weights.

    python -m benchmarks.gpu_pack PACK --photos FOLDER --pairs FOLDER... --frames FOLDER --init CHECKPOINT

Pictures become WebP, photographs at most ``photo_px`` long; quality falls until everything fits into ``limit_mb``.
``benchmarks/on_gpu.sh PACK`` takes it from there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import tyro

from deblur_deploy.errors import InputError
from deblur_deploy.files import writing_folder
from deblur_deploy.media.images import read_image
from deblur_deploy.media.listing import look_into

WHEELS = ("docstring-parser", "filelock", "msgspec", "psutil", "typeguard", "tyro")
"""What deblur-train and the benchmarks need beyond torch, accelerate, safetensors, OpenCV, scikit-image, jinja2,
matplotlib and rich."""
QUALITIES = (92, 88, 84, 80, 75, 70, 60)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Pack data, wheels and weights for a GPU."""

    pack: tyro.conf.Positional[Path]
    """Folder to make."""
    photos: Path
    """Sharp photographs."""
    pairs: tuple[Path, ...] = ()
    """Folders of pairs (sharp/, blur/)."""
    frames: tuple[Path, ...] = ()
    """Folders of consecutive frames."""
    init: Path
    """Weights to start from."""
    photo_px: int = 960
    """Longest side of a photograph."""
    limit_mb: float = 45
    """Megabytes of all pictures together."""
    python: str = "3.12"
    """Python of the other machine."""
    force: bool = False
    """Replace the folder if it is there."""


def pictures(arguments: Arguments) -> Iterator[tuple[Path, Path, int | None]]:
    """(source, place in the pack, longest side)."""
    for path in look_into(arguments.photos, recursive=True).paths:
        yield path, Path("photos") / path.relative_to(arguments.photos).with_suffix(".webp"), arguments.photo_px
    for kind, folders in (("pairs", arguments.pairs), ("frames", arguments.frames)):
        for folder in folders:
            for path in look_into(folder, recursive=True).paths:
                yield path, Path(kind) / folder.name / path.relative_to(folder).with_suffix(".webp"), None


def write(arguments: Arguments, folder: Path, quality: int) -> int:
    """All pictures at ``quality``; returns their bytes, or stops as soon as they are too many."""
    total = 0
    for source, place, longest in pictures(arguments):
        image = read_image(source)[..., ::-1]
        scale = min(1.0, longest / max(image.shape[:2])) if longest else 1.0
        if scale < 1:
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        _, data = cv2.imencode(".webp", image, [cv2.IMWRITE_WEBP_QUALITY, quality])
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(data.tobytes())
        total += len(data)
        if total > arguments.limit_mb * 1e6:
            break
    return total


def download(folder: Path, python: str) -> None:
    """Fetch the wheels for that Python on Linux."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--python-version", python, "--dest", str(folder), *WHEELS], check=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the pack."""
    arguments = tyro.cli(Arguments, args=argv)
    with writing_folder(arguments.pack, force=arguments.force) as folder:
        for quality in QUALITIES:
            if (total := write(arguments, folder, quality)) <= arguments.limit_mb * 1e6:
                break
        else:
            raise InputError(f"more than {arguments.limit_mb} MB even at quality {QUALITIES[-1]}; lower --photo-px")
        shutil.copy(arguments.init, folder / "init.safetensors")
        download(folder / "wheels", arguments.python)
    print(f"{arguments.pack}: {total / 1e6:.1f} MB of pictures at quality {quality}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
