"""Ranges and biases tuned together by what they do to the result, on the calibration tiles.

A few photographs drive an activation ten times further than most do.  A range that holds them leaves coarse levels to
all others, and one that does not ruins them; and what one layer rounds away another's bias may make up for.  Which is
better depends on what the network makes of it, so all ranges and biases follow the gradient of the result's error, with
fp32 as the only teacher.  Weights stay as they are rounded: they are too many for a few dozen tiles.

Photographs in use may drive an activation further than those that calibrate, and what lies outside of a range is lost:
so ranges that may be twice as wide at hardly any cost then are, those nearest to the result first.

Source: Esser et al., Learned Step Size Quantization (2020); biases as in Nagel et al. (2019), here by gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor

from deblur_deploy.media.images import Image
from deblur_deploy.pipeline.graph import BLOCKS, CORRECTION
from deblur_deploy.pipeline.int8.calibrate import run_body
from deblur_deploy.pipeline.int8.gradient import computed
from deblur_deploy.pipeline.int8.quantize import layer_name
from deblur_deploy.pipeline.network import Network
from deblur_deploy.pipeline.nodes import attributes, constants_of
from deblur_deploy.training.winograd import Winograd

_STEPS, _PASSES, _TILES = 150, 20, 4
"""How often everything is moved at most, how often each tile is looked at, at most, and how many at once."""
_SCALE_RATE, _BIAS_RATE = 0.03, 2e-4
"""Highest learning rates of Adam, of the logarithm of a scale and of the biases of equalized channels.

