"""What JPEG does to a picture, in torch: batched over blocks, on every device, without an encoder.

Only the loss is wanted, so entropy coding is left out.  Source: ITU-T T.81, annex K tables; quality scaling as in
libjpeg; 4:2:0 chroma.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = torch.tensor(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ],
    dtype=torch.float32,
)
_CHROMA = torch.full((8, 8), 99.0)
_CHROMA[:4, :4] = torch.tensor([[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]])

_TO_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_TO_RGB = torch.linalg.inv(_TO_YCC)

_k = torch.arange(8)
_DCT = torch.cos((2 * _k + 1) * _k[:, None] * math.pi / 16) * torch.where(_k == 0, math.sqrt(1 / 8), 0.5)[:, None]


def jpeg_roundtrip(image: Tensor, quality: Tensor) -> Tensor:
    """``image``, float (N, 3, H, W) RGB in [0, 1], as JPEGs of ``quality`` (N values, 1 to 100) would give it back."""
    height, width = image.shape[-2:]
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality).to(image).view(-1, 1, 1, 1, 1)
    padded = F.pad(image, (0, -width % 16, 0, -height % 16), mode="replicate") * 255
    ycc = torch.einsum("ij,njhw->nihw", _TO_YCC.to(image), padded)
    luma = _quantised(ycc[:, :1] - 128, _LUMA, scale) + 128
    chroma = _quantised(F.avg_pool2d(ycc[:, 1:], 2), _CHROMA, scale)
    full = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    rgb = torch.einsum("ij,njhw->nihw", _TO_RGB.to(image), torch.cat([luma, full], 1))
    return (rgb[..., :height, :width] / 255).clamp(0, 1)


def _quantised(planes: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    """(N, C, H, W), multiples of 8, through the quantised cosine transform of its 8x8 blocks."""
    steps = ((table.to(planes) * scale + 50) / 100).floor().clamp(1, 255)[:, :, None]
    dct = _DCT.to(planes)
    high, wide = planes.shape[-2] // 8, planes.shape[-1] // 8
    blocks = planes.reshape(*planes.shape[:2], high, 8, wide, 8).transpose(-3, -2)
    kept = (dct @ blocks @ dct.T / steps).round() * steps
    return (dct.T @ kept @ dct).transpose(-3, -2).reshape(planes.shape)
