"""3x3 convolutions with a quarter of the multiplications, for gradients in fp32 on a processor.

Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016):
tiles of 6x6 pixels and the filter are transformed, multiplied value by value, and transformed back to 4x4 pixels.  With
many channels the product is 36 matrix products, and so are both of its gradients.  PyTorch's own convolutions run next
to the peak of a processor's arithmetic, so nothing but fewer operations can make them faster.

Results differ from a plain convolution's by rounding, about 1e-5 of the largest value: less than TF32 does on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

_TILES = 144
"""Tiles transformed at a time: enough rows for a matrix product, few enough to stay in the cache."""
_CHANNELS = 48
"""With fewer channels than this the transforms cost more than the products save."""


def _twice(rows: list[list[float]]) -> Tensor:
    """A transform of lines as one of (flattened) squares."""
    matrix = torch.tensor(rows, dtype=torch.float64)
    return torch.kron(matrix, matrix).float()


# The interpolation points 0, 1, -1, 2, -2 and infinity, as in the paper.
_INPUT = _twice(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_FILTER = _twice(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
_OUTPUT = _twice([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])


class Winograd(TorchFunctionMode):
    """While this context is entered, convolutions are computed so, forwards and backwards, where that is faster.

    That is: 3x3 with a bias, stride, dilation and groups 1, padding 1, fp32 on the CPU, heights and widths that are
    multiples of 4, at least 48 channels.  Everything else stays as it is.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.conv2d and not kwargs and _suits(*args):
            return _Convolution.apply(*args[:3])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


def _suits(image: Tensor, weight: Tensor, bias: Tensor | None = None, *geometry: object) -> bool:
    return (
        image.device.type == "cpu"
        and image.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and geometry == ((1, 1), (1, 1), (1, 1), 1)
        and weight.shape[2:] == (3, 3)
        and min(weight.shape[:2]) >= _CHANNELS
        and image.ndim == 4
        and image.shape[2] % 4 == image.shape[3] % 4 == 0
        and bias is not None
    )


class _Blocks:
    """A batch cut into runs of 4x4 tiles: some rows of tiles of one image, or some whole images."""

    def __init__(self, batch: int, height: int, width: int) -> None:
        rows, self.columns = height // 4, width // 4
        self.rows = _divisor(rows, _TILES // self.columns)
        self.images = _divisor(batch, _TILES // (rows * self.columns)) if self.rows == rows else 1
        self.tiles = self.images * self.rows * self.columns
        self._firsts = [(n, y) for n in range(0, batch, self.images) for y in range(0, rows, self.rows)]

    def __len__(self) -> int:
        return len(self._firsts)

    def views(self, pixels: Tensor, size: int) -> Iterator[Tensor]:
        """The tiles of ``size`` x ``size`` at every fourth pixel of NHWC ``pixels``, block by block.

        Each is (size, size, images, rows, columns, channels); tiles of more than 4x4 overlap.
        """
        image, row, column, channel = pixels.stride()
        shape = (size, size, self.images, self.rows, self.columns, pixels.shape[-1])
        strides = (row, column, image, 4 * row, 4 * column, channel)
        for n, y in self._firsts:
            yield pixels.as_strided(shape, strides, pixels.storage_offset() + n * image + 4 * y * row)


class _Convolution(torch.autograd.Function):
    """``F.conv2d(image, weight, bias, padding=1)``, the result in channels-last memory."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        batch, inputs, height, width = image.shape
        outputs = len(weight)
        blocks = _Blocks(batch, height, width)
        padded = F.pad(image.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        filters = (_FILTER @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, inputs, outputs)
        transformed = image.new_empty(len(blocks), 36, blocks.tiles, inputs)
        gathered = image.new_empty(36, blocks.tiles * inputs)
        product = image.new_empty(36, blocks.tiles, outputs)
        pixels = image.new_empty(16, blocks.tiles * outputs)
        result = image.new_empty(batch, height, width, outputs)
        for tiles, block, target in zip(blocks.views(padded, 6), transformed, blocks.views(result, 4), strict=True):
            gathered.view(tiles.shape).copy_(tiles)
            torch.mm(_INPUT, gathered, out=block.view(36, -1))
            torch.bmm(block, filters, out=product)
            torch.mm(_OUTPUT, product.view(36, -1), out=pixels)
            torch.add(pixels.view(target.shape), bias, out=target)
        # Kept instead of the image: transforming it again would take longer than reading this.
        ctx.save_for_backward(transformed, filters)
        return result.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        transformed, filters = ctx.saved_tensors
        to_image, to_weight, _ = ctx.needs_input_grad
        inputs, outputs = filters.shape[1:]
        arrived = gradients[0].permute(0, 2, 3, 1).contiguous()
        batch, height, width, _ = arrived.shape
        blocks = _Blocks(batch, height, width)
        pixels = arrived.new_empty(16, blocks.tiles * outputs)
        product = arrived.new_empty(36, blocks.tiles, outputs)
        block_gradient = arrived.new_empty(36, blocks.tiles, inputs)
        gathered = arrived.new_empty(36, blocks.tiles * inputs)
        backwards = filters.transpose(1, 2).contiguous()
        filter_gradient = torch.zeros_like(filters)
        # One pixel of padding before, and up to three behind, so that the last tiles lie inside.
        padded = arrived.new_zeros(batch, height + 4, width + 4, inputs) if to_image else arrived.new_empty(0, 0, 0, 0)
        corners = [padded[:, y:, x:] for y in (0, 4) for x in (0, 4)]
        quarters = zip(*(blocks.views(corner, 4) for corner in corners), strict=True) if to_image else iter(())
        for tiles, block in zip(blocks.views(arrived, 4), transformed, strict=True):
            pixels.view(tiles.shape).copy_(tiles)
            torch.mm(_OUTPUT.t(), pixels, out=product.view(36, -1))
            if to_weight:
                filter_gradient.baddbmm_(block.transpose(1, 2), product)
            if to_image:
                torch.bmm(product, backwards, out=block_gradient)
                torch.mm(_INPUT.t(), block_gradient.view(36, -1), out=gathered)
                _add_overlapping(gathered, next(quarters))
        weight = (_FILTER.t() @ filter_gradient.view(36, -1)).view(3, 3, inputs, outputs).permute(3, 2, 0, 1)
        image = padded[:, 1 : height + 1, 1 : width + 1].permute(0, 3, 1, 2)
        return image if to_image else None, weight if to_weight else None, arrived.sum((0, 1, 2))


def _add_overlapping(tiles: Tensor, quarters: tuple[Tensor, ...]) -> None:
    """Add 6x6 ``tiles`` where they came from, in four passes whose targets do not overlap.

    ``quarters``: views of the 4x4 pixels under each tile, then of those right of it, below it, and right below.
    """
    here, right, below, corner = quarters
    values = tiles.view(6, 6, *here.shape[2:])
    here.add_(values[:4, :4])
    right[:, :2].add_(values[:4, 4:])
    below[:2].add_(values[4:, :4])
    corner[:2, :2].add_(values[4:, 4:])


def _divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` up to ``limit``, at least 1."""
    return next(size for size in range(max(1, min(number, limit)), 0, -1) if number % size == 0)
