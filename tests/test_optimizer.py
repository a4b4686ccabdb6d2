"""Muon takes convolutions as matrices, AdamW the rest; what was saved goes on with the same bits."""

import copy

import pytest
import torch
from torch import Tensor, nn

from deblur_deploy.training.config import Kind
from deblur_deploy.training.muon import orthogonal
from deblur_deploy.training.optimizer import Optimizer

KINDS: tuple[Kind, ...] = ("muon", "adamw", "adam")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(4, 3, 1)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def batch(seed: int) -> Tensor:
    return torch.rand(2, 3, 9, 12, generator=torch.Generator().manual_seed(seed))


def train(net: nn.Module, optimizer: Optimizer, seeds: range) -> list[Tensor]:
    for seed in seeds:
        net(batch(seed)).square().mean().backward()
        optimizer.step(0.01)
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in net.parameters()]


def made(net: nn.Module, kind: Kind) -> Optimizer:
    return Optimizer(kind, net.parameters(), rate=0.01, weight_decay=0.1)


def test_muon_moves_a_convolution_by_an_orthogonal_matrix_of_adamws_size() -> None:
    net = network()
    weight = net.get_parameter("0.weight")
    before = weight.detach().clone()
    train(net, Optimizer("muon", net.parameters(), rate=0.01, weight_decay=0.0), range(1))
    moved = (before - weight.detach()).flatten(1)
    values = torch.linalg.svdvals(moved) / (0.01 * 0.2 * max(moved.shape) ** 0.5)
    assert values.min() > 0.5
    assert values.max() < 1.3  # bounds of the Newton-Schulz iteration


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_it_is_torchs_muon_on_the_matrix(name: str) -> None:
    net = network()
    weight = net.get_parameter(name)
    matrix = nn.Parameter(weight.detach().flatten(1).clone())
    reference = torch.optim.Muon([matrix], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizer = made(net, "muon")
    for seed in range(3):
        net(batch(seed)).square().mean().backward()
        assert weight.grad is not None
        matrix.grad = weight.grad.flatten(1).clone()
        optimizer.step(0.01)
        optimizer.zero_grad()
        reference.step()  # type: ignore[no-untyped-call]
    # torch rounds to 8 bits on the way; a step is 0.01, three were taken.
    assert torch.allclose(weight.flatten(1), matrix, atol=5e-4)


def test_heads_and_biases_are_adamws() -> None:
    muon, adamw = network(), network()
    train(muon, made(muon, "muon"), range(1))
    train(adamw, made(adamw, "adamw"), range(1))
    for name, parameter in muon.named_parameters():
        same = torch.equal(parameter, adamw.get_parameter(name))
        assert same == (name not in ("0.weight", "2.weight")), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_goes_on_with_the_same_bits(kind: Kind) -> None:
    whole = network()
    straight = train(whole, made(whole, kind), range(6))
    first = network()
    optimizer = made(first, kind)
    train(first, optimizer, range(3))
    second = copy.deepcopy(first)
    resumed = made(second, kind)
    resumed.load_tensors({name: value.clone() for name, value in optimizer.tensors().items()})
    assert all(map(torch.equal, straight, train(second, resumed, range(3, 6))))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns(kind: Kind) -> None:
    net = network()
    before = net(batch(9)).square().mean()
    train(net, made(net, kind), range(40))
    assert net(batch(9)).square().mean() < 0.5 * before


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_convolution_learns_as_if_its_input_were_centred(kind: Kind) -> None:
    plain, centred = network().double(), network().double()
    first = plain[0]
    assert isinstance(first, nn.Conv2d)
    centred.get_parameter("0.bias").data += 0.5 * first.weight.data.sum((1, 2, 3))
    steps = {
        plain: Optimizer(kind, plain.parameters(), rate=0.01, weight_decay=0.0, first=first),
        centred: Optimizer(kind, centred.parameters(), rate=0.01, weight_decay=0.0),
    }
    for seed in range(3):
        image = batch(seed).double()
        results = plain(image), centred(image - 0.5)
        assert torch.allclose(results[0], results[1], atol=1e-6)
        for result, optimizer in zip(results, steps.values(), strict=True):
            result.square().mean().backward()
            optimizer.step(0.01)
            optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(8, 27), (27, 8), (16, 16), (1, 9)])
def test_orthogonal_keeps_the_directions_and_evens_their_lengths(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ orthogonal(matrix) @ right.T
    assert inner.diagonal().min() > 0.5
    assert inner.diagonal().max() < 1.3
    assert (inner - inner.diagonal().diag()).abs().max() < 1e-3
