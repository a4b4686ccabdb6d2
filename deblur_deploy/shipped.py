"""Where the model that ships with the package lies: inside the wheel, or in ``models/`` of a source checkout."""

from pathlib import Path

_HERE = Path(__file__).parent

MODELS = _HERE / "models" if (_HERE / "models").is_dir() else _HERE.parent / "models"
"""Folder with ``hd.safetensors`` (weights) and ``hd/`` (the bundle that ``deblur-export`` made from them)."""

DEFAULT_CHECKPOINT = MODELS / "hd.safetensors"
DEFAULT_BUNDLE = MODELS / "hd"
