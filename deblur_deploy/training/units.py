"""Channels that never fire: counted, so that a run can tell.

Without normalization a ReLU network loses channels for good when its learning rate is too high early on: a channel
whose value is negative everywhere has no gradient that could bring it back.  Nothing else shows it, since the loss goes
on falling with what is left.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_FIRES = 5e-4
"""Share of the pixels in which a live channel is above zero."""


@torch.no_grad()
def dead_share(network: nn.Module, images: Tensor) -> float:
    """Share of the channels of all ReLUs of ``network`` that are (next to) never above zero.

    ``images``: what the network takes; take enough of them to speak for what it will see.
    """
    dead: list[Tensor] = []

    def look(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        dead.append((output > 0).float().mean((0, 2, 3)) < _FIRES)

    hooks = [module.register_forward_hook(look) for module in network.modules() if isinstance(module, nn.ReLU)]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return float(torch.cat(dead).float().mean())
