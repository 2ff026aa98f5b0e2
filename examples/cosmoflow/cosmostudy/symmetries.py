"""The 48 ways to turn and mirror a cube: matter has no preferred direction, so each gives another cube as likely.

Each is a transform of the library, so a rank makes its part of a turned cube from the boxes this part comes from; the
parts together are the turned cube, bit for bit.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

from meshwright.data import chance, transforms
from meshwright.data.rearrange import Flip, Permute
from meshwright.data.transforms import WORDS, Compose

_STREAM = 0x63756265  # keeps these numbers apart from others drawn from the same seed
_PLACES = 1 << 50  # more than any run sees

ORDERS = tuple(itertools.permutations(WORDS))
FLIPS = tuple(tuple(word for bit, word in enumerate(WORDS) if number >> bit & 1) for number in range(8))
COUNT = len(ORDERS) * len(FLIPS)  # 48; number 0 leaves a cube as it is

Spans = tuple[slice, ...]


@lru_cache(maxsize=COUNT)
def symmetry(number: int) -> Compose:
    """Dims in another order, then some of them reversed."""
    order, flip = ORDERS[number % len(ORDERS)], FLIPS[number // len(ORDERS)]
    return Compose((Permute(order), Flip(flip)))


def draw(seed: int, place: int, count: int) -> list[int]:
    """The numbers of the symmetries of the samples at `count` places of the order, from `place` on."""
    bits = chance.words(chance.key(_STREAM, seed), _PLACES, place, place + count)
    return [int(number) for number in (bits >> 16 & 0xFFFFFFFF) % COUNT]


@lru_cache(maxsize=4096)
def source(number: int, spans: tuple[tuple[int, int], ...], size: int) -> Spans:
    """The box of a cube of `size`³ that the box `spans` of the turned cube comes from."""
    (box,) = transforms.source_spans(symmetry(number), [slice(lo, hi) for lo, hi in spans], (size,) * 3)
    return box
