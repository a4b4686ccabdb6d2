"""Which model an engine is told to run, and the bytes of its files, checked where a bundle says what they must be."""

from __future__ import annotations

import hashlib
from pathlib import Path

from deblur_deploy.bundles.manifest import Bundle
from deblur_deploy.bundles.names import located
from deblur_deploy.errors import MissingFileError, ModelError
from deblur_deploy.files import existing, kind_of
from deblur_deploy.shipped import DEFAULT_BUNDLE


def found(model: str | Path | None) -> Bundle | Path:
    """The bundle or the ``.onnx`` file that ``model`` names; None is the bundle that ships with us.

    Raises MissingFileError or ModelError.
    """
    if model is None:
        if not DEFAULT_BUNDLE.is_dir():
            raise MissingFileError(f"no model ships with this installation ({DEFAULT_BUNDLE}); give a bundle or .onnx")
        return Bundle.read(DEFAULT_BUNDLE)
    path = located(model)
    kind = kind_of(path)
    if kind == "folder":
        return Bundle.read(path)
    if not kind:
        # Here, since a path needs none of it.
        from deblur_deploy.bundles.hub import fetched, url

        if place := url(model):
            return Bundle.read(fetched(place))
        raise MissingFileError(f"no such model: {path}; give a bundle folder or an .onnx file of deblur-export")
    return existing(path, kind="file")


def content(path: Path, sha256: str | None = None) -> bytes:
    """What the file holds; raises ModelError if it cannot be read, or is not what its bundle says (``sha256``)."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise ModelError(f"{path} is not the file that its bundle.json describes; export the bundle again")
    return data
