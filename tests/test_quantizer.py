"""Which operations are tried in int8, and that nothing is found out twice for that."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from deblur_deploy.pipeline.int8 import probe, quantizer
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


@pytest.mark.parametrize("more", ["y = Dropout(x)", "s = SplitToSequence(x)\n y = ConcatFromSequence<axis = 0>(s)"])
def test_what_gives_no_tensor_costs_no_int8(more: str) -> None:
    """An optional output that is not wanted has no name, and a sequence has no type of its own."""
    body = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 18]>
        net (float[1, 3, h, w] blocks) => (float[1, 3, h, w] z) {{ x = Relu(blocks)
        {more}
        z = Relu(y) }}""")
    for node in body.graph.node:
        if node.op_type == "Dropout":
            node.output.append("")
    assert probe.int8_ops(body)["Relu"]


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
