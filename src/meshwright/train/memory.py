"""How much memory this rank holds and has held at most, by an instrument that can be set back to zero.

On a GPU torch's own allocator counts. On Linux the kernel counts the resident pages of the process (`VmHWM`) and
forgets its maximum when 5 is written to `/proc/self/clear_refs` (proc(5)). Elsewhere only the maximum since the start
of the process is known, so nothing is set back.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> bool:
    """Start counting the peak anew; False where the system does not allow it (then it counts since the start)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """The most memory held since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _kernel("VmHWM") or _since_start()


def resident_bytes(device: torch.device) -> int:
    """The memory held now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _kernel("VmRSS") or _since_start()


def _kernel(key: str) -> int:
    """A line of `/proc/self/status` in bytes; 0 on a system without it."""
    if not _STATUS.exists():
        return 0
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _since_start() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
