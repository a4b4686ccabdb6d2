"""Which channels of a network belong together, what they cost, and how they are taken out.

torch-pruning's dependency graph (Fang et al., DepGraph, 2023) says which slices of which weights go when an output
channel goes, through concatenations, pooling and transposed convolutions.  What it says is not believed but proved: a
network without channels must compute what the whole one computes with the same channels set to zero.  A group of
layers that does not hold this (the head, or what passes through an operation that the graph misreads) is left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch_pruning as tp
from torch import Tensor, nn

from deblur_deploy.errors import InputError, VerificationError, one_line

T = TypeVar("T")
Forward = Callable[[nn.Module, Tensor], Tensor]
Removal = Mapping[str, Sequence[int]]
"""Output channels to take out, by the name of the layer that makes them."""

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What one channel of a group takes from one layer."""

    layer: str
    of_outputs: bool
    """Whether these are outputs of the layer, or inputs."""
    indices: tuple[int, ...]
    """The channels of the layer."""
    roots: tuple[int, ...]
    """The channel of the group that each of ``indices`` belongs to."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Channels that live and die together, named after the layer that makes them."""

    name: str
    width: int
    slices: tuple[Slice, ...]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Size of one layer: ``macs`` is its multiply-accumulates for one input and one output channel."""

    inputs: int
    outputs: int
    kernel: int
    macs: float
    separable: bool
    """Each output sees one input only (a depthwise convolution)."""
    per_output: int
    """Parameters that each output has beyond the kernel."""

    def of(self, inputs: int, outputs: int) -> tuple[float, int]:
        """(multiply-accumulates, parameters) with other numbers of channels."""
        pairs = outputs if self.separable else inputs * outputs
        return self.macs * pairs, self.kernel * pairs + self.per_output * outputs


class Channels:
    """The groups of ``model`` that can be pruned, found by tracing it on ``example``.

    ``keep`` names layers whose outputs stay.  With ``probe`` every group is tried on its own, and what does not hold
    the proof goes to ``left`` with the reason.  Raises InputError if the network cannot be traced or nothing of it can
    be pruned.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        *,
        forward: Forward = lambda model, image: model(image),
        keep: Sequence[str] = (),
        probe: bool = False,
    ) -> None:
        self.model, self.example, self.forward = model.eval(), example, forward
        self.left: dict[str, str] = {}
        """Layers that must stay as they are, and why."""
        with named_failures(model), torch.no_grad():
            output = forward(model, example)
        if not isinstance(output, Tensor):
            raise InputError(f"the network returns {type(output).__name__}; one image tensor is needed")
        self.costs = _costs(model, example, forward)
        self._traced = {
            (one := self._record(group)).name: (group, one)
            for group in self._traceable(model, lambda graph: list(graph.get_all_groups()))
        }
        # In the order in which the network is built.
        names = [name for name in self.costs if name in self._traced and name not in keep]
        self.groups = {name: self._traced[name][1] for name in names}
        if probe:
            self._probe()
        if not self.groups:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.left.items())
            raise InputError(f"no layer of the network can be pruned ({why or 'it has no convolutions'})")

    def without(self, removal: Removal) -> nn.Module:
        """A copy of the network without these channels, proved to compute what zeroing them computes.

        Raises VerificationError that names the layers if it does not.
        """
        small = self._cut(removal)
        with torch.no_grad():
            difference = self._difference(small, removal)
        if difference is not None:
            raise VerificationError(f"pruning {', '.join(removal)} breaks the network: {difference}")
        return small

    def silenced(self, removal: Removal) -> nn.Module:
        """A copy of the network with these channels set to zero."""
        whole = copy.deepcopy(self.model)
        modules = dict(whole.named_modules())
        for name, indices in removal.items():
            chosen = set(indices)
            for part in self.groups[name].slices:
                if part.of_outputs:
                    gone = [index for index, root in zip(part.indices, part.roots, strict=True) if root in chosen]
                    _silence(modules[part.layer], gone)
        return whole

    def cost(self, widths: Mapping[str, int]) -> tuple[float, int]:
        """(multiply-accumulates on ``example``, parameters) if each group has the width given, or its own."""
        inputs = {name: cost.inputs for name, cost in self.costs.items()}
        outputs = {name: cost.outputs for name, cost in self.costs.items()}
        for name, width in widths.items():
            group = self.groups[name]
            for part in group.slices:
                sizes = outputs if part.of_outputs else inputs
                sizes[part.layer] -= (group.width - width) * (len(part.indices) // group.width)
        totals = [cost.of(inputs[name], outputs[name]) for name, cost in self.costs.items()]
        return sum(macs for macs, _ in totals), sum(count for _, count in totals)

    def rated(self, importance: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """One of torch-pruning's importances for every group, as a value for each channel."""
        return {name: importance(self._traced[name][0]).detach() for name in self.groups}

    def _traceable(self, model: nn.Module, wanted: Callable[[Any], T]) -> T:
        """What is ``wanted`` of torch-pruning's graph of ``model``; raises InputError if it cannot make one."""
        try:
            # The graph is read from autograd, so it needs gradients wherever this is called from.
            with torch.enable_grad(), named_failures(model):
                graph = tp.DependencyGraph()
                return wanted(graph.build_dependency(model, self.example, forward_fn=self.forward, verbose=False))
        except InputError:
            raise
        except Exception as error:  # whatever torch-pruning meets in a stranger's network
            raise InputError(f"torch-pruning cannot trace the network: {one_line(error)}") from None

    def _record(self, group: Any) -> Group:
        graph, names = group._DG, group._DG._module2name
        slices = []
        for item in group:
            module = item.dep.target.module
            if isinstance(module, nn.Module) and names.get(module) in self.costs:
                slices.append(
                    Slice(
                        layer=names[module],
                        of_outputs=bool(graph.is_out_channel_pruning_fn(item.dep.handler)),
                        indices=tuple(item.idxs),
                        roots=tuple(item.root_idxs),
                    )
                )
        return Group(name=slices[0].layer, width=len(group[0].idxs), slices=tuple(slices))

    def _cut(self, removal: Removal) -> nn.Module:
        small = copy.deepcopy(self.model)
        graph, modules = self._traceable(small, lambda graph: graph), dict(small.named_modules())
        for name, indices in removal.items():
            pruner = graph.get_pruner_of_module(modules[name])
            graph.get_pruning_group(modules[name], pruner.prune_out_channels, list(indices)).prune()
        return small

    def _probe(self) -> None:
        for name, group in list(self.groups.items()):
            removal = {name: [group.width // 2]}
            try:
                with torch.no_grad():
                    difference = (
                        "it has one channel" if group.width < 2 else self._difference(self._cut(removal), removal)
                    )
            except Exception as error:  # as above
                difference = one_line(error)
            if difference is not None:
                self.left[name] = difference
                del self.groups[name]

    def _difference(self, small: nn.Module, removal: Removal) -> str | None:
        """How ``small`` differs from the network with the removed channels set to zero; None if it does not."""
        expected = self.forward(self.silenced(removal), self.example)
        with named_failures(small):
            found = self.forward(small, self.example)
        if found.shape != expected.shape:
            return f"the output becomes {tuple(found.shape)} instead of {tuple(expected.shape)}"
        scale = float(expected.abs().max()) or 1.0
        off = float((found - expected).abs().max()) / scale
        return None if off < _EQUAL else f"the output changes by {off:.2g} of its range where zeros were removed"


_EQUAL = 1e-3
"""Sums in another order differ by rounding only; a wrong channel changes the output by about its range."""


@contextmanager
def named_failures(model: nn.Module) -> Iterator[None]:
    """Turn a failing forward pass into an InputError that names the layer in which it failed."""
    inside: list[str] = []

    def leave(*_: object) -> None:
        inside.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    except Exception as error:  # a network of somebody else's may fail with anything
        if isinstance(error, InputError) or not inside:
            raise
        where = f"layer {inside[-1]}" if inside[-1] else "the network's own forward"
        raise InputError(f"the forward pass fails in {where}: {one_line(error)}") from None
    finally:
        for handle in handles:
            handle.remove()


def _costs(model: nn.Module, example: Tensor, forward: Forward) -> dict[str, Cost]:
    """Every layer with channels; places are counted while it runs."""
    places: dict[str, float] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, _WEIGHTED):

            def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                # A transposed convolution works on its input's places, any other layer on its output's.
                seen = inputs[0] if getattr(module, "transposed", False) else output
                channels = seen.shape[-1 if isinstance(module, nn.Linear) else 1]
                places[name] = places.get(name, 0) + seen.numel() / channels

            handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        forward(model, example)
    for handle in handles:
        handle.remove()
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, _WEIGHTED):
            ends = ("in_features", "out_features") if isinstance(module, nn.Linear) else ("in_channels", "out_channels")
            inputs, outputs = (int(getattr(module, end)) for end in ends)
            separable = getattr(module, "groups", 1) > 1
            kernel = module.weight.numel() // (outputs if separable else inputs * outputs)
            found[name] = Cost(
                inputs=inputs,
                outputs=outputs,
                kernel=kernel,
                macs=kernel * places.get(name, 0.0),
                separable=separable,
                per_output=int(module.bias is not None),
            )
        elif isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm | nn.PReLU):
            parameters = list(module.parameters(recurse=False))
            width = parameters[0].numel() if parameters else int(getattr(module, "num_features", 0))
            found[name] = Cost(inputs=0, outputs=width, kernel=0, macs=0.0, separable=False, per_output=len(parameters))
    return found


@torch.no_grad()
def _silence(module: nn.Module, outputs: Sequence[int]) -> None:
    """Let these outputs be zero."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        module.weight[:, outputs] = 0
    elif isinstance(module.weight, Tensor):
        module.weight[outputs] = 0
    if isinstance(bias := getattr(module, "bias", None), Tensor):
        bias[outputs] = 0
