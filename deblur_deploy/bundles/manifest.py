"""Reading a bundle: which variants there are, and what was measured of each.

Only what the runtime needs is read; the manifest holds more (stages, hashes, versions).  ``pipeline.bundle`` writes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, get_args

from deblur_deploy.contract import Io, Precision
from deblur_deploy.errors import ModelError
from deblur_deploy.files import existing

MANIFEST = "bundle.json"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One ``.onnx`` of a bundle."""

    name: str
    """``fp32``, ``fp16``, ``int8`` or ``float`` (fp32 arithmetic, float32 in and out)."""
    path: Path
    sha256: str
    precision: Precision
    io: Io
    layout: str = "planes"
    """``rows`` suits ONNX Runtime's own CPU kernels, ``planes`` every other provider."""
    drop_db: float
    """PSNR against ground truth that this variant loses against the fp32 one."""
    latency_ms: dict[str, float]
    """Median at 1280x720 by provider, as measured on the machine that made the bundle."""
    slower_than_fp32_on: tuple[str, ...] = ()
    """Providers on which fp32 was faster there."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The directory that ``deblur-export`` writes."""

    path: Path
    name: str
    variants: dict[str, Variant]

    @classmethod
    def read(cls, path: Path) -> Bundle:
        """Read ``path/bundle.json``.

        Raises MissingFileError if there is none, ModelError if it is damaged or names files that are not there.
        """
        existing(path, kind="folder")
        manifest = existing(path / MANIFEST, kind="file")
        try:
            data: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise ModelError(
                    f"{manifest} has schema {data['schema']}, this version reads {SCHEMA}; export it again"
                )
            variants = {row["name"]: _variant(path, row) for row in data["variants"]}
            bundle = cls(path=path, name=str(data["name"]), variants=variants)
        except ModelError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, OSError) as error:
            raise ModelError(f"{manifest} is damaged ({error!r}); export the bundle again") from None
        if not variants:
            raise ModelError(f"{manifest} lists no variants; export the bundle again")
        return bundle


def _variant(folder: Path, row: dict[str, Any]) -> Variant:
    file = str(row["file"])
    # A manifest is data from somewhere else: it must not reach outside its own folder.
    if Path(file).name != file:
        raise ModelError(f"{folder / MANIFEST} names {file!r}, which is not a file inside the bundle")
    if not (folder / file).is_file():
        raise ModelError(f"{folder} lacks {file}, which its {MANIFEST} names; export the bundle again")
    if row["precision"] not in get_args(Precision) or row["io"] not in get_args(Io):
        raise ValueError(f"precision {row['precision']!r} with io {row['io']!r}")
    drop_db = float(row["drop_db"])
    latency_ms = {str(key): float(value) for key, value in row["latency_ms"].items()}
    if not all(map(isfinite, (drop_db, *latency_ms.values()))):
        raise ValueError(f"a measurement of {file} is not a finite number")
    return Variant(
        name=str(row["name"]),
        path=folder / file,
        sha256=str(row["sha256"]),
        precision=row["precision"],
        io=row["io"],
        layout=str(row.get("layout", "planes")),
        drop_db=drop_db,
        latency_ms=latency_ms,
        slower_than_fp32_on=tuple(map(str, row.get("slower_than_fp32_on", ()))),
    )
