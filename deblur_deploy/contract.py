"""What an exported model promises, and how the promise travels inside the ONNX file.

An app in any language can embed a model by reading these few metadata entries: everything else (padding, scaling,
clamping, rounding) is inside the graph.  Only the standard library is needed here, since the runtime reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Literal, get_args

from deblur_deploy.errors import ModelError

KEY = "deblur_deploy.contract"
"""The ONNX metadata key under which the contract is stored, as one JSON object."""

CHECKPOINT_KEY = "deblur_deploy.unet"
"""The safetensors metadata key under which a checkpoint's config is stored, as one JSON object."""

INPUT, OUTPUT = "image", "restored"
"""Names of the graph's only input and only output."""

BATCH_DIM, HEIGHT_DIM, WIDTH_DIM = "batch", "height", "width"
"""Names of the graph's free dimensions, which a session may fix."""

OLDEST_ONNXRUNTIME = "1.15"
"""What runs an exported file by itself, in any language; :class:`~deblur_deploy.DeblurEngine` asks for more."""

Io = Literal["uint8", "float32"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]


@dataclass(frozen=True, kw_only=True)
class ModelContract:
    """The promise of one ``.onnx`` file."""

    schema: int = 1
    """Version of this record."""
    io: Io = "uint8"
    """``uint8``: NHWC in [0, 255], rounded; ``float32``: NCHW in [0, 1], clamped.  The same for input and output."""
    colour: str = "RGB"
    """Order of the three channels."""
    precision: Precision = "fp32"
    """Arithmetic of the convolutions."""
    size_divisor: int
    """The network works on multiples of this many pixels; the graph pads to it and crops again."""
    receptive_radius_px: int
    """No input pixel farther away than this (in rows or columns) changes an output pixel."""
    sees_everything: bool = False
    """Whether any input pixel may change any output pixel (pooling, attention or normalization over the image): then
    no cut into tiles is exact."""
    macs_per_pixel: float
    """Multiply-accumulate operations of all convolutions, per input pixel."""
    parent_sha256: str
    """SHA-256 of the checkpoint file that the weights came from."""
    library_version: str
    """Version of deblur_deploy that exported the file."""

    def to_metadata(self) -> dict[str, str]:
        """The ONNX metadata entries that carry this contract."""
        return {KEY: json.dumps(asdict(self), sort_keys=True)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], where: object) -> ModelContract:
        """Read the contract from ONNX metadata; ``where`` is named in errors.

        Raises ModelError if there is none, or if it is of another schema or incomplete.
        """
        if KEY not in metadata:
            raise ModelError(f"{where} carries no deblur_deploy contract; export it with deblur-export")
        try:
            values = json.loads(metadata[KEY])
            if values["schema"] != cls.schema:
                raise ModelError(
                    f"{where} has contract schema {values['schema']}, this version reads {cls.schema}; export it again"
                )
            # Files of earlier versions lack what came later, and say so by its default.
            named = {field.name for field in fields(cls) if field.default is MISSING or field.name in values}
            contract = cls(**{name: values[name] for name in named})
            if not contract._sound():
                raise TypeError(f"a value is of the wrong kind: {values}")
            return contract
        except ModelError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelError(f"{where} has a damaged deblur_deploy contract ({error!r}); export it again") from None

    def _sound(self) -> bool:
        numbers = (self.size_divisor, self.receptive_radius_px, self.macs_per_pixel)
        return (
            self.io in get_args(Io)
            and self.precision in get_args(Precision)
            and isinstance(self.sees_everything, bool)
            and all(isinstance(value, int | float) and value >= 0 for value in numbers)
            and isinstance(self.size_divisor, int)
            and isinstance(self.receptive_radius_px, int)
            and self.size_divisor >= 1
        )
