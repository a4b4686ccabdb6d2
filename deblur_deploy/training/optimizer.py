"""The optimizers a run can choose, each with the few members that the trainer uses.

Muon replaces the gradient of a weight matrix by the nearest orthogonal matrix, so that every direction is learnt at
the same speed.  A plain convolution network without normalization needs that: its gradients are dominated by the mean
brightness.  Muon takes matrices only; here convolutions are shown to it as matrices, and AdamW takes care of biases and
of the 1x1 heads, as Muon's author advises.  Its steps are scaled to the size of AdamW's: one learning rate serves both.

Pixels are between 0 and 1, never negative, so half of what the first convolution's weights do is the work of a bias.
It therefore steps as if its input had 0.5 taken off, which is only another pair of coordinates for weights and bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from deblur_deploy.training.config import Kind
from deblur_deploy.training.muon import Muon

_Tensors = tuple[Tensor, ...] | list[Tensor]


class Optimizer:
    """Several optimizers of ``torch.optim`` that step as one; convolutions are matrices (out, in x rows x columns).

    ``first``: the convolution among ``parameters`` that reads the image.
    """

    def __init__(
        self,
        kind: Kind,
        parameters: Iterable[nn.Parameter],
        *,
        rate: float,
        weight_decay: float,
        first: nn.Conv2d | None = None,
    ) -> None:
        everything, self._first = [p for p in parameters if p.requires_grad], first
        # 1x1 convolutions are heads here, whose outputs are colours: no matrix whose directions are worth the same.
        self._weights = [p for p in everything if kind == "muon" and p.ndim == 4 and p.shape[-1] > 1]
        self._matrices = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in self._weights]
        chosen = {id(weight) for weight in self._weights}
        others = [parameter for parameter in everything if id(parameter) not in chosen]
        self.parts: list[torch.optim.Optimizer] = []
        if self._matrices:
            self.parts.append(Muon(self._matrices, lr=rate, weight_decay=weight_decay))
        if kind == "adam":
            self.parts.append(torch.optim.Adam(others, lr=rate))
        else:
            self.parts.append(torch.optim.AdamW(others, lr=rate, weight_decay=weight_decay))

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad()
        for weight in self._weights:
            weight.grad = None

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step with learning rate ``rate``."""
        with _centred(self._first) if self._first else nullcontext():
            self._step(rate)

    def _step(self, rate: float) -> None:
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            matrix.copy_(weight.flatten(1))
            # None of a layer that the network does not use; the step leaves it as it is.
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            weight.copy_(matrix.view(weight.shape))

    def tensors(self) -> dict[str, Tensor]:
        """Everything that ``load_tensors`` needs to go on, under names of its own."""
        return {
            f"{number}.{index}.{name}": value
            for number, part in enumerate(self.parts)
            for index, values in part.state_dict()["state"].items()
            for name, value in values.items()
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what ``tensors`` gave.  Raises ValueError if that was of another kind or network."""
        for number, part in enumerate(self.parts):
            state: dict[int, dict[str, Any]] = {}
            for path, value in tensors.items():
                place, index, name = path.split(".")
                if int(place) == number:
                    state.setdefault(int(index), {})[name] = value
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})


@contextmanager
def _centred(conv: nn.Conv2d) -> Iterator[None]:
    """The step inside is taken in the coordinates (weight, bias + 0.5 sum(weight)): that of an input less 0.5."""
    assert conv.bias is not None
    assert conv.bias.grad is not None
    assert conv.weight.grad is not None
    conv.weight.grad -= 0.5 * conv.bias.grad[:, None, None, None]
    before = conv.weight.sum((1, 2, 3))
    yield
    conv.bias -= 0.5 * (conv.weight.sum((1, 2, 3)) - before)


def averaging(decay: float) -> Callable[[_Tensors, _Tensors, Tensor | int], None]:
    """Exponential averages that start over the last tenth of the run, so that its first weights are soon forgotten."""

    def update(averaged: _Tensors, current: _Tensors, count: Tensor | int) -> None:
        done = float(count)
        decay_now = min(decay, (1 + done) / (10 + done))
        get_ema_multi_avg_fn(decay_now)(averaged, current, count)  # type: ignore[no-untyped-call]

    return update
