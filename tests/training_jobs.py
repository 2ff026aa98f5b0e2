"""A small training job on real NIfTI files, and what ranks run in the training tests."""

from __future__ import annotations

import hashlib
import json
import resource
import signal
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from meshwright import config
from meshwright.checkpoint import read
from meshwright.checkpoint.format import Checkpoint
from meshwright.cluster.agree import assert_same_on_all_ranks
from meshwright.cluster.launch import launch
from meshwright.config import Config
from meshwright.errors import MismatchError, NumericsError
from meshwright.parallel.apply import parallelize, shard
from meshwright.plan.plan import Plan
from meshwright.train import loop, nonfinite, rundir
from meshwright.train.job import build

SHAPE = (13, 10, 8)  # D, H, W: uneven over 2 and over 4 ranks
STEPS = 6


def write_pairs(folder: Path, count: int = 3) -> list[str]:
    """Volumes whose label is 1 where the image is bright; returns the settings of a job on them."""
    generator = np.random.default_rng(0)
    for case in range(count):
        image = generator.normal(size=SHAPE[::-1]).astype(np.float32)  # NIfTI counts x, y, z
        label = (image > 0.5).astype(np.uint8)
        for name, array in (("image", image), ("label", label)):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / f"{name}{case}.nii.gz")
    return [
        "data.name=folder",
        f"data.images='{folder}/image*.nii.gz'",
        f"data.labels='{folder}/label*.nii.gz'",
        "data.classes=[dark, bright]",
        "augment.flip=[depth, width]",
        "model.base=4",
        "model.levels=2",
        f"train.steps={STEPS}",
        "train.validate_every=0",
        "checkpoint.every=2",
        "threads=1",
    ]


def job(settings: list[str], *more: str, ranks: int = 1) -> Config:
    """The configuration of the small job."""
    return config.load(None, [*settings, *more], ranks)


def train(settings: Config, run: Path, *, resume: bool = False) -> dict[str, Any]:
    """Run it on local ranks; the result of rank 0."""
    rundir.prepare(run, resume=resume)
    return launch(loop.run, settings.ranks or 1, (settings, str(run), resume, True), threads=1)[0]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "steps.jsonl").read_text().splitlines()]


def last(run: Path) -> Checkpoint:
    path = read.newest(run / "checkpoints")
    assert path is not None
    return read.read(path)


def bits(run: Path, steps: int = STEPS) -> str:
    """A digest of every tensor of the last checkpoint, optimiser included."""
    checkpoint = last(run)
    assert checkpoint.step == steps
    digest = hashlib.sha256()
    for tensors in (checkpoint.model, checkpoint.optimizer):
        assert tensors
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# -- what ranks run ----------------------------------------------------------------------------------------------------


def build_on_own_files(settings: Config, folders: list[str]) -> None:
    """Each rank sees a folder of its own, as where the nodes of a cluster have local disks."""
    own = config.override(settings, f"data.path={folders[dist.get_rank()]}")
    build(own, Plan.uniform(depth=2))


def run_with_little_space(settings: Config, run: str) -> None:
    """Resume on a disk that takes only half of a checkpoint: the kernel refuses larger files."""
    saved = read.newest(Path(run) / "checkpoints")
    assert saved is not None
    limit_bytes = max(path.stat().st_size for path in saved.iterdir()) // 2
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    loop.run(settings, run, True, True)


def disagreements() -> dict[str, str]:
    """What `assert_same_on_all_ranks` says when rank 1 differs in one way."""
    return {how: _disagree(how) for how in ("value", "buffer", "shape", "dtype", "more", "nothing")}


def _disagree(how: str) -> str:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    if dist.get_rank() == 1:
        match how:
            case "value":
                model[0].bias.data[1] += 1e-7
            case "buffer":
                model[1].running_var[2] = 2.0
            case "shape":
                model[0] = nn.Linear(2, 4)
            case "dtype":
                model[0].double()
            case "more":
                model.append(nn.Linear(1, 1))
    try:
        assert_same_on_all_ranks(model)
    except MismatchError as error:
        return str(error)
    return "all the same"


class Overflowing(nn.Module):
    """Its second layer makes an infinity, in the last part of the volume only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 2, 1)
        self.second = nn.ReLU()
        self.third = nn.Conv3d(2, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x)))


def blamed(ranks: int) -> dict[str, str]:
    """The message for a loss that is NaN, for each cause."""
    return {where: _blame(ranks, where) for where in ("layer", "weights", "input")}


def _blame(ranks: int, where: str) -> str:
    torch.manual_seed(0)
    model, x = Overflowing(), torch.ones(1, 1, 4, 4, 4)
    if where == "layer":
        x[0, 0, 3] = 3e38  # finite, but not after the first convolution
        model.first.weight.data.fill_(2.0)
    elif where == "weights":
        model.third.bias.data.fill_(float("inf"))
    else:
        x[0, 0, 3, 0, 0] = float("nan")
    plan = Plan.uniform(depth=ranks)
    parallelize(model, plan)
    split = shard(x, plan)
    try:
        nonfinite.stop(model, lambda: model(split), split, 7, float("nan"))
    except NumericsError as error:
        return str(error)
    return "nothing found"
