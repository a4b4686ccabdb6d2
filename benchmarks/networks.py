"""Networks that no one here wrote, through the whole line: what each variant loses, and how fast it is.

    python benchmarks/networks.py --networks nafnet drunet
    python benchmarks/networks.py --networks path/to/maxim.onnx --json networks.json

``nafnet`` is NAFNet-32 and ``drunet`` DRUNet, by spandrel (extra ``networks``), ``restormer`` and ``mprnet`` are of
spandrel_extra_arches; all with random weights, so that dB against fp32 and latency mean something and PSNR does not;
``small`` is each in a size that takes seconds.  Anything else is a file or package.module:build for deblur-export.
Beside the variants of the bundle that comes out stand ONNX Runtime's quantization with its defaults, and NNCF's run by
OpenVINO (extra ``peers``), all timed in turn and compared with fp32 on the same photograph.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import peer_onnx
import torch
import tyro
from onnxruntime.tools.onnx_model_utils import make_input_shape_fixed
from torch import nn

from deblur_deploy import DeblurEngine
from deblur_deploy.bundles.manifest import MANIFEST, Bundle
from deblur_deploy.contract import INPUT
from deblur_deploy.errors import InputError
from deblur_deploy.evaluation.latency import at_size, take_turns
from deblur_deploy.evaluation.quality import Restorer, psnr
from deblur_deploy.evaluation.record import new_record, write_json
from deblur_deploy.media.images import Image
from deblur_deploy.pipeline.bundle import build_bundle
from deblur_deploy.pipeline.config import NetworkConfig, VerifyConfig
from deblur_deploy.pipeline.doors.weights import import_spandrel
from deblur_deploy.pipeline.photos import builtin_calibration, builtin_pairs
from deblur_deploy.pipeline.recipe import Recipe
from deblur_deploy.system.threads import usable_cores

SIZE = (640, 360)


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Export networks of other people, and measure what comes out."""

    networks: tuple[str, ...] = ("small-nafnet", "small-drunet")
    """Of nafnet, drunet, restormer, mprnet, each also as small-nafnet ...; or files and package.module:build."""
    json: Path | None = None
    """Write a record here, too."""
    rounds: int = 10
    """Timed calls of each variant at most: no new round begins after two minutes."""
    threads: int = usable_cores()
    """Threads of every variant and peer."""


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


def measured(name: str, folder: Path, rounds: int, threads: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of one network, exported to ``folder``: what came out and what its peers made of it, timed in turn.

    Besides, what its bundle took; stages that the cache held count with the time that they took when they were run.
    """
    global _current
    known = name in BUILT
    _current = name if known else _current
    model = f"{__name__}:build" if known else name if ":" in name else ""
    verify = VerifyConfig(width_px=SIZE[0], height_px=SIZE[1], rounds=3)
    network = NetworkConfig(model=model, output="0" if name.endswith("mprnet") else "")
    recipe = Recipe(name=Path(name).stem, network=network, verify=verify)
    out = folder / "bundle"
    since = time.perf_counter()
    build_bundle(
        None if model else Path(name), recipe, out, on_progress=lambda what: print(f"- {what}", file=sys.stderr)
    )
    manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    took = time.perf_counter() - since + sum(stage["seconds"] for stage in manifest["stages"] if stage["cached"])
    about = {"network": manifest["name"]}
    rows = [{**about, "variant": what, "left out": why} for what, why in manifest["left_out"].items()]
    shares = {(row["name"], run["provider"]): run["int8_macs"] for row in manifest["variants"] for run in row["runs"]}
    files = Bundle.read(out).variants
    calls: dict[tuple[str, str], Restorer] = {
        (variant, provider): DeblurEngine(files[variant].path, provider=provider, threads=threads)
        for variant, provider in shares
    }
    for way, prepare in PEERS.items():
        try:
            calls[way] = prepare(out / "fp32.onnx", folder, threads)
        except Exception as error:  # whatever another tool fails with, its row says it and the others stand
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            rows.append({**about, "variant": way[0], "run by": way[1], "left out": why})
    photo = at_size(builtin_pairs()[0].blurred, *SIZE)
    exact = calls["fp32", "cpu"](photo)
    losses = {way: round(psnr(call(photo), exact), 2) for way, call in calls.items() if way != ("fp32", "cpu")}
    timed = {" by ".join(way): partial(call, photo) for way, call in calls.items()}
    timings = take_turns(timed, rounds=rounds, warm_up=1, budget_s=120)
    for way in calls:
        timing = timings[" by ".join(way)]
        row: dict[str, Any] = {"variant": way[0], "run by": way[1] if way in PEERS else f"deblur_deploy, {way[1]}"}
        row |= {"ms": round(timing.median_ms, 1), "±": f"{timing.noise:.1%}"}
        rows.append({**about, **row, "to fp32, dB": losses.get(way), "MACs in int8": shares.get(way)})
    return rows, {**about, "seconds": round(took)}


def _quantized(fp32: Path, target: Path, how: Callable[[Path, Path, Sequence[Image]], Path]) -> Path:
    """``target``, made by another tool of ``fp32`` at the size that is timed, calibrated on built-in photographs."""
    fixed = target.with_suffix(".fixed.onnx")
    model = onnx.load(fp32)
    make_input_shape_fixed(model.graph, INPUT, [1, SIZE[1], SIZE[0], 3])
    onnx.save(model, fixed)
    return how(fixed, target, [at_size(photo, *SIZE) for photo in builtin_calibration()[:4]])


def _onnxruntime(fp32: Path, folder: Path, threads: int) -> Restorer:
    path = _quantized(fp32, folder / "defaults.onnx", partial(peer_onnx.quantize_onnxruntime, symbolic=False))
    return peer_onnx.onnxruntime_defaults({"{}x{}".format(*SIZE): str(path)}, threads).restore


def _nncf(fp32: Path, folder: Path, threads: int) -> Restorer:
    path = _quantized(fp32, folder / "nncf.xml", peer_onnx.quantize_nncf)
    return peer_onnx.openvino_native({"{}x{}".format(*SIZE): str(path)}, threads).restore


PEERS: Mapping[tuple[str, str], Callable[[Path, Path, int], Restorer]] = {
    ("quantize_static defaults", "ONNX Runtime"): _onnxruntime,
    ("NNCF int8", "OpenVINO"): _nncf,
}


def main(options: Networks) -> None:
    rows: list[dict[str, Any]] = []
    bundles: list[dict[str, Any]] = []
    for name in options.networks:
        if name not in BUILT and ":" not in name and not Path(name).is_file():
            raise InputError(f"networks has {name!r}; allowed: {', '.join(BUILT)}, a file or package.module:build")
        with TemporaryDirectory(prefix="deblur-networks-") as folder:
            found, bundle = measured(name, Path(folder), options.rounds, options.threads)
        rows += found
        bundles.append(bundle)
        for row in (*found, bundle):
            print(json.dumps(row), flush=True)
    if options.json:
        settings = {"networks": list(options.networks), "size": "{}x{}".format(*SIZE), "threads": options.threads}
        record = new_record("networks", settings, found={"of_other_people": rows, "bundle_made_in": bundles})
        write_json(options.json, record)


if __name__ == "__main__":
    main(tyro.cli(Networks, description=__doc__))
