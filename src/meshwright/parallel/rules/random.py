"""Random operators on mesh tensors: every rank draws its own part, and the global tensor is the same for every plan.

Dropout in all its forms needs no rule of its own: torch composes it of `empty_like`, `bernoulli_` and products,
or of `native_dropout` where a device has it fused. Nothing is ever sent. The numbers are not those of torch's
generators; one rank under `parallelize` is the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import Shard

from meshwright.errors import UnsupportedError
from meshwright.parallel.layout import REPLICATE, owned, partial_axes
from meshwright.parallel.noise import Index, digits_of, fill, normal, open_unit, shifted, unit
from meshwright.parallel.operators import POINTWISE, cause_of, operator
from meshwright.parallel.randomness import draw_key
from meshwright.parallel.rules.pointwise import like_spec, pointwise, to_parts
from meshwright.parallel.rules.reduce import arguments
from meshwright.parallel.tensor import MeshOps

aten = torch.ops.aten
POINTWISE |= {aten.native_dropout_backward.default, aten.rrelu_with_noise_backward.default}
Values = Callable[[torch.Tensor, Index], torch.Tensor]


def _draw(x: Any, values: Values, generator: torch.Generator | None = None) -> Any:
    """Overwrite mesh tensor `x` by `values` of fresh random bits."""
    placements = tuple(x._spec.placements)
    if partial_axes(placements):  # summands that are overwritten: from now on every rank holds the value
        x._spec = like_spec(x, tuple(p if isinstance(p, Shard) else REPLICATE for p in placements))
    spec = x._spec
    shape = tuple(spec.shape)
    box = tuple(owned(spec.mesh, tuple(spec.placements), dim, size) for dim, size in enumerate(shape))
    fill(x._local_tensor, draw_key(x._ledger, generator), shape, box, values)
    return x


def _empty_like(x: Any, **options: Any) -> Any:
    return pointwise(aten.empty_like.default, (x,), {k: v for k, v in options.items() if v is not None})


def _options(a: dict[str, Any]) -> dict[str, Any]:
    return {key: a[key] for key in ("dtype", "layout", "device", "pin_memory", "memory_format") if key in a}


def _uniform(lo: float, hi: float, dtype: torch.dtype) -> Values:
    def values(bits: torch.Tensor, index: Index) -> torch.Tensor:
        out = unit(bits, digits_of(dtype)).mul_(hi - lo).add_(lo).to(dtype)
        return out.masked_fill_(out >= hi, lo) if hi > lo else out  # rounding may have reached the excluded end

    return values


def _standard_normal(bits: torch.Tensor, index: Index) -> torch.Tensor:
    return normal(bits)


def _integers(lo: int, hi: int) -> Values:
    """Integers in [lo, hi), by the remainder, as torch does."""
    if hi <= lo:
        raise RuntimeError(f"random integers from {lo} to {hi}: the range is empty")
    return lambda bits, index: shifted(bits, 1).remainder_(hi - lo).add_(lo)


def _less(p: Any) -> Values:
    """1 with probability `p`: a number, or a local tensor with the shape of the part."""
    if isinstance(p, torch.Tensor):
        return lambda bits, index: unit(bits) < p[index]
    if not 0 <= p <= 1:
        raise RuntimeError(f"bernoulli expects p to be in [0, 1], but got p={p}")
    return lambda bits, index: shifted(bits, 11) < math.ceil(p * 2.0**53)


def _largest(dtype: torch.dtype) -> int:
    """The end of the range of `random_()`, as torch documents it."""
    if dtype == torch.bool:
        return 2
    return 2 ** digits_of(dtype) + 1 if dtype.is_floating_point else min(torch.iinfo(dtype).max + 1, (1 << 63) - 1)


_IN_PLACE: dict[Any, Callable[[dict[str, Any], torch.dtype], Values]] = {
    aten.uniform_.default: lambda a, t: _uniform(a["from"], a["to"], t),
    aten.normal_.default: lambda a, t: lambda bits, i: normal(bits).mul_(a["std"]).add_(a["mean"]),
    aten.log_normal_.default: lambda a, t: lambda bits, i: normal(bits).mul_(a["std"]).add_(a["mean"]).exp_(),
    aten.exponential_.default: lambda a, t: (
        lambda bits, i: (
            open_unit(bits).log_().div_(-a["lambd"])  # never 0, whose logarithm gumbel_softmax takes
        )
    ),
    aten.cauchy_.default: lambda a, t: (
        lambda bits, i: open_unit(bits).sub_(0.5).mul_(math.pi).tan_().mul_(a["sigma"]).add_(a["median"])
    ),
    aten.geometric_.default: lambda a, t: (
        lambda bits, i: open_unit(bits).log_().div_(math.log1p(-a["p"])).ceil_().clamp_(min=1)
    ),
    aten.bernoulli_.float: lambda a, t: _less(a["p"]),
    aten.random_.default: lambda a, t: _integers(0, _largest(t)),
    aten.random_.to: lambda a, t: _integers(0, a["to"]),
    getattr(aten.random_, "from"): lambda a, t: _integers(a["from"], _largest(t) if a["to"] is None else a["to"]),
}


@operator(*_IN_PLACE, linear=True)
def in_place(func: Any, args: Any, kwargs: Any) -> Any:
    """`x.normal_()` and its kin."""
    a = arguments(func, args, kwargs)
    x = a["self"]
    if func is aten.normal_.default and a["std"] < 0:
        raise RuntimeError(f"normal expects std >= 0.0, but found std {a['std']}")
    return _draw(x, _IN_PLACE[func](a, x.dtype), a["generator"])


@operator(
    aten.rand_like.default,
    aten.rand_like.generator,
    aten.randn_like.default,
    aten.randn_like.generator,
    aten.randint_like.default,
    aten.randint_like.generator,
    aten.randint_like.low_dtype,
    aten.randint_like.low_generator_dtype,
)
def like_another(func: Any, args: Any, kwargs: Any) -> Any:
    """Factories that take shape and layout from a mesh tensor."""
    a = arguments(func, args, kwargs)
    out = _empty_like(a["self"], **_options(a))
    name = func._schema.name
    if name == "aten::randn_like":
        values: Values = _standard_normal
    elif name == "aten::rand_like":
        values = _uniform(0.0, 1.0, out.dtype)
    else:
        values = _integers(a.get("low", 0), a["high"])
    return _draw(out, values, a.get("generator"))


@operator(aten.normal.Tensor_float, aten.normal.float_Tensor, aten.normal.Tensor_Tensor)
def normal_of(func: Any, args: Any, kwargs: Any) -> Any:
    """`torch.normal(mean, std)` with tensors that broadcast."""
    a = arguments(func, args, kwargs)
    mean, std = a["mean"], a["std"]
    like = pointwise(aten.add.Tensor, (mean, std), {}) if isinstance(mean, torch.Tensor) else std
    out = _draw(_empty_like(like), _standard_normal, a["generator"])
    return pointwise(aten.add.Tensor, (pointwise(aten.mul.Tensor, (out, std), {}), mean), {})


@operator(aten.bernoulli.default, aten.bernoulli.p, aten.bernoulli.Tensor, aten.bernoulli_.Tensor)
def bernoulli(func: Any, args: Any, kwargs: Any) -> Any:
    """Zeros and ones with a probability for each position (`self`, or `p` broadcast to it)."""
    a = arguments(func, args, kwargs)
    x, p = a["self"], a.get("p", a["self"])
    if not isinstance(x, MeshOps):
        raise UnsupportedError(f"{func}: a plain tensor cannot take the values of a mesh tensor; clone it as one")
    out = x if func is aten.bernoulli_.Tensor else _empty_like(x)
    if isinstance(p, torch.Tensor):
        shape, target = tuple(x._spec.shape), tuple(x._spec.placements)
        (p,) = to_parts([p], shape, target, x._spec.mesh, cause_of(func, args))
        p = p.expand(out._local_tensor.shape)
        if not ((p >= 0) & (p <= 1)).all():
            raise RuntimeError("bernoulli expects every probability to be in [0, 1]")
    return _draw(out, _less(p), a["generator"])


@operator(aten.native_dropout.default)
def native_dropout(func: Any, args: Any, kwargs: Any) -> Any:
    """Dropout where a device has it fused: the result and the mask of what is kept."""
    x, p, train = args
    mask = _empty_like(x, dtype=torch.bool)
    if train is False:
        mask._local_tensor.fill_(True)
        return pointwise(aten.clone.default, (x,), {}), mask
    _draw(mask, _less(1 - p))
    out = pointwise(aten.mul.Tensor, (x, mask), {})
    return pointwise(aten.mul.Scalar, (out, 0.0 if p == 1 else 1 / (1 - p)), {}), mask


@operator(aten.rrelu_with_noise.default, aten.rrelu_with_noise_.default)
def rrelu(func: Any, args: Any, kwargs: Any) -> Any:
    """Leaky ReLU with a random slope for each negative position; `noise` keeps the slopes for backward."""
    a = arguments(func, args, kwargs)
    x, noise = a["self"], a["noise"]
    lower, upper = float(a["lower"]), float(a["upper"])
    if a["training"]:
        _draw(noise, _uniform(lower, upper, noise.dtype), a["generator"])
        noise._local_tensor.masked_fill_(x._local_tensor > 0, 1)
        kept = pointwise(aten.mul.Tensor, (x, noise), {})
    else:
        kept = pointwise(aten.leaky_relu.default, (x, (lower + upper) / 2), {})
    if func is aten.rrelu_with_noise.default:
        return kept
    x._local_tensor.copy_(kept._local_tensor)
    return x
