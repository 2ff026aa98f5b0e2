"""What ranks run in the tests of `launch`; as a script, one plain launch (with or without the main guard)."""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from meshwright.cluster.cluster import Cluster
from meshwright.cluster.launch import launch
from meshwright.cluster.process_group import ensure_process_group


@dataclass(frozen=True)
class Answer:
    """A result of a type of its own."""

    rank: int
    tensor: torch.Tensor


def scale_and_sum(tensor: torch.Tensor, factor: float) -> Answer:
    total = tensor * factor * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return Answer(dist.get_rank(), total)


def meet() -> float:
    total = torch.tensor(dist.get_rank() + 1.0)
    dist.all_reduce(total)
    return total.item()


def surroundings() -> dict[str, Any]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME", "MARK")
    found: dict[str, Any] = {name: os.environ.get(name) for name in names}
    found["backend"] = dist.get_backend()
    found["launcher"] = Cluster.detect().launcher
    return found


def threads() -> int:
    return torch.get_num_threads()


def meet_again_by_environment() -> int:
    """A user who makes the process group himself, the way torchrun scripts do."""
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method="env://")
    total = torch.ones(1)
    dist.all_reduce(total)
    return int(total.item())


def launch_inside() -> list[int]:
    ensure_process_group(2)
    return launch(dist.get_rank, 2)


def draw() -> tuple[float, float]:
    return random.random(), float(np.random.rand())


def unsendable() -> Any:
    return lambda: 0


def say(text: str) -> None:
    sys.stdout.write(f"{text} from rank {dist.get_rank()}\n")
    sys.stderr.write(f"{text} as error\n")


def working_directory() -> str:
    return os.getcwd()


if __name__ == "__main__":
    print(launch(threads, 2, threads=1))
