"""`F.pad` in every mode, also negative: what a rank pads and crops, and what travels."""

from __future__ import annotations

import torch.nn.functional as F
from harness import Call, Case, Input
from harness_bounds import Bound, Stage, moved
from torch import nn

SIZES = {1: (3, 4, 21), 2: (2, 4, 11, 13), 3: (3, 4, 9, 10, 7)}
MODES = ("constant", "reflect", "replicate", "circular")
WIDTHS = {
    1: {"wide": (3, 4), "mixed": (-2, 5), "crop": (-7, -6)},
    2: {"last": (4, 3, 0, 0), "wide": (2, 1, 5, 3), "mixed": (-1, 2, 3, -2), "crop": (-2, -1, -3, -6)},
    3: {"wide": (1, 2, 0, 1, 4, 2), "mixed": (-1, 2, 3, -2, 1, -3), "crop": (-1, -1, -2, -2, -4, -4)},
}


def _source(mode: str, n: int, left: int, right: int, o: int) -> int | None:
    """The input position of output o; circular wraps around what cropping leaves."""
    at = o - left
    if mode == "circular":
        first, kept = max(0, -left), n + min(0, left) + min(0, right)
        return first + (o - max(0, left)) % kept
    if 0 <= at < n:
        return at
    if mode == "reflect":
        return -at if at < 0 else 2 * (n - 1) - at
    return min(max(at, 0), n - 1) if mode == "replicate" else None


def _stages(mode: str, ndim: int, pads: tuple[int, ...]) -> tuple[Stage, ...]:
    def stage(dim: int, left: int, right: int) -> Stage:
        return moved(dim, lambda n: [_source(mode, n, left, right, o) for o in range(left + n + right)])

    return tuple(stage(1 + ndim - pair, *pads[2 * pair : 2 * pair + 2]) for pair in range(ndim))


def pad(mode: str, ndim: int, name: str) -> Case:
    pads = WIDTHS[ndim][name]
    call = Call(lambda x: F.pad(x, pads, mode, **({"value": 1.5} if mode == "constant" else {})))
    bound = Bound(_stages(mode, ndim, pads), any_order=True)
    return Case(f"pad{ndim}d_{mode}_{name}", lambda: call, (Input(SIZES[ndim]),), bound)


def module(make: type[nn.Module], ndim: int) -> Case:
    pads = (1, 2, 0, 3, 1, 1)[: 2 * ndim]
    return Case(f"module_{make.__name__}", lambda: make(pads), (Input(SIZES[ndim]),))


CASES = [
    *(pad(mode, ndim, name) for mode in MODES for ndim, widths in WIDTHS.items() for name in widths),
    *(module(make, 2) for make in (nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ZeroPad2d, nn.CircularPad2d)),
    *(module(make, 3) for make in (nn.ReflectionPad3d, nn.ReplicationPad3d, nn.ZeroPad3d, nn.CircularPad3d)),
    Case(
        "pad2d_constant_batch_and_channels",
        lambda: Call(lambda x: F.pad(x, (0, 0, 1, 1, 2, 0, 1, 2), value=2.0)),
        (Input(SIZES[2]),),
    ),
    Case("pad2d_crop_to_one_plane", lambda: Call(lambda x: F.pad(x, (0, 0, -5, -5))), (Input(SIZES[2]),)),
    Case("pad2d_crop_far_and_pad", lambda: Call(lambda x: F.pad(x, (0, 0, -10, 3))), (Input(SIZES[2]),)),
    Case("pad2d_reflect_unbatched", lambda: Call(lambda x: F.pad(x[0], (1, 2, 2, 1), "reflect")), (Input(SIZES[2]),)),
]
