"""Where the time and the bytes of a step go: the numbers, for the page and for the console."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from meshwright.report.records import Step


@dataclass(frozen=True)
class Share:
    """One kind of work over all steps: `values_s` per step, their median, the slowest tenth, the share of all time."""

    name: str
    colour: str
    values_s: tuple[float, ...]
    median_s: float
    p90_s: float
    share: float


def breakdown(steps: Sequence[Step]) -> tuple[Share, ...]:
    """Compute, exchange, gradient reduction, data, and what is left of the step, each as measured by rank 0."""
    if not steps:
        return ()
    rest_s = [
        max(0.0, step.step_s - step.compute_s - step.exchange_s - step.reduction_s - step.data_s) for step in steps
    ]
    total_s = sum(step.step_s for step in steps)
    named = (
        ("compute", "compute", [step.compute_s for step in steps]),
        ("exchange", "exchange", [step.exchange_s for step in steps]),
        ("gradient reduction", "reduction", [step.reduction_s for step in steps]),
        ("data", "data", [step.data_s for step in steps]),
        ("other", "other", rest_s),
    )
    return tuple(
        Share(
            name,
            colour,
            tuple(values),
            median(values),
            percentile(values, 0.9),
            sum(values) / total_s if total_s else 0.0,
        )
        for name, colour, values in named
    )


def waiting(steps: Sequence[Step]) -> tuple[str, float] | None:
    """(what, median seconds) of the part of the data time that steps waited for threads that read ahead; None: none."""
    loaders = max((step.loaders for step in steps), default=0)
    if not loaders:
        return None
    threads = f"{loaders} thread" + "s" * (loaders > 1)
    return f"waiting for data, {threads} at most", median(step.wait_s for step in steps)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
