"""What ``deblur-run`` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated

import tyro

from deblur_deploy.runtime.arguments import MOST_THREADS
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.runtime.variants import Wish


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Deblur images, folders, videos, and a camera or stream.

    Finished files are kept: run the same command again after an interruption and it does the rest. Metadata and
    profiles go along as they are; a file that could not stay what it is (an animation, CMYK, several pages) is refused.
    """

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Image or video files, or folders of them; or one live source: camera:0, or a URL such as rtsp://..."""
    out: Path = Path("restored")
    """Folder for the results, which have the names and formats of the inputs (a.gif becomes a.gif.png, as 256 colours
    cannot hold it); of a live source the video file."""
    model: Path | None = None
    """Bundle folder, its name (such as hd-quarter) or .onnx file of deblur-export; by default the shipped hd."""
    provider: str = "auto"
    """auto, cpu, openvino, cuda, tensorrt or another execution provider; a named one runs or fails."""
    precision: Wish = "auto"
    """auto is the fastest within 0.1 dB of fp32."""
    recursive: bool = False
    """Go into subfolders too."""
    glob: str = "*"
    """Only files of a folder whose names match this, such as 'IMG_*'."""
    overwrite: bool = False
    """Do files again whose result is there already."""
    threads: int | None = None
    """Cores to use; by default all that this process may use."""
    max_memory_mb: float | None = None
    """Larger images are cut into tiles; by default decided by the free memory."""
    max_megapixels: float = 268.4
    """Refuse images, and frames of videos, that state more pixels than this."""
    seconds: float | None = None
    """Length of what is recorded from a live source; by default until it ends, or Ctrl-C."""
    ray: tuple[str, ...] | None = None
    """Restore images on a Ray cluster, at this address or, without one, on this machine; inputs and out may be URLs.
    A worker has as many cores as --threads says, by default all of the smallest machine."""
    doctor: bool = False
    """Print what this machine offers, what is missing and how to mend it, and do nothing else."""

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"threads is {self.threads}; allowed: 1 to {MOST_THREADS}")
        for name in ("max_megapixels", "max_memory_mb", "seconds"):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value > 0):
                raise ValueError(f"{name.replace('_', '-')} is {value}; allowed: more than 0 and finite")

    @property
    def max_pixels(self) -> int:
        return int(self.max_megapixels * 1e6)

    def engine(self) -> DeblurEngine:
        return DeblurEngine(
            self.model, self.provider, self.precision, threads=self.threads, max_memory_mb=self.max_memory_mb
        )


USUAL = {
    RunConfig: (
        "inputs", "out", "model", "provider", "precision", "recursive", "glob", "overwrite", "seconds", "doctor",
    )
}  # fmt: skip
