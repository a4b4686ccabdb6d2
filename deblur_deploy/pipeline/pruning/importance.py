"""How much a network would miss each channel: three measures, and the order in which channels go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from deblur_deploy.errors import InputError
from deblur_deploy.pipeline.pruning.channels import Channels, Group, Removal
from deblur_deploy.pipeline.pruning.config import Importance, Target

Samples = Sequence[tuple[Tensor, Tensor]]
"""Batches of (blurred, sharp), float NCHW in [0, 1]."""


def score(channels: Channels, method: Importance, samples: Samples) -> dict[str, Tensor]:
    """Importance of each channel of each group.

    ``magnitude``: L2 norm of all weights of the group (Fang et al., DepGraph, 2023), relative to the group's mean.
    ``taylor``: |weight x gradient of the L1 loss|, summed over the group and the samples (Molchanov et al. 2019).
    ``activation``: energy of what the channel adds to the layers that read it, mean square of its values times that of
    their weights (as Wanda, Sun et al. 2024, has it for single weights), relative to the group's mean.
    """
    if method != "magnitude" and not samples:
        raise InputError(f"importance {method!r} needs photographs; give some, or choose 'magnitude'")
    if method == "taylor":
        return _taylor(channels, samples)
    found = _activation(channels, samples) if method == "activation" else _magnitude(channels)
    return {name: values / values.mean().clamp_min(1e-12) for name, values in found.items()}


def _magnitude(channels: Channels) -> dict[str, Tensor]:
    return channels.rated(tp.importance.GroupMagnitudeImportance(p=2, normalizer=None, bias=True))


def _taylor(channels: Channels, samples: Samples) -> dict[str, Tensor]:
    importance = tp.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None, bias=True)
    found: dict[str, Tensor] = {}
    for blurred, sharp in samples:
        channels.model.zero_grad()
        with torch.enable_grad():
            F.l1_loss(channels.model(blurred), sharp).backward()  # type: ignore[no-untyped-call]
        for name, values in channels.rated(importance).items():
            found[name] = found.get(name, 0) + values
    channels.model.zero_grad()
    return found


def _activation(channels: Channels, samples: Samples) -> dict[str, Tensor]:
    modules = dict(channels.model.named_modules())
    readers = {part.layer for group in channels.groups.values() for part in group.slices if not part.of_outputs}
    energy: dict[str, Tensor] = {}
    handles = []
    for name in readers:

        def note(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            axis = inputs[0].ndim - 1 if isinstance(module, nn.Linear) else 1
            dims = [i for i in range(inputs[0].ndim) if i != axis]
            energy[name] = energy.get(name, 0) + inputs[0].square().mean(dims)

        handles.append(modules[name].register_forward_pre_hook(note))
    with torch.no_grad():
        for blurred, _ in samples:
            channels.model(blurred)
    for handle in handles:
        handle.remove()
    found = {}
    for name, group in channels.groups.items():
        values = torch.zeros(group.width)
        for part in group.slices:
            if not part.of_outputs:
                weight = modules[part.layer].weight.detach()
                assert isinstance(weight, Tensor)
                first = isinstance(modules[part.layer], nn.modules.conv._ConvTransposeNd)
                squares = weight.transpose(0, 0 if first else 1).flatten(1).square().sum(1)
                indices = list(part.indices)
                values.index_add_(0, torch.tensor(part.roots), (squares * energy[part.layer])[indices])
        found[name] = values
    return found


def allowed_widths(width: int, multiple: int) -> list[int]:
    """Widths that a group of ``width`` may get, from high to low: multiples of ``multiple``.

    Of a power of two below it where the group is narrower than twice of it, so that narrow layers can shrink as well.
    """
    while multiple > 1 and 2 * multiple > width:
        multiple //= 2
    return list(range((width - 1) // multiple * multiple, 0, -multiple))


def order(
    channels: Channels, scores: Mapping[str, Tensor], multiple: int, target: Target, balance: float = 0.0
) -> list[tuple[str, int]]:
    """Blocks of channels in the order in which they go, down to the smallest network: the group, and its width then.

    The next to go is the block that loses the least importance for the ``target`` that it saves, over all layers.  A
    layer waits, though, rather than keep less than ``balance`` of the share that the fullest layer keeps: importance
    knows what is lost now, not how little a narrow layer can learn afterwards.  Channels without any do not count.
    """
    which = 0 if target == "macs" else 1
    lost = {name: torch.cat([torch.zeros(1), values.sort().values.cumsum(0).cpu()]) for name, values in scores.items()}
    alive = {name: max(1, int((values > 0).sum())) for name, values in scores.items()}
    widths = {name: group.width for name, group in channels.groups.items()}
    left = {name: allowed_widths(width, multiple) for name, width in widths.items()}
    blocks: list[tuple[str, int]] = []
    while shrinkable := [name for name, narrower in left.items() if narrower]:
        now = channels.cost(widths)[which]
        kept = {name: min(1.0, widths[name] / alive[name]) for name in shrinkable}
        fullest = max(kept.values())

        def price(name: str, now: float = now) -> float:
            full, wide, narrow = channels.groups[name].width, widths[name], left[name][0]
            saved = now - channels.cost(widths | {name: narrow})[which]
            return float(lost[name][full - narrow] - lost[name][full - wide]) / max(saved, 1e-9)

        balanced = [name for name in shrinkable if left[name][0] >= balance * fullest * alive[name]]
        # A narrow layer shrinks by a large share at once; the fullest may always, or none could.
        name = min(balanced or [name for name in shrinkable if kept[name] == fullest], key=price)
        widths[name] = left[name].pop(0)
        blocks.append((name, widths[name]))
    return blocks


def removal(scores: Mapping[str, Tensor], groups: Mapping[str, Group], widths: Mapping[str, int]) -> Removal:
    """The least important channels of each group beyond the width given."""
    chosen = {
        name: scores[name].argsort()[: groups[name].width - width].sort().values for name, width in widths.items()
    }
    return {name: indices.tolist() for name, indices in chosen.items() if len(indices)}
