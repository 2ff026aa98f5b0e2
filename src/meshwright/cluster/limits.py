"""Time limits of the exchange between ranks, and where they come from."""

from __future__ import annotations

import math
import os

from meshwright.errors import ConfigError

EXCHANGE_TIMEOUT_S = 120.0
"""How long a rank waits for another one before the job is ended, unless `MESHWRIGHT_TIMEOUT_S` or an argument says."""

RENDEZVOUS_TIMEOUT_S = 60.0
"""Ranks import their code at different speeds, so the first meeting gets at least this long."""


def exchange_timeout_s(asked_s: float | None = None) -> float:
    """The limit in seconds: `asked_s`, else the environment variable `MESHWRIGHT_TIMEOUT_S`, else the default.

    Raises `ConfigError` when the value is no positive finite number.
    """
    source, value = "timeout_s", asked_s
    if value is None:
        text = os.environ.get("MESHWRIGHT_TIMEOUT_S")
        if text is None:
            return EXCHANGE_TIMEOUT_S
        source = "MESHWRIGHT_TIMEOUT_S"
        try:
            value = float(text)
        except ValueError:
            raise ConfigError(f"{source}={text!r} is not a number of seconds") from None
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{source}={value!r} must be a positive, finite number of seconds")
    return value
