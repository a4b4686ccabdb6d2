"""A network that sees the whole image is not cut in silence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from deblur_deploy import DeblurEngine
from deblur_deploy.errors import InputError, MemoryLimitError
from tests import tiny
from tests.conftest import noise

BIG = noise(900, 1100, 3)


@pytest.fixture(scope="module", params=["uint8", "float32"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that claims to see everything."""
    path = tiny.write_model(tmp_path_factory.mktemp("whole") / "whole.onnx", io=request.param)
    model = onnx.load(path)
    contract = replace(tiny.CONTRACT, io=request.param, sees_everything=True, receptive_radius_px=1 << 20)
    onnx.helper.set_model_props(model, contract.to_metadata())
    onnx.save(model, path)
    return path


def test_an_image_that_is_too_large_is_refused_with_the_figures(whole: Path) -> None:
    with DeblurEngine(whole, provider="cpu", max_memory_mb=20) as engine:
        assert engine(BIG[:300, :200]).shape == (300, 200, 3)
        with pytest.raises(MemoryLimitError, match=r"1100x900 takes about \d+ MB, 20 MB are allowed, .*approximate'"):
            engine(BIG)
        assert engine.receipt.tiles == "never"
        assert str(engine.receipt).endswith("tiles: never")


def test_without_a_limit_it_may_take_what_is_free(whole: Path) -> None:
    with DeblurEngine(whole, provider="cpu") as engine:
        assert engine(BIG).shape == BIG.shape


@pytest.mark.parametrize("size", [(900, 1100), (400, 1100), (901, 403)])
def test_tiles_are_blended_by_wish(whole: Path, size: tuple[int, int]) -> None:
    image = BIG[: size[0], : size[1]]
    with DeblurEngine(whole, provider="cpu") as engine:
        expected = engine(image).astype(int)
    with DeblurEngine(whole, provider="cpu", max_memory_mb=10, tiles="approximate") as engine:
        found = engine(image)
        assert engine.receipt.tiles == "approximate"
    assert found.dtype == image.dtype
    # The tiny network really sees 11 pixels only, and within 16 pixels of a cut no tile counts.
    assert np.abs(found - expected).max() <= 1


def test_others_stay_exact_whatever_is_wished(tmp_path: Path) -> None:
    path = tiny.write_model(tmp_path / "local.onnx")
    with DeblurEngine(path, provider="cpu", max_memory_mb=10, tiles="approximate") as engine:
        found = engine(BIG)
        assert engine.receipt.tiles == "exact"
    with DeblurEngine(path, provider="cpu") as engine:
        np.testing.assert_array_equal(engine(BIG), found)


def test_a_wish_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tiles is 'some'; allowed: exact, approximate"):
        DeblurEngine(tmp_path / "none.onnx", tiles="some")  # type: ignore[arg-type]
