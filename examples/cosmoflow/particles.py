"""From displacements to particles, from particles to counts per cell, in whole numbers only.

A position is rounded once, to `STEPS` parts of a voxel, and packed with the other two into 63 bits. From there on all
sums are sums of whole numbers: the order in which particles arrive, and from which rank, changes no bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from displacement import AXES, component
from meshwright.errors import DataError
from meshwright.plan.geometry import Interval, chunks
from slabs import Complex, Slabs, exchange
from universes import STEPS, Settings

Whole = npt.NDArray[np.int64]

BITS = 21  # of one coordinate
_MASK = (1 << BITS) - 1
_BLOCK = 1 << 20  # particles counted at a time
_WEIGHT_BITS = 3 * (STEPS.bit_length() - 1)  # of a whole particle's weight in cloud-in-cell
_MOST = np.iinfo(np.int16).max


def positions(settings: Settings, slabs: Slabs, potential: Complex) -> Whole:
    """The particles that started on this rank's planes: x, y, z of each in 1/STEPS voxel, packed; [planes, M, M]."""
    per_voxel, period = settings.particles, settings.voxels * STEPS
    packed = np.zeros((slabs.planes.size, slabs.size, slabs.size), np.int64)
    lattice = (np.arange(slabs.size) + 0.5) * (STEPS / per_voxel)  # in the middle of their own small cells
    for axis in AXES:
        moved = component(slabs, potential, axis)
        for i in range(slabs.planes.size):
            start = (lattice[slabs.planes.lo + i], lattice[:, None], lattice[None, :])[axis]
            steps = np.floor(moved[i] * period + start).astype(np.int64) % period
            packed[i] |= steps << (BITS * (2 - axis))
    return packed


def unpacked(packed: Whole, axis: int) -> Whole:
    """One coordinate, in 1/STEPS voxel."""
    return (packed >> (BITS * (2 - axis))) & _MASK


def layers(settings: Settings, ranks: int) -> tuple[Interval, ...]:
    """The planes of the counts that each rank owns: whole layers of chunks, so that none is written by two."""
    edge, size = settings.chunk, settings.voxels
    parts = chunks(-(-size // edge), ranks)
    return tuple(Interval(min(size, part.lo * edge), min(size, part.hi * edge)) for part in parts)


def delivered(settings: Settings, slabs: Slabs, packed: Whole) -> Whole:
    """Particles that touch this rank's planes of the counts, from all ranks: each is sent to its owner, or its two."""
    flat = packed.reshape(-1)
    if slabs.ranks == 1:
        return flat
    owner = np.empty(settings.voxels, np.int64)
    for rank, part in enumerate(layers(settings, slabs.ranks)):
        owner[part.lo : part.hi] = rank
    lower = (unpacked(flat, 0) - _shift(settings)) // STEPS % settings.voxels
    first = owner[lower]
    second = owner[(lower + 1) % settings.voxels] if settings.assignment == "cic" else first
    sent = [flat[(first == rank) | (second == rank)] for rank in range(slabs.ranks)]
    sizes = torch.empty(slabs.ranks, dtype=torch.int64)
    dist.all_to_all_single(sizes, torch.tensor([piece.size for piece in sent]))
    return np.concatenate([piece.view(np.int64) for piece in exchange(sent, sizes.tolist())])


def counts(settings: Settings, planes: Interval, packed: Whole) -> npt.NDArray[np.int16]:
    """What the particles add to the cells of `planes`: [planes, N, N], in `settings.unit` to a particle.

    Raises `DataError` when a cell holds more than an int16 can say.
    """
    size, shift = settings.voxels, _shift(settings)
    sums = np.zeros(planes.size * size * size, np.int64)
    for start in range(0, packed.size, _BLOCK):
        block = packed[start : start + _BLOCK]
        cells, beyond = zip(*(np.divmod(unpacked(block, axis) - shift, STEPS) for axis in AXES), strict=True)
        for corner in range(8 if settings.assignment == "cic" else 1):
            step = [corner >> (2 - axis) & 1 for axis in AXES]
            x, y, z = ((cell + one) % size for cell, one in zip(cells, step, strict=True))
            weight = np.ones_like(block)
            if settings.assignment == "cic":
                for away, one in zip(beyond, step, strict=True):
                    weight *= away if one else STEPS - away
            here = (x >= planes.lo) & (x < planes.hi)
            np.add.at(sums, (((x - planes.lo) * size + y) * size + z)[here], weight[here])
    if settings.assignment == "cic":  # to the nearest unit
        sums = (sums * settings.unit + (1 << (_WEIGHT_BITS - 1))) >> _WEIGHT_BITS
    if sums.max(initial=0) > _MOST:
        raise DataError(
            f"a cell holds {sums.max() // settings.unit} particles, more than the {_MOST // settings.unit} that the "
            "file can say; use fewer particles to a voxel, or smaller voxels"
        )
    return sums.astype(np.int16).reshape(planes.size, size, size)


def _shift(settings: Settings) -> int:
    """Half a voxel for cloud-in-cell, whose cells are centred on their numbers."""
    return STEPS // 2 if settings.assignment == "cic" else 0
