"""Which operations are tried in int8, and that nothing is found out twice for that."""

from __future__ import annotations

from pathlib import Path

import pytest

from deblur_deploy.pipeline.int8 import quantizer
from deblur_deploy.pipeline.int8.quantizer import Quantizer
from tests.photos import photo
from tests.small import exporter

TILES = [photo(seed, 96, 96) for seed in range(2)]


@pytest.mark.parametrize(
    ("ops", "layers_only"),
    [
        ({"Conv": True, "Identity": True, "DepthToSpace": True, "Mul": False}, None),
        ({"Conv": True, "Relu": True, "Mul": True}, ["Conv", "Relu"]),
    ],
)
def test_layers_alone_are_tried_only_where_more_than_they_has_kernels(
    ops: dict[str, bool], layers_only: list[str] | None, tmp_path: Path
) -> None:
    whole = Quantizer(exporter(tmp_path), TILES)
    whole._ops = lambda layout: ops
    narrow = whole.narrower()
    assert (narrow and narrow._int8_ops("planes")) == layers_only


def test_both_see_the_tiles_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    collect = quantizer.ranges_of_each
    monkeypatch.setattr(quantizer, "ranges_of_each", lambda *given: seen.append(1) or collect(*given))
    whole = Quantizer(exporter(tmp_path), TILES)
    known = whole._ops
    whole._ops = lambda layout: known(layout) | {"Mul": True}
    narrow = whole.narrower()
    assert narrow is not None
    assert narrow.body("result", "planes").SerializeToString() != b""
    assert whole._ranges("result", "planes")
    assert len(seen) == 1
