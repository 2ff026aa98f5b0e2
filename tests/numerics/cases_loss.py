"""Every loss of torch with its options, each by position, as a mean and as a sum; and losses written by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import Call, Case, Input
from harness_bounds import Bound
from torch import Tensor, nn

X = Input((2, 4, 11, 13))
UNIT = Input((2, 4, 11, 13), kind="unit")
PARTS = Input((2, 4, 11, 13), kind="probabilities")
LABELS = Input((2, 11, 13), kind="classes", classes=4, layout="NHW")
CLASS_WEIGHTS = Input((4,), kind="unit", plain=True)
ROWS, ROW_LABELS = Input((10, 5)), Input((10,), kind="classes", classes=5, layout="N")
MANY_LABELS = Input((10, 5), kind="classes", classes=5, layout="NC")
SCALARS = Bound(statistics=lambda shapes: 40)  # sums and counts, nothing that grows with the volume
SAMPLES = Bound(statistics=lambda shapes: 40 + 12 * shapes[0][0] * shapes[0][1])
Loss = Callable[..., Tensor]


def every(name: str, loss: Loss, *inputs: Input, bound: Bound = SCALARS, **options: Any) -> Case:
    """`loss(*inputs, reduction)` in its three reductions at once."""

    def call(*args: Tensor) -> list[Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shapes that broadcast, which is meant
            return [loss(*args, reduction) for reduction in ("none", "mean", "sum")]

    return Case(f"losses_{name}", lambda: Call(call), inputs or (X, UNIT), bound, **options)


def signs(t: Tensor) -> Tensor:
    return (t > 0.5).to(t.dtype) * 2 - 1


def per_channel(x: Tensor) -> Tensor:
    return torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype).view(4, 1, 1)


def entropy(name: str, **options: Any) -> list[Case]:
    """Class indices in 1-D to 3-D, with and without class weights."""
    cases = []
    for ndim, shape in ((1, (3, 4, 21)), (2, X.shape), (3, (3, 4, 9, 10, 7))):
        target = Input((shape[0], *shape[2:]), kind="classes", classes=4, layout=("NW", "NHW", "NDHW")[ndim - 1])
        plain = lambda x, y, r: F.cross_entropy(x, y, reduction=r, **options)  # noqa: E731
        weighted = lambda x, y, w, r: F.cross_entropy(x, y, w, reduction=r, **options)  # noqa: E731
        cases.append(every(f"cross_entropy{ndim}d{name}", plain, Input(shape), target))
        cases.append(every(f"cross_entropy{ndim}d{name}_weighted", weighted, Input(shape), target, CLASS_WEIGHTS))
    return cases


def dice(x: Tensor, t: Tensor) -> Tensor:
    p = x.softmax(1)
    return 1 - ((2 * (p * t).sum((2, 3)) + 1) / (p.sum((2, 3)) + t.sum((2, 3)) + 1)).mean()


def focal(x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(x, y, reduction="none")
    return ((1 - torch.exp(-loss)) ** 2 * loss).mean()


def tversky(x: Tensor, t: Tensor) -> Tensor:
    p, t = x.sigmoid().flatten(1), t.flatten(1)
    hit, over, under = (p * t).sum(1), (p * (1 - t)).sum(1), ((1 - p) * t).sum(1)
    return (1 - (hit + 1) / (hit + 0.3 * over + 0.7 * under + 1)).pow(0.75).mean()


def ssim(a: Tensor, b: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """Structural similarity (Wang and others 2004) from any local mean."""
    ma, mb = mean(a), mean(b)
    va, vb, ab = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    return ((2 * ma * mb + 1e-4) * (2 * ab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))).mean()


def gaussian(v: Tensor) -> Tensor:
    line = torch.exp(-((torch.arange(5, dtype=v.dtype) - 2) ** 2) / 4.5)
    return F.conv2d(v, (line[:, None] * line / line.sum() ** 2).expand(4, 1, 5, 5), groups=4)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Local normalised cross-correlation, the loss of image registration."""

    def s(v: Tensor) -> Tensor:
        return F.conv3d(v.mean(1, keepdim=True), torch.ones(1, 1, 3, 3, 3, dtype=v.dtype), padding=1)

    return -(s(a * b) ** 2 / (s(a * a) * s(b * b) + 1e-3)).mean()


