"""The stages from a checkpoint to ``.onnx`` files that keep the contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import msgspec
import onnx
from onnx import ModelProto

from deblur_deploy import __version__
from deblur_deploy.contract import Io, ModelContract, Precision
from deblur_deploy.files import sha256
from deblur_deploy.pipeline.artifact import Artifact
from deblur_deploy.pipeline.config import Layout
from deblur_deploy.pipeline.graph import assemble, export_body, in_half_precision
from deblur_deploy.training.checkpoint import load_checkpoint
from deblur_deploy.training.unet import UNet, parameter_count


def export_variants(checkpoint: Path, parent_sha256: str, folder: Path) -> dict[str, Any]:
    """The stage that writes every variant in floating point, and the bodies from which int8 is made."""
    unet = load_checkpoint(checkpoint)
    exporter = Exporter(unet, parent_sha256, folder)
    artifacts = [exporter.fp32(), exporter.fp16(), exporter.floats()]
    exporter.save_bodies()
    return {
        "artifacts": [artifact.about() for artifact in artifacts],
        "network": msgspec.to_builtins(unet.config),
        "parameters": parameter_count(unet),
        "macs_per_pixel": unet.config.macs_per_pixel,
    }


class Exporter:
    """Writes the variants of one network into one folder; the body in each layout is exported only once.

    ``bodies`` is a folder in which :meth:`save_bodies` has left them, or None.
    """

    def __init__(self, unet: UNet, parent_sha256: str, folder: Path, bodies: Path | None = None) -> None:
        self.unet, self.parent, self.folder, self.bodies = unet, parent_sha256, folder, bodies
        self._bodies: dict[Layout, ModelProto] = {}

    def fp32(self) -> Artifact:
        """uint8 images, fp32 arithmetic: what every other variant is compared with."""
        return self._save("fp32", self.body("planes"), "fp32", "uint8", "planes")

    def fp16(self) -> Artifact:
        """uint8 images, fp16 arithmetic; scaling, the residual sum and rounding stay fp32."""
        return self._save("fp16", in_half_precision(self.body("planes")), "fp16", "uint8", "planes")

    def floats(self) -> Artifact:
        """float32 images in [0, 1], fp32 arithmetic: for sources of more than 8 bits."""
        return self._save("float", self.body("planes"), "fp32", "float32", "planes")

    def int8(self, body: ModelProto, layout: Layout, folder: Path | None = None) -> Artifact:
        """uint8 images around a quantized ``body``; ``rows`` for ONNX Runtime's own CPU kernels.

        ``folder`` is another than the exporter's, for a trial.
        """
        return self._save("int8" if layout == "rows" else f"int8-{layout}", body, "int8", "uint8", layout, folder)

    def body(self, layout: Layout) -> ModelProto:
        """The fp32 body, between the rearrangements of ``layout``."""
        if layout not in self._bodies:
            saved = self.bodies and onnx.load(self.bodies / f"body-{layout}.onnx")
            self._bodies[layout] = saved or export_body(self.unet, layout)
        return self._bodies[layout]

    def save_bodies(self) -> None:
        """Leave the body of every layout in the folder, for stages that quantize it."""
        for layout in get_args(Layout):
            onnx.save(self.body(layout), self.folder / f"body-{layout}.onnx")

    def _save(
        self, name: str, body: ModelProto, precision: Precision, io: Io, layout: Layout, folder: Path | None = None
    ) -> Artifact:
        config = self.unet.config
        model = assemble(body, config, layout=layout, io=io)
        contract = ModelContract(
            io=io,
            precision=precision,
            size_divisor=config.size_divisor,
            receptive_radius_px=config.receptive_radius_px,
            macs_per_pixel=config.macs_per_pixel,
            parent_sha256=self.parent,
            library_version=__version__,
        )
        onnx.helper.set_model_props(model, contract.to_metadata())
        model.producer_name, model.producer_version = "deblur_deploy", __version__
        onnx.checker.check_model(model, full_check=True)
        path = (folder or self.folder) / f"{name}.onnx"
        onnx.save(model, path)
        return Artifact(
            name=name,
            path=path,
            sha256=sha256(path),
            parent_sha256=self.parent,
            precision=precision,
            io=io,
            layout=layout,
        )
