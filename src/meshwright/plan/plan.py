"""The plan: which mesh axes exist, and which part of the work each axis splits. A frozen value, saved as YAML."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from meshwright.errors import PlanError
from meshwright.plan.geometry import chunk

VERSION = 1
# role -> the letter of its dim in a layout such as "NCDHW"
LETTER = {"sample": "N", "depth": "D", "height": "H", "width": "W"}
_AXIS_ROLE = {"data": "sample", "depth": "depth", "height": "height", "width": "width"}
_LAYOUT_BY_NDIM = {5: "NCDHW", 4: "NCHW", 3: "NCW", 2: "NC"}


@dataclass(frozen=True)
class Axis:
    """A mesh axis: its name, how many ranks lie along it, and the role it plays in every layer."""

    name: str
    size: int
    role: str


@dataclass(frozen=True)
class Plan:
    """Mesh axes, outermost (slowest) first. `rank = ((i0 * size1 + i1) * size2 + i2) ...`."""

    axes: tuple[Axis, ...]

    def __post_init__(self) -> None:
        names = [axis.name for axis in self.axes]
        roles = [axis.role for axis in self.axes]
        for axis in self.axes:
            if axis.role not in LETTER:
                raise PlanError(f"axis {axis.name!r} has role {axis.role!r}; known roles: {', '.join(LETTER)}")
            if not isinstance(axis.size, int) or isinstance(axis.size, bool) or axis.size < 1:
                raise PlanError(f"axis {axis.name!r} has size {axis.size!r}; a size is a whole number of at least 1")
        for what, values in (("name", names), ("role", roles)):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise PlanError(f"two axes share the {what} {twice[0]!r}; each {what} may be used once")

    @classmethod
    def uniform(cls, data: int = 1, depth: int = 1, height: int = 1, width: int = 1) -> Plan:
        """The same split in every layer: the batch over `data`, space over `depth` × `height` × `width`.

        Axes of size 1 are left out; the plan needs `data * depth * height * width` ranks.
        """
        sizes = {"data": data, "depth": depth, "height": height, "width": width}
        axes = tuple(Axis(name, size, _AXIS_ROLE[name]) for name, size in sizes.items() if size != 1)
        return cls(axes or (Axis("data", 1, "sample"),))

    @property
    def ranks(self) -> int:
        """How many ranks the plan needs."""
        return math.prod(axis.size for axis in self.axes)

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """The position of `rank` along each axis."""
        if not 0 <= rank < self.ranks:
            raise PlanError(f"rank {rank} does not exist: the plan has ranks 0 to {self.ranks - 1}")
        position: list[int] = []
        for axis in reversed(self.axes):
            rank, index = divmod(rank, axis.size)
            position.append(index)
        return tuple(reversed(position))

    def dims(self, ndim: int, layout: str | None = None) -> tuple[int | None, ...]:
        """For each axis the tensor dim it splits, or None where the tensor has no such dim (then it is replicated).

        `layout` names the dims, one letter each: N sample, D H W depth height width, C or any other letter
        for a dim that is never split. Without it 5-D is NCDHW, 4-D NCHW, 3-D NCW, 2-D NC.
        """
        if layout is None:
            if ndim not in _LAYOUT_BY_NDIM:
                raise PlanError(f"a {ndim}-D tensor has no customary layout; name its dims, for example layout='NDHW'")
            layout = _LAYOUT_BY_NDIM[ndim]
        if len(layout) != ndim or len(set(layout)) != len(layout):
            raise PlanError(f"layout {layout!r} must name each of the {ndim} dims of the tensor once")
        found = (layout.find(LETTER[axis.role]) for axis in self.axes)
        return tuple(None if dim < 0 else dim for dim in found)

    def as_dict(self) -> dict[str, Any]:
        """The form that is saved."""
        axes = {axis.name: {"size": axis.size, "role": axis.role} for axis in self.axes}
        return {"meshwright_plan": VERSION, "axes": axes}

    @classmethod
    def from_dict(cls, raw: object, where: str = "plan") -> Plan:
        """The inverse of `as_dict`. Raises `PlanError` naming `where` and the key that is wrong."""
        if not isinstance(raw, dict) or set(raw) != {"meshwright_plan", "axes"}:
            raise PlanError(f"{where}: a plan has exactly the keys 'meshwright_plan' and 'axes'")
        if raw["meshwright_plan"] != VERSION:
            raise PlanError(f"{where}: plan version {raw['meshwright_plan']!r}; this release reads {VERSION}")
        if not isinstance(raw["axes"], dict) or not raw["axes"]:
            raise PlanError(f"{where}: 'axes' maps each axis name to its size and role")
        axes = []
        for name, entry in raw["axes"].items():
            if not isinstance(entry, dict) or set(entry) != {"size", "role"}:
                raise PlanError(f"{where}: axis {name!r} has exactly the keys 'size' and 'role'")
            axes.append(Axis(str(name), entry["size"], str(entry["role"])))
        try:
            return cls(tuple(axes))
        except PlanError as error:
            raise PlanError(f"{where}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the plan as YAML."""
        Path(path).write_text(yaml.safe_dump(self.as_dict(), sort_keys=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from YAML. Raises `PlanError` if the file is missing, not YAML, or not a plan."""
        try:
            raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PlanError(f"{path}: no such plan file") from None
        except yaml.YAMLError as error:
            raise PlanError(f"{path}: not YAML: {error}") from None
        return cls.from_dict(raw, str(path))

    def __str__(self) -> str:
        return " × ".join(f"{axis.name}={axis.size}" for axis in self.axes)


def interval(shape: tuple[int, ...], plan: Plan, rank: int, layout: str | None = None) -> tuple[slice, ...]:
    """The slices of a tensor of global `shape` that `rank` owns under `plan`: pure arithmetic.

    `layout` as in `Plan.dims`. Dims that no axis splits come back whole. Raises `PlanError`.
    """
    spans = [slice(0, size) for size in shape]
    for axis, index, dim in zip(plan.axes, plan.coordinates(rank), plan.dims(len(shape), layout), strict=True):
        if dim is not None:
            span = chunk(shape[dim], axis.size, index)
            spans[dim] = slice(span.lo, span.hi)
    return tuple(spans)
