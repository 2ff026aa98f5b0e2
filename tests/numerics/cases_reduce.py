"""Reductions, softmax, losses and metrics: global values of split tensors, bytes that do not grow with the volume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import Call, Case, Input
from harness_bounds import Bound
from torch import Tensor, nn

X3 = Input((3, 4, 9, 10, 7))
X2 = Input((2, 4, 11, 13))
LOGITS = Input((3, 5, 9, 10, 7))
LABELS = Input((3, 9, 10, 7), layout="NDHW", kind="classes", classes=5)
LABELS_PLAIN = Input((3, 9, 10, 7), kind="classes", classes=5, plain=True)
TARGET3 = Input((3, 4, 9, 10, 7), kind="unit")
NOTHING = Bound()
SCALAR = Bound(statistics=lambda shapes: 8)


def kept(elements: int) -> Bound:
    """Each rank tells the others its part of `elements` results (a few numbers for each)."""
    return Bound(statistics=lambda shapes: 4 * elements)


def case(name: str, fn: Callable[..., Any], *inputs: Input, bound: Bound | None = SCALAR, **options: Any) -> Case:
    return Case(name, lambda: Call(fn), inputs, bound, **options)


def loss(name: str, module: nn.Module, *inputs: Input, bound: Bound | None = SCALAR, **options: Any) -> Case:
    return Case(f"loss_{name}", lambda: module, inputs, bound, **options)


def user_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """A soft Dice as users write it."""
    p = logits.softmax(1)
    t = F.one_hot(labels, p.shape[1]).movedim(-1, 1).to(p.dtype)
    overlap = (p * t).sum((2, 3, 4))
    return 1 - ((2 * overlap + 1) / (p.sum((2, 3, 4)) + t.sum((2, 3, 4)) + 1)).mean()


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    ce = F.cross_entropy(logits, labels, reduction="none")
    return ((1 - torch.exp(-ce)) ** 2 * ce).mean()


def tversky(logits: Tensor, target: Tensor) -> Tensor:
    p = torch.sigmoid(logits)
    hit, miss, extra = (p * target).sum(), ((1 - p) * target).sum(), (p * (1 - target)).sum()
    return 1 - hit / (hit + 0.7 * miss + 0.3 * extra + 1e-6)


WEIGHT = torch.tensor([0.2, 1.0, 1.5, 0.7, 2.0], dtype=torch.float64)


def ignoring(criterion: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Some labels become the ignored one."""
    return lambda x, t: criterion(x, torch.where(t == 2, torch.full_like(t, -100), t))


