"""Functions that ranks run in the fault tests; as a script, a job that another process can break from outside."""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist

from meshwright.cluster.launch import launch
from meshwright.cluster.process_group import set_time_limit
from meshwright.guard.inject import fault_point

STEPS = 4


def steps() -> float:
    """A job whose steps exchange; `MESHWRIGHT_FAULT` breaks it."""
    total = torch.zeros(1)
    for step in range(STEPS):
        fault_point(step)
        dist.all_reduce(total.add_(1))
    return total.item()


def raise_at_two_ranks() -> None:
    """Rank 2 fails first, rank 0 later with an error of its own."""
    if dist.get_rank() == 2:
        raise ValueError("the first")
    if dist.get_rank() == 0:
        time.sleep(0.1)  # not a synchronisation: makes the second failure the second
        raise KeyError("the second")
    dist.barrier()


def exit_politely() -> None:
    if dist.get_rank() == 0:
        sys.exit(0)
    dist.barrier()


def wrap_network_error() -> None:
    """Rank 1 dies; rank 0 turns the broken connection into an error of another type."""
    if dist.get_rank() == 1:
        os._exit(7)
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        raise ValueError("could not sum") from error


def return_early() -> None:
    """Rank 1 returns although rank 0 still waits for it."""
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(1))


def hang_in_subgroup() -> None:
    """Rank 1 sleeps while rank 0 waits in a group that was made later."""
    group = dist.new_group([0, 1])
    set_time_limit(group)
    if dist.get_rank() == 1:
        time.sleep(3600)
    dist.all_reduce(torch.ones(1), group=group)


def announce_and_exchange_forever() -> None:
    dist.barrier()
    sys.stdout.write(f"ready {os.getpid()}\n")
    sys.stdout.flush()
    while True:
        dist.all_reduce(torch.ones(1))


def announce_and_sleep() -> None:
    sys.stdout.write(f"ready {os.getpid()}\n")
    sys.stdout.flush()
    time.sleep(3600)


if __name__ == "__main__":
    launch({"exchange": announce_and_exchange_forever, "sleep": announce_and_sleep}[sys.argv[1]], ranks=2)
