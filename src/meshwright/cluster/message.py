"""What a local rank and its parent say to each other over their multiprocessing pipe.

The pipe belongs to this process and its own child, which is the only place where objects are pickled. Tensors travel
by value: torch's default for multiprocessing shares memory with the sender, which may be gone before it is read.
"""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar

import torch.distributed as dist

from meshwright.errors import ExchangeError

LEAVE = b"leave"  # parent → rank: everyone has returned, close the process group
WHERE = b"where"  # parent → rank: what is your main thread doing?

# Errors that say "another rank is gone or silent": seldom the cause, so they never hide another rank's own error.
_NETWORK_TYPES = (ExchangeError, dist.DistNetworkError, dist.DistStoreError, ConnectionError)
_NETWORK_TEXT = re.compile(r"gloo/transport|Connection (closed|reset|refused)|Broken pipe|Timed out waiting|NCCL")


_GLOO_PLACE = re.compile(r"\[[^\]]*/gloo/[^\]]*\] ")
_GLOO_ADVICE = re.compile(r" This is typically caused by .*", re.DOTALL)


class _ByValue(ForkingPickler):
    _extra_reducers: ClassVar[dict[type, Any]] = {}


@dataclass(frozen=True)
class Started:
    """The rank has imported the main script and is about to run the function."""


@dataclass(frozen=True)
class Returned:
    """The function returned; `payload` is its result, packed."""

    payload: bytes


@dataclass(frozen=True)
class Failed:
    """The function raised. `network`: the error only says that another rank did not answer."""

    when_s: float
    headline: str
    trace: str
    where: str
    network: bool


@dataclass(frozen=True)
class Position:
    """Where the main thread is: innermost frame outside of torch, as text, and the whole stack."""

    line: str
    in_exchange: bool


def pack(value: object) -> bytes:
    """The bytes that travel through the pipe. Raises whatever pickling raises."""
    return bytes(_ByValue.dumps(value))


def unpack(payload: bytes) -> Any:
    """The inverse of `pack`; only ever called on bytes from the own parent or child."""
    return ForkingPickler.loads(payload)


def is_network(error: BaseException) -> bool:
    """Whether `error`, or the error it was raised from, only reports that another rank is gone or silent."""
    if isinstance(error, _NETWORK_TYPES) or (isinstance(error, RuntimeError) and _NETWORK_TEXT.search(str(error))):
        return True
    return error.__cause__ is not None and is_network(error.__cause__)


def headline(error: BaseException) -> str:
    """The last line of a traceback, without the place in gloo's source and gloo's advice."""
    text = traceback.format_exception_only(error)[-1].strip()
    return _GLOO_ADVICE.sub("", _GLOO_PLACE.sub("", text))


def describe_stack(frames: traceback.StackSummary) -> Position:
    """The innermost frame that is not torch's own, as `file:line in function: code`."""
    in_exchange = any("/torch/distributed/" in frame.filename for frame in frames[-4:])
    own = [frame for frame in frames if "/torch/" not in frame.filename] or list(frames)
    frame = own[-1]
    return Position(f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}", in_exchange)
