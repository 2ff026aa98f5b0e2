"""A small training step, the same script under every launcher: `launcher_job.py PLAN OUT`; rank 0 writes OUT (npz)."""

from __future__ import annotations

import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from harness import plan_of
from torch import Tensor, nn

import meshwright as mw

SHAPE = (2, 3, 9, 10, 7)


class Net(nn.Module):
    """Windows, statistics over all ranks, and a layer that sees everything."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv3d(3, 4, 3, padding=1), nn.BatchNorm3d(4)
        self.second, self.last = nn.ConvTranspose3d(4, 2, 3, stride=2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool3d(torch.tanh(self.norm(self.first(x))), 2)
        return self.last(self.second(y).mean((2, 3, 4)))


def step(plan: mw.Plan | None) -> dict[str, np.ndarray]:
    """Loss, output and gradients as arrays; without a plan those of plain torch."""
    torch.manual_seed(5)
    net, x = Net().double(), torch.randn(SHAPE, dtype=torch.float64)
    if plan is not None:
        net, x = mw.parallelize(net, plan, strict=True), mw.shard(x, plan)
    y = net(x)
    loss = (y * y).mean() + y.sum() * 0.1
    loss.backward()
    found = {"loss": torch.tensor(loss.item()), "output": y, **{name: p.grad for name, p in net.named_parameters()}}
    found |= dict(net.named_buffers())
    return {name: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().numpy() for name, v in found.items()}


def work(name: str) -> dict[str, np.ndarray]:
    """What every rank runs."""
    torch.set_num_threads(1)
    return step(plan_of(name))


if __name__ == "__main__":
    found = mw.launch(work, ranks=plan_of(sys.argv[1]).ranks, args=(sys.argv[1],))[0]
    place = mw.Cluster.detect(os.environ)
    if place.rank == 0:
        np.savez(sys.argv[2], launcher=np.array(place.launcher), hosts=np.array(place.hosts), **found)
