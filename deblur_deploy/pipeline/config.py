"""What can be chosen of each stage, and nothing else: a command line, or a run that finds all in the cache, needs the
choices without torch and onnx, which take seconds to import.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Layout = Literal["planes", "rows"]
"""How the graph rearranges pixels; see ``pipeline.graph``."""

Method = Literal["minmax", "percentile", "entropy"]


class Int8Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to quantize."""

    method: Method = "minmax"
    """How activation ranges are found on the calibration photographs."""
    tiles: int = 16
    """Calibration tiles, spread over the photographs."""
    tile_px: int = 256
    """Height and width of a tile; less where the smallest photograph allows no more."""

    def __post_init__(self) -> None:
        for name, lowest in (("tiles", 1), ("tile_px", 16)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {lowest} or more")


class VerifyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What must hold for a bundle to be written."""

    fp16_max_drop_db: float = 0.02
    """PSNR that fp16 may lose against fp32, mean over the pairs."""
    int8_max_drop_db: float = 0.05
    """PSNR that int8 may lose against fp32, mean over the pairs."""
    max_differing: float = 0.001
    """Share of uint8 values in which fp32 ONNX may differ from torch, by one level."""
    random_sizes: int = 6
    """Random images of random sizes, besides one of 1x1, on which fp32 ONNX is compared with torch."""
    width_px: int = 1280
    """Width of the image that is timed."""
    height_px: int = 720
    """Height of the image that is timed."""
    rounds: int = 10
    """Timed calls of each variant on each provider."""
    providers: tuple[str, ...] = ()
    """Providers to run every variant on; empty means all that are present."""

    def __post_init__(self) -> None:
        for name, most in (("fp16_max_drop_db", 100), ("int8_max_drop_db", 100), ("max_differing", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 0 to {most}")
        for name, least, last in (
            ("random_sizes", 0, 1000),
            ("width_px", 1, 16384),
            ("height_px", 1, 16384),
            ("rounds", 1, 1000),
        ):
            if not least <= getattr(self, name) <= last:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {least} to {last}")
