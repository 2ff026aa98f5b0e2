"""Every setting of the study: frozen dataclasses filled from strict YAML and `--set a.b=c`, as in the main job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from meshwright import Plan, config
from meshwright.errors import ConfigError
from meshwright.models.cosmoflow import pools


@dataclass(frozen=True)
class Data:
    """The universes: generated into `<out>/universes` unless `folder` names them. The first `train` train."""

    folder: str | None = None
    train: int = 1024
    test: int = 128
    test_from: int | None = None  # number of the first universe held out; None: the one after those that train
    voxels: int = 64  # along each edge of a universe
    box_mpc: float = 256.0  # edge of a universe in Mpc/h
    particles: int = 2  # along each edge of a voxel
    lpt: Literal[1, 2] = 1  # 1: Zel'dovich
    seed: int = 0
    workers: int | None = None  # processes that generate; None: one a core
    store_mib: int | None = None  # memory of the distributed store on each rank; None: a rank keeps what it has read

    @property
    def first_test(self) -> int:
        """Number of the first universe that is held out."""
        return self.train if self.test_from is None else self.test_from

    @property
    def count(self) -> int:
        """Universes in the folder."""
        return self.first_test + self.test


@dataclass(frozen=True)
class Network:
    """CosmoFlow, its first convolution `width` channels wide (16 as published); `keep` a feature in dropout."""

    width: int = 8
    keep: float = 0.8


@dataclass(frozen=True)
class Recipe:
    """How weights are found from gradients."""

    optimizer: Literal["adamw", "adam"]
    lr: float
    schedule: Literal["one_cycle", "linear"]
    weight_decay: float = 0.0
    clip_norm: float = 0.0  # 0: gradients are left as they are
    symmetries: bool = False  # each cube turned and mirrored at random


RECIPES: Mapping[str, Recipe] = {
    "figure": Recipe("adamw", 7e-4, "one_cycle", weight_decay=1e-2, clip_norm=1.0, symmetries=True),
    "original": Recipe("adam", 1e-3, "linear"),
}


@dataclass(frozen=True)
class Train:
    """The same for every size: each voxel is seen `epochs` times."""

    recipe: Literal["figure", "original"] = "figure"
    lr: float | None = None  # None: the recipe's
    symmetries: bool | None = None  # None: the recipe's
    epochs: int = 5
    batch: int = 8  # cubes of the largest size a step; of cubes half as long, four times as many
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"  # bf16: weights in fp32, autocast
    checkpoint_every: int = 64  # steps


@dataclass(frozen=True)
class Split:
    """The plans. A file names all axes; else the largest cubes are split in depth and of others the batch."""

    ranks: int = 2
    largest: str | None = None  # a plan file
    others: str | None = None
    threads: int = 1  # of each rank


@dataclass(frozen=True)
class Study:
    """All of it. `sizes`: edges of the cubes in voxels; `plain`: the size that also trains without batch norm."""

    sizes: tuple[int, ...] = (16, 32, 64)
    seeds: tuple[int, ...] = (0, 1, 2)
    plain: int | None = 32
    data: Data = field(default_factory=Data)
    network: Network = field(default_factory=Network)
    train: Train = field(default_factory=Train)
    split: Split = field(default_factory=Split)

    def __post_init__(self) -> None:
        for size in self.sizes:
            pools(size)  # refuses what CosmoFlow is not defined for
            if self.data.voxels % size:
                raise ConfigError(f"sizes: universes of {self.data.voxels}³ voxels do not fall into cubes of {size}³")
        if not self.sizes or list(self.sizes) != sorted(set(self.sizes)):
            raise ConfigError(f"sizes = {list(self.sizes)}: name each size once, the smallest first")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds = {list(self.seeds)}: name each seed once")
        if self.plain is not None and self.plain not in self.sizes:
            raise ConfigError(f"plain = {self.plain} is none of the sizes {list(self.sizes)}")
        whole = {
            "data.train": self.data.train,
            "data.test": self.data.test,
            "train.epochs": self.train.epochs,
            "train.batch": self.train.batch,
            "train.checkpoint_every": self.train.checkpoint_every,
            "network.width": self.network.width,
            "split.ranks": self.split.ranks,
        }
        for key, value in whole.items():
            if value < 1:
                raise ConfigError(f"{key} = {value}: at least 1 is needed")
        if self.data.first_test < self.data.train:
            raise ConfigError(f"data.test_from = {self.data.test_from}: universes before {self.data.train} train")

    @property
    def recipe(self) -> Recipe:
        """The named recipe with what `train` changes of it."""
        named, train = RECIPES[self.train.recipe], self.train
        lr = named.lr if train.lr is None else train.lr
        return replace(named, lr=lr, symmetries=named.symmetries if train.symmetries is None else train.symmetries)

    def plan(self, size: int) -> Plan:
        """The plan for cubes of `size`. Raises `PlanError` for a file that is none."""
        largest = size == max(self.sizes)
        file = self.split.largest if largest else self.split.others
        if file is not None:
            return Plan.load(file)
        return Plan.uniform(depth=self.split.ranks) if largest else Plan.uniform(data=self.split.ranks)

    def batch(self, size: int) -> int:
        """Cubes of `size` a step: of cubes half as long four times as many, so these take twice as many steps."""
        return self.train.batch * int((max(self.sizes) // size) ** 2)

    def steps(self, size: int) -> int:
        """Optimiser steps until each voxel has been seen `train.epochs` times."""
        cubes = self.data.train * (self.data.voxels // size) ** 3
        return max(1, self.train.epochs * cubes // self.batch(size))

    def yaml(self) -> str:
        """The whole study, every default written out."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False)


QUICK: Mapping[str, Any] = {"seeds": [0], "data": {"train": 256, "test": 64}, "train": {"epochs": 8}}


def load(quick: bool = False, file: str | Path | None = None, settings: Iterable[str] = ()) -> Study:
    """The defaults, the changes of `--quick`, a YAML file's and those of `--set`, in this order.

    Raises `ConfigError` for an unknown key or a value of the wrong type.
    """
    raw: Any = _plain(asdict(Study()))
    if quick:
        raw = _merged(raw, QUICK)
    if file is not None:
        try:
            raw = _merged(raw, yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {})
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: cannot read the settings: {error}") from None
    given = list(settings)
    for setting in given:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {setting!r}: write it as section.key=value, for example --set train.epochs=5")
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting!r}: the value is not YAML: {error}") from None
        for name in reversed(key.strip().split(".")):
            value = {name: value}
        raw = _merged(raw, value)
    return config.read(Study, raw, " ".join(f"--set {setting}" for setting in given) or str(file or "settings"))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _merged(base: Any, patch: Any) -> Any:
    """`base` with the nested mapping `patch` laid over it."""
    if not (isinstance(base, Mapping) and isinstance(patch, Mapping)):
        return patch
    return {**base, **{key: _merged(base.get(key), item) for key, item in patch.items()}}
