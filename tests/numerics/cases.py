"""All cases by name, and the worker that runs them on a rank."""

from __future__ import annotations

import zlib
from functools import lru_cache

import cases_conv
import cases_corners
import cases_dimwise
import cases_found
import cases_indices
import cases_loss
import cases_norm
import cases_pad
import cases_pool
import cases_random
import cases_reduce
import cases_sampling
import cases_shape
import cases_weights
import scenarios
from harness import Case, plan_of
from harness_driver import Key, run_keys
from scenario_kit import Scenario

OPERATIONS: list[Case] = [
    *cases_conv.CASES,
    *cases_pool.CASES,
    *cases_norm.CASES,
    *cases_shape.CASES,
    *cases_reduce.CASES,
    *cases_random.CASES,
    *cases_corners.CASES,
    *cases_dimwise.CASES,
    *cases_indices.CASES,
    *cases_loss.CASES,
    *cases_sampling.CASES,
    *cases_weights.CASES,
    *cases_pad.CASES,
    *cases_found.CASES,
]
KEYS: list[Key] = [(case.name, plan) for case in [*OPERATIONS, *scenarios.SCENARIOS] for plan in case.all_plans()]


@lru_cache(maxsize=1)
def _table() -> dict[str, Case | Scenario]:
    return {case.name: case for case in [*OPERATIONS, *scenarios.SCENARIOS]}


def lookup(name: str) -> Case | Scenario:
    return _table()[name]


def is_ordinary(key: Key) -> bool:
    """Whether the case runs under this plan without `--full` too: of the four meshes that most cases have on four
    ranks two wait for it, others from case to case."""
    name, plan = key
    four = [mesh for mesh in lookup(name).all_plans() if plan_of(mesh).ranks == 4]
    left_out = zlib.crc32(name.encode())
    return len(four) < 4 or plan not in four or (four.index(plan) - left_out) % 4 > 1


def ranks_of(key: Key) -> int:
    return plan_of(key[1]).ranks


def worker(keys: list[Key], folder: str) -> None:
    """What every rank of a launch runs."""
    run_keys(lookup, keys, folder)
