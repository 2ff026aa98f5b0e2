"""What a rank trains: the sources, the model under the plan, the optimiser."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from meshwright.checkpoint import read
from meshwright.checkpoint.format import Checkpoint
from meshwright.cluster import agree
from meshwright.config import Config
from meshwright.data.counted import Counted
from meshwright.data.folder import find_pairs
from meshwright.data.foreground import Foreground
from meshwright.data.hdf5_mpi import through_mpi
from meshwright.data.kept import Kept
from meshwright.data.mni import open_mni
from meshwright.data.monai_named import named
from meshwright.data.prefetch import processors
from meshwright.data.recipe import Recipe
from meshwright.data.sampler import Sampler, Shuffled
from meshwright.data.source import ReadStats, VolumeSource
from meshwright.data.volumes import Pairs, hold_out, make_pairs, of_one_size, open_pairs
from meshwright.errors import ConfigError, PlanError
from meshwright.models.small_unet import SmallUNet
from meshwright.models.unet3d import UNet3D
from meshwright.parallel.apply import parallelize
from meshwright.parallel.mesh import default_device
from meshwright.plan.plan import Plan
from meshwright.train import optim, precision, state


@dataclass(frozen=True)
class Job:
    """A training job on one rank. `split` False: plain torch on whole volumes, the reference of `--check`."""

    config: Config
    plan: Plan
    rank: int
    device: torch.device
    train: Kept
    validation: VolumeSource
    model: nn.Module
    optimizer: torch.optim.Optimizer
    split: bool = True
    reads: Counted | None = None  # what `train` reads from
    held_reads: Counted | None = None  # what `validation` reads from
    foreground: Foreground | None = None  # of what `train` reads
    reading: dict[int, ReadStats] = field(
        default_factory=dict
    )  # by epoch, from 1; epochs that read nothing are left out
    bad: tuple[str, ...] = ()  # why samples were left out
    begin: tuple[int, int] = (0, 0)  # steps, and samples seen, before this run: it may have had another batch size

    @property
    def samples(self) -> str:
        """What is trained on: how many samples, and a digest of their names."""
        names = "\n".join(self.train.names).encode()
        return f"{len(self.train.names)} ({hashlib.blake2b(names, digest_size=4).hexdigest()})"

    def at(self, step: int) -> Sampler:
        """Where `step` (from 1) begins in the order of samples."""
        seen = self.begin[1] + (step - 1 - self.begin[0]) * batch_size(self.config, self.plan)
        return Sampler(Shuffled(len(self.train.names)), self.config.seed, seen)


def batch_size(config: Config, plan: Plan) -> int:
    """Samples a step. Raises `PlanError` if there are fewer than parts along the data axis."""
    parts = next((axis.size for axis in plan.axes if axis.role == "sample"), 1)
    size = config.train.batch or parts
    if size < parts:
        raise PlanError(f"train.batch = {size} leaves ranks without a sample: the plan {plan} has {parts} along data")
    return size


def sources(config: Config, bad: list[str] | None = None) -> tuple[VolumeSource, VolumeSource]:
    """(train, validation): files found and headers compared; labels are read only if `data.classes` names none.

    With `data.on_bad` = skip samples that cannot be opened are left out, and the reasons added to `bad`.
    Raises `DataError`, `ConfigError`.
    """
    recipe(config)  # what it refuses is refused before anything is read
    data = config.data
    left_out = None if data.on_bad == "stop" else [] if bad is None else bad
    if data.path is None and data.name == "mni152":
        return open_mni(data.fold, data.resolution_mm, data.hemisphere, data.crop)
    intensity = None
    if data.intensity is not None:
        if len(data.intensity) != 2:
            raise ConfigError(f"data.intensity = {list(data.intensity)}: two numbers are needed, centre and spread")
        intensity = (data.intensity[0], data.intensity[1])
    if data.path is not None:
        given = "data.images" if data.images is not None else "data.labels" if data.labels is not None else None
        if given is not None:
            raise ConfigError(f"data.path = {data.path!r} and {given} are both set; keep one of them")
        pairs = make_pairs(find_pairs(data.path, data.image, data.label, left_out), data.classes, intensity, left_out)
    elif data.images is None or data.labels is None:
        missing = "data.images" if data.images is None else "data.labels"
        raise ConfigError(
            f"data.name = folder needs {missing}: a file pattern such as 'scans/*_t1.nii.gz' (or data.path: a folder)"
        )
    else:
        pairs = open_pairs(data.images, data.labels, data.classes, intensity, left_out)
    if data.hdf5_driver == "mpio":
        own = (replace(pair, image=through_mpi(pair.image), label=through_mpi(pair.label)) for pair in pairs.pairs)
        pairs = replace(pairs, pairs=tuple(own))
    return hold_out(pairs, data.held_out)


def settled(config: Config, train: VolumeSource) -> Config:
    """`config` with what was found in the files written out, so that no rank and no resumed run counts again.

    Raises `ConfigError` and `DataError` for an augmentation that cannot be drawn for these samples.
    """
    ranges = recipe(config)
    ranges.draw(config.seed, 0, train.shape(0), spacing_mm=train.spacing_mm(0))
    for step in ranges.monai:
        step.see(train.fields["image"].sizes[0], "augment.monai")
    data = replace(config.data, classes=train.classes) if is_folder(config) else config.data
    if data.path is not None:
        data = replace(data, name="folder", path=str(Path(data.path).resolve()))
    if data.images is not None and data.labels is not None:  # a resumed run may begin in another directory
        images = data.images
        images = os.path.abspath(images) if isinstance(images, str) else tuple(map(os.path.abspath, images))
        data = replace(data, images=images, labels=os.path.abspath(data.labels))
    return replace(config, data=data)


def recipe(config: Config) -> Recipe:
    """What is drawn for each sample; flip, scale and shift are drawn for a step. Raises `ConfigError`."""
    drawn, share = asdict(config.augment), config.augment.patch_foreground
    for name in ("flip", "scale", "shift", "patch_foreground"):
        del drawn[name]
    if not 0 <= share <= 1 or (share and config.augment.patch is None):
        raise ConfigError(f"augment.patch_foreground = {share}: a share from 0 to 1 of the patches, augment.patch")
    monai, low_high = named(drawn.pop("monai"), "augment.monai"), drawn.pop("gamma_range")
    if len(low_high) != 2:
        raise ConfigError(f"augment.gamma_range = {list(low_high)}: two numbers are needed, low and high")
    try:
        return Recipe(**drawn, gamma_range=(low_high[0], low_high[1]), monai=monai)
    except ValueError as error:
        raise ConfigError(f"augment: {error}") from None


def is_folder(config: Config) -> bool:
    """Whether the data are the user's own files."""
    return config.data.path is not None or config.data.name == "folder"


