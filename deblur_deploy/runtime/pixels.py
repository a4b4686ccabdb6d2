"""Images as callers hold them <-> the RGB batches that the graph takes.

Accepted: uint8, uint16 (full range), float32 and float64 (in [0, 1]); HxW gray, HxWxC and NxHxWxC with C = 1 (gray),
3 (RGB) or 4 (RGB and alpha, which is passed through); any strides, any byte order, read-only or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deblur_deploy.errors import InputError

_ACCEPTED = "give uint8, uint16 or float in [0, 1], as HxW, HxWxC or NxHxWxC with C = 1 (gray), 3 (RGB) or 4 (RGBA)"
_LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What one caller's array looks like, checked."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    images: NDArray[Any]
    """The caller's array as NxHxWxC, a view."""

    @classmethod
    def of(cls, image: object) -> Layout:
        """Check ``image``; raises InputError that says what is accepted."""
        if not isinstance(image, np.ndarray):
            raise InputError(f"an image must be a numpy array, this is {type(image).__name__}; {_ACCEPTED}")
        kind = image.dtype.newbyteorder("=")
        if kind not in (np.uint8, np.uint16, np.float32, np.float64):
            raise InputError(f"an image of dtype {image.dtype} is not accepted; {_ACCEPTED}")
        plain = np.asarray(image)
        if plain.ndim == 2:
            images = plain[None, :, :, None]
        elif plain.ndim in (3, 4) and plain.shape[-1] in (1, 3, 4):
            images = plain if plain.ndim == 4 else plain[None]
        else:
            raise InputError(f"an image of shape {plain.shape} is not accepted; {_ACCEPTED}")
        if 0 in plain.shape[-3:] if plain.ndim > 2 else 0 in plain.shape:
            raise InputError(f"an image of shape {plain.shape} has no pixels; {_ACCEPTED}")
        if kind.kind == "f" and images.size:
            colour = images[..., :3]
            low, high = float(colour.min()), float(colour.max())
            # Written so that a NaN, which compares with nothing, is refused too.
            if not (low >= 0 and high <= 1):
                what = "NaN" if np.isnan(low) else f"values from {low:g} to {high:g}"
                raise InputError(f"a float image must lie in [0, 1], this one has {what}; {_ACCEPTED}")
        return cls(shape=image.shape, dtype=image.dtype, images=images)

    @property
    def exact_in_uint8(self) -> bool:
        """Whether the graph with bytes in and out loses nothing of this image."""
        return bool(self.dtype == np.uint8)

    def colour(self, index: int) -> NDArray[Any]:
        """Image ``index`` as HxWx3 RGB, a view where possible; where alpha is 0, in the colours seen around.

        What lies hidden there is arbitrary, mostly black, and would be smeared into what is seen.
        """
        image: NDArray[Any] = self.images[index]
        if image.shape[2] == 1:
            return np.broadcast_to(image, (*image.shape[:2], 3))
        return spread(image[..., :3], image[..., 3]) if image.shape[2] == 4 else image

    def result(self) -> NDArray[Any]:
        """An uninitialised array like the caller's, as NxHxWxC."""
        return np.empty(self.images.shape, self.dtype)

    def store(self, result: NDArray[Any], index: int, rgb: NDArray[Any]) -> None:
        """Write restored ``rgb`` (HxWx3, in the caller's dtype) as image ``index`` of ``result``."""
        target = result[index]
        if target.shape[2] == 1:
            if self.dtype.kind == "u":
                target[..., 0] = np.rint(rgb.astype(np.float32) @ _LUMA.astype(np.float32))
            else:
                # The weights' rounding must not make white brighter than white.
                target[..., 0] = np.clip(rgb @ _LUMA.astype(rgb.dtype), 0, 1)
        else:
            target[..., :3] = rgb
        if target.shape[2] == 4:
            given = self.images[index]
            target[..., 3] = given[..., 3]
            np.copyto(target[..., :3], given[..., :3], where=(given[..., 3:] == 0))


def spread(rgb: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """HxWx3 whose pixels of alpha 0 take colours from those around them, weighted by alpha; a view if there are none.

    Push and pull: cells of 2, 4, 8... pixels hold the mean of what is seen in them, and each hidden pixel takes that of
    the smallest cell that sees anything.
    """
    if (alpha != 0).all():
        return rgb
    height, width = alpha.shape
    colours = np.zeros(((height + 1) // 2, (width + 1) // 2, 3), np.float32)
    weights = np.zeros((*colours.shape[:2], 1), np.float32)
    most = np.float32(np.iinfo(alpha.dtype).max if alpha.dtype.kind == "u" else 1)
    quarters = [(slice(i, None, 2), slice(k, None, 2)) for i in (0, 1) for k in (0, 1)]
    for quarter in quarters:
        weight = alpha[quarter].astype(np.float32)[..., None] / most
        if alpha.dtype.kind == "f":  # which may be anything, as nobody checks it
            weight = np.clip(np.nan_to_num(weight), 0, 1)
        here = np.s_[: weight.shape[0], : weight.shape[1]]
        colours[here] += rgb[quarter] * weight
        weights[here] += weight
    seen = weights > 0
    if not seen.any():
        return rgb
    colours /= np.where(seen, weights, 1)
    coarse = spread(colours, np.minimum(weights[..., 0], 1))
    means = (np.rint(coarse) if rgb.dtype.kind == "u" else coarse).astype(rgb.dtype)
    filled = rgb.copy()
    for quarter in quarters:
        hidden = alpha[quarter] == 0
        np.copyto(filled[quarter], means[: hidden.shape[0], : hidden.shape[1]], where=hidden[..., None])
    return filled


def to_graph(rgb: NDArray[Any], io: str) -> NDArray[Any]:
    """HxWx3 of an accepted dtype as the contiguous batch of one that a graph with ``io`` takes."""
    if io == "uint8":
        return np.ascontiguousarray(rgb)[None]
    scale = np.iinfo(rgb.dtype).max if rgb.dtype.kind == "u" else 1
    planes = np.ascontiguousarray(rgb.transpose(2, 0, 1), np.float32)
    return (planes / np.float32(scale) if scale != 1 else planes)[None]


def from_graph(batch: NDArray[Any], io: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The one image of a restored batch as contiguous HxWx3 in ``dtype`` and its range."""
    image: NDArray[Any] = batch[0]
    if io == "uint8":
        return image
    if dtype.kind == "u":
        image = np.rint(image * np.float32(np.iinfo(dtype).max))
    return np.ascontiguousarray(image.transpose(1, 2, 0), dtype)
