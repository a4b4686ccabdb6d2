"""Keeps what was measured, as a JSON file: rows, and everything needed to believe them or to repeat them.

``deblur-bench`` and the scripts in ``benchmarks/`` write it; ``--compare`` and the report read it.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from deblur_deploy.errors import InputError
from deblur_deploy.evaluation.machine import commit, machine, package_versions
from deblur_deploy.files import existing, writing_file

SCHEMA = 1


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One candidate at one size; what could not be measured is None, and ``error`` says why."""

    model: str
    """Bundle, network or file."""
    variant: str
    """Which file of the bundle, or which peer."""
    provider: str
    """Who ran it: an execution provider, or the peer's library."""
    size: str
    """Width x height of the image, as in ``1280x720``; empty for quality alone."""
    data: str = ""
    """Which image pairs the quality is of."""
    error: str | None = None
    median_ms: float | None = None
    """uint8 array to uint8 array."""
    p95_ms: float | None = None
    best_ms: float | None = None
    calls: int = 0
    noise: float | None = None
    """Half the 95 % confidence interval of the median, relative to it."""
    steady_ms: float | None = None
    """Median of the calls' times without waiting for a core that another process held."""
    steady_noise: float | None = None
    waited: float | None = None
    """Share of the calls' time that was such waiting, on average."""
    peak_mb: float | None = None
    """Most memory of a process that does nothing else, Python and libraries included."""
    gpu_mb: float | None = None
    """Memory on the GPU that came into use between the start of the process and its third image."""
    load_ms: float | None = None
    """From importing the library to a model that is ready, in a new process."""
    first_ms: float | None = None
    """The first image of this size, in that process."""
    psnr_blurred: float | None = None
    """Mean PSNR of the blurred images against ground truth, in dB."""
    psnr: float | None = None
    """Mean PSNR of the restored images against ground truth, in dB."""
    ssim: float | None = None
    psnr_to_fp32: float | None = None
    """Mean PSNR of the restored images against those of fp32, in dB; None for fp32 itself."""
    worst_drop_db: float | None = None
    """PSNR that the image that loses most against fp32 loses, in dB; None for fp32 itself."""
    worst_image: str | None = None
    """Its name."""
    facts: dict[str, Any] = {}
    """The engine's receipt, or the peer's settings."""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes this row the same row in another run."""
        return self.model, self.variant, self.provider, self.size or self.data

    @property
    def pixels(self) -> int:
        """Pixels of one image."""
        return math.prod(map(int, self.size.split("x")))

    @property
    def frames_per_s(self) -> float | None:
        """Images in a second, one after the other."""
        return None if self.median_ms is None else 1e3 / self.median_ms

    @property
    def megapixels_per_s(self) -> float | None:
        """Megapixels in a second."""
        return None if self.median_ms is None else self.pixels / self.median_ms / 1e3

    @property
    def ran(self) -> str:
        """What really ran, in words; nothing where the row failed."""
        if self.error is not None:
            return ""
        receipt = self.facts.get("receipt")
        if receipt:
            return f"{receipt['provider']} in {receipt['effective_precision']}, {receipt['threads']} threads"
        return self.provider


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One run of a benchmark."""

    schema: int = SCHEMA
    benchmark: str
    date: str
    commit: str | None
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    """The options of the run, and the names of the image pairs."""
    reference_ms: dict[str, float] = {}
    """Median of one fixed computation (matrix product and copy) that took turns with the candidates, by size."""
    machine_noise: float | None = None
    """By how much that computation's medians differ, or how uncertain they are, at most: the machine's restlessness."""
    stolen: float | None = None
    """Share of the processor time of the run that a virtual machine's host took; None if unknown."""
    notes: list[str] = []
    """What was skipped, and why."""
    found: dict[str, Any] = {}
    """What else this benchmark found."""
    rows: list[Row] = []


def new_record(benchmark: str, settings: dict[str, Any], **values: Any) -> Record:
    """A record of this machine, now."""
    return Record(
        benchmark=benchmark,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        machine=machine(),
        versions=package_versions(),
        settings=settings,
        **values,
    )


def write_json(path: Path, record: msgspec.Struct) -> None:
    """Write a record, whole or not at all."""
    with writing_file(path) as temporary:
        temporary.write_bytes(to_json(record))


def to_json(record: msgspec.Struct) -> bytes:
    """A record as indented JSON."""
    plain = _rounded(msgspec.to_builtins(record))
    return msgspec.json.format(msgspec.json.encode(plain), indent=1) + b"\n"


def read_record(path: Path) -> Record:
    """Read what :func:`write_json` wrote; raises MissingFileError or InputError."""
    try:
        record = msgspec.json.decode(existing(path, kind="file").read_bytes(), type=Record)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a record of deblur-bench ({error}); write one with --json") from None
    if record.schema != SCHEMA:
        raise InputError(f"{path} has schema {record.schema}, this version reads {SCHEMA}; measure again")
    return record


COLUMNS = (
    "model", "variant", "provider", "size", "median_ms", "p95_ms", "best_ms", "calls", "noise", "megapixels_per_s",
    "frames_per_s", "steady_ms", "waited", "peak_mb", "gpu_mb", "load_ms", "first_ms", "data", "psnr_blurred", "psnr",
    "ssim", "psnr_to_fp32", "worst_drop_db", "worst_image", "ran", "error",
)  # fmt: skip
"""What CSV files hold of a row."""


def to_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV with a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([_short(getattr(row, name)) for name in COLUMNS])
    return text.getvalue()


def _short(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else _rounded(value)


def _rounded(value: Any) -> Any:
    # Six digits: more are noise, and make differences between two files unreadable.
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    # Names of files need not be UTF-8, and JSON and CSV must.
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
