"""From a network to a smaller dense one: which channels go, at which size to stop, and the result as a ``UNet``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deblur_deploy.errors import InputError, VerificationError
from deblur_deploy.pipeline.pruning.channels import Channels
from deblur_deploy.pipeline.pruning.config import PruneConfig, Target
from deblur_deploy.pipeline.pruning.importance import Samples, allowed_widths, order, removal, score
from deblur_deploy.training.unet import UNet, UNetConfig, Widths, parameter_count


class Plan:
    """Ways to make a network smaller: which channels go at any target, ranked over all layers."""

    def __init__(self, channels: Channels, config: PruneConfig, samples: Samples) -> None:
        self.channels, self.multiple = channels, config.multiple
        self.target: Target = "macs" if config.parameters is None else "parameters"
        self.scores = score(channels, config.importance, samples)
        self._whole = self._cost({})
        self.path: list[dict[str, int]] = [{}]
        """Widths of the groups that shrank, from the whole network to the smallest, one block of channels a step."""
        for group, width in order(channels, self.scores, config.multiple, self.target, config.balance):
            self.path.append(self.path[-1] | {group: width})

    def share(self, widths: Mapping[str, int]) -> float:
        """What a network of these widths keeps of the target's cost."""
        return self._cost(widths) / self._whole

    @property
    def smallest(self) -> float:
        """Share that the smallest network keeps."""
        return self.share(self.path[-1])

    def widths(self, share: float) -> dict[str, int]:
        """Widths of the groups that shrink, for a network that keeps at most ``share``.

        Raises InputError if even the smallest network keeps more.
        """
        share *= 1 + 1e-9  # a share that was computed from widths gives these widths
        widths = next((widths for widths in self.path if self.share(widths) <= share), None)
        if widths is None:
            what = "multiply-accumulates" if self.target == "macs" else "parameters"
            raise InputError(
                f"a share of {share:g} of the {what} is out of reach: the smallest network, with one block of "
                f"channels in each layer, keeps {self.smallest:.3g}; ask for more, or allow narrower layers with a "
                "lower multiple"
            )
        # The last block may have been far more than was needed: others are taken back while they fit.
        while fitting := [more for more in self._wider(widths) if self.share(more) <= share]:
            widths = max(fitting, key=self._kept)
        return widths

    def network(self, widths: Mapping[str, int]) -> nn.Module:
        """A network of these widths, proved to compute what the whole one computes with those channels set to zero."""
        return self.channels.without(removal(self.scores, self.channels.groups, widths))

    def _cost(self, widths: Mapping[str, int]) -> float:
        return self.channels.cost(widths)[0 if self.target == "macs" else 1]

    def _wider(self, widths: Mapping[str, int]) -> Iterator[dict[str, int]]:
        """The same with one more block of channels in one group."""
        for name, width in widths.items():
            full = self.channels.groups[name].width
            more = next((more for more in reversed(allowed_widths(full, self.multiple)) if more > width), full)
            yield {other: kept for other, kept in {**widths, name: more}.items() if other != name or more < full}

    def _kept(self, widths: Mapping[str, int]) -> float:
        """Importance of all channels that stay."""
        total = 0.0
        for name, values in self.scores.items():
            total += float(values.sort().values[-widths.get(name, len(values)) :].sum())
        return total


def unet_channels(unet: UNet) -> Channels:
    """The prunable channels of one of our networks: all but those of its head, which are the image."""
    side = 2 * unet.config.size_divisor
    # Neither black nor flat, so that a wrong channel shows.
    example = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    return Channels(unet, example, forward=_core, keep=("head",))


def _core(model: nn.Module, image: Tensor) -> Tensor:
    assert isinstance(model, UNet)
    return model.core(image)


def as_unet(pruned: nn.Module) -> UNet:
    """A pruned ``UNet`` as a new one, built from a config that its weights fit, in eval mode."""
    assert isinstance(pruned, UNet)
    config = UNetConfig(
        stem=pruned.config.stem,
        encoder=tuple(_widths(block) for block in pruned.encoder),
        up=_widths(pruned.up),
        decoder=tuple(_widths(block) for block in pruned.decoder),
        residual=pruned.config.residual,
    )
    unet = UNet(config)
    unet.load_state_dict(pruned.state_dict())
    return unet.eval()


def _widths(layers: nn.Module) -> Widths:
    kinds = nn.Conv2d | nn.ConvTranspose2d
    return tuple(layer.out_channels for layer in layers.children() if isinstance(layer, kinds))


def sizes(dense: UNet, pruned: UNet) -> dict[str, Any]:
    """What pruning did to the shape of the network: channels by layer, and costs, before and after."""
    nets = (dense, pruned)
    before, after = (
        {name: layer.out_channels for name, layer in unet.named_modules() if hasattr(layer, "out_channels")}
        for unet in nets
    )
    return {
        "widths": {name: [width, after[name]] for name, width in before.items()},
        "macs_per_pixel": [unet.config.macs_per_pixel for unet in nets],
        "parameters": [parameter_count(unet) for unet in nets],
    }


def plan_for(unet: UNet, config: PruneConfig, samples: Samples) -> Plan:
    """The ways to make ``unet`` smaller."""
    return Plan(unet_channels(unet), config, samples)


def network_of(plan: Plan, share: float) -> UNet:
    """The network of a plan for a ``UNet`` that keeps at most ``share``; its cost is counted again, from its config.

    Raises InputError if that is out of reach.
    """
    widths, whole = plan.widths(share), plan.channels.model
    unet = as_unet(plan.network(widths))
    assert isinstance(whole, UNet)
    found = cost_of(unet, plan.target) / cost_of(whole, plan.target)
    if abs(found - plan.share(widths)) > 1e-9:
        raise VerificationError(f"pruning counted {plan.share(widths)} of the {plan.target}, the network has {found}")
    return unet


def cost_of(unet: UNet, target: Target) -> float:
    """What ``unet`` costs in the measure of ``target``."""
    return unet.config.macs_per_pixel if target == "macs" else parameter_count(unet)


def sensitivity(
    plan: Plan, samples: Samples, shares: Sequence[float] = (0.25, 0.5, 0.75)
) -> Mapping[str, Mapping[float, float]]:
    """PSNR of the network on ``samples``, in dB, when one layer alone loses this share of its channels."""
    found: dict[str, dict[float, float]] = {}
    whole = _psnr(plan.channels.model, samples)
    for name, group in plan.channels.groups.items():
        found[name] = {0.0: whole}
        for share in shares:
            width = max(1, round(group.width * (1 - share)))
            gone = removal(plan.scores, plan.channels.groups, {name: width})
            found[name][share] = _psnr(plan.channels.silenced(gone), samples)
    return found


@torch.no_grad()
def _psnr(model: nn.Module, samples: Samples) -> float:
    errors = [
        (model(blurred).clamp(0, 1) - sharp).square().mean(dim=(1, 2, 3)).clamp_min(1e-10) for blurred, sharp in samples
    ]
    return float(-10 * torch.cat(errors).log10().mean())
