"""Operations that couple positions along split dims: scans, sorts, lookups, transforms, windows, writes to slices.

Under `strict`: totals carried from rank to rank, the best merged, or splits moved to other dims and back; never a
gather. `Moves(n)`: so many times may every element of the first input travel, forward and backward together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from harness import Call, Case, Input
from harness_bounds import Bound
from torch import Tensor, nn

X3 = Input((2, 4, 9, 10, 7))
X2 = Input((2, 4, 11, 13))
X1 = Input((2, 4, 21))
FEW = Input((2, 4, 3, 5, 6))  # fewer planes than ranks: empty shards
PLANE3 = 2 * 4 * 10 * 7


class Moves(Bound):
    """Every element of the first input sent at most `times` times, of all passes together."""

    def __init__(self, times: float) -> None:
        object.__setattr__(self, "times", times)

    def bytes(self, plan: Any, shapes: Sequence[tuple[int, ...]], layout: str | None, itemsize: int) -> int:
        return int(self.times * math.prod(shapes[0]) * itemsize)


def planes(elements: int) -> Bound:
    """Each rank tells the others a few planes of `elements`."""
    return Bound(statistics=lambda shapes: elements)


def case(name: str, fn: Callable[..., Any], x: Input, bound: Bound | float | None = None, **options: Any) -> Case:
    limit = Moves(bound) if isinstance(bound, int | float) else bound
    return Case(f"along_{name}", lambda: Call(fn), (x,), limit, **options)


def ties(x: Tensor) -> Tensor:
    return (x * 2).round() / 2


def some(shape: Sequence[int], top: int) -> Tensor:
    return torch.randint(0, top, tuple(shape), generator=torch.Generator().manual_seed(3))


def bad(x: Tensor) -> Tensor:
    """One position on one rank is not a number."""
    mask = torch.zeros(x.shape, dtype=torch.bool)
    mask[0, 0, 2, 1] = True
    return torch.where(mask, torch.full((), math.nan, dtype=x.dtype), x)


def filter_spectrum(x: Tensor) -> Tensor:
    """A Fourier layer keeps the lowest frequencies."""
    dims = tuple(range(2, x.ndim))
    low = torch.fft.rfftn(x, dim=dims)[..., :3] * 2.0
    return torch.fft.irfftn(low, s=x.shape[2:], dim=dims)


def shifted_sum(x: Tensor) -> Tensor:
    y = x * 1.5
    y[:, :, 1:] += x[:, :, :-1]
    return y


def planes_written(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :, :3] = x[:, :, :3] * 2
    y[:, :, 1] += x[:, :, 0]
    y[:, :, -1] = 1.0
    y[:, :, ::2].mul_(3.0)
    return y


def recurrence(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for i in range(1, x.shape[2]):
        y[:, :, i] = y[:, :, i - 1] * 0.5 + x[:, :, i]
    return y


def masks_written(x: Tensor) -> Tensor:
    y = x * 1.5
    y[x > 0.5] = 7.0
    y[:, x[0, :, 0, 0, 0].detach() * 0 > -1] *= 2 if x.ndim == 5 else 1
    y[y < -1] = -1.0
    return y


def views_stay_views(x: Tensor) -> tuple[Tensor, ...]:
    """A slice sees later writes to its base and to other slices, and the base sees writes to slices of slices."""
    y = x * 1.5
    a, b, c = y[:, :, 1:4], y[:, :, 2:], y[:, 1:3]
    a.mul_(2)
    c.add_(1)
    y.mul_(3)
    b[:, :, :2].add_(x[:, :, :2])
    rows = y.flatten(2)
    rows[:, :, 3:9] = 0.0
    y[:, :, 0, 1:4].sub_(1.0)
    return a * 2, b + 1, c * 1, rows * 2, y


def without_graph(x: Tensor) -> tuple[Tensor, ...]:
    y = x.detach().clone()
    with torch.no_grad():
        for part in y.chunk(3, 2):
            part.mul_(part.sum())
        for part in y.unbind(2):
            part.add_(1)
    with torch.inference_mode():
        z = y * 1
        late = z[:, :, 1:]
        z.mul_(2)
        z[:, :, :3].add_(1)
        seen = late * 1
    return y * x, x[:, :, 1:] * seen.clone()


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def attend(t: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(t, t * 2, t - 1, **options)


def bias(x: Tensor) -> Tensor:
    n = x[0, 0].numel()
    return torch.ones(n, n, dtype=x.dtype).tril() * 0.1


def both_ends(x: Tensor) -> Tensor:
    """The percentiles by which intensities are clipped."""
    return torch.quantile(x, torch.tensor([0.05, 0.95], dtype=x.dtype))


class Heads(nn.Module):
    """Self-attention over all positions, as in a transformer over an image."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        t = tokens(x)
        return self.attention(t, t, t, need_weights=False)[0].transpose(1, 2).reshape(x.shape) * x


