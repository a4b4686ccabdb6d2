"""What every stage knows of a network, whichever door it came in by: the facts about its float ONNX body.

The body takes ``graph.BLOCKS`` and gives ``graph.CORRECTION``; everything behind the doors (ends, fp16, int8,
verification) works from the body and these facts alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from deblur_deploy.pipeline.convention import Convention

if TYPE_CHECKING:
    from onnx import ModelProto

    from deblur_deploy.training.unet import UNet

EVERYTHING_PX = 1 << 20
"""Radius in pixels that no image exceeds."""


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about one body."""

    size_divisor: int
    """Heights and widths are multiples of this; the graph around the body pads to it, and tiles begin on it."""
    receptive_radius_px: int
    """No input pixel farther away changes an output pixel; ``EVERYTHING_PX`` if the network sees everything."""
    macs_per_pixel: float
    """Multiply-accumulate operations, per input pixel."""
    values_per_pixel: float = 0.0
    """Floats that its operations give, per input pixel, where that was counted."""
    parameters: int
    """Number of weights."""
    stem: int = 1
    """The body reads blocks of this many pixels squared, with channels (row, column, colour)."""
    residual: bool = False
    """Whether the body gives what is to be added to the image, and not the image."""
    least_px: int = 1
    """Smallest height and width that the body takes, a multiple of the divisor; the graph pads to that, too."""
    sees_everything: bool = False
    """Whether a far pixel may change any other, so that no cut into tiles is exact."""
    any_batch: bool = True
    """Whether the body takes more than one image at once."""
    ours: bool = False
    """Whether it is a U-Net of ours, for which an int8 that does not keep the budget is a failure."""

    @property
    def work_per_pixel(self) -> float:
        """What an input pixel costs, in multiplications: to write and read a float takes a CPU as long as about 20."""
        return self.macs_per_pixel + 20 * self.values_per_pixel

    @property
    def multiple(self) -> int:
        """What heights and widths of the body's input, in blocks, are multiples of."""
        return self.size_divisor // self.stem

    @classmethod
    def of(cls, unet: UNet) -> Network:
        """The facts about one of our U-Nets."""
        from deblur_deploy.training.unet import parameter_count  # torch, which a run from the cache does without

        config = unet.config
        return cls(
            size_divisor=config.size_divisor,
            receptive_radius_px=config.receptive_radius_px,
            macs_per_pixel=config.macs_per_pixel,
            parameters=parameter_count(unet),
            stem=config.stem,
            residual=config.residual,
            ours=True,
        )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A float body with its facts."""

    body: ModelProto
    network: Network
    convention: Convention
    notes: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)
    """For the manifest: what there is to say of the network's shape."""
