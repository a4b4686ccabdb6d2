"""The graph in float equals torch: at least 90 dB, at any size and batch."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deblur_deploy.media.images import list_images, read_image
from deblur_deploy.pipeline.export import Exporter
from deblur_deploy.pipeline.graph import in_half_precision
from deblur_deploy.pipeline.nodes import OnnxRunner
from deblur_deploy.shipped import DEFAULT_CHECKPOINT
from deblur_deploy.training.checkpoint import load_checkpoint
from tests import small, strangers

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 1000), st.integers(1, 1000))


def db(found, expected):
    return -10 * np.log10(max(np.mean(np.square(found - expected, dtype=np.float64)), 1e-30))


def restored(session, model, images):
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).clamp(0, 1).numpy()
    return session.run(None, {"image": images})[0], expected


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = small.exporter(tmp_path_factory.mktemp("float"), "stem4").floats().path
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]), small.unet("stem4")


@settings(max_examples=10, deadline=None)
@given(size=SIZES, seed=st.integers(0, 99))
def test_any_size_and_batch(tiny, size, seed):
    batch, height, width = size
    images = np.random.default_rng(seed).random((batch, 3, height, width), np.float32)
    found, expected = restored(*tiny, images)
    assert found.shape == images.shape
    assert db(found, expected) >= 90


@pytest.mark.slow
def test_the_shipped_network_on_noise_and_on_photographs(data, tmp_path):
    model = load_checkpoint(DEFAULT_CHECKPOINT)
    path = Exporter.of(model, "0" * 64, tmp_path).floats().path
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    photos = [read_image(name) for name in list_images(data / "eval" / "frames9" / "blur")[:2]]
    images = [np.ascontiguousarray(photo.transpose(2, 0, 1)[None]).astype(np.float32) / 255 for photo in photos]
    images += [np.random.default_rng(0).random(shape, np.float32) for shape in ((4, 3, 1, 1), (2, 3, 333, 127))]
    for image in images:
        assert db(*restored(session, model, image)) >= 90


def test_half_precision_of_somebody_elses_graph_is_a_valid_one():
    text = 'm = Max(blocks, zero)\ns = Resize<mode = "nearest">(m, , scales)\ncorrection = Sub(s, m)'
    constants = {"zero": np.float32(0.5), "scales": np.ones(4, np.float32)}
    body = strangers.graph(text, "float[n,3,h,w] blocks => (float[n,3,h,w] correction)", constants)
    half = in_half_precision(body)
    onnx.checker.check_model(half)
    given = OnnxRunner(half, "half")(np.ones((1, 3, 4, 5), np.float16))["correction"]
    assert given.dtype == np.float16
    assert not given.any()
