"""What memory a rank takes while it makes its part of one universe.

    python examples/cosmoflow/memory.py 256 1 2 4

prints, for 256³ voxels with second order on 1, 2 and 4 ranks, the peak resident memory of the rank that takes most,
above that of a rank that has made a tiny universe only (Linux).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

import meshwright as mw
from generate import make
from universes import Settings


def peak_bytes() -> int:
    """The most that this process has ever had in memory."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def taken(settings: Settings, folder: Path) -> int:
    """On one rank: bytes that a universe takes above those of a tiny one."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    make(replace(settings, voxels=16), folder, 0, rank, ranks)
    before = peak_bytes()
    make(settings, folder, 1, rank, ranks)
    return peak_bytes() - before


def main(arguments: Sequence[str]) -> int:
    """Print a line for each number of ranks."""
    if len(arguments) < 2 or not all(word.isdigit() for word in arguments):
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    voxels, *numbers = map(int, arguments)
    for ranks in numbers:
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(voxels=voxels, box_mpc=2.0 * voxels, lpt=2, format="zarr")
            most = max(mw.launch(taken, ranks, (settings, Path(folder))))
        print(f"{voxels}³ on {ranks} rank{'s' * (ranks > 1)}: {most / 1e6:.0f} MB a rank", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
