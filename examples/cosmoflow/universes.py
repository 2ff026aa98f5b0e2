"""What a folder of universes is: its settings, the parameters of each universe, the names of its files."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import yaml

from cosmology import Parameters
from meshwright import config
from meshwright.data import chance
from meshwright.errors import DataError
from spectrum import Name

FORMAT = 1
SETTINGS = "universes.yaml"
PARAMETERS, NOISE = 1, 2  # streams of random numbers
STEPS = 256  # parts of a voxel that a position is rounded to, and units of a whole particle's weight along an axis
CIC_UNIT = 64  # numbers in the file for one particle that is spread over its cells
MOST_VOXELS = 4096  # along an edge: three positions fit 63 bits then


@dataclass(frozen=True)
class Ranges:
    """Where the four parameters are drawn, uniformly and independently: (lowest, highest)."""

    omega_m: tuple[float, ...] = (0.25, 0.35)
    sigma_8: tuple[float, ...] = (0.78, 0.95)
    n_s: tuple[float, ...] = (0.9, 1.0)
    h_0: tuple[float, ...] = (0.603, 0.737)


@dataclass(frozen=True)
class Settings:
    """How a folder of universes is made; everything in its files follows from this and the index of a file."""

    seed: int = 0
    count: int = 256
    voxels: int = 64  # along each edge
    box_mpc: float = 256.0  # edge of the box in Mpc/h
    particles: int = 1  # along each edge of a voxel: 2 means 8 particles to a voxel
    lpt: Literal[1, 2] = 1  # Zel'dovich, or second order too
    assignment: Literal["ngp", "cic"] = "ngp"
    redshifts: tuple[float, ...] = (0.0,)  # one channel each
    spectrum: Name = "eh"
    format: Literal["hdf5", "zarr"] = "hdf5"
    ranges: Ranges = field(default_factory=Ranges)
    version: int = FORMAT

    def __post_init__(self) -> None:
        if self.version != FORMAT:
            raise DataError(f"universes of format {self.version}; this program writes and reads format {FORMAT}")
        if self.count < 1 or self.particles < 1 or not self.box_mpc > 0:
            raise DataError(
                f"count {self.count}, particles {self.particles}, box_mpc {self.box_mpc}: above 0, all three"
            )
        if self.voxels < 2 or self.voxels % 2 or self.grid > MOST_VOXELS:
            raise DataError(
                f"{self.voxels} voxels of {self.particles} particles: even, and {MOST_VOXELS} in all at most"
            )
        if not self.redshifts or min(self.redshifts) < 0:
            raise DataError(f"redshifts {self.redshifts}: at least one, none below 0")
        for known in fields(self.ranges):
            ends = getattr(self.ranges, known.name)
            if len(ends) != 2 or not 0 < ends[0] <= ends[1]:
                raise DataError(f"the range of {known.name} is {ends}; expected lowest, highest, both above 0")

    @property
    def grid(self) -> int:
        """Particles along each edge of the box."""
        return self.voxels * self.particles

    @property
    def chunk(self) -> int:
        """The edge of a chunk in the files: an eighth of the box, but 16 at least and 64 at most."""
        return min(self.voxels, max(16, min(64, self.voxels // 8)))

    @property
    def unit(self) -> int:
        """What one particle adds to the numbers of a file."""
        return CIC_UNIT if self.assignment == "cic" else 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(C, D, H, W) of `image`."""
        return len(self.redshifts), self.voxels, self.voxels, self.voxels

    def parameters(self, index: int) -> Parameters:
        """Of universe `index`: a function of the seed and the index alone."""
        shares = chance.units(chance.key(PARAMETERS, self.seed, index), 4)
        ends = [getattr(self.ranges, known.name) for known in fields(self.ranges)]
        return Parameters(*(lo + share * (hi - lo) for share, (lo, hi) in zip(shares, ends, strict=True)))

    def path(self, folder: Path, index: int) -> Path:
        """The file (HDF5) or folder (Zarr) of universe `index`."""
        return folder / f"universe_{index:05d}{'.h5' if self.format == 'hdf5' else '.zarr'}"

    def image(self, folder: Path, index: int) -> str:
        """What `meshwright.data.formats.open_array` opens to read the counts."""
        return f"{self.path(folder, index)}::image"

    @property
    def bytes(self) -> int:
        """Of the counts of one universe, before compression."""
        return 2 * math.prod(self.shape)


def load(folder: Path) -> Settings:
    """The settings of a folder. Raises `DataError` if it holds none, `ConfigError` for what is not understood."""
    path = folder / SETTINGS
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: {folder} is no folder of universes") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not YAML: {error}") from None
    return config.read(Settings, raw, str(path))


def save(settings: Settings, folder: Path) -> None:
    """Write the settings into a new folder, or see that they are those of the folder, which may grow.

    Raises `DataError` for a folder whose universes were made otherwise.
    """
    path = folder / SETTINGS
    if path.exists():
        old, new = (asdict(one) for one in (load(folder), settings))
        if old["count"] >= new["count"]:
            new["count"] = old["count"]
        other = [f"{key} is {old[key]}, now {new[key]}" for key in new if key != "count" and old[key] != new[key]]
        if other:
            raise DataError(
                f"{folder} holds other universes ({'; '.join(other)}). Choose another folder, or remove it."
            )
        if old == new:
            return
        settings = config.read(Settings, new, str(path))
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{SETTINGS}.partial"
    partial.write_text(yaml.safe_dump(_plain(asdict(settings)), sort_keys=False), encoding="utf-8")
    partial.replace(path)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
