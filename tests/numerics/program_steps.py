"""What random programs are made of: operations with a way to draw legal arguments for a shape, and a way to run.

A step gets the current tensor `y` and all earlier ones. Its arguments are plain values, so that a program is text.
`draw` may propose what torch refuses: such proposals are drawn again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cases_conv import CONV, TRANSPOSED
from cases_norm import BATCH, INSTANCE, used
from cases_pool import ADAPTIVE, AVERAGE, MAX
from program_draws import (
    Arguments,
    Shape,
    draw_channels,
    draw_conv,
    draw_cut,
    draw_dim,
    draw_dims,
    draw_merge,
    draw_order,
    draw_pad,
    draw_pieces,
    draw_pool,
    draw_positions,
    draw_resize,
    draw_shift,
    draw_sizes,
    draw_space,
    draw_split_dim,
    draw_transposed,
    draw_two,
)
from torch import Tensor, nn

Draw = Callable[[random.Random, Shape], Arguments]
Run = Callable[[Tensor, Arguments, "nn.Module | None", Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Operation:
    """`layer` makes the module with parameters that the operation needs."""

    draw: Draw
    run: Run
    layer: Callable[[Arguments], nn.Module] | None = None
    weight: int = 2


OPERATIONS: dict[str, Operation] = {}


def add(name: str, run: Run, draw: Draw = lambda r, s: {}, layer: Any = None, weight: int = 2) -> None:
    OPERATIONS[name] = Operation(draw, run, layer, weight)


def _where(a: Arguments) -> tuple[slice, ...]:
    return (*[slice(None)] * a["dim"], slice(a["start"], a["stop"], a["step"]))


def _vector(x: Tensor, at: int) -> Tensor:
    """A plain tensor along one dim, built from the shape."""
    return torch.linspace(-1, 1, x.shape[at], dtype=x.dtype).view(*(-1 if d == at else 1 for d in range(x.ndim)))


def _written(y: Tensor, a: Arguments) -> Tensor:
    y = y * 1
    y[_where(a)] += 1.5
    return y


def _multiplied(y: Tensor, a: Arguments) -> Tensor:
    y = y * 1
    y[_where(a)].mul_(0.5)
    return y


def _in_place(y: Tensor, a: Arguments) -> Tensor:
    y = y * 1.5
    y.add_(0.25).mul_(2).sub_(y.detach() * 0.5)
    return torch.relu_(y) if a["relu"] else y.tanh_()


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": lambda y: F.silu(y) + y,
    "softplus": F.softplus,
    "square": lambda y: y * y * 0.5 + y,
    "clamp": lambda y: y.clamp(-1.5, 2),
    "where": lambda y: torch.where(y > 0.1, y, 0.3 * y),
    "root": lambda y: (y * y + 1).sqrt() - y / (y * y + 2),
    "detach": lambda y: y + y.detach() * 0.5,
    "clone": lambda y: y.clone().contiguous() * 2,
    "dropout_off": lambda y: F.dropout(y, 0.5, training=False) + 1,
    "leaky": lambda y: F.leaky_relu(y, 0.2),
    "maximum": lambda y: torch.maximum(y, 0.5 - y),
}
REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "mean": lambda y, d, keep: y.mean(d, keepdim=keep),
    "sum": lambda y, d, keep: y.sum(d, keepdim=keep) * 0.3,
    "amax": lambda y, d, keep: y.amax(d, keepdim=keep),
    "var": lambda y, d, keep: y.var(d, correction=0, keepdim=keep),
    "logsumexp": lambda y, d, keep: y.logsumexp(d, keepdim=keep),
    "norm": lambda y, d, keep: (torch.linalg.vector_norm(y, dim=d, keepdim=keep) + 1).log(),
}


def _kind(table: dict[str, Any], more: Draw = lambda r, s: {}) -> Draw:
    return lambda r, s: {"kind": r.choice(sorted(table))} | more(r, s)


add(
    "conv",
    lambda y, a, m, e: m(y),
    draw_conv,
    lambda a: CONV[a["n"]](
        a["inside"], a["out"], a["k"], a["s"], tuple(a["p"]), a["d"], a["groups"], padding_mode=a["mode"]
    ),
    8,
)
add(
    "conv_transpose",
    lambda y, a, m, e: m(y),
    draw_transposed,
    lambda a: TRANSPOSED[a["n"]](a["inside"], a["out"], a["k"], a["s"], a["p"]),
    4,
)
add(
    "max_pool",
    lambda y, a, m, e: m(y),
    draw_pool,
    lambda a: MAX[a["n"]](a["k"], a["s"], a["p"], ceil_mode=a["ceil"]),
    3,
)
add(
    "avg_pool",
    lambda y, a, m, e: m(y),
    draw_pool,
    lambda a: AVERAGE[a["n"]](a["k"], a["s"], a["p"], ceil_mode=a["ceil"]),
    3,
)
add(
    "adaptive_pool",
    lambda y, a, m, e: m(y),
    lambda r, s: {"n": draw_space(s), "out": draw_sizes(r, draw_space(s), 1, 5)},
    lambda a: ADAPTIVE["avg", a["n"]](a["out"]),
)


def in_one_order(y: Tensor, a: Arguments, m: Any, e: Sequence[Tensor]) -> Tensor:
    """On one device the gradient in the memory order of the input: torch 2.13.0 (CPU) reads one of the two in the
    other's order, and gives wrong gradients, where they differ."""
    if type(y) is not Tensor:
        return m(y)
    out = m(y.contiguous())
    if out.requires_grad:
        out.register_hook(lambda grad: grad.contiguous())
    return out


