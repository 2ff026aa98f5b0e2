"""Cases that are drawn at random: plain values (they travel to the ranks as text), and what they become.

A `Drawn` prints as the JSON that makes it again, so that a failure can be pasted. Each family gives the
module, and the closed form of the bytes that its exchange may send.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch.nn.functional as F
from cases_conv import CONV, TRANSPOSED
from cases_norm import BATCH, INSTANCE, PER_CHANNEL, PER_SAMPLE, used
from cases_pool import ADAPTIVE, AVERAGE, MAX
from harness import Call, Case, Input
from harness_bounds import Bound, Stage, adaptive, conv, padded, resampled, sliced, transposed
from harness_driver import Key, run_keys
from torch import Tensor, nn

Options = dict[str, Any]
Made = tuple[Callable[[], nn.Module], Bound]  # the module's maker, and what it may send
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Drawn:
    """One random case; as text `["conv", "d2h2", [2, 4, 5, 6, 7], {"k": [3, 1, 2], ...}]`."""

    family: str
    plan: str
    shape: Shape
    options: Options

    @property
    def key(self) -> Key:
        return json.dumps([self.family, self.shape, self.options], sort_keys=True), self.plan

    @classmethod
    def parse(cls, text: str) -> Drawn:
        family, plan, shape, options = json.loads(text)
        return cls(family, plan, tuple(shape), options)

    def __str__(self) -> str:
        return json.dumps([self.family, self.plan, self.shape, self.options])

    def case(self) -> Case:
        make, bound = FAMILIES[self.family](self.shape, dict(self.options))
        options = {"steps": 2} if self.options.get("track_running_stats") else {}
        return Case(self.key[0], make, (Input(self.shape),), bound, plans=(self.plan,), **options)


def drawn_of(key: Key) -> Drawn:
    family, shape, options = json.loads(key[0])
    return Drawn(family, key[1], tuple(shape), options)


@lru_cache(maxsize=4)
def _case(name: str) -> Case:
    return drawn_of((name, "one")).case()


def worker(keys: list[Key], folder: str) -> None:
    """What every rank of a launch runs."""
    run_keys(_case, keys, folder)


def _convolution(shape: Shape, o: Options) -> Made:
    ndim, mode = len(shape) - 2, o["mode"]
    k, s, p, d = o["k"], o["s"], o["p"], o["d"]
    out = o["groups"] * o["out"]
    make = lambda: CONV[ndim](  # noqa: E731
        shape[1], out, k, s, p if isinstance(p, str) else tuple(p), d, o["groups"], o["bias"], mode
    )
    if mode == "zeros":
        return make, Bound((conv(ndim, k, s, p, d),))
    pads = [padded(2 + i, w, w, mode) for i, w in enumerate(p)]  # the padded tensor has chunks of its own
    return make, Bound((*reversed(pads), conv(ndim, k, s, 0, d)))  # the last dim is padded first, as `F.pad` counts


def _transposed(shape: Shape, o: Options) -> Made:
    ndim = len(shape) - 2
    k, s, p, extra, d = o["k"], o["s"], o["p"], o["extra"], o["d"]
    make = lambda: TRANSPOSED[ndim](  # noqa: E731
        shape[1], o["groups"] * o["out"], k, s, p, extra, o["groups"], o["bias"], d
    )
    return make, Bound((transposed(ndim, k, s, p, extra, d),))


def _max_pool(shape: Shape, o: Options) -> Made:
    ndim = len(shape) - 2
    make = lambda: MAX[ndim](o["k"], o["s"], o["p"], o["d"], ceil_mode=o["ceil"])  # noqa: E731
    return make, Bound((conv(ndim, o["k"], o["s"], o["p"], o["d"], o["ceil"]),))


def _avg_pool(shape: Shape, o: Options) -> Made:
    ndim = len(shape) - 2
    more = {"divisor_override": o["divisor"]} if o["divisor"] and ndim > 1 else {}
    make = lambda: AVERAGE[ndim](  # noqa: E731
        o["k"], o["s"], o["p"], ceil_mode=o["ceil"], count_include_pad=o["include"], **more
    )
    return make, Bound((conv(ndim, o["k"], o["s"], o["p"], 1, o["ceil"]),))


def _adaptive(shape: Shape, o: Options) -> Made:
    """Where few outputs remain, partial sums of outputs may travel instead of inputs."""
    out = tuple(o["out"])
    stage, outputs = adaptive(*out), 2 * shape[0] * shape[1] * math.prod(out)
    return lambda: ADAPTIVE[o["kind"], len(out)](out), Bound((stage,), statistics=lambda _: outputs)


def _pad(shape: Shape, o: Options) -> Made:
    widths, mode, last = o["widths"], o["mode"], len(shape) - 1
    value = 1.5 if mode == "constant" else None
    stages = tuple(padded(last - i, *widths[2 * i : 2 * i + 2], mode) for i in range(len(widths) // 2))
    call = Call(lambda x: F.pad(x, widths, mode, value))
    return lambda: call, Bound(tuple(reversed(stages)), any_order=True)


def _interpolate(shape: Shape, o: Options) -> Made:
    ndim = len(shape) - 2
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[ndim] if o["mode"] == "linear" else o["mode"]
    arguments: Options = {"mode": mode}
    if o["mode"] == "linear":
        arguments["align_corners"] = o["aligned"]
    if o["size"]:
        arguments["size"], out, scales = o["size"], o["size"], [None] * ndim
    else:
        arguments |= {"scale_factor": o["scale"], "recompute_scale_factor": o["recompute"] or None}
        out = [math.floor(n * factor) for n, factor in zip(shape[2:], o["scale"], strict=True)]
        scales = [None] * ndim if o["recompute"] else o["scale"]
    if o["mode"] == "area":
        _, bound = _adaptive(shape, {"out": out, "kind": "avg"})
    else:
        bound = Bound((resampled(o["mode"], out, scales, bool(o["aligned"])),))
    call = Call(lambda x: F.interpolate(x, **arguments))
    return lambda: call, bound


def _norm(shape: Shape, o: Options) -> Made:
    ndim, channels, kind = len(shape) - 2, shape[1], o["kind"]
    rest = {name: value for name, value in o.items() if name not in ("kind", "groups", "dims")}
    if kind == "batch":
        return lambda: used(BATCH[ndim](channels, **rest)), PER_CHANNEL
    if kind == "instance":
        return lambda: used(INSTANCE[ndim](channels, **rest)), PER_SAMPLE
    if kind == "group":
        return lambda: used(nn.GroupNorm(o["groups"], channels, **rest)), PER_SAMPLE
    trailing = shape[-o["dims"] :]
    rows = math.prod(shape) // math.prod(trailing)
    return lambda: used(nn.LayerNorm(trailing)), Bound(statistics=lambda _: 4 * rows + 4)


def _slices(shape: Shape, o: Options) -> Made:
    """`x[..., a:b:c, ...]` of every dim, and last a single position of one dim."""
    cuts = [slice(*entry) for entry in o["cuts"]]
    stages: list[Stage] = [sliced(dim, cut) for dim, cut in enumerate(cuts)]
    where = o["select"]

    def cut(x: Tensor) -> Tensor:
        y = x[tuple(cuts)] * 1
        return y if where is None else y.select(where[0], where[1])

    left = [len(range(n)[cut]) for n, cut in zip(shape, cuts, strict=True)]
    plane = 0 if where is None else math.prod(left) // max(1, left[where[0]])
    return lambda: Call(cut), Bound(tuple(stages), any_order=True, statistics=lambda _: plane)


FAMILIES: dict[str, Callable[[Shape, Options], Made]] = {
    "conv": _convolution,
    "conv_transpose": _transposed,
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "adaptive": _adaptive,
    "pad": _pad,
    "interpolate": _interpolate,
    "norm": _norm,
    "slices": _slices,
}
