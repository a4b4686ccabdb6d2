"""Which onnxruntime runs the files, and which runs the engine.

The first is tried for real where DEBLUR_OLDEST_PYTHON names a Python that has it:

    python3.11 -m venv V && V/bin/pip install 'onnxruntime==1.15.0' 'numpy<2'
    DEBLUR_OLDEST_PYTHON=V/bin/python pytest tests/test_runtime_range.py
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import cv2
import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from deblur_deploy import DeblurEngine
from deblur_deploy.contract import OLDEST_ONNXRUNTIME
from deblur_deploy.errors import MissingExtraError
from deblur_deploy.media.images import write_image
from deblur_deploy.pipeline.bundle import build_bundle
from deblur_deploy.shipped import DEFAULT_BUNDLE
from deblur_deploy.training.checkpoint import save_checkpoint
from tests import oldest
from tests.photos import photo
from tests.small import RECIPE, unet

OPSET, IR_VERSION = 19, 9
"""What onnxruntime 1.15 reads, as its release notes say: ONNX 1.14."""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A bundle that is exported here and now."""
    room = tmp_path_factory.mktemp("range")
    save_checkpoint(unet("flat"), room / "flat.safetensors")
    write_image(room / "blur" / "0.png", cv2.GaussianBlur(photo(0), (0, 0), 1.2))
    write_image(room / "sharp" / "0.png", photo(0))
    recipe = msgspec.structs.replace(RECIPE, pairs=room, calibration=room / "blur")
    build_bundle(room / "flat.safetensors", recipe, room / "bundle", cached=False)
    return room / "bundle"


@pytest.fixture(params=["fresh", "shipped"])
def bundle(request):
    """A bundle that promises to run on ``OLDEST_ONNXRUNTIME``."""
    folder = DEFAULT_BUNDLE if request.param == "shipped" else request.getfixturevalue("fresh")
    promised = json.loads((folder / "bundle.json").read_text()).get("onnxruntime")
    if promised is None and request.param == "shipped":
        pytest.skip("the shipped bundle promises nothing yet; export it again")
    assert promised == f">={OLDEST_ONNXRUNTIME}"
    return folder


def test_files_are_no_newer_than_the_oldest_onnxruntime_reads(bundle):
    models = [onnx.load(path) for path in bundle.glob("*.onnx")]
    assert len(models) >= 5
    for model in models:
        assert model.ir_version <= IR_VERSION
        assert [(opset.domain, opset.version <= OPSET) for opset in model.opset_import] == [("", True)]


@pytest.fixture
def old_python():
    python = os.environ.get("DEBLUR_OLDEST_PYTHON")
    if not python:
        pytest.skip(f"set DEBLUR_OLDEST_PYTHON to a Python with onnxruntime {OLDEST_ONNXRUNTIME}")
    return python


def call(*arguments, **options):
    return subprocess.run(list(map(str, arguments)), capture_output=True, text=True, check=False, **options)


def test_the_oldest_onnxruntime_gives_the_same_within_one_level(bundle, old_python, tmp_path):
    images = {"photo": photo(3, 117, 90), "noise": np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)}
    images["one"] = images["noise"][:1, :1]
    np.savez(tmp_path / "images.npz", **images)
    done = call(old_python, oldest.__file__, bundle, tmp_path / "images.npz", tmp_path / "results.npz")
    assert done.returncode == 0, done.stderr
    assert f"{done.stdout.strip()}.".startswith(f"{OLDEST_ONNXRUNTIME}.")
    found = np.load(tmp_path / "results.npz")
    assert len(found.files) == len(images) * len(list(bundle.glob("*.onnx")))
    for key in found.files:
        variant, name = key.split()
        expected = oldest.restore(bundle / f"{variant}.onnx", images[name])
        assert np.abs(found[key].astype(int) - expected).max() <= 1, key


def test_an_engine_on_a_too_old_onnxruntime_is_one_line(old_python):
    done = call(old_python, "-c", "import deblur_deploy; deblur_deploy.DeblurEngine()", cwd=Path(__file__).parents[1])
    assert "installed, 1.24 or later is needed" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("version", ["1.9.0", "1.23.2", "1.24.0", "2.0.0", "1.25.0.dev20260101"])
def test_the_engine_names_both_versions(version, monkeypatch, fresh):
    monkeypatch.setattr(ort, "__version__", version)
    if version in ("1.9.0", "1.23.2"):
        with pytest.raises(
            MissingExtraError, match=f"^onnxruntime {version} is installed, 1.24 or later is needed; .*"
        ):
            DeblurEngine(fresh, provider="cpu")
    else:
        DeblurEngine(fresh, provider="cpu").close()
