"""Numbers as people read them: every one with its unit."""

from __future__ import annotations

import math

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def byte_unit(count: float) -> tuple[float, str]:
    """The divisor and the name of the largest binary unit that `count` bytes fill, for an axis with one unit."""
    power = 0
    while abs(count) >= 1024 and power < len(_BYTE_UNITS) - 1:
        count /= 1024
        power += 1
    return float(1024**power), _BYTE_UNITS[power]


def bytes_text(count: float) -> str:
    """`1536` → `1.50 KiB`: three digits that count."""
    divisor, unit = byte_unit(count)
    return f"{count:.0f} B" if unit == "B" else f"{_three_digits(count / divisor)} {unit}"


def seconds_text(duration_s: float) -> str:
    """`0.0123` → `12.3 ms`, `161` → `2 min 41 s`, `3780` → `1 h 03 min`."""
    if not math.isfinite(duration_s):
        return "—"
    if duration_s < 1e-3:
        return f"{_three_digits(duration_s * 1e6)} µs" if duration_s else "0 s"
    if duration_s < 1:
        return f"{_three_digits(duration_s * 1e3)} ms"
    if duration_s < 60:
        return f"{_three_digits(duration_s)} s"
    minutes, seconds = divmod(round(duration_s), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def ratio_text(actual: float, ideal: float) -> str:
    """How many times the ideal: `1.04 ×`; a dash where there is no ideal to compare with."""
    return f"{actual / ideal:.2f} ×" if ideal else "—"


def percent_text(part: float, whole: float) -> str:
    """`88 %`; below ten percent with one decimal, so that a small part does not read as none."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.05:
        return "< 0.1 %"
    return f"{share:.1f} %" if 0 < share < 9.95 else f"{share:.0f} %"


def dice_text(value: float) -> str:
    """Dice with three decimals; a dash for a class that occurs nowhere (NaN)."""
    return f"{value:.3f}" if math.isfinite(value) else "—"


def _three_digits(value: float) -> str:
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}"
