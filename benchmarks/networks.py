"""Networks that no one here wrote, through the whole line: what each variant loses, and how fast it is.

    python benchmarks/networks.py --networks nafnet drunet
    python benchmarks/networks.py --networks path/to/maxim.onnx --json networks.json

``nafnet`` is NAFNet-32 and ``drunet`` DRUNet, by spandrel (extra ``networks``), ``restormer`` and ``mprnet`` are of
spandrel_extra_arches; all with random weights, so that dB against fp32 and latency mean something and PSNR does not;
``small`` is each in a size that takes seconds.  Anything else is a file or package.module:build for deblur-export.
Every row is read from the bundle that comes out; beside it stands ONNX Runtime's quantization with its defaults.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import tyro
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

from deblur_deploy import DeblurEngine
from deblur_deploy.contract import INPUT
from deblur_deploy.errors import DeblurError, InputError
from deblur_deploy.evaluation.latency import at_size, take_turns
from deblur_deploy.evaluation.quality import psnr
from deblur_deploy.evaluation.record import new_record, write_json
from deblur_deploy.pipeline.bundle import build_bundle
from deblur_deploy.pipeline.config import NetworkConfig, VerifyConfig
from deblur_deploy.pipeline.doors.weights import import_spandrel
from deblur_deploy.pipeline.photos import builtin_calibration, builtin_pairs
from deblur_deploy.pipeline.recipe import Recipe
from deblur_deploy.runtime.bundle import MANIFEST

SIZE = (640, 360)


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Export networks of other people, and measure what comes out."""

    networks: tuple[str, ...] = ("small-nafnet", "small-drunet")
    """Of nafnet, drunet, restormer, mprnet, each also as small-nafnet ...; or files and package.module:build."""
    json: Path | None = None
    """Write a record here, too."""
    rounds: int = 10
    """Timed calls of each variant."""


def nafnet(width: int = 32, encoder: Sequence[int] = (1, 1, 1, 28)) -> nn.Module:
    """NAFNet-32 as published for GoPro: 17 million parameters."""
    import_spandrel()
    from spandrel.architectures.NAFNet import NAFNet

    torch.manual_seed(0)
    blocks = {"enc_blk_nums": list(encoder), "dec_blk_nums": [1] * len(encoder)}
    model: nn.Module = NAFNet(img_channel=3, width=width, middle_blk_num=1, **blocks)
    for name, value in model.named_parameters():
        # What scales a residual block starts at zero, and would hide the block.
        if name.endswith((".beta", ".gamma")):
            nn.init.constant_(value, 0.1)
    return model.eval()


def drunet(channels: Sequence[int] = (64, 128, 256, 512)) -> nn.Module:
    """DRUNet for colour images without its noise map: 32 million parameters."""
    import_spandrel()
    from spandrel.architectures.DRUNet import DRUNet

    torch.manual_seed(0)
    model: nn.Module = DRUNet(in_nc=3, out_nc=3, nc=list(channels), nb=4)
    return model.eval()


def restormer(width: int = 48, blocks: Sequence[int] = (4, 6, 6, 8)) -> nn.Module:
    """Restormer for motion blur: 26 million parameters, attention over channels."""
    import_spandrel()
    from spandrel_extra_arches.architectures.Restormer import Restormer

    torch.manual_seed(0)
    model: nn.Module = Restormer(dim=width, num_blocks=list(blocks), num_refinement_blocks=blocks[0])
    return model.eval()


def mprnet(features: tuple[int, int, int] = (96, 48, 32), blocks: int = 8) -> nn.Module:
    """MPRNet for motion blur: 20 million parameters; it cuts the image into patches, and gives its last stage first."""
    import_spandrel()
    from spandrel_extra_arches.architectures.MPRNet import MPRNet

    torch.manual_seed(0)
    own, unet, ors = features
    model: nn.Module = MPRNet(n_feat=own, scale_unetfeats=unet, scale_orsnetfeats=ors, num_cab=blocks)
    return model.eval()


