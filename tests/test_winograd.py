"""Convolutions with a quarter of the multiplications are the same convolutions, forwards and backwards."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deblur_deploy.training.unet import PRESETS, UNet
from deblur_deploy.training.winograd import Winograd

ONCE = (1, 1)


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def convolution(image: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    return F.conv2d(image, weight, bias, *(geometry or (ONCE, ONCE, ONCE, 1)))


def used(result: Tensor) -> bool:
    return type(result.grad_fn).__name__ == "_ConvolutionBackward"


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 5),
    inputs=st.integers(48, 70),
    outputs=st.integers(48, 70),
    rows=st.integers(1, 14),
    columns=st.integers(1, 14),
    wanted=st.tuples(st.booleans(), st.booleans()).filter(any),
    channels_last=st.booleans(),
)
def test_result_and_gradients_are_a_plain_convolutions(
    batch: int, inputs: int, outputs: int, rows: int, columns: int, wanted: tuple[bool, bool], *, channels_last: bool
) -> None:
    image = made(batch, inputs, 4 * rows, 4 * columns)
    weight, bias = made(outputs, inputs, 3, 3, seed=1) / inputs**0.5, made(outputs, seed=2)
    arrives = made(batch, outputs, 4 * rows, 4 * columns, seed=3)
    if channels_last:
        image, arrives = (values.contiguous(memory_format=torch.channels_last) for values in (image, arrives))

    def everything(dtype: torch.dtype) -> list[Tensor]:
        leaves = [values.to(dtype) for values in (image, weight, bias)]
        followed = [leaf.requires_grad_() for leaf, follow in zip(leaves, (*wanted, True), strict=True) if follow]
        result = convolution(leaves[0], leaves[1], leaves[2])
        assert used(result) == (dtype == torch.float32)
        return [result.detach(), *torch.autograd.grad(result, followed, arrives.to(dtype))]

    with Winograd():
        ours, exact = everything(torch.float32), everything(torch.float64)
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 5e-5 * b.abs().max()


@pytest.mark.parametrize(
    ("image", "weight", "geometry"),
    [
        pytest.param((1, 48, 8, 10), (48, 48, 3, 3), (ONCE, ONCE, ONCE, 1), id="no multiple of 4"),
        pytest.param((1, 47, 8, 8), (48, 47, 3, 3), (ONCE, ONCE, ONCE, 1), id="few channels"),
        pytest.param((1, 48, 8, 8), (48, 48, 1, 1), (ONCE, (0, 0), ONCE, 1), id="1x1"),
        pytest.param((1, 48, 8, 8), (48, 48, 3, 3), ((2, 2), ONCE, ONCE, 1), id="stride"),
        pytest.param((1, 48, 8, 8), (48, 48, 3, 3), (ONCE, (0, 0), ONCE, 1), id="no padding"),
        pytest.param((1, 48, 8, 8), (48, 48, 3, 3), (ONCE, (2, 2), (2, 2), 1), id="dilation"),
        pytest.param((1, 96, 8, 8), (96, 48, 3, 3), (ONCE, ONCE, ONCE, 2), id="groups"),
    ],
)
def test_others_stay_as_they_are(image: tuple[int, ...], weight: tuple[int, ...], geometry: tuple[object, ...]) -> None:
    values = made(*image).requires_grad_(), made(*weight, seed=1), made(weight[0], seed=2)
    with Winograd():
        result = convolution(*values, *geometry)
    assert not used(result)
    assert torch.equal(result, convolution(*values, *geometry))


def test_nothing_changes_outside_of_it() -> None:
    image, weight, bias = made(1, 48, 8, 8).requires_grad_(), made(48, 48, 3, 3, seed=1), made(48, seed=2)
    assert not used(convolution(image, weight, bias))
    with Winograd(), torch.autocast("cpu", torch.bfloat16):
        assert not used(convolution(image, weight, bias))


def test_a_network_learns_the_same() -> None:
    torch.manual_seed(0)
    network, image = UNet(PRESETS["hd"]), torch.rand(2, 3, 64, 96)
    torch.nn.init.normal_(network.head.weight, std=0.1)

    def gradient() -> Tensor:
        network.zero_grad()
        network(image).square().mean().backward()
        return torch.cat([of.grad.flatten() for of in network.parameters() if of.grad is not None])

    plain = gradient()
    with Winograd():
        ours = gradient()
    assert 0 < (ours - plain).norm() < 1e-4 * plain.norm()  # not the same bits, or it was not used
