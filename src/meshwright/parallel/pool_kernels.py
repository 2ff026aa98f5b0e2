"""Average pooling of local parts: torch's own 3-D kernel knows no channels_last_3d.

It copies such an input to the default format and gives the default format back, by which all that follows leaves the
fast kernels too (an activation's gradient alone took five times as long). Sums over boxes are sums over lines, so here
the last two dims are pooled as a channels_last image, the first one after them on what is left.

Which kernel is taken depends on how a rank's part lies in memory, so both hide behind one Function: torch's own would
leave another graph of second gradients (a zero for its input) than ours, and ranks would meet in different layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from meshwright.parallel.kernels import memory_format
from meshwright.parallel.node import Node
from meshwright.parallel.taps import gather, spread

_POOL: dict[int, Any] = {2: F.avg_pool2d, 3: F.avg_pool3d}
_BACKWARD: dict[int, Any] = {2: torch.ops.aten.avg_pool2d_backward, 3: torch.ops.aten.avg_pool3d_backward}
MOST_TAPS = 4  # of a kernel along one dim: the gradient passes over the input once a tap


class Boxes(NamedTuple):
    """The windows of an average pooling, per spatial dim, and what each sum is divided by."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pads: tuple[int, ...]
    ceil: bool
    divisor: int


def average(x: torch.Tensor, boxes: Boxes) -> torch.Tensor:
    """Sums over windows (zeros outside) by one divisor; `x` is [N, C, *space]. Differentiable, twice too.

    Autocast is not seen: the result has the dtype of `x`.
    """
    if x.ndim == 3:  # torch's 1-D form has no divisor, so it is 2-D of height 1
        kernel, stride, pads, ceil, divisor = boxes
        high = Boxes((1, *kernel), (1, *stride), (0, *pads), ceil, divisor)
        return average(x.unsqueeze(-2), high).squeeze(-2)
    return Average.apply(x, boxes)


def _is_separable(x: torch.Tensor, boxes: Boxes) -> bool:
    return (
        x.device.type == "cpu"
        and x.ndim == 5
        and x.dtype in (torch.float32, torch.float64)
        and x.shape[1] > 1
        and x.numel() > 0
        and memory_format(x) is torch.channels_last_3d
        and boxes.divisor == math.prod(boxes.kernel)
        and max(boxes.kernel) <= MOST_TAPS
        and all(k == 1 or 2 * p <= k for k, p in zip(boxes.kernel, boxes.pads, strict=True))
    )


class Average(Node):
    """Average pooling; its gradient is `Spread`, whose gradient is `Average` again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, boxes: Boxes) -> torch.Tensor:
        ctx.boxes, ctx.shape, ctx.format = boxes, tuple(x.shape), memory_format(x)
        if not _is_separable(x, boxes):
            with torch.autocast(x.device.type, enabled=False):
                return _POOL[x.ndim - 2](x, *boxes[:4], True, boxes.divisor)
        y = _image_pooled(x, boxes) if _pools_images(boxes) else x
        return _depth_pooled(y, boxes) if _pools_depth(boxes) else y.clone() if y is x else y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return Spread.apply(grad, ctx.boxes, ctx.shape, ctx.format), None


class Spread(Node):
    """The adjoint of `Average`: every result hands its share to the positions of its window."""

    @staticmethod
    def forward(
        ctx: Any, grad: torch.Tensor, boxes: Boxes, shape: tuple[int, ...], layout: torch.memory_format
    ) -> torch.Tensor:
        ctx.boxes, ctx.format = boxes, layout
        like = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)  # never read or written
        if not _is_separable(like, boxes):
            given = grad.contiguous(memory_format=layout)
            found: torch.Tensor = _BACKWARD[grad.ndim - 2](given, like, *boxes[:4], True, boxes.divisor)
            return found
        out = grad.contiguous(memory_format=torch.channels_last_3d)
        has_images = _pools_images(boxes)
        if not has_images:
            out = out / boxes.divisor
        if _pools_depth(boxes):  # first, while planes are small
            out = _depth_spread(out, boxes, shape[2])
        return _image_spread(out, boxes, shape[3:]) if has_images else out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return Average.apply(grad.contiguous(memory_format=ctx.format), ctx.boxes), None, None, None


def _pools_depth(boxes: Boxes) -> bool:
    return boxes.kernel[0] > 1 or boxes.stride[0] > 1


def _pools_images(boxes: Boxes) -> bool:
    return max(boxes.kernel[1:]) > 1 or max(boxes.stride[1:]) > 1


def _images(x: torch.Tensor) -> torch.Tensor:
    """Every plane as an image of the batch."""
    n, c, d, h, w = x.shape
    return x.permute(0, 2, 3, 4, 1).reshape(n * d, h, w, c).permute(0, 3, 1, 2)


def _volume(images: torch.Tensor, samples: int) -> torch.Tensor:
    """The adjoint of `_images`."""
    rows = images.permute(0, 2, 3, 1).contiguous()
    return rows.view(samples, -1, *rows.shape[1:]).permute(0, 4, 1, 2, 3)


def _image_pooled(x: torch.Tensor, boxes: Boxes) -> torch.Tensor:
    """Over the last two dims."""
    kernel, stride, pads = boxes.kernel[1:], boxes.stride[1:], boxes.pads[1:]
    y = F.avg_pool2d(_images(x), kernel, stride, pads, boxes.ceil, True, math.prod(kernel))
    return _volume(y, x.shape[0])


def _image_spread(grad: torch.Tensor, boxes: Boxes, space: Sequence[int]) -> torch.Tensor:
    """The adjoint of `_image_pooled`, with the division for all dims."""
    images = _images(grad)
    like = torch.empty((*images.shape[:2], *space), dtype=grad.dtype, memory_format=torch.channels_last)  # never read
    given = (boxes.kernel[1:], boxes.stride[1:], boxes.pads[1:], boxes.ceil, True, boxes.divisor)
    return _volume(torch.ops.aten.avg_pool2d_backward(images, like, *given), grad.shape[0])


def _depth_pooled(x: torch.Tensor, boxes: Boxes) -> torch.Tensor:
    """Over the first dim of space."""
    kernel, stride, pad = boxes.kernel[0], boxes.stride[0], boxes.pads[0]
    n, c, d, h, w = x.shape
    outs = F.avg_pool1d(x.new_empty(1, 1, d), kernel, stride, pad, boxes.ceil).shape[2]
    out = torch.empty((n, c, outs, h, w), dtype=x.dtype, memory_format=torch.channels_last_3d)
    gather(out, x, 2, kernel, stride, pad)
    return out.div_(kernel)


def _depth_spread(grad: torch.Tensor, boxes: Boxes, size: int) -> torch.Tensor:
    """The adjoint, undivided."""
    n, c, _, h, w = grad.shape
    out = torch.empty((n, c, size, h, w), dtype=grad.dtype, memory_format=torch.channels_last_3d)
    spread(out, grad, 2, boxes.kernel[0], boxes.stride[0], boxes.pads[0])
    return out
