"""What a run directory says, as frozen values, and the strict step from JSON to them.

The shape of a value is written once, in its annotations; `decode` holds the file to it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from meshwright.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """One optimiser step as rank 0 saw it: a line of `steps.jsonl`. `dice` is of the training part, one per class."""

    step: int
    loss: float
    lr: float
    dice: tuple[float, ...]
    grad_norm: float
    step_s: float
    compute_s: float
    exchange_s: float
    reduction_s: float
    data_s: float
    sent_bytes: int
    reduced_bytes: int
    messages: int
    samples_per_s: float
    wait_s: float = 0.0  # of data_s, that the step waited for threads that read ahead (`data.memory_mib`)
    loaders: int = 0  # these threads


@dataclass(frozen=True)
class Validation:
    """Loss and Dice of the held-out part after `step`: a line of `validation.jsonl`."""

    step: int
    loss: float
    dice: tuple[float, ...]


@dataclass(frozen=True)
class RankRecord:
    """What one rank held and read: an entry of `ranks.json`. `interval` is D, H, W of the training volume."""

    rank: int
    interval: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    peak_bytes: int
    state_bytes: int
    ideal_bytes: int
    part_bytes: int
    read_bytes: int
    ideal_read_bytes: int


@dataclass(frozen=True)
class ReadingRow:
    """Bytes of training data that one rank read in one epoch: an entry of `reading.json`. `shared_bytes` came from the
    copy of a stream that one rank of its host had decoded."""

    epoch: int
    rank: int
    read_bytes: int
    ideal_read_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class LayerRow:
    """Bytes that one operation of one layer sent to neighbours, or to everybody for want of a local rule."""

    layer: str
    op: str
    exchanged_bytes: int
    gathered_bytes: int
    messages: int


@dataclass(frozen=True)
class Summary:
    """How the run ended: `summary.json`."""

    finished: bool
    steps: int
    train_s: float
    total_s: float
    dice: tuple[float, ...]
    classes: tuple[str, ...]
    ranks: int
    threads_per_rank: int
    precision: str
    parameters: int
    resolution_mm: float | None
    fold: Any


def decode(kind: type[T], raw: object, where: str) -> T:
    """The JSON object `raw` as a `kind`. Unknown keys are left out: a newer release may write more.

    Raises `DataError` naming `where` and the key that is missing or of the wrong type.
    """
    if not isinstance(raw, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(raw).__name__}")
    hints = _hints(cast(Hashable, kind))
    given = {f.name for f in fields(cast(Any, kind)) if f.default is not MISSING}  # what older releases did not write
    missing = [name for name in hints if name not in raw and name not in given]
    if missing:
        raise DataError(f"{where}: missing {', '.join(map(repr, missing))}; was it written by another release?")
    return kind(**{name: _value(hint, raw[name], f"{where}: {name!r}") for name, hint in hints.items() if name in raw})


@lru_cache(maxsize=32)
def _hints(kind: Hashable) -> dict[str, Any]:
    return get_type_hints(kind)


def _value(hint: Any, raw: object, where: str) -> Any:
    if hint is Any:
        return raw
    if get_origin(hint) is UnionType:
        if raw is None:
            return None
        hint = next(option for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is tuple:
        return _sequence(get_args(hint), raw, where)
    if hint is float and isinstance(raw, (int, float)) and not isinstance(raw, bool):
        return float(raw)
    if type(raw) is hint:
        return raw
    raise DataError(f"{where} is {raw!r}; expected {getattr(hint, '__name__', hint)}")


def _sequence(hints: tuple[Any, ...], raw: object, where: str) -> tuple[Any, ...]:
    if not isinstance(raw, list):
        raise DataError(f"{where} is {raw!r}; expected a list")
    if hints[-1] is Ellipsis:
        hints = (hints[0],) * len(raw)
    if len(raw) != len(hints):
        raise DataError(f"{where} has {len(raw)} entries; expected {len(hints)}")
    return tuple(_value(hint, entry, f"{where}[{i}]") for i, (hint, entry) in enumerate(zip(hints, raw, strict=True)))
