"""Random numbers as a pure function of (key, global position): counter-based, so any box of any tensor can be drawn
alone, by any rank, in any order.

Position i of a tensor (its row-major index) under a key gets the 64 bits of SplitMix64 (Steele, Lea and Flood 2014)
started at the key: `mix(key + i * GAMMA)`. Large parts are drawn in blocks, so that the integers take little memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch

from meshwright.plan.geometry import Interval

GAMMA = 0x9E3779B97F4A7C15
_WORD = 1 << 64
Box = tuple[Interval, ...]
Index = tuple[slice, ...]


def signed(value: int) -> int:
    """A 64-bit pattern as the int64 of the same bits."""
    value %= _WORD
    return value - _WORD if value >= _WORD >> 1 else value


def mix(value: int) -> int:
    """The finaliser of SplitMix64, its upper 63 bits: a key from another key and a counter."""
    value = (value + GAMMA) % _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % _WORD
    return (value ^ (value >> 31)) >> 1


def shifted(words: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift to the right (torch's keeps the sign)."""
    return (words >> by).bitwise_and_((1 << (64 - by)) - 1)


def words(key: int, shape: tuple[int, ...], box: Box, device: torch.device) -> torch.Tensor:
    """64 random bits (int64) for each position of `box` in a tensor of global `shape`."""
    x = torch.full((), signed(key), dtype=torch.int64, device=device)
    step = 1
    for dim in reversed(range(len(shape))):
        along = torch.arange(box[dim].lo, box[dim].hi, device=device) * signed(step * GAMMA)
        x = x + along.view(-1, *(1 for _ in range(len(shape) - 1 - dim)))
        step *= max(1, shape[dim])
    x.bitwise_xor_(shifted(x, 30)).mul_(signed(0xBF58476D1CE4E5B9))
    x.bitwise_xor_(shifted(x, 27)).mul_(signed(0x94D049BB133111EB))
    return x.bitwise_xor_(shifted(x, 31))


def blocks(shape: tuple[int, ...], limit: int) -> Iterator[Index]:
    """Boxes of at most `limit` positions (one row of the last dim at least) that together are all of `shape`."""
    if not math.prod(shape):
        return
    dim = next((d for d in range(len(shape)) if math.prod(shape[d + 1 :]) <= limit), 0)
    step = max(1, limit // math.prod(shape[dim + 1 :])) if shape else 1
    lead = itertools.product(*(range(size) for size in shape[:dim]))
    for before in lead:
        here = tuple(slice(i, i + 1) for i in before)
        rest = tuple(slice(0, size) for size in shape[dim + 1 :])
        if not shape:
            yield ()
        for lo in range(0, shape[dim] if shape else 0, step):
            yield (*here, slice(lo, min(lo + step, shape[dim])), *rest)


def fill(
    out: torch.Tensor,
    key: int,
    shape: tuple[int, ...],
    box: Box,
    value: Callable[[torch.Tensor, Index], torch.Tensor],
) -> torch.Tensor:
    """Write `value(bits, index)` into `out`, the part `box` of a tensor of global `shape`; block by block.

    `index` says which block of `out` the bits are for.
    """
    limit = 1 << (16 if out.device.type == "cpu" else 22)  # a block stays in the cache; a GPU wants long kernels
    for index in blocks(tuple(out.shape), limit):
        part = tuple(Interval(b.lo + i.start, b.lo + i.stop) for b, i in zip(box, index, strict=True))
        out[index].copy_(value(words(key, shape, part, out.device), index))
    return out


def unit(bits: torch.Tensor, digits: int = 53) -> torch.Tensor:
    """Uniform in [0, 1): the upper `digits` bits as a binary fraction (fp64)."""
    return shifted(bits, 64 - digits).double().mul_(2.0**-digits)


def open_unit(bits: torch.Tensor) -> torch.Tensor:
    """Uniform in (0, 1), both ends excluded (fp64): for logarithms and inverse distribution functions."""
    return unit(bits, 52).add_(2.0**-53)


def normal(bits: torch.Tensor) -> torch.Tensor:
    """Standard normal (fp64), never infinite: Box and Muller 1958, radius from 40 bits (to 7.4), angle from 24."""
    radius = shifted(bits, 24).double().add_(0.5).mul_(2.0**-40).log_().mul_(-2).sqrt_()
    return (bits & ((1 << 24) - 1)).double().mul_(2 * math.pi * 2.0**-24).cos_().mul_(radius)


def digits_of(dtype: torch.dtype) -> int:
    """Bits of the significand, so that a fraction of so many bits never rounds up to 1."""
    return 1 - int(math.log2(torch.finfo(dtype).eps)) if dtype.is_floating_point else 53