def make_model(config: Config, classes: int, channels: int = 1) -> nn.Module:
    """The network of `config.model`, its weights a function of the seed alone. Not parallelized."""
    model, memory = config.model, torch.channels_last_3d if config.train.channels_last else torch.contiguous_format
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network: nn.Module
        if model.name == "small_unet":
            network = SmallUNet(channels, classes, model.base or 8, model.levels, model.norm)
        else:
            network = UNet3D(channels, classes, model.base or 32)
    return network.to(precision.DTYPE[config.train.precision]).to(memory_format=memory)  # type: ignore[call-overload]


def build(
    config: Config, plan: Plan, saved: Path | None = None, *, split: bool = True
) -> tuple[Job, Checkpoint | None]:
    """The job at its start, or as it was at the checkpoint `saved` (returned too).

    Collective if `split`. Raises `DataError`, `PlanError`, `CheckpointError`, `MismatchError`.
    """
    config = precision.resolve(config)
    batch_size(config, plan)
    bad: list[str] = []
    train, validation = sources(config, bad)
    several = batch_size(config, plan) > 1 and config.augment.patch is None  # samples, uncut, in one batch
    if config.data.on_bad == "skip" and several and isinstance(train, Pairs):
        train = of_one_size(train, bad)
    if split:  # ranks that see other files would put samples together of parts that do not belong together
        seen = [f"{s.names[i]} {s.shape(i)}" for s in (train, validation) for i in range(len(s.names))]
        agree.assert_same_on_all_ranks({"samples": "\n".join(seen)}, "what can be opened of the data")
    device = default_device()
    model = make_model(config, len(train.classes), train.fields["image"].sizes[0])
    checkpoint = None
    if saved is not None:
        checkpoint = read.read(saved)
        state.restore_model(model, checkpoint, saved)
    model = parallelize(model, plan, device=device, seed=config.seed) if split else model.to(device)
    optimizer = optim.build(config.optim, model.parameters())
    if saved is not None and checkpoint is not None:
        state.restore_optimizer(optimizer, model, checkpoint, saved)
        state.restore_clock(model, checkpoint)
    rank = dist.get_rank() if split and dist.is_initialized() else 0
    reads = Counted(train)
    begin = (0, 0)
    if checkpoint is not None:  # older ones count steps only
        begin = checkpoint.step, checkpoint.extra.get("seen", checkpoint.step * batch_size(config, plan))
    held = Counted(validation)
    # within a budget each validation reads anew, for what it kept would come on top
    kept = Kept(reads, processors()), held if config.data.memory_mib is not None else Kept(held)
    boxes = Foreground(train, reads.add)
    job = Job(
        config, plan, rank, device, *kept, model, optimizer, split, reads, held, boxes, bad=tuple(bad), begin=begin
    )
    return job, checkpoint


def note_reading(job: Job, step: int) -> None:
    """Add what has been read since the last call to the epoch in which `step` begins."""
    spent = job.reads.take() if job.reads is not None else ReadStats()
    if spent != ReadStats():
        epoch = job.at(step).epoch + 1
        job.reading[epoch] = job.reading.get(epoch, ReadStats()) + spent