def few_bins(line: Tensor) -> Tensor:
    """Sums of the positive and of the other values, into a plain tensor smaller than the index."""
    return torch.zeros(3, dtype=line.dtype).scatter_add(0, (line > 0).long(), line)


CASES = [
    case("cumsum", lambda x: x.cumsum(2), X3, planes(PLANE3), sample=True),
    case("cumsum_few", lambda x: x.cumsum(2), FEW, planes(2 * 4 * 5 * 6), sample=True),
    case("cumsum_two", lambda x: x.cumsum(2).cumsum(3), X3),
    case("cumsum_in_place", lambda x: (x * 1).cumsum_(2), X2),
    case("cumsum_of_mask", lambda x: (x > 0).cumsum(2), X3, grad=False),
    case("cumsum_1d", lambda x: x.cumsum(-1), X1, sample=True),
    case("cumprod", lambda x: x.cumprod(2), X2, 12),
    case("cummax", lambda x: x.cummax(2), X3, 6),
    case("cummin_ties", lambda x: ties(x).cummin(2), FEW, 12),
    case("cummax_nan", lambda x: bad(x).cummax(2)[1], X2, grad=False),
    case("logcumsumexp", lambda x: x.logcumsumexp(2), X2, 10),
    case("sort", lambda x: x.sort(2), X3, 6, sample=True),
    case("sort_few", lambda x: x.sort(2, descending=True), FEW, 6),
    case("sort_stable", lambda x: torch.sort(ties(x), dim=3, stable=True), X2, 6),
    case("argsort", lambda x: x.argsort(2), X3, 3, grad=False),
    case("topk", lambda x: x.topk(3, 2), X3, 6),
    case("topk_ends_few", lambda x: x.topk(2, 2, largest=False), FEW, 8),
    case("hard_mining", lambda x: (x.mean((0, 1)) ** 2).topk(5)[0].mean(), X1, planes(64)),
    case("norm_negative_few", lambda x: torch.linalg.vector_norm(x, -1.0, dim=2), FEW),
    case("rot90", lambda x: torch.rot90(x, 1, (2, 3)) * 2, X2, 4),
    case("rot90_whole_turn", lambda x: torch.rot90(x, 4, (2, 3)) * 2, X2, 0),
    case("dist", lambda x: torch.dist(x, x.flip(1) * 2), X3, planes(4)),
    case("matrix_vector", lambda x: torch.mv(x[0, 0], x[1, 0, 0]) + torch.dot(x[0, 0, 0], x[0, 0, 1]), X2),
    case("kthvalue", lambda x: x.kthvalue(3, 2), X3, 6),
    case("median", lambda x: x.median(2), X2, 6),
    case("nanmedian", lambda x: x.nanmedian(2, keepdim=True), X2, 6),
    case("mode", lambda x: ties(x).mode(2), X2, 6),
    case("quantile", lambda x: torch.quantile(x, 0.3, dim=2), X2, 12),
    case("glu", lambda x: F.glu(x[:, :, :8], 2), X2, 6),
    case("argmax_all", lambda x: (x.argmax(), ties(x).argmin()), X3, planes(4), grad=False, sample=True),
    case("argmax_nan", lambda x: bad(x).argmax(), X2, planes(2), grad=False),
    case("max", lambda x: x.max(2), X3),
    case("max_ties", lambda x: ties(x).max(2)[1], FEW, planes(240), grad=False),
    case("aminmax", lambda x: torch.aminmax(x), X3, planes(8)),
    case("aminmax_dim", lambda x: torch.aminmax(x, dim=2), X2),
    case(
        "extremes_nan",
        lambda x: (
            bad(x).max().isnan(),
            bad(x).amin((2, 3)).isnan(),
            torch.linalg.vector_norm(bad(x), math.inf).isnan(),
        ),
        X2,
        grad=False,
    ),
    case("nansum", lambda x: bad(x).nansum(2), X3, planes(PLANE3), grad=False),
    case("nanmean", lambda x: x.nanmean((2, 3)), X3, planes(2 * 4 * 7 * 4)),
    case("prod", lambda x: x.prod(2), X2),
    case("histc", lambda x: (torch.histc(x, 8, -2, 2), torch.histc(x, 5)), X3, planes(20), grad=False),
    case("gather", lambda x: x.gather(2, some(x.shape, x.shape[2])), X3, 6),
    case("gather_few", lambda x: x.mean((0, 1)).gather(0, torch.tensor([3, 17, 3, 20])), X1, planes(84), sample=True),
    case("gather_none", lambda x: x.mean((0, 1)).gather(0, torch.tensor([], dtype=torch.long)), X1, planes(84)),
    case("scatter_few_bins", lambda x: few_bins(x.mean((0, 1))), X1, planes(84), sample=True),
    case("gather_argmax", lambda x: x.gather(2, x.argmax(2, keepdim=True)), X2),
    case("take_along_dim", lambda x: torch.take_along_dim(x, x.argsort(2), 2), X2, 10),
    case("scatter_add", lambda x: torch.zeros_like(x).scatter_add_(2, some(x.shape, x.shape[2]), x), X3, 6),
    case("scatter_one_hot", lambda x: torch.zeros_like(x).scatter_(2, x.argmax(2, keepdim=True), 1.0) * x, X2),
    case(
        "scatter_reduce", lambda x: x.scatter_reduce(2, some(x.shape, x.shape[2]), x * 2, "amax"), X2, None, grad=False
    ),
    case("index_select", lambda x: x.index_select(2, torch.tensor([2, 0, 2, 1])), X3, 4, sample=True),
    case("index_list", lambda x: x[:, :, [2, 1, -1]], X3, 4),
    case("index_two", lambda x: x[:, :, [3, 1, 1], [0, 2, 4]], X2, 4),
    case("index_grid", lambda x: x[:, :, torch.tensor([0, 2])[:, None], torch.tensor([1, 3, 4])], X2, 4),
    case("index_mask_of_dim", lambda x: x[:, :, torch.arange(x.shape[2]) % 2 == 0], X3, 4),
    case("index_add", lambda x: torch.zeros_like(x).index_add_(2, torch.randperm(11), x) * 0 + x, X2, 6),
    case("index_copy", lambda x: x.index_copy(2, torch.tensor([1, 3]), x[:, :, :2] * 2), X2, 6),
    case("index_put", lambda x: operator_put(x), X2, 6),
    case("table", lambda x: torch.arange(9.0, dtype=x.dtype)[(x * 2).long().clamp(0, 8)] * x, X3, Bound()),
    case("bucketize", lambda x: torch.bucketize(x, torch.linspace(-2, 2, 9, dtype=x.dtype)), X3, Bound(), grad=False),
    case("embedding", lambda x: embedded(x), X2, Bound()),
    case("masks_written", masks_written, X3),
    case("fft", lambda x: torch.view_as_real(torch.fft.fft(x, dim=2)), X3, 12),
    case("fftn", lambda x: torch.view_as_real(torch.fft.fftn(x, dim=(2, 3))), X2, 16),
    case("fft_all_dims", lambda x: torch.fft.fftn(x).real, FEW, 16),
    case("rfft", lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=2), n=x.shape[2], dim=2), X3, 12),
    case("hfft", lambda x: torch.fft.hfft(x, dim=2), X2, 24),
    case("fftshift", lambda x: torch.fft.fftshift(x, dim=(2, 3)), X3, 4),
    case("fourier_layer", filter_spectrum, X2, 16, sample=True),
    case("unfold", lambda x: x.unfold(2, 3, 2), X3, 2, sample=True),
    case("unfold_two", lambda x: x.unfold(2, 3, 1).unfold(3, 2, 2), X2, 4),
    case("unfold_wide", lambda x: x.unfold(2, 7, 1), X2, 6),
    case("columns", lambda x: F.unfold(x, 3, padding=1), X2, 18),
    case("columns_odd_channels", lambda x: F.unfold(x, 3, padding=1), Input((2, 3, 11, 13)), 40),
    case("reshape_two_groups", lambda x: x.reshape(2, 4, 15, 3, 7, 10), Input((2, 4, 45, 70)), 4),
    case("columns_dilated", lambda x: F.unfold(x, 2, stride=2, dilation=2), X2, 4),
    case("fold", lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1), X2, 18),
    case("repeat", lambda x: x.repeat(1, 1, 2, 1), X2, 4),
    case("tile", lambda x: x.tile((2, 1, 3)), X1, 8),
    case("repeat_interleave", lambda x: x.repeat_interleave(3, dim=2), X1, 6),
    case("triangles", lambda x: x.tril() + x.triu(1) * 2 + x.transpose(2, 3).tril(-2).transpose(2, 3), X2, Bound()),
    case("diagonal", lambda x: x.diagonal(dim1=2, dim2=3), X2, 4),
    case("slice_scatter", lambda x: x.slice_scatter(x[:, :, :2] * 3, 2, 3, 5).select_scatter(x[:, :, 0], 2, 1), X2, 6),
    case("cross", lambda x: torch.linalg.cross(x[:, :3], x[:, :3].flip(2), dim=1), X2, 4),
    case("attention", lambda x: attend(tokens(x)), X2, 20),
    case("attention_heads_causal", lambda x: attend(tokens(x).unsqueeze(1), is_causal=True), X2, 20),
    case("attention_bias", lambda x: attend(tokens(x), attn_mask=bias(x)), X2, 20),
    case("attention_few", lambda x: attend(tokens(x[:, :, :3])), X3, 8),
    Case("along_multi_head", Heads, (X2,), Moves(60), sample=True),
    case("distances", lambda x: torch.cdist(tokens(x), tokens(x.flip(1))[:, :5] + 1.0), X2, 14),
    case("median_all", lambda x: (x.median(), bad(x).median().isnan()), X3, planes(8 * 256 + 8)),
    case("nanmedian_all", lambda x: bad(x.detach()).nanmedian() * x, X3, planes(8 * 256 + 4)),
    case("quantile_all", lambda x: x.clamp(*both_ends(x.detach())), X3, planes(4 * 8 * 256 + 4), sample=True),
    case(
        "quantile_half",
        lambda x: torch.quantile(x.detach().float(), 0.31, interpolation="lower") * x.float(),
        X3,
        planes(8 * 256),
        tolerance=1e-6,
    ),
    case("write_shifted", shifted_sum, X3, 8, sample=True),
    case("write_planes", planes_written, X3, 12, sample=True),
    case("write_recurrence", recurrence, X2, 12),
    case("write_views", views_stay_views, X3, 18, sample=True),
    case("write_without_graph", without_graph, X2, 10),
]


def operator_put(x: Tensor) -> Tensor:
    y = x * 1.5
    y[:, :, [1, 3]] = 2.0
    y[:, :, [0]] = y[:, :, [4]] * 3
    return y


def embedded(x: Tensor) -> Tensor:
    return F.embedding((x * 2).long().clamp(0, 7), torch.arange(24, dtype=x.dtype).view(8, 3)) * x.unsqueeze(-1)
