"""Plain ONNX Runtime, native OpenVINO with NNCF, and ncnn as peers, each as its own documentation says to use it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deblur_deploy.evaluation.worker import Candidate

if TYPE_CHECKING:
    # Not at run time: the process's memory and start are the peer's, not OpenCV's.
    from deblur_deploy.media.images import Image


def onnxruntime_defaults(files: dict[str, str], threads: int, provider: str = "CPUExecutionProvider") -> Candidate:
    """``files`` by WIDTHxHEIGHT, of which the first is loaded now; default session options but for the number of
    threads."""
    import onnxruntime as ort

    if provider == "CUDAExecutionProvider":
        ort.preload_dlls()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads

    @cache
    def session(size: str) -> ort.InferenceSession:
        opened = ort.InferenceSession(files[size], options, providers=[provider])
        # What cannot be loaded is silently replaced by the CPU.
        if (first := opened.get_providers()[0]) != provider:
            raise RuntimeError(f"onnxruntime took {first} instead of {provider}")
        return opened

    def restore(image: Image) -> Image:
        restored: Image = session(_size(image)).run(None, {"image": image[None]})[0][0]
        return restored

    session(next(iter(files)))
    facts = {"library": f"onnxruntime {ort.__version__}", "threads": threads, "provider": provider}
    return Candidate(restore=restore, facts=facts, threads=threads)


def openvino_native(files: dict[str, str], threads: int) -> Candidate:
    """``files`` (ONNX or OpenVINO IR) by WIDTHxHEIGHT, of which the first is compiled now; the LATENCY hint, precision
    left to OpenVINO."""
    import openvino as ov

    core = ov.Core()
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}

    @cache
    def request(size: str) -> Any:
        return core.compile_model(files[size], "CPU", hints).create_infer_request()

    def restore(image: Image) -> Image:
        restored: Image = request(_size(image)).infer({0: image[None]})[0][0]
        return restored

    precision = request(next(iter(files))).get_compiled_model().get_property("INFERENCE_PRECISION_HINT").to_string()
    facts = {
        "library": f"openvino {ov.__version__}",
        "threads": threads,
        "hint": "LATENCY",
        "precision hint": str(precision),
    }
    return Candidate(restore=restore, facts=facts, threads=threads)


def _size(image: Image) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def quantize_nncf(source: Path, target: Path, tiles: Sequence[Image]) -> Path:
    """NNCF's post-training quantization of ``source`` with its default preset, calibrated on ``tiles`` of its size."""
    import nncf
    import openvino as ov

    model = ov.Core().read_model(source)
    quantized = nncf.quantize(model, nncf.Dataset([tile[None] for tile in tiles]), subset_size=len(tiles))
    ov.save_model(quantized, target)
    return target


def quantize_onnxruntime(source: Path, target: Path, tiles: Sequence[Image], *, symbolic: bool = True) -> Path:
    """``quantize_static`` of ONNX Runtime with its own defaults after its own pre-processing.

    ``symbolic``: with its symbolic shapes, which fail on some networks.
    """
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        batches = iter(tiles)

        def get_next(self) -> dict[str, np.ndarray] | None:
            tile = next(self.batches, None)
            return None if tile is None else {"image": tile[None]}

    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=not symbolic)
    quantize_static(prepared, target, Reader())
    return target


def ncnn_native(param: str, weights: str, threads: int) -> Candidate:
    """The network alone in ncnn (float in and out), with the scaling and rounding that its examples do."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    if net.load_param(param) or net.load_model(weights):
        raise RuntimeError(f"ncnn cannot load {Path(param).name}")

    def restore(image: Image) -> Image:
        height, width, _ = image.shape
        mat = ncnn.Mat.from_pixels(np.ascontiguousarray(image), ncnn.Mat.PixelType.PIXEL_RGB, width, height)
        mat.substract_mean_normalize([], [1 / 255] * 3)
        with net.create_extractor() as extractor:
            extractor.input("in0", mat)
            status, out = extractor.extract("out0")
        if status:
            raise RuntimeError(f"ncnn answered status {status}")
        out.substract_mean_normalize([], [255.0] * 3)
        planes = np.rint(np.array(out)).clip(0, 255).astype(np.uint8)
        return np.ascontiguousarray(planes.transpose(1, 2, 0))

    facts = {"library": f"ncnn {ncnn.__version__}", "threads": threads, "bf16 storage": net.opt.use_bf16_storage}
    return Candidate(restore=restore, facts=facts, threads=threads)


def export_ncnn(checkpoint: Path, folder: Path, height: int, width: int) -> tuple[Path, Path]:
    """Convert the network with pnnx, ncnn's recommended way; answers the files for ``ncnn_native``."""
    import pnnx
    import torch
    from torch import Tensor, nn

    from deblur_deploy.training.checkpoint import load_checkpoint

    class Core(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = load_checkpoint(checkpoint)

        def forward(self, image: Tensor) -> Tensor:
            return self.net.core(image)

    path = folder / "ncnn.pt"
    with torch.no_grad():
        pnnx.export(Core().eval(), str(path), inputs=(torch.zeros(1, 3, height, width),), fp16=False)
    return path.with_name("ncnn.ncnn.param"), path.with_name("ncnn.ncnn.bin")