def rows(x: Tensor) -> Tensor:
    return x.mean((2, 3))


BY_POSITION: dict[str, Loss] = {
    "bce": lambda x, t, r: F.binary_cross_entropy(x.sigmoid(), t, reduction=r),
    "bce_weight": lambda x, t, r: F.binary_cross_entropy(x.sigmoid(), t, t * 2, reduction=r),
    "bce_logits": lambda x, t, r: F.binary_cross_entropy_with_logits(x, t, reduction=r),
    "bce_logits_weight": lambda x, t, r: F.binary_cross_entropy_with_logits(
        x, t, per_channel(x), pos_weight=t + 1, reduction=r
    ),
    "bce_logits_pos_weight": lambda x, t, r: F.binary_cross_entropy_with_logits(
        x, t, pos_weight=per_channel(x), reduction=r
    ),
    "mse": lambda x, t, r: F.mse_loss(x, t, reduction=r),
    "mse_weight": lambda x, t, r: F.mse_loss(x, t, reduction=r, weight=t + 1),
    "l1": lambda x, t, r: F.l1_loss(x, t, reduction=r),
    "l1_weight": lambda x, t, r: F.l1_loss(x, t, reduction=r, weight=t + 1),
    "smooth_l1": lambda x, t, r: F.smooth_l1_loss(x, t, reduction=r, beta=0.3),
    "smooth_l1_beta0": lambda x, t, r: F.smooth_l1_loss(x, t, reduction=r, beta=0.0),
    "huber": lambda x, t, r: F.huber_loss(x, t, reduction=r, delta=0.4),
    "huber_weight": lambda x, t, r: F.huber_loss(x, t, reduction=r, delta=0.4, weight=t + 1),
    "kl_div": lambda x, t, r: F.kl_div(x.log_softmax(1), t, reduction=r),
    "kl_div_log_target": lambda x, t, r: F.kl_div(x.log_softmax(1), t.log(), reduction=r, log_target=True),
    "kl_div_batchmean": lambda x, t, r: F.kl_div(x.log_softmax(1), t, reduction="batchmean"),
    "poisson": lambda x, t, r: F.poisson_nll_loss(x, t, reduction=r),
    "poisson_full": lambda x, t, r: F.poisson_nll_loss(x.exp(), t * 4, log_input=False, full=True, reduction=r),
    "gaussian": lambda x, t, r: F.gaussian_nll_loss(x, t, x.exp(), full=True, reduction=r),
    "gaussian_number": lambda x, t, r: F.gaussian_nll_loss(x, t, 0.5, reduction=r),
    "hinge_embedding": lambda x, t, r: F.hinge_embedding_loss(x, signs(t), margin=0.7, reduction=r),
    "margin_ranking": lambda x, t, r: F.margin_ranking_loss(x, t, signs(t), margin=0.1, reduction=r),
    "soft_margin": lambda x, t, r: F.soft_margin_loss(x, signs(t), reduction=r),
    "multilabel_soft_margin": lambda x, t, r: F.multilabel_soft_margin_loss(
        x.movedim(1, -1), (t > 0.5).to(x.dtype).movedim(1, -1), per_channel(x).flatten(), reduction=r
    ),
    "triplet": lambda x, t, r: F.triplet_margin_loss(
        x.movedim(1, -1), t.movedim(1, -1), (x * t).movedim(1, -1), margin=0.3, p=1.5, swap=True, reduction=r
    ),
    "triplet_with_distance": lambda x, t, r: F.triplet_margin_with_distance_loss(
        x.movedim(1, -1), t.movedim(1, -1), (x * t).movedim(1, -1), margin=0.3, reduction=r
    ),
    "cosine_similarity": lambda x, t, r: F.cosine_similarity(x, t, dim=1),
}
CASES = [
    *entropy(""),
    *entropy("_ignored", ignore_index=1),
    *entropy("_smooth", label_smoothing=0.1),
    *entropy("_smooth_ignored", label_smoothing=0.2, ignore_index=2),
    every("cross_entropy_soft", lambda x, t, r: F.cross_entropy(x, t, reduction=r), X, PARTS),
    every(
        "cross_entropy_soft_weighted",
        lambda x, t, w, r: F.cross_entropy(x, t, w, reduction=r, label_smoothing=0.1),
        *(X, PARTS, CLASS_WEIGHTS),
    ),
    every("cross_entropy_rows", lambda x, y, r: F.cross_entropy(x, y, reduction=r), ROWS, ROW_LABELS),
    every(
        "cross_entropy_all_ignored",
        lambda x, y, r: F.cross_entropy(x, y * 0, reduction="sum", ignore_index=0),
        X,
        LABELS,
    ),
    every(
        "nll_weighted",
        lambda x, y, w, r: F.nll_loss(x.log_softmax(1), y, w, ignore_index=3, reduction=r),
        *(X, LABELS, CLASS_WEIGHTS),
    ),
    every(
        "nll_operator",
        lambda x, y, r: torch._C._nn.nll_loss_nd(x.log_softmax(1), y, None, ("none", "mean", "sum").index(r), -100),
        *(X, LABELS),
    ),
    every(
        "cross_entropy_operator",
        lambda x, y, r: torch._C._nn.cross_entropy_loss(x, y, None, ("none", "mean", "sum").index(r)),
        *(X, LABELS),
    ),
    *(every(name, loss) for name, loss in BY_POSITION.items()),
    *(
        every(f"{name}_plain_target", BY_POSITION[name], X, Input(X.shape, kind="unit", plain=True))
        for name in ("bce", "mse_weight", "l1_weight", "gaussian", "kl_div")
    ),
    every(
        "cosine_embedding",
        lambda x, t, r: F.cosine_embedding_loss(
            rows(x), rows(t), torch.tensor([1.0, -1.0], dtype=x.dtype), 0.1, reduction=r
        ),
        bound=SAMPLES,
    ),
    every(
        "triplet_rows",
        lambda x, t, r: F.triplet_margin_loss(rows(x), rows(t), x.amax((2, 3)), reduction=r),
        bound=SAMPLES,
    ),
    every("multi_margin", lambda x, y, r: F.multi_margin_loss(x, y, p=2, margin=0.6, reduction=r), ROWS, ROW_LABELS),
    every(
        "multi_margin_weighted",
        lambda x, y, w, r: F.multi_margin_loss(x, y, weight=w, reduction=r),
        *(ROWS, ROW_LABELS, Input((5,), kind="unit", plain=True)),
    ),
    every("multilabel_margin", lambda x, y, r: F.multilabel_margin_loss(x, y, reduction=r), ROWS, MANY_LABELS),
    Case("losses_dice", lambda: Call(dice), (X, PARTS), SAMPLES),
    Case("losses_focal", lambda: Call(focal), (X, LABELS), SCALARS),
    Case("losses_tversky", lambda: Call(tversky), (X, UNIT)),
    Case("losses_ssim_mean", lambda: Call(lambda a, b: ssim(a, b, nn.AvgPool2d(3, 1))), (X, UNIT)),
    Case("losses_ssim_gaussian", lambda: Call(lambda a, b: ssim(a, b, gaussian)), (X, UNIT)),
    Case("losses_correlation", lambda: Call(correlation), (Input((3, 4, 9, 10, 7)), Input((3, 4, 9, 10, 7)))),
]