BUILT: Mapping[str, Callable[[], nn.Module]] = {
    "nafnet": nafnet,
    "drunet": drunet,
    "restormer": restormer,
    "mprnet": mprnet,
    "small-nafnet": partial(nafnet, 8, (1, 1)),
    "small-drunet": partial(drunet, (8, 8, 16, 16)),
    "small-restormer": partial(restormer, 8, (1, 1, 1, 1)),
    "small-mprnet": partial(mprnet, (16, 8, 4), 1),
}


def build() -> nn.Module:
    """What ``--model`` is given: the network that this run is at."""
    return BUILT[_current]()


_current = "small-nafnet"


def measured(name: str, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """The rows of one network, exported to ``folder``."""
    global _current
    known = name in BUILT
    _current = name if known else _current
    model = f"{__name__}:build" if known else name if ":" in name else ""
    verify = VerifyConfig(width_px=SIZE[0], height_px=SIZE[1], rounds=rounds)
    network = NetworkConfig(model=model, output="0" if name.endswith("mprnet") else "")
    recipe = Recipe(name=Path(name).stem, network=network, verify=verify)
    out = folder / "bundle"
    build_bundle(
        None if model else Path(name), recipe, out, on_progress=lambda what: print(f"- {what}", file=sys.stderr)
    )
    manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    rows = [
        {
            "network": manifest["name"],
            "variant": row["name"],
            "run by": f"deblur_deploy, {run['provider']}",
            "ms": run["median_ms"],
            "to fp32, dB": row["db_to_fp32"] if row["name"] != "fp32" else None,
            "MACs in int8": run["int8_macs"],
        }
        for row in manifest["variants"]
        for run in row["runs"]
    ]
    left = [
        {"network": manifest["name"], "variant": what, "left out": why} for what, why in manifest["left_out"].items()
    ]
    return [*rows, *left, *_defaults(manifest["name"], out, folder, rounds)]


class _Photos(CalibrationDataReader):
    def __init__(self) -> None:
        self.images = iter([at_size(photo, *SIZE)[None] for photo in builtin_calibration()])

    def get_next(self) -> dict[str, Any] | None:
        image = next(self.images, None)
        return None if image is None else {INPUT: image}


def _defaults(name: str, bundle: Path, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """ONNX Runtime's own quantization of the same fp32 file, timed in turn with it."""
    import onnx

    fp32, path = bundle / "fp32.onnx", folder / "defaults.onnx"
    try:
        quantize_static(fp32, path, _Photos(), quant_format=QuantFormat.QDQ, activation_type=QuantType.QUInt8)
        whole = onnx.load(path)
        whole.metadata_props.extend(onnx.load(fp32).metadata_props)
        onnx.save(whole, path)
        pair = builtin_pairs()[0]
        with DeblurEngine(fp32, provider="cpu") as exact, DeblurEngine(path, provider="cpu") as engine:
            photo = at_size(pair.blurred, *SIZE)
            timings = take_turns({"fp32": partial(exact, photo), "int8": partial(engine, photo)}, rounds=rounds)
            loss = psnr(engine(pair.blurred), exact(pair.blurred))
    except (DeblurError, RuntimeError, ValueError) as error:
        return [{"network": name, "variant": "quantize_static", "left out": " ".join(str(error).split())}]
    about = {"network": name, "variant": "quantize_static defaults", "run by": "ONNX Runtime"}
    return [{**about, "ms": timings["int8"].median_ms, "to fp32, dB": float(np.round(loss, 2)), "MACs in int8": None}]


def main(options: Networks) -> None:
    rows: list[dict[str, Any]] = []
    for name in options.networks:
        if name not in BUILT and ":" not in name and not Path(name).is_file():
            raise InputError(f"networks has {name!r}; allowed: {', '.join(BUILT)}, a file or package.module:build")
        with TemporaryDirectory(prefix="deblur-networks-") as folder:
            rows += measured(name, Path(folder), options.rounds)
    for row in rows:
        print(json.dumps(row))
    if options.json:
        about = {"networks": list(options.networks), "size": "{}x{}".format(*SIZE), "rounds": options.rounds}
        write_json(options.json, new_record("networks", about, found={"of_other_people": rows}))


if __name__ == "__main__":
    main(tyro.cli(Networks, description=__doc__))