Adam moves a bias by about its rate at every step, however little there is to gain.  Biases that learn too fast learn
the calibration tiles by heart: at 1e-3, five times as much, int8 of ``quality`` lost 0.030 dB on gopro6 and 0.017 on
reds5, at this rate 0.011 and 0.008; ``hd`` at most 0.005 on any set, as before.
"""
_ROOM, _ROOM_COST, _ROOM_RUNS, _ROOM_TILES = 2.0, 0.1, 600, 16
"""How much wider ranges become, by which share the error may grow by all of that, and how many tiles are run for it, at
most, and at once."""
_LEVEL = 1 / 255
_MOST = 255
_WORK = 5e12
"""Work, in multiplications, that tuning may take: some minutes of two cores."""
_LEAST_PX, _WHOLE_PX = 64, 128
"""Least side of a part of a tile, and the largest for a network that sees everything: what it makes of any part of an
image is not what it makes of the whole, however large that part is."""


def affordable(tiles: Sequence[Image], network: Network) -> list[Image]:
    """``tiles``, or parts of them, that somebody else's network can be tuned on; none if it costs too much."""
    side = len(tiles[0])
    if network.ours:
        return list(tiles)

    def fits(side: int) -> bool:
        return side >= max(_LEAST_PX, network.least_px) and side % network.size_divisor == 0

    while network.sees_everything and side > _WHOLE_PX and fits(side // 2):
        side //= 2
    while 3 * _STEPS * _TILES * side**2 * network.work_per_pixel > _WORK:
        side //= 2
        if not fits(side):
            return []
    return [np.ascontiguousarray(tile[:side, :side]) for tile in tiles]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What tuning changed."""

    ranges: dict[str, tuple[np.float32, np.float32]]
    """By activation."""
    biases: dict[str, NDArray[np.float32]]
    """By layer: (outputs,), in the order of the layout ``planes``."""


def tuned(
    body: ModelProto,
    quantized: ModelProto,
    tiles: Sequence[Image],
    stem: int,
    tied: Mapping[str, str],
    *,
    residual: bool,
) -> Tuned:
    """The ranges and biases with which ``quantized`` (QDQ, in planes) comes near to ``body`` (fp32) on ``tiles``.

    The error of a tile is a share of what the network does to it, or of a level where it does nothing, and its root
    counts: otherwise a few tiles that no range can hold would decide for all.  ``tied``: activations that keep the
    range of another; ``residual``: whether the body gives what is to be added to the image, and not the image.
    """
    seen = list(run_body(body, tiles, stem, {CORRECTION}))
    blocks, exact = (torch.from_numpy(np.concatenate([of[name] for of in seen])) for name in (BLOCKS, CORRECTION))
    energies = (exact if residual else exact - blocks).square().mean((1, 2, 3)) + _LEVEL**2
    network = _FakeQuantized(quantized, tied)
    groups = [
        {"params": list(network.scales.values()), "lr": _SCALE_RATE},
        {"params": list(network.biases.values()), "lr": _BIAS_RATE},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(0)
    passes = [torch.randperm(len(tiles), generator=generator) for _ in range(_PASSES)]
    batches = torch.split(torch.cat(passes), _TILES)[:_STEPS]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))

    def error(chosen: Tensor) -> Tensor:
        with Winograd():
            noise = (network(blocks[chosen]) - exact[chosen]).square().mean((1, 2, 3))
        return (noise / energies[chosen] + 1e-9).sqrt().mean()

    for chosen in batches:
        with torch.enable_grad():
            loss = error(chosen)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    some = passes[0][: min(_ROOM_TILES, max(1, _ROOM_RUNS // max(len(network.scales), 1)))]
    network.give_room(lambda: error(some).item())
    return network.found()


class _FakeQuantized:
    """A quantized body in torch, with a gradient: everything is rounded, but stays float."""

    def __init__(self, quantized: ModelProto, tied: Mapping[str, str]) -> None:
        self.tied, graph = tied, quantized.graph
        constants = constants_of(quantized)
        self.constants = {name: torch.from_numpy(np.array(of)) for name, of in constants.items()}
        self.nodes = []
        for node in graph.node:
            if node.op_type != "DequantizeLinear" or node.input[0] not in constants:
                self.nodes.append(node)
                continue
            # Weights and biases: their zero points are zero, and their steps lie along one axis.
            values, step = (self.constants[name] for name in node.input[:2])
            axis = attributes(node).get("axis", 0) if step.ndim else 0
            along = [1] * values.ndim
            if values.ndim:
                along[axis] = -1
            self.constants[node.output[0]] = values * step.reshape(along)
        self.scales: dict[str, Tensor] = {}
        self.zeros: dict[str, int] = {}
        self.biases: dict[str, Tensor] = {}
        for node in self.nodes:
            if node.op_type == "QuantizeLinear":
                self.zeros[_activation(node)] = int(constants[node.input[2]])
                if (name := self._key(_activation(node))) not in (BLOCKS, CORRECTION):  # whose steps are levels
                    self.scales.setdefault(name, torch.tensor(math.log(constants[f"{name}_scale"])).requires_grad_())
            if node.op_type == "Conv" and len(node.input) > 2 and node.input[2] in self.constants:
                self.biases[layer_name(node.input[1])] = self.constants[node.input[2]].clone().requires_grad_()

    def _key(self, name: str) -> str:
        return self.tied.get(name, name)

    def __call__(self, blocks: Tensor) -> Tensor:
        values = {BLOCKS: blocks}
        for node in self.nodes:
            if any(name in values for name in node.input):
                given = self._run(node, values)
                values.update(zip(node.output, given if isinstance(given, tuple) else (given,), strict=False))
        return values[CORRECTION]

    def _run(self, node: Any, values: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        inputs = [values[name] if name in values else self.constants.get(name) for name in node.input]
        match node.op_type:
            case "QuantizeLinear":
                x = inputs[0]
                assert x is not None
                zero, step = self.zeros[_activation(node)], self.constants[node.input[1]]
                if (name := self._key(_activation(node))) == CORRECTION:
                    # Rounded to levels, as an image would be anyway, and so would fp32's.
                    return x.clamp(-zero * step, (_MOST - zero) * step)
                if name in self.scales:
                    step = self.scales[name].exp()
                return _Rounded.apply(x, step, zero)  # type: ignore[no-untyped-call]
            case "DequantizeLinear":
                assert inputs[0] is not None
                return inputs[0]
            case "Conv":
                bias = self.biases.get(layer_name(node.input[1]))
                return computed(node, [*inputs[:2], bias])
        return computed(node, inputs)

    @torch.no_grad()
    def give_room(self, error: Callable[[], float]) -> None:
        """Widen ranges, those nearest to the result first, as long as ``error`` grows by a small share in all."""
        most = (1 + _ROOM_COST) * error()
        for scale in reversed(self.scales.values()):
            scale += math.log(_ROOM)
            if error() > most:
                scale -= math.log(_ROOM)

    def found(self) -> Tuned:
        """What the parameters are by now."""
        ranges = {}
        for name, zero in self.zeros.items():
            if (scale := self.scales.get(self._key(name))) is not None:
                step = math.exp(scale.item())
                ranges[name] = np.float32(-zero * step), np.float32((_MOST - zero) * step)
        return Tuned(ranges=ranges, biases={layer: of.detach().numpy() for layer, of in self.biases.items()})


def _activation(node: Any) -> str:
    """What the scale of a QuantizeLinear was found for; max-pooling and the like share that of what they read."""
    return str(node.input[1]).removesuffix("_scale")


class _Rounded(torch.autograd.Function):
    """Values as uint8 would hold them: (x, step, zero point) to x; the gradient of rounding itself is 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero: int) -> Tensor:
        steps = x / step
        whole = steps.round().clamp_(-zero, _MOST - zero)
        ctx.save_for_backward(steps, whole)
        return whole * step

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,), (steps, whole) = gradients, ctx.saved_tensors
        error = whole - steps
        inside = error.abs() <= 0.5
        # Outside of the range, where nothing of x is left, the end of the range moves with the step.
        towards = torch.where(inside, error, whole)
        return gradient * inside, torch.vdot(gradient.flatten(), towards.flatten()), None