add("batch_norm", in_one_order, draw_channels, lambda a: used(BATCH[a["n"]](a["channels"])), 3)
add(
    "instance_norm",
    in_one_order,
    draw_channels,
    lambda a: used(INSTANCE[a["n"]](a["channels"], affine=True)),
)
add("group_norm", lambda y, a, m, e: m(y), draw_channels, lambda a: used(nn.GroupNorm(a["groups"], a["channels"])), 3)
add(
    "layer_norm",
    lambda y, a, m, e: m(y),
    lambda r, s: {"shape": s[-r.randint(1, 2) :]},
    lambda a: used(nn.LayerNorm(a["shape"])),
)
add(
    "linear",
    lambda y, a, m, e: m(y),
    lambda r, s: {"inside": s[-1], "out": r.randint(1, 4)},
    lambda a: nn.Linear(a["inside"], a["out"]),
)
add(
    "channels_einsum",
    lambda y, a, m, e: torch.einsum("nc...,dc->nd...", y, m.weight),
    lambda r, s: {"inside": s[1], "out": r.randint(1, 4)},
    lambda a: nn.Linear(a["inside"], a["out"], bias=False),
    3,
)
add(
    "channels_matmul",
    lambda y, a, m, e: (m.weight @ y.flatten(2)).unflatten(2, y.shape[2:]),
    lambda r, s: {"inside": s[1], "out": r.randint(1, 4)},
    lambda a: nn.Linear(a["inside"], a["out"], bias=False),
)
add("pad", lambda y, a, m, e: F.pad(y, a["widths"], a["mode"]), draw_pad, weight=4)
add("interpolate", lambda y, a, m, e: F.interpolate(y, size=a["size"], mode=a["mode"]), draw_resize, weight=4)
add("elementwise", lambda y, a, m, e: ELEMENTWISE[a["kind"]](y), _kind(ELEMENTWISE), weight=8)
add("in_place", lambda y, a, m, e: _in_place(y, a), lambda r, s: {"relu": r.random() < 0.5}, weight=3)
add("write_slice", lambda y, a, m, e: _written(y, a), draw_cut)
add("scale_slice", lambda y, a, m, e: _multiplied(y, a), draw_cut)
add("slice", lambda y, a, m, e: y[_where(a)], draw_cut, weight=5)
add("narrow", lambda y, a, m, e: y.narrow(a["dim"], a["start"], a["stop"] - a["start"]), draw_cut)
add("select", lambda y, a, m, e: y.select(a["dim"], a["start"]), draw_cut, weight=1)
add("index_select", lambda y, a, m, e: y.index_select(a["dim"], torch.tensor(a["index"])), draw_positions)
add("cat", lambda y, a, m, e: torch.cat([y, torch.tanh(y), y], a["dim"]), draw_dim)
add("cat_shifted", lambda y, a, m, e: torch.cat([y[_where(a)], y], a["dim"]), draw_cut)
add(
    "stack",
    lambda y, a, m, e: torch.stack([y, -y], a["dim"]).flatten(a["dim"], a["dim"] + 1),
    lambda r, s: {"dim": r.randrange(len(s))},
)
add(
    "chunk_stack",
    lambda y, a, m, e: torch.cat(list(reversed(torch.chunk(y, a["parts"], a["dim"]))), a["dim"]),
    draw_pieces,
)
add(
    "unbind_stack",
    lambda y, a, m, e: torch.stack([p * (i + 1) for i, p in enumerate(y.unbind(a["dim"]))], a["dim"]),
    draw_dim,
    weight=1,
)
add("permute", lambda y, a, m, e: y.permute(a["order"]), draw_order, weight=3)
add("transpose", lambda y, a, m, e: y.transpose(a["a"], a["b"]).contiguous(), draw_two)
add("split_dim", lambda y, a, m, e: y.unflatten(a["dim"], a["sizes"]), draw_split_dim)
add("merge_dims", lambda y, a, m, e: y.flatten(a["first"], a["last"]), draw_merge)
add(
    "reshape_swap",
    lambda y, a, m, e: y.unflatten(a["dim"], a["sizes"]).transpose(a["dim"], a["dim"] + 1).reshape(y.shape),
    draw_split_dim,
)
add("centre", lambda y, a, m, e: y - REDUCTIONS[a["kind"]](y, a["dims"], True), _kind(REDUCTIONS, draw_dims), weight=5)
add("reduce", lambda y, a, m, e: REDUCTIONS[a["kind"]](y, a["dim"], False), _kind(REDUCTIONS, draw_dim))
add("softmax", lambda y, a, m, e: y.softmax(a["dim"]) * y, draw_dim, weight=3)
add("roll", lambda y, a, m, e: y.roll(a["shifts"], a["dims"]), draw_shift, weight=3)
add("flip", lambda y, a, m, e: y.flip(a["dims"]), draw_dims, weight=3)
add("cumsum", lambda y, a, m, e: y.cumsum(a["dim"]) * 0.5, draw_dim)
add("sort", lambda y, a, m, e: y.sort(a["dim"], stable=True)[0], draw_dim)
add(
    "topk",
    lambda y, a, m, e: y.topk(a["k"], a["dim"])[0],
    lambda r, s: (lambda d: d | {"k": r.randint(1, s[d["dim"]])})(draw_dim(r, s)),
    weight=1,
)
add("diff", lambda y, a, m, e: y.diff(dim=a["dim"]), draw_dim, weight=1)
add("repeat", lambda y, a, m, e: y.repeat([2 if d == a["dim"] else 1 for d in range(y.ndim)]), draw_dim)
add("repeat_interleave", lambda y, a, m, e: y.repeat_interleave(2, a["dim"]), draw_dim, weight=1)
add(
    "expand",
    lambda y, a, m, e: y.unsqueeze(a["dim"]).expand(*y.shape[: a["dim"]], 2, *y.shape[a["dim"] :]),
    draw_dim,
    weight=1,
)
add("squeeze", lambda y, a, m, e: y.unsqueeze(a["dim"]).squeeze(a["dim"]) * 1.5, draw_dim, weight=1)
add("ramp", lambda y, a, m, e: y * _vector(y, a["dim"]), draw_dim)
add("mask", lambda y, a, m, e: y.masked_fill(_vector(y, a["dim"]) > 0.2, 0.5), draw_dim)
add("earlier", lambda y, a, m, e: next((y + x * 0.7 for x in reversed(e) if x.shape == y.shape), y * 2), weight=4)
add("gram", lambda y, a, m, e: y @ y.transpose(-1, -2) / math.sqrt(y.shape[-1]), weight=1)
add(
    "unfold",
    lambda y, a, m, e: y.unfold(a["dim"], a["size"], a["step"]).mean(-1),
    lambda r, s: draw_dim(r, s) | {"size": r.randint(1, 3), "step": r.randint(1, 2)},
    weight=1,
)
