"""Fixtures that several test files share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from deblur_deploy.errors import ProviderError
from deblur_deploy.runtime import providers
from tests import tiny


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of CUDA are skipped where onnxruntime has none."""
    absent = "CUDAExecutionProvider" not in ort.get_available_providers()
    for item in items:
        if absent and item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="onnxruntime has no CUDA here"))


@pytest.fixture(scope="session", autouse=True)
def no_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is tuned or installed on this machine must not change a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEBLUR_CACHE", str(tmp_path_factory.getbasetemp() / "no-cache"))
        patch.setenv("DEBLUR_BUNDLES", str(tmp_path_factory.getbasetemp() / "no-bundles"))
        yield


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of tiny models with every variant."""
    return tiny.write_bundle(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of photographs that some tests use; skips where it is absent."""
    folder = Path(os.environ.get("DEBLUR_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no photographs at {folder}; set DEBLUR_DATA")
    return folder


@pytest.fixture(scope="session")
def openvino() -> str:
    """The name of the OpenVINO provider; skips where it is absent."""
    try:
        return providers.find("openvino").name
    except ProviderError as error:
        pytest.skip(str(error))


@contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder that every user may enter; those of pytest are closed."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        try:
            yield Path(name)
        finally:
            for path in (Path(name), *Path(name).rglob("*")):
                path.chmod(0o755)


@contextmanager
def reading_as_nobody() -> Iterator[None]:
    """As a user who is bound by permissions; root is not."""
    if not hasattr(os, "geteuid"):
        pytest.skip("no permissions of that kind")
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if before == 0:
            os.seteuid(0)


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random bytes: the hardest image for any claim of equality."""
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
