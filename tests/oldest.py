"""Runs every ``.onnx`` of a folder on given images by bare onnxruntime: executed by a Python with an old one."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort


def restore(model: Path, image: np.ndarray) -> np.ndarray:
    """``image``, uint8 HxWx3, through ``model``, as any app would call it."""
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    if session.get_inputs()[0].type == "tensor(uint8)":
        return session.run(None, {"image": image[None]})[0][0]
    planes = image.transpose(2, 0, 1)[None].astype(np.float32) / 255
    return np.rint(session.run(None, {"image": planes})[0][0] * 255).astype(np.uint8).transpose(1, 2, 0)


if __name__ == "__main__":
    folder, images, results = map(Path, sys.argv[1:])
    given = np.load(images)
    found = {
        f"{model.stem} {name}": restore(model, given[name]) for model in folder.glob("*.onnx") for name in given.files
    }
    np.savez(results, **found)
    print(ort.__version__)  # noqa: T201
