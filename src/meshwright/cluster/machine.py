"""This machine: processor, memory, torch and its backends, and what is missing. No host, user or path names."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed as dist

# what the kernel calls it -> what people call it
_INSTRUCTION_SETS = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_bf16": "avx512-bf16",
    "amx_bf16": "amx-bf16",
    "amx_int8": "amx-int8",
    "asimd": "neon",
    "sve": "sve",
    "bf16": "arm-bf16",
}
_CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass(frozen=True)
class Missing:
    """Something that is not installed: what it would be good for and how to get it."""

    what: str
    why: str
    how: str


def describe() -> dict[str, Any]:
    """Facts about this machine that belong beside every measurement; plain values that JSON can hold.

    Bytes are None where the system does not say. `threads` is what torch uses in this process.
    """
    cpuinfo = _read("/proc/cpuinfo")
    return {
        "processor": _processor_name(cpuinfo),
        "cores": usable_cores(),
        "physical_cores": _physical_cores(cpuinfo),
        "instruction_sets": _instruction_sets(cpuinfo),
        "memory_bytes": memory_bytes(),
        "memory_available_bytes": _meminfo_bytes("MemAvailable"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backends": _backends(),
        "gpus": [
            {"name": torch.cuda.get_device_name(i), "memory_bytes": torch.cuda.get_device_properties(i).total_memory}
            for i in range(torch.cuda.device_count())
        ],
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def missing() -> list[Missing]:
    """Optional parts that are not installed. The core needs none of them."""
    found = []
    if importlib.util.find_spec("nibabel") is None:
        found.append(Missing("nibabel", "reads NIfTI volumes", "pip install 'meshwright[nifti]'"))
    if importlib.util.find_spec("nilearn") is None:
        why = "brings the MRI volume of the main job (`./scripts/train`)"
        found.append(Missing("nilearn", why, "pip install 'meshwright[examples]'"))
    if not any(shutil.which(name) for name in _CHROMIUM_NAMES):
        why = "the tests look at a report in it; reports are made and read without it"
        found.append(Missing("chromium", why, "apt-get install chromium, or your system's package"))
    return found


def usable_cores() -> int:
    """Logical cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Memory this process may use: the machine's, or the smaller limit of its container (control group)."""
    total = _meminfo_bytes("MemTotal")
    if total is None and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(
        (limit for limit in (total, *(limit for limit, _ in _memory_limits())) if limit is not None), default=None
    )


def available_bytes() -> int:
    """Memory that is free, or can be made so, for this process; 0 where the system does not say."""
    return max(0, min((_meminfo_bytes("MemAvailable") or 0, *(limit - used for limit, used in _memory_limits()))))


def peak_bytes() -> int:
    """The most memory that this process has had in use, as the kernel counts it; 0 where it does not."""
    lines = _read("/proc/self/status").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _memory_limits() -> list[tuple[int, int]]:
    """(limit, use without what can be dropped) of each control group that this process is in, as far as they say."""
    found = []
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, names = "/sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = "/sys/fs/cgroup/memory"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        own = PurePosixPath(path)
        for group in (own, *own.parents):  # a group is bound by those that it lies in
            there = f"{root}{group}".rstrip("/")
            limit, used = (_read(f"{there}/{name}").strip() for name in names[:2])
            if limit.isdigit() and used.isdigit():
                cached = re.search(rf"^{names[2]} (\d+)$", _read(f"{there}/memory.stat"), re.MULTILINE)
                found.append((int(limit), int(used) - (int(cached[1]) if cached else 0)))
    return found


def _processor_name(cpuinfo: str) -> str:
    names = _cpuinfo_values(cpuinfo, "model name")
    return names[0] if names else platform.processor() or platform.machine()


def _physical_cores(cpuinfo: str) -> int | None:
    """Distinct (socket, core) pairs; None where the system does not list them."""
    pairs = set(zip(_cpuinfo_values(cpuinfo, "physical id"), _cpuinfo_values(cpuinfo, "core id"), strict=True))
    return len(pairs) or None


def _instruction_sets(cpuinfo: str) -> list[str]:
    listed = _cpuinfo_values(cpuinfo, "flags") or _cpuinfo_values(cpuinfo, "Features")
    flags = set(listed[0].split()) if listed else set()
    return [name for flag, name in _INSTRUCTION_SETS.items() if flag in flags]


def _backends() -> list[str]:
    available = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "cuda": torch.cuda.is_available(),
    }
    return [name for name, there in available.items() if there]


def _cpuinfo_values(cpuinfo: str, key: str) -> list[str]:
    pairs = (line.partition(":") for line in cpuinfo.splitlines())
    return [value.strip() for name, _, value in pairs if name.strip() == key]


def _meminfo_bytes(key: str) -> int | None:
    for line in _read("/proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None


def _read(path: str) -> str:
    """A file of the kernel, or nothing on systems that have none."""
    if sys.platform != "linux":
        return ""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
