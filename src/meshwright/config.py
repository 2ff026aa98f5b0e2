"""The configuration of a training job: frozen dataclasses filled from strict YAML and `--set a.b=c`.

The dataclasses are the schema that `strict` reads, so a new option is one line here. What is not understood is a
`ConfigError` that names the key, the value and what was expected.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from meshwright.errors import ConfigError
from meshwright.strict import merged, plain, read


@dataclass(frozen=True)
class PlanConfig:
    """How the work is split: a plan file, or the size of each axis. Nothing given: all ranks along depth."""

    file: str | None = None
    data: int | None = None
    depth: int | None = None
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class DataConfig:
    """Which volumes: `path`, or `folder` with `images` and `labels`, or `mni152`, the template inside nilearn."""

    path: str | None = None  # a folder, an HDF5 file or a Zarr group with pairs of image and label
    name: Literal["mni152", "folder"] = "mni152"
    resolution_mm: int = 2  # mni152: 1 to 4
    fold: int = 0  # mni152: 0 trains on the first planes, 1 on the last
    hemisphere: Literal["both", "left"] = "both"
    crop: bool = True  # mni152: the box around the brain instead of all planes
    # path: the word in file names, and the name of the dataset in HDF5 and Zarr; several, [t1, t2], are channels
    image: str | tuple[str, ...] = "image"
    label: str = "label"
    images: str | tuple[str, ...] | None = None  # folder: a file pattern such as scans/*_t1.nii.gz; several: channels
    labels: str | None = None
    classes: tuple[str, ...] = ()  # folder: the names of the label values 0, 1, 2 …; none: counted in the labels
    intensity: tuple[float, ...] | None = None  # folder: centre and spread; None: measured in each image
    hdf5_driver: Literal["independent", "mpio"] = "independent"  # mpio: through MPI-IO, where h5py is built with MPI
    on_bad: Literal["stop", "skip"] = "stop"  # folder: samples whose files cannot be opened; skip leaves them out
    memory_mib: int | None = None  # for the training data, on each rank; None: it keeps all of its parts in memory
    spill: bool = True  # memory_mib: what does not fit goes to a file in the run directory; else it is read again
    held_out: float = 0.2  # folder: the share of the cases, the last ones, that only validates


@dataclass(frozen=True)
class ModelConfig:
    """The network: its name in `meshwright.models` and its sizes (levels and norm are those of `small_unet`)."""

    name: Literal["small_unet", "unet3d"] = "small_unet"
    base: int | None = None  # channels of the first convolution; None: 8 in small_unet, 32 in unet3d as published
    levels: int = 3
    norm: Literal["batch", "group", "none"] = "batch"


@dataclass(frozen=True)
class OptimConfig:
    """AdamW or SGD, the schedule of the learning rate, and the limit of the global gradient norm (0: none)."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-2
    weight_decay: float = 1e-2
    schedule: Literal["one_cycle", "constant"] = "one_cycle"
    clip_norm: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """Steps, arithmetic, augmentation and the loss: `cross_entropy` × CE + `dice` × soft Dice."""

    steps: int = 150
    batch: int | None = None  # samples a step; None: one for each part along the data axis
    precision: Literal["auto", "bf16", "fp32", "fp64"] = "auto"  # bf16: weights in fp32, autocast; auto: if it is fast
    channels_last: bool = True
    cross_entropy: float = 1.0
    dice: float = 1.0
    validate_every: int = 50  # steps between validations; 0: only at the end
    validate_norm: Literal["running", "own"] = "running"  # batch norm there: running averages, or each volume's own


