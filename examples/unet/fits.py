"""A volume that does not fit one rank trains on four: memory of a rank against the split, then a limit that holds.

    python examples/unet/fits.py                     the published U-Net at base 8 on 64 cubed, 1, 2 and 4 ranks
    python examples/unet/fits.py --size 96 --base 16

First two training steps on the whole volume on 1, 2 and 4 ranks without a limit, and how much the resident memory of a
rank grew at most. Then the operating system refuses every rank (RLIMIT_AS) more than `--limit` times what four ranks
needed: one rank runs out of memory and says so; four ranks train, to the same loss.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

import meshwright as mw
from meshwright.models.unet3d import UNet3D
from meshwright.train import memory
from phantom import planes

MIB = 2**20
TOLERANCE = 1e-3  # of the loss after a step, fp32, between one rank and four


def address_space() -> int:
    """The bytes of this process that RLIMIT_AS counts."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmSize:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmSize: this example needs Linux")


def step(size: int, base: int, depth: int, limit: int | None) -> tuple[float, int]:
    """Two training steps, which may take `limit` bytes more than the process holds before them.

    Returns (loss of the second step, bytes that the resident memory grew by). No rank makes more of the volume
    than its part.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plan = mw.Plan.uniform(depth=depth)
    network = UNet3D(base=base).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    model = mw.parallelize(network, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rank = torch.distributed.get_rank()
    shape = (1, 1, size, size, size)
    span = mw.interval(shape, plan, rank)[2]
    image, label = (torch.from_numpy(part)[None] for part in planes(0, 0, size, span.start, span.stop))
    x = mw.from_local(image[None].float() / 100, plan, shape)
    y = mw.from_local(label.long(), plan, shape[1:], layout="NDHW")
    if limit is not None:
        most = address_space() + limit
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    device = torch.device("cpu")
    memory.reset_peak(device)
    before = memory.resident_bytes(device)
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item(), memory.peak_bytes(device) - before


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and what the limit does; 1 if it does not separate one rank from four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="voxels a side, a multiple of 32 (%(default)s)")
    parser.add_argument("--base", type=int, default=8, help="channels of the first convolution (%(default)s)")
    parser.add_argument("--limit", type=float, default=1.5, help="times what a rank of four needs (%(default)s)")
    args = parser.parse_args(arguments)
    found = {}
    for ranks in (1, 2, 4):
        results = mw.launch(step, ranks, (args.size, args.base, ranks, None))
        found[ranks] = results[0][0], max(peak for _, peak in results)
        print(
            f"{ranks} rank(s): at most {found[ranks][1] / MIB:.0f} MiB a rank, loss {found[ranks][0]:.5f}", flush=True
        )
    limit = int(args.limit * found[4][1])
    print(f"\nwith {limit / MIB:.0f} MiB for each rank:", flush=True)
    try:
        mw.launch(step, 1, (args.size, args.base, 1, limit))
    except mw.errors.RankError as error:
        said = next((line.strip() for line in str(error).splitlines() if "memory" in line.lower()), None)
        if said is None:
            raise
        print(f"1 rank: {said}", flush=True)
    else:
        print("1 rank: it fits, so the limit separates nothing; choose a larger --size")
        return 1
    loss = mw.launch(step, 4, (args.size, args.base, 4, limit))[0][0]
    print(f"4 ranks: trained, loss {loss:.5f}")
    return 0 if abs(loss - found[1][0]) <= TOLERANCE * abs(found[1][0]) else 1


if __name__ == "__main__":
    sys.exit(main())
