"""What is rewritten computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, parser
from torch import nn

from deblur_deploy.errors import InputError, ModelError
from deblur_deploy.pipeline.body import to_onnx
from deblur_deploy.pipeline.convention import Convention
from deblur_deploy.pipeline.doors.module import exported
from deblur_deploy.pipeline.doors.onnx_file import plain
from deblur_deploy.pipeline.graph import BLOCKS, CORRECTION
from deblur_deploy.pipeline.nodes import OnnxRunner
from deblur_deploy.pipeline.rewrite import body_of, prepared
from deblur_deploy.pipeline.rows import in_rows
from tests import strangers
from tests.small import CONFIGS, body


def raw(net: nn.Module, **how: object) -> tuple[object, Convention]:
    convention = Convention(output="output", **how)  # type: ignore[arg-type]
    model, _ = plain(exported(net, "net", convention), "net")
    return body_of(model, convention), convention


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_are_planes(name: str) -> None:
    planes = body(name, "planes")
    rows, orders = in_rows(planes, 64)
    channels = planes.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    image = np.random.default_rng(0).random((2, channels, 16, 24), np.float32)
    one, two = (OnnxRunner(model, name)(image)[CORRECTION] for model in (planes, rows))
    np.testing.assert_allclose(one, two, atol=1e-6)
    assert len(orders) == len(CONFIGS[name].up)
    assert "DepthToSpace" not in {node.op_type for node in rows.graph.node}


def test_sizes_that_a_network_computes_as_fractions_stay_free() -> None:
    net = strangers.seeded(strangers.Halves)
    run = OnnxRunner(exported(net, "net", Convention(output="output")), "net")
    image = torch.rand(1, 3, 30, 21)
    with torch.no_grad():
        np.testing.assert_allclose(run(image.numpy())["output"], net(image), atol=1e-5)


def test_a_graph_of_one_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net, asked = strangers.seeded(strangers.Halves), []

    def fixed(*args: Any, strict: bool) -> ModelProto:
        asked.append(strict)
        return to_onnx(*args)

    monkeypatch.setattr("deblur_deploy.pipeline.doors.module.to_onnx", fixed)
    with pytest.raises(InputError, match=r"cannot export net for all sizes: .* \(h // 2, not int\(h / 2\)\)"):
        exported(net, "net", Convention(output="output"))
    assert asked == [False, True]


def test_a_graph_may_call_its_values_as_ours_do_and_as_ours_would_be_renamed() -> None:
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18]>
        net (float[n, 3, h, w] image) => (float[n, 3, h, w] output)
        { blocks = Abs(image) blocks_of_body = Neg(blocks) output = Add(blocks_of_body, image) }"""
    )
    image = np.random.default_rng(0).random((2, 3, 4, 5), np.float32)
    found = OnnxRunner(body_of(model, Convention(output="output", range="255")), "net")(image)[CORRECTION]
    np.testing.assert_allclose(found, np.zeros_like(image), atol=1e-6)


def test_a_branch_may_call_its_values_as_ours_do() -> None:
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 18]>
        net (float[n, 3, h, w] image) => (float[n, 3, h, w] output)
        <bool yes = {1}> {
            output = If (yes) <
                then_branch = one () => (float[n, 3, h, w] blocks) { factor = Neg(image) blocks = Neg(factor) },
                else_branch = two () => (float[n, 3, h, w] swapped)
                    <float[1] offset = {2.0}> { swapped = Mul(image, offset) } > }"""
    )
    body = body_of(model, Convention(output="output", range="255", colour="bgr"))
    onnx.checker.check_model(body)
    image = np.random.default_rng(0).random((2, 3, 4, 5), np.float32)
    np.testing.assert_allclose(OnnxRunner(body, "net")(image)[CORRECTION], image, atol=1e-6)


class Upsampling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, stride=3), nn.ConvTranspose2d(8, 3, 3, stride=3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.up(torch.relu(self.down(image)))


def test_a_transposed_convolution_without_overlap_becomes_a_plain_one() -> None:
    net = strangers.seeded(Upsampling)
    before, how = raw(net, divisor=3)
    after, residual = prepared(before, how.divisor)  # type: ignore[arg-type]
    assert not residual
    kinds = [node.op_type for node in after.graph.node]
    assert "ConvTranspose" not in kinds
    assert "DepthToSpace" in kinds
    image = torch.rand(1, 3, 21, 33)
    found = OnnxRunner(after, "after")(image.numpy())[CORRECTION]
    np.testing.assert_allclose(found, net(image).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", [strangers.Residual, strangers.Attention])
def test_the_image_that_is_added_at_the_end_is_left_to_the_end(kind: type[nn.Module]) -> None:
    net = strangers.seeded(kind)
    before, how = raw(net)
    after, residual = prepared(before, how.divisor)  # type: ignore[arg-type]
    assert residual
    image = torch.rand(2, 3, 21, 34)
    found = OnnxRunner(after, "after")(image.numpy())[CORRECTION]
    np.testing.assert_allclose(found + image.numpy(), net(image).detach().numpy(), atol=1e-5)
    layers = {node.input[1] for node in after.graph.node if node.op_type == "Conv"}
    assert all(name.endswith(".weight") for name in layers)
    assert [value.name for value in after.graph.input] == [BLOCKS]


def test_a_sum_with_anything_else_stays() -> None:
    class Flipped(strangers.Residual):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.flip(3) + self.last(torch.relu(self.first(image)))

    before, how = raw(strangers.seeded(Flipped))
    assert not prepared(before, how.divisor)[1]  # type: ignore[arg-type]


class Halving(nn.Module):
    """Takes any size, by rounding up, and cuts what is too much; ``groups`` of the layer before the shuffle."""

    def __init__(self, groups: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up = nn.Conv2d(4, 12, 3, padding=1, groups=groups, bias=bias)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found = nn.functional.pixel_shuffle(self.up(self.down(image)), 2)
        return found[..., : image.shape[-2], : image.shape[-1]]


@pytest.mark.parametrize(
    ("net", "multiple", "rewritten"),
    [(Halving, 1, False), (Halving, 2, True), (lambda: Halving(groups=4), 2, False),
     (lambda: Halving(bias=False), 2, True)],
)  # fmt: skip
def test_rows_are_planes_of_any_network_at_any_size_it_takes(
    net: type[nn.Module], multiple: int, rewritten: bool
) -> None:
    planes, _ = raw(strangers.seeded(net))
    rows, orders = in_rows(planes, multiple)  # type: ignore[arg-type]
    assert bool(orders) == rewritten
    for size in ((10, 6), (21, 13)) if multiple == 1 else ((10, 6),):
        image = np.random.default_rng(0).random((1, 3, *size), np.float32)
        one, two = (OnnxRunner(model, "net")(image)[CORRECTION] for model in (planes, rows))  # type: ignore[arg-type]
        np.testing.assert_allclose(one, two, atol=1e-6)


def test_a_network_of_large_images_only_is_rewritten_too() -> None:
    class Reflecting(strangers.Residual):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            wide = nn.functional.pad(image, (40, 40, 40, 40), mode="reflect")
            return image + self.last(torch.relu(self.first(wide)))[..., 40:-40, 40:-40]

    before, how = raw(strangers.seeded(Reflecting), least_px=64)
    assert prepared(before, how.divisor, how.least_px)[1]  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="onnxruntime does not run net on 1x3x16x16: "):
        OnnxRunner(before, "net")(np.zeros((1, 3, 16, 16), np.float32))  # type: ignore[arg-type]
