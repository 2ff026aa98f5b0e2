"""From a failing random case to a small one: smaller numbers, one at a time, as long as the failure stays."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from drawn import Drawn
from harness import run_plain

ROUNDS = 16  # launches spent on one failing case
WIDTH = 60  # candidates in a launch
LIMIT_S = 60.0  # no further launch after this: cases that hang cost much


def smaller(value: Any) -> Iterator[Any]:
    """The value with one number, switch or entry made simpler."""
    if isinstance(value, bool):
        if value:
            yield False
    elif isinstance(value, int):
        for less in dict.fromkeys((1 if value > 1 else 0, value // 2, value - 1)):
            if 0 <= less < value:
                yield less
        if value < 0:
            yield -value
    elif isinstance(value, float):
        if value != 1.0:
            yield 1.0
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            for less in smaller(entry):
                yield type(value)([*value[:index], less, *value[index + 1 :]])
    elif isinstance(value, dict):
        for key, entry in value.items():
            for less in smaller(entry):
                yield value | {key: less}


def candidates(case: Drawn) -> list[Drawn]:
    """Smaller cases that are legal torch."""
    found = [replace(case, shape=shape) for shape in smaller(case.shape)]
    found += [replace(case, options=options) for options in smaller(case.options)]
    return [one for one in found if legal(one)]


def legal(case: Drawn) -> bool:
    """Whether one device computes it, to something that is not empty."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = run_plain(case.case(), torch.float64)
    except (ValueError, RuntimeError, IndexError, ZeroDivisionError):
        return False
    return all(value.numel() for value in outcome.values.values())


def shrink(case: Drawn, failing: Callable[[Sequence[Drawn]], list[Drawn]]) -> Drawn:
    """The smallest failing case that a few launches find; `failing` says which of many still fail."""
    begin_s = time.monotonic()
    for _ in range(ROUNDS):
        still = failing(candidates(case)[:WIDTH])
        if still:
            case = min(still, key=weight)
        if not still or time.monotonic() - begin_s > LIMIT_S:
            break
    return case


def weight(case: Drawn) -> int:
    """A measure of how much there is to read and to compute."""

    def count(value: Any) -> int:
        if isinstance(value, int | float):
            return abs(int(value))
        if isinstance(value, dict):
            return sum(count(entry) for entry in value.values())
        return sum(count(entry) for entry in value) if isinstance(value, list | tuple) else 0

    return count(case.shape) + count(case.options)