@dataclass(frozen=True)
class AugmentConfig:
    """Flips, each with probability one half, and image · (1 ± scale) ± shift, drawn from seed and step.

    The rest is off by default and drawn for each sample (`data.recipe`); a rank reads the voxels its part comes from.
    """

    flip: tuple[str, ...] | None = None  # of depth, height, width; None: mni152 depth and height, folder nothing
    scale: float = 0.1
    shift: float = 0.1
    patch: tuple[int, ...] | None = None  # train on random patches of this size (D, H, W); validation stays whole
    patch_foreground: float = 0.0  # the share of patches around a labelled voxel; the others lie anywhere
    permute: tuple[str, ...] = ()  # these dims, of one size, in any order
    rotate90: tuple[str, ...] = ()  # quarter turns in the plane of two of these dims, of one size
    roll: tuple[str, ...] = ()  # by any number of voxels along these dims
    rotate_deg: float = 0.0  # turns within ± degrees about each axis, of space in mm: voxels need be no cubes
    zoom: float = 0.0  # sizes × 1 / (1 + zoom) to 1 + zoom
    elastic: float = 0.0  # voxels that a cubic B-spline displaces at most
    elastic_spacing: float = 32.0  # voxels between its control points
    halo: float = 32.0  # turns, zoom and elastic may move no voxel further
    gamma: float = 0.0  # exponents 1 / (1 + gamma) to 1 + gamma
    gamma_range: tuple[float, ...] = (-4.0, 4.0)  # of intensities, (value - centre) / spread, which gamma keeps
    noise: float = 0.0  # normal, of a standard deviation of 0 to noise
    # pointwise transforms of MONAI for the image, after what moves voxels and before gamma: {name: …, argument: …}
    monai: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint every so many steps (0: only at the end), of which the newest `keep` stay."""

    every: int = 50
    keep: int = 2


@dataclass(frozen=True)
class Config:
    """A whole job. `ranks` None: what the plan needs, or what the launcher started, or 2."""

    ranks: int | None = None
    threads: int | None = None  # per rank; None: the cores of this machine shared out evenly
    seed: int = 0
    run: str | None = None  # None: runs/<date>-<time>
    plan: PlanConfig = field(default_factory=PlanConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        whole = {
            "ranks": self.ranks,
            "threads": self.threads,
            "train.steps": self.train.steps,
            "train.batch": self.train.batch,
            "data.memory_mib": self.data.memory_mib,
            "model.base": self.model.base,
            "model.levels": self.model.levels,
            "checkpoint.keep": self.checkpoint.keep,
        }
        for key, value in whole.items():
            if value is not None and value < 1:
                raise ConfigError(f"{key} = {value}: at least 1 is needed")
        positive = {"optim.lr": self.optim.lr}
        for name, number in positive.items():
            if not 0 < number < float("inf"):
                raise ConfigError(f"{name} = {number}: a positive number is needed")
        zero = {
            "seed": self.seed,
            "checkpoint.every": self.checkpoint.every,
            "optim.clip_norm": self.optim.clip_norm,
            "train.validate_every": self.train.validate_every,
            "optim.weight_decay": self.optim.weight_decay,
        }
        for name, number in zero.items():
            if not 0 <= number < float("inf"):
                raise ConfigError(f"{name} = {number}: 0 or more is needed")

    def as_dict(self) -> dict[str, Any]:
        """Plain values only: what `save` writes and `read` accepts."""
        return typing.cast(dict[str, Any], plain(asdict(self)))

    def yaml(self) -> str:
        """The whole configuration as YAML, every default written out."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False)


def load(path: str | Path | None = None, settings: Iterable[str] = (), ranks: int | None = None) -> Config:
    """The configuration from a YAML file (or the defaults), changed by `a.b=c` settings, then by `ranks`.

    Raises `ConfigError` for a missing file, an unknown key, or a value of the wrong type.
    """
    raw: Any = {}
    where = "configuration"
    if path is not None:
        where = str(path)
        try:
            raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot read the configuration: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not YAML: {error}") from None
    config = read(Config, {} if raw is None else raw, where)
    for setting in settings:
        config = override(config, setting)
    return config if ranks is None else replace(config, ranks=ranks)


def override(config: Config, setting: str) -> Config:
    """`config` with one `a.b=c` applied; `c` is read as YAML and must have the type of the field."""
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {setting!r}: write it as section.key=value, for example --set train.steps=20")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {setting!r}: the value is not YAML: {error}") from None
    *sections, name = key.strip().split(".")
    patch: Any = {name: value}
    for section in reversed(sections):
        patch = {section: patch}
    return read(Config, merged(config.as_dict(), patch), f"--set {setting!r}")
