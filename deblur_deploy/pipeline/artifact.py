"""What stages hand on: a file, what it came from, and what was measured of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deblur_deploy.contract import Io, Precision
from deblur_deploy.evaluation.quality import Quality
from deblur_deploy.files import sha256
from deblur_deploy.pipeline.config import Layout


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One ``.onnx`` variant."""

    name: str
    path: Path
    sha256: str
    parent_sha256: str
    """SHA-256 of the checkpoint that the weights came from."""
    precision: Precision
    io: Io
    layout: Layout

    def about(self) -> dict[str, str]:
        """What a stage's record says of the file; :meth:`of` reads it."""
        return {"name": self.name, "precision": self.precision, "io": self.io, "layout": self.layout}

    @classmethod
    def of(cls, about: dict[str, Any], folder: Path, parent_sha256: str) -> Artifact:
        """The artifact that :meth:`about` told of, in ``folder``."""
        path = folder / f"{about['name']}.onnx"
        return cls(path=path, sha256=sha256(path), parent_sha256=parent_sha256, **about)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One variant on one provider, at one size."""

    provider: str
    """What really ran it."""
    device: str
    arithmetic: str
    """Effective precision of the convolutions."""
    median_ms: float
    p95_ms: float
    int8_macs: float | None = None
    """Share of the multiplications that ran in int8; None where the provider does not tell."""
    drop_db: float | None = None
    """PSNR lost here against fp32 on the CPU, mean over the pairs; None on the CPU, where the variant has it."""
    worst_drop_db: float | None = None
    """The most that a single image lost here."""
    measured: str = ""
    """When: ISO 8601, UTC."""
    cached: bool = False
    """Whether an earlier run measured it, on this machine and with these versions."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A variant with everything that verification found out about it."""

    artifact: Artifact
    size_bytes: int
    quality: Quality
    """Mean over the verification pairs."""
    drop_db: float
    """PSNR lost against fp32, mean over the pairs."""
    worst_drop_db: float
    """The most that a single image lost."""
    db_to_fp32: float
    """PSNR of this variant's results taken against fp32's, in dB."""
    extremes_db: dict[str, float] = field(default_factory=dict)
    """The same on black, white, random and checkered images."""
    peak_activation: float | None = None
    """The largest value inside of the network on those images and the middle of the pairs; only asked for fp16, which
    holds 65504 at most."""
    runs: list[Run] = field(default_factory=list)
    slower_than_fp32_on: list[str] = field(default_factory=list)
    """Providers on which fp32 is faster: engines do not choose this variant there by themselves."""

    def on(self, provider: str) -> Run | None:
        """Its run on ``provider``, if its layout suits that one."""
        return next((run for run in self.runs if run.provider == provider), None)

    def row(self) -> dict[str, Any]:
        """What ``bundle.json`` and ``deblur-export --json`` say of this variant."""
        artifact = self.artifact
        return {
            "name": artifact.name,
            "file": artifact.path.name,
            "sha256": artifact.sha256,
            "size_bytes": self.size_bytes,
            "precision": artifact.precision,
            "io": artifact.io,
            "layout": artifact.layout,
            "psnr_blurred": round(self.quality.psnr_blurred, 4),
            "psnr": round(self.quality.psnr, 4),
            "ssim": round(self.quality.ssim, 5),
            "drop_db": round(self.drop_db, 4),
            "worst_drop_db": round(self.worst_drop_db, 4),
            "db_to_fp32": round(self.db_to_fp32, 2),
            "extremes_db": {name: round(value, 2) for name, value in self.extremes_db.items()},
            "latency_ms": {run.provider: round(run.median_ms, 2) for run in self.runs},
            "slower_than_fp32_on": self.slower_than_fp32_on,
            "runs": [asdict(run) for run in self.runs],
        }
