"""Every error a user can meet: what happened, where (rank, layer, file, line), the numbers, and the fix.

`ValueError` subclasses are wrong input by the caller; `RuntimeError` subclasses happen while work runs.
"""

from __future__ import annotations


class MeshwrightError(Exception):
    """Base of all errors raised on purpose by Meshwright."""


class PlanError(MeshwrightError, ValueError):
    """A plan that cannot be used: wrong number of ranks, unknown role, a combination that is refused."""


class ConfigError(MeshwrightError, ValueError):
    """A configuration file or `--set` that is not understood (unknown key, wrong type)."""


class DataError(MeshwrightError, ValueError):
    """Input data that is missing, truncated, or does not fit (image and label of different shapes)."""


class CheckpointError(MeshwrightError, RuntimeError):
    """A checkpoint that is missing, damaged, or belongs to another model."""


class StrictError(MeshwrightError, RuntimeError):
    """An operation has no exact local rule and `strict=True` forbids to gather. Raised before communication."""


class UnsupportedError(MeshwrightError, RuntimeError):
    """An operation that can neither be split nor gathered without a wrong answer. Raised before communication."""


class MismatchError(MeshwrightError, RuntimeError):
    """Ranks disagree about something that must be equal: the model, an input, the plan."""


class ExchangeError(MeshwrightError, RuntimeError):
    """A neighbour did not answer within the time limit of the exchange, or died."""


class NumericsError(MeshwrightError, RuntimeError):
    """NaN or infinity where a number is needed; names the first layer that produced it."""


class RankError(MeshwrightError, RuntimeError):
    """A local rank failed. `rank` is the first that failed, `cause` its own traceback as text."""

    def __init__(self, message: str, *, rank: int, cause: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.cause = cause
