"""What ``deblur-bench --tune`` found fastest on this machine, kept in the user's cache directory.

A choice counts for one model on one machine with one set of versions: all three are in the file and in its name, so
that after any change the engine goes by its usual rules again.  So it does with a file that it cannot make sense of.
"""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from deblur_deploy import __version__
from deblur_deploy.bundles.manifest import MANIFEST
from deblur_deploy.files import sha256, writing_file
from deblur_deploy.runtime.arguments import MOST_THREADS
from deblur_deploy.system.folders import cache_folder
from deblur_deploy.system.hardware import gpu_models, processor
from deblur_deploy.system.threads import usable_cores
from deblur_deploy.wheels import ONNXRUNTIMES, versions

SCHEMA = 1
_PACKAGES = ("numpy", *ONNXRUNTIMES, "onnxruntime-ep-openvino")
_MOST_BYTES = 2**16
_MOST = {"threads": MOST_THREADS, "tile_pixels": 2**40}


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """One way to run a model."""

    variant: str
    """Which file of the bundle; the stem of a file that stands alone."""
    provider: str
    threads: int | None
    """Cores to use; None where the provider does not compute on them."""
    fixed: bool
    """Whether shapes that come often get sessions of their own."""
    tile_pixels: int | None
    """Larger images are cut into tiles of at most this; None goes by memory alone."""
    date: str
    """When it was measured, by ISO 8601."""

    def __post_init__(self) -> None:
        if not all(isinstance(value, str) for value in (self.variant, self.provider, self.date)):
            raise ValueError("variant, provider and date must be text")
        if not isinstance(self.fixed, bool):
            raise ValueError(f"fixed is {self.fixed!r}; allowed: true, false")
        for name, value in (("threads", self.threads), ("tile_pixels", self.tile_pixels)):
            if value is not None and (type(value) is not int or not 1 <= value <= _MOST[name]):
                raise ValueError(f"{name} is {value!r}; allowed: none, or a whole number from 1 to {_MOST[name]}")


def load(model: Path) -> Tuned | None:
    """The choice that was kept for ``model`` (a bundle folder or a file) here; None if there is none that holds."""
    try:
        folder = cache_folder()
        # Where nothing was ever tuned, nobody waits for the versions of packages.
        if not (folder / "tuned").is_dir():
            return None
        key = _key(model)
        with _path(key, folder).open("rb") as file:
            kept = json.loads(file.read(_MOST_BYTES))
        if kept["schema"] != SCHEMA or kept["key"] != key:
            return None
        return Tuned(**{field.name: kept["tuned"][field.name] for field in fields(Tuned)})
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def save(model: Path, tuned: Tuned, folder: Path | None = None) -> Path:
    """Keep a choice, whole or not at all, in ``folder`` or the cache; returns the file.  Raises OutputError."""
    key = _key(model)
    path = _path(key, folder or cache_folder())
    with writing_file(path) as temporary:
        temporary.write_text(
            json.dumps({"schema": SCHEMA, "key": key, "tuned": asdict(tuned)}, indent=1) + "\n", encoding="utf-8"
        )
    return path


def _key(model: Path) -> dict[str, Any]:
    return {
        # A manifest names the hash of every file.
        "model": sha256(model / MANIFEST if model.is_dir() else model),
        "machine": {
            "processor": processor(),
            "cores": usable_cores(),
            "system": f"{platform.system()} {platform.machine()}",
            "gpus": gpu_models(),
        },
        "versions": {"python": platform.python_version(), "deblur_deploy": __version__, **versions(*_PACKAGES)},
    }


def _path(key: dict[str, Any], folder: Path) -> Path:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder / "tuned" / f"{name[:32]}.json"
