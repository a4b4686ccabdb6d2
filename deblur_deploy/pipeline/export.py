"""The stages from a network to ``.onnx`` files that keep the contract."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import onnx
from onnx import ModelProto

from deblur_deploy import __version__
from deblur_deploy.contract import Io, ModelContract, Precision
from deblur_deploy.pipeline.artifact import Artifact
from deblur_deploy.pipeline.body import export_body
from deblur_deploy.pipeline.config import Layout
from deblur_deploy.pipeline.graph import assemble, in_half_precision, oldest_onnxruntime
from deblur_deploy.pipeline.network import Network, Prepared
from deblur_deploy.pipeline.rows import in_rows
from deblur_deploy.training.unet import UNet

BODY = "body.onnx"
"""The float body, for stages that quantize it."""


def export_variants(prepared: Prepared, parent_sha256: str, folder: Path) -> dict[str, Any]:
    """The stage that writes every variant in floating point, and the body from which int8 is made."""
    network = prepared.network
    exporter = Exporter(network, prepared.body, parent_sha256, folder)
    artifacts = [exporter.fp32(), exporter.fp16(), exporter.floats()]
    onnx.save(prepared.body, folder / BODY)
    return {
        "artifacts": [artifact.about() for artifact in artifacts],
        "onnxruntime": f">={oldest_onnxruntime(prepared.body)}",
        "body": msgspec.to_builtins(network),
        "convention": msgspec.to_builtins(prepared.convention),
        "notes": list(prepared.notes),
        "parameters": network.parameters,
        "macs_per_pixel": network.macs_per_pixel,
        **prepared.about,
    }


class Exporter:
    """Writes the variants of one network, whose float ``body`` is given in planes, into one folder."""

    def __init__(self, network: Network, body: ModelProto, parent_sha256: str, folder: Path) -> None:
        self.network, self.parent, self.folder = network, parent_sha256, folder
        self._bodies: dict[Layout, ModelProto] = {"planes": body}

    @classmethod
    def of(cls, unet: UNet, parent_sha256: str, folder: Path) -> Exporter:
        """For one of our U-Nets, which torch exports here."""
        return cls(Network.of(unet), export_body(unet), parent_sha256, folder)

    def fp32(self) -> Artifact:
        """uint8 images, fp32 arithmetic: what every other variant is compared with."""
        return self._save("fp32", self.body("planes"), "fp32", "uint8", "planes")

    def fp16(self) -> Artifact:
        """uint8 images, fp16 arithmetic; scaling, the residual sum and rounding stay fp32."""
        return self._save("fp16", in_half_precision(self.body("planes")), "fp16", "uint8", "planes")

    def floats(self) -> Artifact:
        """float32 images in [0, 1], fp32 arithmetic: for sources of more than 8 bits."""
        return self._save("float", self.body("planes"), "fp32", "float32", "planes")

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """The layouts that differ for this network, that of ONNX Runtime's own CPU kernels first."""
        differ = self.network.stem > 1 or in_rows(self._bodies["planes"], self.network.multiple)[1]
        return ("rows", "planes") if differ else ("planes",)

    def int8(self, body: ModelProto, layout: Layout, folder: Path | None = None) -> Artifact:
        """uint8 images around a quantized ``body``; ``rows`` for ONNX Runtime's own CPU kernels.

        ``folder`` is another than the exporter's, for a trial.
        """
        return self._save(
            "int8" if layout == self.layouts[0] else f"int8-{layout}", body, "int8", "uint8", layout, folder
        )

    def body(self, layout: Layout) -> ModelProto:
        """The fp32 body, between the rearrangements of ``layout``."""
        if layout not in self._bodies:
            self._bodies[layout], _ = in_rows(self._bodies["planes"], self.network.multiple)
        return self._bodies[layout]

    def _save(
        self, name: str, body: ModelProto, precision: Precision, io: Io, layout: Layout, folder: Path | None = None
    ) -> Artifact:
        network = self.network
        model = assemble(body, network, layout=layout, io=io)
        contract = ModelContract(
            io=io,
            precision=precision,
            size_divisor=network.size_divisor,
            receptive_radius_px=network.receptive_radius_px,
            sees_everything=network.sees_everything,
            macs_per_pixel=network.macs_per_pixel,
            parent_sha256=self.parent,
            library_version=__version__,
        )
        onnx.helper.set_model_props(model, contract.to_metadata())
        model.producer_name, model.producer_version = "deblur_deploy", __version__
        onnx.checker.check_model(model, full_check=network.ours)  # others' graphs may defeat shape inference
        folder, about = folder or self.folder, {"name": name, "precision": precision, "io": io, "layout": layout}
        onnx.save(model, folder / f"{name}.onnx")
        return Artifact.of(about, folder, self.parent)
