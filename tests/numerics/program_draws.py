"""How the operations of random programs draw their arguments for a shape."""

from __future__ import annotations

import random
from typing import Any

Arguments = dict[str, Any]
Shape = tuple[int, ...]


def draw_dim(r: random.Random, s: Shape) -> Arguments:
    return {"dim": r.randrange(len(s))}


def draw_dims(r: random.Random, s: Shape) -> Arguments:
    return {"dims": sorted(r.sample(range(len(s)), r.randint(1, min(3, len(s)))))}


def draw_sizes(r: random.Random, n: int, low: int, high: int) -> list[int]:
    return [r.randint(low, high) for _ in range(n)]


def draw_space(s: Shape) -> int:
    if len(s) > 5:  # torch lets some pools pass there, by accident
        raise ValueError(f"no operation of space on {s}")
    return max(1, min(3, len(s) - 2))


def draw_conv(r: random.Random, s: Shape) -> Arguments:
    n, groups = draw_space(s), r.choice([1, 1, s[1]])
    k = draw_sizes(r, n, 1, 3)
    a = {"n": n, "inside": s[1], "out": groups * r.randint(1, 3), "k": k, "groups": groups}
    mode = r.choice(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"])
    return a | {
        "s": draw_sizes(r, n, 1, 2),
        "p": [r.randint(0, kk // 2 + 1) for kk in k],
        "d": draw_sizes(r, n, 1, 2),
        "mode": mode,
    }


def draw_transposed(r: random.Random, s: Shape) -> Arguments:
    n = draw_space(s)
    return {
        "n": n,
        "inside": s[1],
        "out": r.randint(1, 3),
        "k": draw_sizes(r, n, 1, 3),
        "s": draw_sizes(r, n, 1, 2),
        "p": r.randint(0, 1),
    }


def draw_pool(r: random.Random, s: Shape) -> Arguments:
    n = draw_space(s)
    k = draw_sizes(r, n, 1, 3)
    return {
        "n": n,
        "k": k,
        "s": draw_sizes(r, n, 1, 3),
        "p": [kk // 2 if r.random() < 0.5 else 0 for kk in k],
        "ceil": r.random() < 0.3,
    }


def draw_channels(r: random.Random, s: Shape) -> Arguments:
    return {"n": draw_space(s), "channels": s[1], "groups": r.choice([1, s[1]])}


def draw_pad(r: random.Random, s: Shape) -> Arguments:
    n, mode = draw_space(s), r.choice(["constant", "reflect", "replicate", "circular"])
    return {"widths": draw_sizes(r, 2 * n, -1 if mode == "constant" else 0, 2), "mode": mode}


def draw_resize(r: random.Random, s: Shape) -> Arguments:
    n = draw_space(s)
    mode = r.choice(["nearest", "nearest-exact", ("linear", "bilinear", "trilinear")[n - 1], "area"])
    return {"size": [max(1, int(size * r.choice([0.5, 1, 1.5, 2]))) for size in s[2:]], "mode": mode}


def draw_cut(r: random.Random, s: Shape) -> Arguments:
    at = r.randrange(len(s))
    start = r.randint(0, max(0, s[at] - 2))
    return {"dim": at, "start": start, "stop": r.randint(start + 1, s[at]), "step": r.choice([1, 1, 2, 3])}


def draw_positions(r: random.Random, s: Shape) -> Arguments:
    at = r.randrange(len(s))
    return {"dim": at, "index": [r.randrange(s[at]) for _ in range(r.randint(1, 4))]}


def draw_order(r: random.Random, s: Shape) -> Arguments:
    order = list(range(len(s)))
    r.shuffle(order)
    return {"order": order}


def draw_two(r: random.Random, s: Shape) -> Arguments:
    a, b = r.sample(range(len(s)), 2)
    return {"a": a, "b": b}


def draw_split_dim(r: random.Random, s: Shape) -> Arguments:
    at = r.randrange(len(s))
    factor = r.choice([f for f in range(1, s[at] + 1) if s[at] % f == 0])
    return {"dim": at, "sizes": [factor, s[at] // factor]}


def draw_merge(r: random.Random, s: Shape) -> Arguments:
    first = r.randrange(len(s) - 1)
    return {"first": first, "last": r.randint(first + 1, len(s) - 1)}


def draw_shift(r: random.Random, s: Shape) -> Arguments:
    found = draw_dims(r, s)
    return found | {"shifts": [r.randint(-s[d], s[d]) for d in found["dims"]]}


def draw_pieces(r: random.Random, s: Shape) -> Arguments:
    return draw_dim(r, s) | {"parts": r.randint(2, 3)}
