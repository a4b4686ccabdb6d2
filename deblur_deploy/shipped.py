"""Where the model that ships with the package lies: inside the wheel, or in ``models/`` of a source checkout."""

from pathlib import Path

_HERE = Path(__file__).parent

MODELS = _HERE / "models" if (_HERE / "models").is_dir() else _HERE.parent / "models"
"""Folder with ``hd.safetensors`` (weights) and bundles: ``hd/``, which ``deblur-export`` made from them, and others."""

DEFAULT_CHECKPOINT = MODELS / "hd.safetensors"
DEFAULT_BUNDLE = MODELS / "hd"
