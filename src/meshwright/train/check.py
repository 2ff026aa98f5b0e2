"""`meshwright train --check`: the same steps under the plan and in plain torch on one rank, and how far they differ.

Both run in fp64, where rounding is 10⁷ times smaller than any mistake: a difference above the tolerance is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from meshwright.config import Config
from meshwright.plan.plan import Plan
from meshwright.train import state
from meshwright.train.batches import training_batch
from meshwright.train.job import Job, batch_size, build
from meshwright.train.loop import deterministic
from meshwright.train.plans import resolve_plan
from meshwright.train.step import optimise

TOLERANCE = 1e-8  # whole models in fp64
_SMALL = 1e-3  # a tensor's difference is measured against at least this share of the largest tensor's values


@dataclass(frozen=True)
class Difference:
    """The largest relative difference of one quantity, and where it is."""

    quantity: str
    value: float
    where: str

    @property
    def ok(self) -> bool:
        return self.value <= TOLERANCE


@dataclass(frozen=True)
class Trace:
    """Of each step: the loss, the gradients and the weights (buffers included) after it, as full tensors."""

    losses: tuple[float, ...]
    gradients: tuple[dict[str, Tensor], ...]
    weights: tuple[dict[str, Tensor], ...]


def run(config: Config, steps: int) -> list[Difference] | None:
    """Compare `steps` steps on this rank. Collective; the result comes from rank 0, the others return None.

    Rank 0 then computes the reference alone, on the whole volume: it needs the memory of one device.
    """
    deterministic()
    plan = resolve_plan(config)
    train = replace(config.train, precision="fp64", batch=batch_size(config, plan))
    config = replace(config, train=train)
    job, _ = build(config, plan)
    split = trace(job, steps)
    if job.rank > 0:
        return None
    reference, _ = build(config, Plan.uniform(), split=False)
    return differences(split, trace(reference, steps))


def trace(job: Job, steps: int) -> Trace:
    """Train `steps` steps and note every number. Collective if the job is split."""
    losses, gradients, weights = [], [], []
    for step in range(1, steps + 1):
        losses.append(optimise(job, training_batch(job, step), step).loss)
        grads = {name: p.grad for name, p in job.model.named_parameters() if p.grad is not None}
        gradients.append({name: state.whole(grad).clone() for name, grad in grads.items()})
        weights.append({name: state.whole(value).clone() for name, value in job.model.state_dict().items()})
    return Trace(tuple(losses), tuple(gradients), tuple(weights))


def differences(split: Trace, reference: Trace) -> list[Difference]:
    """The largest difference of loss, gradients and weights over all steps."""
    losses = [abs(a - b) / max(abs(b), _SMALL) for a, b in zip(split.losses, reference.losses, strict=True)]
    worst = max(range(len(losses)), key=losses.__getitem__)
    found = [Difference("loss", losses[worst], f"step {worst + 1}")]
    for quantity, mine, other in (
        ("gradients", split.gradients, reference.gradients),
        ("weights", split.weights, reference.weights),
    ):
        steps = [(*_largest(a, b), step) for step, (a, b) in enumerate(zip(mine, other, strict=True), start=1)]
        value, name, step = max(steps)
        found.append(Difference(quantity, value, f"{name}, step {step}"))
    return found


def _largest(mine: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest |a − b| over the larger of max|b| and 10⁻³ of the largest value of all tensors, and its name."""
    peaks = {name: float(value.abs().max()) for name, value in other.items()}
    floor = _SMALL * max(peaks.values())
    return max((float((mine[name] - other[name]).abs().max()) / max(peaks[name], floor), name) for name in other)
