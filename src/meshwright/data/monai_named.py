"""MONAI transforms by name, as a configuration gives them: a closed list, and of each the arguments that it may take.

What is not on the list is refused before MONAI is asked for anything, so a file can name no code of its own. Fixed
ones belong to the data: held-out samples get them too. Random ones draw a number for a sample, or one for each
channel, from a generator that begins anew with a key of seed and place in the order: the same on all ranks.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from meshwright.data.intensity import PerVoxel
from meshwright.data.monai_transforms import Monai, not_pointwise, refused
from meshwright.data.transforms import Box, Shape, whole
from meshwright.errors import ConfigError

_FLAG, _NUMBER, _NUMBERS = "true or false", "a number", "a list of numbers"
_FIXED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "Identity": {},
    "MapLabelValue": {"orig_labels": (_NUMBERS,), "target_labels": (_NUMBERS,)},
    "NormalizeIntensity": {
        "subtrahend": (_NUMBER, _NUMBERS),
        "divisor": (_NUMBER, _NUMBERS),
        "nonzero": (_FLAG,),
        "channel_wise": (_FLAG,),
    },
    "ScaleIntensity": {"minv": (_NUMBER, "empty"), "maxv": (_NUMBER, "empty"), "factor": (_NUMBER,)},
    "ScaleIntensityRange": {
        **dict.fromkeys(("a_min", "a_max"), (_NUMBER,)),
        **dict.fromkeys(("b_min", "b_max"), (_NUMBER, "empty")),
        "clip": (_FLAG,),
    },
    "ShiftIntensity": {"offset": (_NUMBER,)},
    "SignalFillEmpty": {"replacement": (_NUMBER,)},
    "ThresholdIntensity": {"threshold": (_NUMBER,), "above": (_FLAG,), "cval": (_NUMBER,)},
}
_RANDOM: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "RandScaleIntensity": {"factors": (_NUMBER, _NUMBERS), "prob": (_NUMBER,), "channel_wise": (_FLAG,)},
    "RandShiftIntensity": {"offsets": (_NUMBER, _NUMBERS), "prob": (_NUMBER,), "channel_wise": (_FLAG,)},
}
_ARGUMENTS = {**_FIXED, **_RANDOM}


@dataclass(frozen=True)
class MonaiNamed(PerVoxel):
    """`name` of the lists above with its arguments, applied to the image [c, d, h, w]. Random ones begin at `key`."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()
    key: int = 0
    fields: tuple[str, ...] | None = ("image",)

    @property
    def is_random(self) -> bool:
        return self.name in _RANDOM

    def at(self, key: int) -> MonaiNamed:
        """The same with what a random one draws under `key`; a fixed one as it is."""
        return replace(self, key=key) if self.is_random else self

    def made(self) -> Any:
        """The transform of MONAI, ready to be applied."""
        transform = vars(_monai())[self.name](**dict(self.arguments))
        if self.is_random:
            transform.set_random_state(seed=self.key % (1 << 32))  # numpy's RandomState: its numbers never change
        return transform

    def see(self, channels: int, where: str) -> None:
        """Raise `ConfigError`, which names `where`, if the transform refuses a voxel of so many channels."""
        voxel = (1, 1, 1)
        try:
            self.build([{"image": torch.ones(channels, *voxel)}], whole(voxel), voxel)
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise ConfigError(f"{where}: {self.name} cannot be applied to {channels} channel(s): {error}") from None

    def _values(self, name: str, x: Tensor, box: Box, shape: Shape) -> Tensor:
        found: Tensor = Monai(self.made(), (name,)).build([{name: x}], box, shape)[name]
        return found.to(x.dtype)


def named(given: Sequence[Mapping[str, Any]], where: str) -> tuple[MonaiNamed, ...]:
    """The transforms of a list such as [{"name": "ShiftIntensity", "offset": 0.1}], in its order.

    Raises `ConfigError`, which names the place in `where`, for what is not on the list, with the reason; for arguments
    that are unknown, of the wrong type, or that make a transform measure the array; and where MONAI is missing.
    """
    if given:
        _monai()
    return tuple(_one(entry, f"{where}[{number}]") for number, entry in enumerate(given))


def _one(entry: Mapping[str, Any], where: str) -> MonaiNamed:
    if not isinstance(entry.get("name"), str):
        raise ConfigError(f"{where} has no name: write it as {{name: ShiftIntensity, offset: 0.1}}")
    name, arguments = entry["name"], {key: value for key, value in entry.items() if key != "name"}
    if name not in _ARGUMENTS:
        raise ConfigError(f"{where}: {_unknown(name)}")
    for key, value in arguments.items():
        kinds = _ARGUMENTS[name].get(key)
        if kinds is None:
            known = ", ".join(_ARGUMENTS[name]) or "none"
            raise ConfigError(f"{where}: {name} takes no argument {key!r} here; known: {known}")
        if _kind(value) not in kinds:
            raise ConfigError(f"{where}: {name}: {key} = {value!r}; expected {' or '.join(kinds)}")
        if key == "prob" and not 0 <= value <= 1:  # MONAI would take the nearest one that is
            raise ConfigError(f"{where}: {name}: prob = {value}; a probability is between 0 and 1")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    step = MonaiNamed(name, tuple(values.items()))
    wrong = _wrong(step)
    if wrong:
        raise ConfigError(f"{where}: {wrong}")
    return step


@lru_cache(maxsize=64)
def _wrong(step: MonaiNamed) -> str:
    """What MONAI says of the arguments, or why a split sample cannot take the transform; else nothing."""
    try:
        transform = step.made()
    except (TypeError, ValueError) as error:
        return f"{step.name}: {error}"
    reason = None if step.is_random else refused(transform)
    return f"{step.name} cannot augment a split sample: it {reason}" if reason else ""


def _kind(value: object) -> str:
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return _FLAG
    if isinstance(value, int | float):
        return _NUMBER if math.isfinite(value) else "no finite number"
    if isinstance(value, tuple | list) and value and all(_kind(one) == _NUMBER for one in value):
        return _NUMBERS
    return "anything else"


def _unknown(name: str) -> str:
    kind = vars(_monai()).get(name)
    if isinstance(kind, type):
        reason = "changes the type, which train.precision decides" if name == "CastToType" else not_pointwise(kind)
        return f"{name} cannot augment a split sample: it {reason}; accepted are {', '.join(_ARGUMENTS)}"
    near = difflib.get_close_matches(name, _ARGUMENTS, n=1)
    guess = f"did you mean {near[0]}?" if near else f"accepted are {', '.join(_ARGUMENTS)}"
    return f"{name!r} is no transform of MONAI; {guess}"


def _monai() -> ModuleType:
    try:
        from monai import transforms  # seconds: only for those who ask for it
    except ImportError:
        raise ConfigError("transforms of MONAI need MONAI: pip install 'meshwright[monai]'") from None
    return transforms
