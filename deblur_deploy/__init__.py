"""Takes an image-deblurring U-Net from PyTorch to production, and runs it inside any app."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"

_HOMES = {
    "DeblurEngine": "deblur_deploy.runtime.engine",
    "DeblurError": "deblur_deploy.errors",
    "ModelContract": "deblur_deploy.contract",
    "Receipt": "deblur_deploy.runtime.receipt",
}

if TYPE_CHECKING:
    from deblur_deploy.contract import ModelContract
    from deblur_deploy.errors import DeblurError
    from deblur_deploy.runtime.engine import DeblurEngine
    from deblur_deploy.runtime.receipt import Receipt

__all__ = ["DeblurEngine", "DeblurError", "ModelContract", "Receipt"]


def __getattr__(name: str) -> object:
    # Lazily, so that importing the package costs nothing and needs nothing.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
