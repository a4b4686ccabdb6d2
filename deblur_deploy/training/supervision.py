"""The network with what only training needs: heads that let the loss look at its coarser scales.

Source of the idea: Nah et al., Deep multi-scale CNN (2017); Cho et al., MIMO-UNet (2021).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deblur_deploy.training.losses import Loss
from deblur_deploy.training.unet import UNet, pad_to_multiple, to_image


class Supervised(nn.Module):
    """A network and, with ``multi_scale``, a 1x1 head on its bottleneck and on each decoder level but the last."""

    def __init__(self, unet: UNet, *, multi_scale: bool) -> None:
        super().__init__()
        self.unet = unet
        config = unet.config
        widths = [config.encoder[-1][-1], *(block[-1] for block in config.decoder)][:-1] if multi_scale else []
        self.heads = nn.ModuleList(nn.Conv2d(width, 3 * config.stem**2, 1) for width in widths)
        for head in self.heads:
            assert isinstance(head, nn.Conv2d)
            assert head.bias is not None
            nn.init.zeros_(head.bias)
            if config.residual:
                nn.init.zeros_(head.weight)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Restored images, finest first; each further one has half the height and width (of the padded image)."""
        height, width = image.shape[-2:]
        padded = pad_to_multiple(image, self.unet.config.size_divisor)
        features = self.unet.features(padded)
        images = [self.unet.composed(padded, features[-1])[..., :height, :width]]
        # Features and heads are coarsest first and lack the finest, which the network itself restores.
        for halvings, (head, feature) in enumerate(zip(reversed(self.heads), features[-2::-1], strict=False), 1):
            restored = to_image(head(feature), self.unet.config.stem)
            small = F.avg_pool2d(padded, 2**halvings)
            images.append(small + restored if self.unet.config.residual else restored)
        return images

    def loss(self, images: list[Tensor], truth: Tensor, loss: Loss, multi_scale: float) -> Tensor:
        """``loss`` of the finest image plus ``multi_scale`` times its mean over the coarser ones."""
        finest = loss(images[0], truth)
        if not self.heads:
            return finest
        padded = pad_to_multiple(truth, self.unet.config.size_divisor)
        coarser = [loss(image, F.avg_pool2d(padded, 2**i)) for i, image in enumerate(images[1:], 1)]
        return finest + multi_scale * torch.stack(coarser).mean()
