"""How random cases are drawn: hypothesis over shape, arguments and mesh, with fixed seeds; every draw is legal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from drawn import Drawn, Options, Shape
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st

# (ranks, spatial dims) -> meshes: over one, two and three dims
MESHES: dict[tuple[int, int], tuple[str, ...]] = {
    (2, 1): ("w2", "n2"),
    (2, 2): ("h2", "w2", "n2"),
    (2, 3): ("d2", "h2", "w2", "n2"),
    (3, 1): ("w3", "n3"),
    (3, 2): ("h3", "w3", "n3"),
    (3, 3): ("d3", "h3", "w3", "n3"),
    (4, 1): ("w4", "n2w2", "n4"),
    (4, 2): ("h4", "w4", "h2w2", "n2h2", "n2w2"),
    (4, 3): ("d4", "h4", "w4", "d2h2", "d2w2", "h2w2", "n2d2"),
    (8, 1): ("w8", "n2w4"),
    (8, 2): ("w8", "h2w4", "n2h2w2"),
    (8, 3): ("d8", "d2h2w2", "n2d2h2", "h2w4", "d4w2"),
}
LARGEST = {1: 24, 2: 12, 3: 8}  # positions of a spatial dim: uneven, odd, tiny and empty shards all occur
Draw = Callable[..., Any]


def _each(draw: Draw, ndim: int, low: int, high: int) -> list[int]:
    return [draw(st.integers(low, high)) for _ in range(ndim)]


def _shape(draw: Draw, ndim: int, channels: int, smallest: int = 1) -> Shape:
    return (draw(st.integers(1, 3)), channels, *_each(draw, ndim, smallest, LARGEST[ndim]))


def _fit(size: int, k: int, d: int, p: int) -> tuple[int, int]:
    """Kernel and dilation made smaller until they fit into the padded size."""
    while d * (k - 1) + 1 > size + 2 * p:
        k, d = (k, d - 1) if d > 1 else (k - 1, d)
    return k, d


def conv(draw: Draw, ndim: int) -> tuple[Shape, Options]:
    groups, inside = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 2))
    shape = _shape(draw, ndim, groups * inside)
    s, d, k = _each(draw, ndim, 1, 4), _each(draw, ndim, 1, 3), _each(draw, ndim, 1, 5)
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "same", "reflect", "replicate", "circular"]))
    most = {"reflect": -1, "circular": 0}
    p: Any = [
        min(w, n + most[mode]) if mode in most else w for w, n in zip(_each(draw, ndim, 0, 4), shape[2:], strict=True)
    ]
    if mode == "same":
        p, s, mode = "same", [1] * ndim, "zeros"
    else:
        k, d = map(list, zip(*(_fit(*args) for args in zip(shape[2:], k, d, p, strict=True)), strict=True))
    out, bias = draw(st.integers(1, 2)), draw(st.booleans())
    return shape, {"k": k, "s": s, "p": p, "d": d, "mode": mode, "groups": groups, "out": out, "bias": bias}


def conv_transpose(draw: Draw, ndim: int) -> tuple[Shape, Options]:
    groups, inside = draw(st.sampled_from([1, 1, 2])), draw(st.integers(1, 2))
    shape = _shape(draw, ndim, groups * inside)
    s, d, k = _each(draw, ndim, 1, 3), _each(draw, ndim, 1, 3), _each(draw, ndim, 1, 4)
    extra = [draw(st.integers(0, max(a, b) - 1)) for a, b in zip(s, d, strict=True)]
    whole = [(n - 1) * a + b * (c - 1) + e + 1 for n, a, b, c, e in zip(shape[2:], s, d, k, extra, strict=True)]
    p = [draw(st.integers(0, min(3, (size - 1) // 2))) for size in whole]
    out, bias = draw(st.integers(1, 2)), draw(st.booleans())
    return shape, {"k": k, "s": s, "p": p, "d": d, "extra": extra, "groups": groups, "out": out, "bias": bias}


def _pool(draw: Draw, ndim: int, dilations: int) -> tuple[Shape, Options]:
    shape = _shape(draw, ndim, draw(st.integers(1, 3)))
    k, d, s = _each(draw, ndim, 1, 4), _each(draw, ndim, 1, dilations), _each(draw, ndim, 1, 4)
    k, d = map(list, zip(*(_fit(n, a, b, 0) for n, a, b in zip(shape[2:], k, d, strict=True)), strict=True))
    p = [draw(st.integers(0, a // 2)) for a in k]
    return shape, {"k": k, "s": s, "p": p, "ceil": draw(st.booleans()), "d": d}


def max_pool(draw: Draw, ndim: int) -> tuple[Shape, Options]:
    return _pool(draw, ndim, 3)


def avg_pool(draw: Draw, ndim: int) -> tuple[Shape, Options]:
    shape, options = _pool(draw, ndim, 1)
    del options["d"]
    return shape, options | {"include": draw(st.booleans()), "divisor": draw(st.sampled_from([0, 0, 3]))}


def adaptive(draw: Draw, ndim: int) -> tuple[Shape, Options]:
    shape = _shape(draw, ndim, draw(st.integers(1, 3)))
    out = draw(st.just([1] * ndim) | st.lists(st.integers(1, LARGEST[ndim]), min_size=ndim, max_size=ndim))
    return shape, {"out": out, "kind": draw(st.sampled_from(["avg", "max"]))}


def pad(draw: Draw, ndim: int) -> tuple[Shape, Options]:
    shape = _shape(draw, ndim, draw(st.integers(1, 3)))
    mode = draw(st.sampled_from(["constant", "constant", "reflect", "replicate", "circular"]))
    count = draw(st.integers(1, ndim + 1)) if mode == "constant" else ndim
    widths: list[int] = []
    for n in reversed(shape[-count:]):
        most = {"reflect": min(4, n - 1), "circular": min(4, n)}.get(mode, 4)
        lows = -(n - 1) // 2 if mode == "constant" else 0
        widths += [draw(st.integers(max(-3, lows), most)) for _ in range(2)]
    assume(all(n + widths[2 * i] + widths[2 * i + 1] > 0 for i, n in enumerate(reversed(shape[-count:]))))
    return shape, {"widths": widths, "mode": mode}


def interpolate(draw: Draw, ndim: int) -> tuple[Shape, Options]:
    shape = _shape(draw, ndim, draw(st.integers(1, 3)))
    mode = draw(st.sampled_from(["nearest", "nearest-exact", "linear", "linear", "area"]))
    options: Options = {"mode": mode, "aligned": draw(st.booleans()) and mode == "linear", "size": None}
    options |= {"scale": None, "recompute": False}
    if draw(st.booleans()):
        options["size"] = _each(draw, ndim, 1, 2 * LARGEST[ndim])
        return shape, options
    factors = [0.5, 0.7, 1.0, 1.3, 1.5, 2.0, 2.0, 2.6, 3.0]
    options["scale"] = [draw(st.sampled_from(factors)) for _ in range(ndim)]
    assume(all(math.floor(n * f) >= 1 for n, f in zip(shape[2:], options["scale"], strict=True)))
    options["recompute"] = draw(st.booleans())
    # torch 2.13.0: nearest on a line or in a volume takes the factor forward and none backward where the size stays
    both = zip(shape[2:], options["scale"], strict=True)
    assume(ndim == 2 or not mode.startswith("nearest") or all(f == 1 or math.floor(n * f) != n for n, f in both))
    return shape, options


def norm(draw: Draw, ndim: int) -> tuple[Shape, Options]:
    kind = draw(st.sampled_from(["batch", "batch", "instance", "group", "layer"]))
    groups = draw(st.integers(1, 2))
    shape = _shape(draw, ndim, groups * draw(st.integers(1, 2)))
    options: Options = {"kind": kind}
    if kind == "layer":
        options["dims"] = draw(st.integers(1, ndim + 1))
        assume(math.prod(shape[-options["dims"] :]) > 1)
        return shape, options
    options["affine"] = draw(st.booleans())
    per = math.prod(shape[2:]) * {"batch": shape[0], "group": shape[1] // groups}.get(kind, 1)
    assume(per > 1)
    if kind == "group":
        return shape, options | {"groups": groups}
    options |= {"track_running_stats": draw(st.booleans()), "eps": draw(st.sampled_from([1e-5, 1e-2]))}
    if kind == "batch":
        options["momentum"] = draw(st.sampled_from([0.1, 0.3, None]))
    return shape, options


def slices(draw: Draw, ndim: int) -> tuple[Shape, Options]:
    shape = _shape(draw, ndim, draw(st.integers(1, 4)))
    cuts = []
    for n in shape:
        start = draw(st.none() | st.integers(-n, n - 1))
        stop, step = draw(st.none() | st.integers(-n, n)), draw(st.sampled_from([None, 1, 2, 3]))
        cut = [start, stop, step]
        cuts.append(cut if len(range(n)[slice(*cut)]) else [start, None, step])
    left = [len(range(n)[slice(*cut)]) for n, cut in zip(shape, cuts, strict=True)]
    where = None
    if draw(st.integers(0, 2)) == 0:
        dim = draw(st.integers(0, len(shape) - 1))
        where = [dim, draw(st.integers(-left[dim], left[dim] - 1))]
    return shape, {"cuts": cuts, "select": where}


FAMILIES: dict[str, Callable[[Draw, int], tuple[Shape, Options]]] = {
    "conv": conv,
    "conv_transpose": conv_transpose,
    "max_pool": max_pool,
    "avg_pool": avg_pool,
    "adaptive": adaptive,
    "pad": pad,
    "interpolate": interpolate,
    "norm": norm,
    "slices": slices,
}
SHARES = {"conv": 5, "conv_transpose": 3, "max_pool": 2, "avg_pool": 2, "adaptive": 1, "pad": 2, "interpolate": 2}
SHARES |= {"norm": 2, "slices": 2}


@st.composite
def drawn(draw: Draw, ranks: int, family: str) -> Drawn:
    """One case for a mesh of `ranks`."""
    ndim = draw(st.integers(1, 3))
    plan = draw(st.sampled_from(MESHES[ranks, ndim]))
    shape, options = FAMILIES[family](draw, ndim)
    return Drawn(family, plan, shape, options)


def cases(ranks: int, count: int, number: int) -> list[Drawn]:
    """`count` different cases of all families, the same in every run; `number` chooses another series."""
    total, found = sum(SHARES.values()), list[Drawn]()
    for index, (family, share) in enumerate(SHARES.items()):
        wanted = -(-count * share // total)
        found += family_cases(ranks, family, wanted, 100 * number + index)
    return found


def family_cases(ranks: int, family: str, count: int, number: int) -> list[Drawn]:
    """`count` different cases of one family; hypothesis repeats itself a little, so it is asked more than once."""
    found: dict[object, Drawn] = {}
    for series in range(20):
        if len(found) >= count:
            break

        @seed(10_000 * number + 100 * ranks + series)
        @settings(
            max_examples=count + 10,
            database=None,
            phases=[Phase.generate],
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(drawn(ranks, family))
        def collect(case: Drawn) -> None:
            found.setdefault(case.key, case)

        collect()
    return list(found.values())[:count]
