"""What this process runs on: which rank of how many, who started it, and with which devices. A frozen value."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from meshwright.cluster.place import Place, find_place


@dataclass(frozen=True)
class Cluster(Place):
    """The ranks of the job as this process sees them, and this host's devices.

    `launcher` is "torchrun" (or whatever sets its variables), "slurm", "openmpi", "meshwright" (inside `mw.launch`)
    or "local" (one process without a rank: `ranks` is 1). `master_address` is where the ranks meet, rank 0's host;
    None where nobody has said.
    """

    device_type: str
    device_count: int
    device_names: tuple[str, ...]

    @classmethod
    def detect(cls, env: Mapping[str, str] | None = None) -> Cluster:
        """Read the variables of torchrun, Slurm or OpenMPI from `env` (default: this process's environment).

        Raises `ConfigError` naming a variable that is missing or is no whole number.
        """
        place = find_place(os.environ if env is None else env)
        names = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        kind, count = ("cuda", len(names)) if names else ("cpu", 1)
        return cls(**asdict(place), device_type=kind, device_count=count, device_names=names or ("cpu",))

    def __str__(self) -> str:
        devices = f"{self.device_count} × {self.device_names[0]}"
        return f"{self.launcher}: rank {self.rank} of {self.ranks} on {self.hosts} host(s), {devices} here"