CASES = [
    case("sum_all", lambda x: x.sum(), X3, sample=True),
    case("mean_all", lambda x: x.mean(), X3, sample=True),
    case("mean_size5_empty_shards", lambda x: (x.mean(), x.amax(), x.var()), Input((2, 3, 5, 5, 5)), sample=True),
    case("mean_space", lambda x: x.mean((2, 3, 4)), X3, bound=kept(12)),
    case("mean_space_keepdim", lambda x: x - x.mean((2, 3, 4), keepdim=True), X3, bound=kept(12)),
    case("mean_depth", lambda x: x.mean(2), X3, bound=kept(3 * 4 * 10 * 7)),
    case("sum_channels", lambda x: x.sum(1), X3, bound=NOTHING),
    case("sum_width_keepdim", lambda x: x.sum(-1, keepdim=True) * x, X2, bound=kept(2 * 4 * 11)),
    case("amax_all", lambda x: x.amax(), X3),
    case("max_min_all", lambda x: x.max() - x.min(), X2),
    case("amax_space", lambda x: x.amax((2, 3, 4)), X3, bound=kept(12)),
    case("amin_height", lambda x: x.amin(2), X2, bound=kept(2 * 4 * 13)),
    case("var_all", lambda x: x.var(), X3),
    case("var_space", lambda x: x.var((2, 3, 4), unbiased=False), X3, bound=kept(12)),
    case("std_channels_kept", lambda x: x.std((0, 2, 3, 4), keepdim=True), X3, bound=kept(4)),
    case("var_mean", lambda x: torch.var_mean(x, (2, 3), correction=0), X2, bound=kept(8)),
    case("standardise", lambda x: (x - x.mean()) / (x.std() + 1e-6), X3),
    case("norm_all", lambda x: x.norm(), X3),
    case("norm_of_half", lambda x: (20 * x).half().norm().to(x.dtype), X3, grad=False, tolerance=1e-3),
    case("norm_space", lambda x: torch.linalg.vector_norm(x, dim=(2, 3)), X2, bound=kept(8)),
    case("norm_one", lambda x: x.norm(p=1, dim=1), X2, bound=NOTHING),
    case("prod_channels", lambda x: x.prod(1), X2, bound=NOTHING),
    case("any_all", lambda x: ((x > 2).any(), (x > -9).all(), (x > 0).sum()), X3, grad=False),
    case("logsumexp_channels", lambda x: x.logsumexp(1), X3, bound=NOTHING),
    case("logsumexp_depth", lambda x: x.logsumexp(2), X3, bound=kept(3 * 4 * 10 * 7)),
    case("argmax_channels", lambda x: x.argmax(1), X3, bound=NOTHING, grad=False),
    case("count_nonzero", lambda x: (x > 0).sum((0, 2, 3, 4)), X3, bound=kept(4), grad=False),
    case("softmax_channels", lambda x: x.softmax(1), X3, bound=NOTHING),
    case("log_softmax_channels", lambda x: F.log_softmax(x * 30, 1), X3, bound=NOTHING),
    case("softmax_depth", lambda x: torch.softmax(x, 2), X3, bound=kept(3 * 4 * 10 * 7)),
    case("log_softmax_width", lambda x: F.log_softmax(x * 30, -1), X2, bound=kept(2 * 4 * 11)),
    case("normalize_channels", lambda x: F.normalize(x, dim=1), X2, bound=NOTHING),
    case("cosine_channels", lambda a, b: F.cosine_similarity(a, b, 1), X2, X2, bound=NOTHING),
    case("einsum_channels", lambda x: torch.einsum("nchw->nhw", x), X2, bound=NOTHING),
    loss("cross_entropy", nn.CrossEntropyLoss(), LOGITS, LABELS, sample=True),
    loss("cross_entropy_plain_target", nn.CrossEntropyLoss(), LOGITS, LABELS_PLAIN),
    loss("cross_entropy_weights", nn.CrossEntropyLoss(WEIGHT), LOGITS, LABELS),
    loss("cross_entropy_smoothing", nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), LOGITS, LABELS),
    loss("cross_entropy_sum", nn.CrossEntropyLoss(reduction="sum"), LOGITS, LABELS),
    loss("cross_entropy_none", nn.CrossEntropyLoss(reduction="none"), LOGITS, LABELS, bound=NOTHING),
    loss("cross_entropy_probabilities", nn.CrossEntropyLoss(), LOGITS, Input(LOGITS.shape, kind="probabilities")),
    case("loss_cross_entropy_ignored", ignoring(nn.CrossEntropyLoss()), LOGITS, LABELS),
    case("loss_cross_entropy_ignored_weights", ignoring(nn.CrossEntropyLoss(WEIGHT)), LOGITS, LABELS),
    case("loss_cross_entropy_ignore_index", lambda x, t: F.cross_entropy(x, t, ignore_index=1), LOGITS, LABELS),
    loss("cross_entropy_features", nn.CrossEntropyLoss(), Input((7, 5)), Input((7,), "N", "classes", 5), plans=("n4",)),
    case("loss_nll", lambda x, t: F.nll_loss(F.log_softmax(x, 1), t, weight=WEIGHT), LOGITS, LABELS),
    case(
        "loss_kl",
        lambda x, t: F.kl_div(F.log_softmax(x, 1), t, reduction="batchmean"),
        LOGITS,
        Input(LOGITS.shape, kind="probabilities"),
    ),
    loss("bce_logits", nn.BCEWithLogitsLoss(), X3, TARGET3),
    loss("bce_logits_pos_weight", nn.BCEWithLogitsLoss(pos_weight=WEIGHT[:4].view(4, 1, 1, 1)), X3, TARGET3),
    case("loss_bce", lambda x, t: F.binary_cross_entropy(torch.sigmoid(x), t), X3, TARGET3),
    loss("mse", nn.MSELoss(), X3, TARGET3, sample=True),
    loss("mse_sum", nn.MSELoss(reduction="sum"), X3, Input(X3.shape, plain=True)),
    loss("mse_none", nn.MSELoss(reduction="none"), X3, X3, bound=NOTHING),
    loss("l1", nn.L1Loss(), X3, TARGET3),
    loss("smooth_l1", nn.SmoothL1Loss(beta=0.5), X3, TARGET3),
    loss("huber", nn.HuberLoss(delta=0.3), X3, TARGET3),
    case("loss_mean_of_squares", lambda x: (x.float() ** 2).mean(), X3, tolerance=1e-6),
    case("loss_user_dice", user_dice, LOGITS, LABELS, bound=kept(3 * 3 * 5), sample=True),
    case("loss_focal", focal, LOGITS, LABELS),
    case("loss_tversky", tversky, X3, TARGET3),
    case("loss_sum_of_two", lambda x, t: F.cross_entropy(x, t) + user_dice(x, t), LOGITS, LABELS, bound=kept(50)),
]
