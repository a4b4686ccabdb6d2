"""The engine loads and runs in numpy and onnxruntime alone; tried in processes in which all else is forbidden."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_GUARD = """
import sys
FORBIDDEN = {"torch", "onnx", "onnxscript", "cv2", "av", "msgspec", "tyro", "rich", "skimage", "safetensors", "psutil"}
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise AssertionError("imported " + name)
sys.meta_path.insert(0, Guard())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", _GUARD + code], capture_output=True, text=True, timeout=120)


def test_the_engine_needs_numpy_and_onnxruntime_only(bundle: Path) -> None:
    done = run(
        "import numpy as np; from deblur_deploy import DeblurEngine;"
        f"engine = DeblurEngine({str(bundle)!r});"
        "assert engine(np.zeros((9, 7, 3), np.uint8)).shape == (9, 7, 3);"
        "assert next(engine.map([np.zeros((9, 7))])).shape == (9, 7)"
    )
    assert done.returncode == 0, done.stderr


def test_the_guard_can_fail() -> None:
    done = run("import deblur_deploy.media.images")
    assert done.returncode != 0
    assert "imported cv2" in done.stderr


def test_importing_the_package_imports_nothing() -> None:
    done = run("import deblur_deploy; assert not {'numpy', 'onnxruntime'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr
