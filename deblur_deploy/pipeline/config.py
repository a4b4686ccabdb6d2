"""What can be chosen of each stage, and nothing else: a command line, or a run that finds all in the cache, needs the
choices without torch and onnx, which take seconds to import.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from deblur_deploy.errors import check_bounds

Layout = Literal["planes", "rows"]
"""How the graph rearranges pixels; see ``pipeline.graph``."""

Statistic = Literal["minmax", "moving_average", "percentile", "entropy"]
"""What ONNX Runtime's calibrators take for the range of an activation."""

Method = Literal["result", Statistic]
"""How activation ranges are found: by what they do to the result, or by the values of the activation alone."""


Rounding = Literal["together", "nearest"]
"""How weights are rounded: each making up for the errors of those before it (GPTQ), or by itself."""


class Int8Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to quantize, and what int8 may cost."""

    max_drop_db: float = 0.02
    """PSNR that int8 may lose against fp32, mean over the pairs; layers go back to float until it is kept."""
    max_image_drop_db: float = 0.1
    """PSNR that int8 may lose against fp32 on any single one of the pairs."""
    min_macs: float = 0.5
    """Share of the multiplications that must stay in int8; if the budget cannot be kept so, the export fails."""
    method: Method = "result"
    """How activation ranges are found on the calibration photographs; what is tried first."""
    rounding: Rounding = "together"
    """How weights are rounded: together, so that their errors cancel (GPTQ); or each to the nearest, faster."""
    search: Literal["one", "first", "all"] = "first"
    """Try only this method; others until one keeps the budget; or measure all and keep the best."""
    nncf: bool = False
    """Let NNCF's quantizer, if it is installed, compete too."""
    tiles: int = 128
    """Calibration tiles, spread over the photographs."""
    tile_px: int = 256
    """Height and width of a tile; less where the photographs allow no more."""
    sensitivity_crops: int = 4
    """Crops of the pairs on which each layer's own loss is measured; 0 leaves that out of the report."""

    def __post_init__(self) -> None:
        check_bounds(self, max_drop_db=(0, 100), max_image_drop_db=(0, 100), min_macs=(0, 1))
        check_bounds(self, tiles=(1, None), tile_px=(16, None), sensitivity_crops=(0, None))


class VerifyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What must hold for a bundle to be written."""

    fp16_max_drop_db: float = 0.02
    """PSNR that fp16 may lose against fp32, mean over the pairs."""
    fp16_min_db: float = 60
    """PSNR of fp16's results taken against fp32's, at least: on the pairs, and on black, white, random and checkered
    images, where no activation may grow beyond what fp16 can hold either."""
    max_differing: float = 0.001
    """Share of uint8 values in which fp32 ONNX may differ from torch, by one level."""
    random_sizes: int = 6
    """Random images of random sizes, besides one of 1x1, on which fp32 ONNX is compared with torch."""
    width_px: int = 1280
    """Width of the image that is timed."""
    height_px: int = 720
    """Height of the image that is timed."""
    rounds: int = 10
    """Timed calls of each variant on each provider; fewer, but at least three, of a network that takes seconds."""
    providers: tuple[str, ...] = ()
    """Providers to run every variant on; empty means all that are present."""

    def __post_init__(self) -> None:
        check_bounds(self, fp16_max_drop_db=(0, 100), fp16_min_db=(0, 100), max_differing=(0, 1))
        check_bounds(self, random_sizes=(0, 1000), width_px=(1, 16384), height_px=(1, 16384), rounds=(1, 1000))


class InputConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a network of somebody else's takes images; what is ``auto`` is found out, and told."""

    layout: Literal["auto", "nchw", "nhwc"] = "auto"
    """Order of the dimensions."""
    range: Literal["auto", "1", "255", "-1"] = "auto"
    """Pixels in [0, 1], in [0, 255] or in [-1, 1]."""
    colour: Literal["auto", "rgb", "bgr"] = "auto"
    """Order of the colours."""


class NetworkConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A network that is no checkpoint of ours."""

    model: str = ""
    """package.module:build, a function that returns the torch module; CHECKPOINT is then its state dict."""
    arch: Literal["auto"] = "auto"
    """Architecture of a file of weights that is none of ours: recognised by spandrel (extra networks)."""
    divisor: int | None = None
    """Heights and widths that it takes are multiples of this; without it, that is found out."""
    output: str = ""
    """Which of its outputs is the restored image; without it, the first of the image's size, or the best."""
    input: InputConfig = InputConfig()
    """How it takes images."""

    def __post_init__(self) -> None:
        if self.divisor is not None and not 1 <= self.divisor <= 512:
            raise ValueError(f"divisor is {self.divisor}; allowed: 1 to 512")
