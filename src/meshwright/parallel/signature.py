"""What the choice of a kernel depends on, as a value: decisions are made once and looked up in every step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Signature(NamedTuple):
    """How a tensor lies in memory, with the questions that are asked of tensors."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def is_contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> bool:
        like = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")
        return like.is_contiguous(memory_format=memory_format)


def signature(t: torch.Tensor) -> Signature:
    """That of a plain tensor."""
    return tuple.__new__(Signature, (t.shape, t.stride(), t.dtype, t.device))  # half the time of its own constructor


Like = torch.Tensor | Signature
Pads = tuple[tuple[int, int], ...]  # (before, after) of each dim


class Conv(NamedTuple):
    """A convolution's constants, one entry per spatial dim."""

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
