"""What is dropped is gone: a module's memory with the module, the threads of the process groups with the groups."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from harness import plan_of
from launcher_job import SHAPE, Net, step

import meshwright as mw
from meshwright.cluster.process_group import leave


def backend_threads() -> list[str]:
    """The names of this process's threads that gloo or torch's gloo group started."""
    names = (task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir())
    return sorted(name for name in names if "gloo" in name)


def train_and_leave(name: str) -> tuple[list[str], list[str], list[str]]:
    """The backend's threads after a step, after leaving, and when it was all done again in this process."""
    step(plan_of(name))
    during = backend_threads()
    leave()
    return during, backend_threads(), [type(x).__name__ for x in gc.get_objects() if type(x).__name__ == "DeviceMesh"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("plan", ["d2", "n2d2"])
def test_no_thread_of_a_group_outlives_it(plan: str) -> None:
    """One that does may ask for the interpreter's lock while that ends, and the process aborts."""
    for during, after, meshes in mw.launch(train_and_leave, ranks=plan_of(plan).ranks, args=(plan,), threads=1):
        assert during
        assert after == []
        assert meshes == []


def drop_a_module(name: str) -> list[str]:
    """Which of module, parameter, gradient and activation outlive the last reference to the module."""
    plan = plan_of(name)
    net = mw.parallelize(Net().double(), plan)
    x = mw.shard(torch.randn(SHAPE, dtype=torch.float64), plan)
    net(x).sum().backward()
    watched = {"module": net, "parameter": net.first.weight, "gradient": net.first.weight.grad, "input": x}
    left = {what: weakref.ref(value) for what, value in watched.items()}
    del net, x, watched
    gc.collect()
    return [what for what, ref in left.items() if ref() is not None]


def test_a_module_is_freed_with_its_last_reference() -> None:
    assert drop_a_module("one") == []
    assert mw.launch(drop_a_module, ranks=2, args=("d2",), threads=1) == [[], []]
