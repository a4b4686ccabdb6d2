"""How somebody's network takes and gives images: layout, range, order of colours, sizes.

``Convention`` translates in both directions, in numpy for the reference and in ONNX for the body, so that everything
behind the doors sees float NCHW RGB in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from deblur_deploy.media.images import Image

Array = NDArray[Any]
Runner = Callable[[Array], Mapping[str, Array]]
"""A network as it came: a batch in its own convention to its outputs by name; raises whatever it fails with."""

PlaneOrder = Literal["nchw", "nhwc"]
Range = Literal["1", "255", "-1"]
"""Pixels in [0, 1], in [0, 255] or in [-1, 1]."""
Colour = Literal["rgb", "bgr"]

SPANS: dict[Range, tuple[float, float]] = {"1": (1.0, 0.0), "255": (255.0, 0.0), "-1": (2.0, -1.0)}
"""(factor, offset) that bring [0, 1] to the range."""


class Convention(msgspec.Struct, frozen=True, kw_only=True):
    """How one network takes and gives images."""

    layout: PlaneOrder = "nchw"
    range: Range = "1"
    colour: Colour = "rgb"
    input_bytes: bool = False
    """Whether it takes uint8, and not float."""
    output: str = ""
    """Name of the output that is the restored image."""
    divisor: int = 1
    """It takes heights and widths that are multiples of this."""
    least_px: int = 1
    """And not smaller than this."""
    any_batch: bool = True
    """Whether it takes more than one image at once."""

    def words(self) -> str:
        """In words, for people."""
        spans = {"1": "[0, 1]", "255": "[0, 255]", "-1": "[-1, 1]"}
        kind = "uint8" if self.input_bytes else "float"
        sizes = "any size" if self.divisor == 1 else f"multiples of {self.divisor}"
        least = f" from {self.least_px}" if self.least_px > self.divisor else ""
        return f"{kind} {self.layout.upper()} {self.colour.upper()} in {spans[self.range]}, {sizes}{least}"

    def to_raw(self, batch: NDArray[np.float32]) -> Array:
        """What the network takes, of float NCHW RGB in [0, 1]."""
        factor, offset = SPANS[self.range]
        raw: Array = batch if self.colour == "rgb" else batch[:, ::-1]
        raw = raw * np.float32(factor) + np.float32(offset)
        if self.layout == "nhwc":
            raw = raw.transpose(0, 2, 3, 1)
        if self.input_bytes:
            raw = np.rint(raw).clip(0, 255).astype(np.uint8)
        return np.ascontiguousarray(raw)

    def from_raw(self, raw: Array) -> NDArray[np.float32]:
        """Float NCHW RGB around [0, 1], of what the network gave."""
        factor, offset = SPANS["255" if raw.dtype == np.uint8 else self.range]
        planes = raw.astype(np.float32)
        if self.layout == "nhwc":
            planes = planes.transpose(0, 3, 1, 2)
        planes = (planes - np.float32(offset)) / np.float32(factor)
        result: NDArray[np.float32] = planes if self.colour == "rgb" else planes[:, ::-1]
        return result


@dataclass(frozen=True)
class Reference:
    """A network as it came, as a ``Restorer``: what every file made of it is compared with.

    Sizes that it does not take are padded below and to the right with the edge pixels.
    """

    run: Runner
    convention: Convention

    def __call__(self, image: Image) -> Image:
        how = self.convention
        height, width = image.shape[:2]
        below, right = (max(-side % how.divisor, how.least_px - side) for side in (height, width))
        padded = np.pad(image, ((0, below), (0, right), (0, 0)), mode="edge")
        planes = padded.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
        restored = how.from_raw(self.run(how.to_raw(planes))[how.output])
        levels = np.rint(restored[0].clip(0, 1) * np.float32(255)).astype(np.uint8)
        return np.ascontiguousarray(levels.transpose(1, 2, 0)[:height, :width])
