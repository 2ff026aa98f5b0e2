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
from slabs import Rows, Slabs, exchange
from universes import STEPS, Settings

Whole = npt.NDArray[np.int64]

BITS = 21  # of one coordinate
_MASK = (1 << BITS) - 1
_BLOCK = 1 << 14  # particles counted at a time: what is computed for them stays in the cache
_WEIGHT_BITS = 3 * (STEPS.bit_length() - 1)  # of a whole particle's weight in cloud-in-cell
_MOST = np.iinfo(np.int16).max


def positions(settings: Settings, slabs: Slabs, potential: Rows) -> Whole:
    """The particles that started on this rank's planes: x, y, z of each in 1/STEPS voxel, packed; [planes, M, M]."""
    period = settings.voxels * STEPS
    packed = np.zeros((slabs.mine.size, slabs.size, slabs.size), np.int64)
    lattice = (np.arange(slabs.size) + 0.5) * (STEPS / settings.particles)  # each in the middle of its own small cell
    for axis in AXES:
        moved = component(slabs, potential, axis)
        for i in range(slabs.mine.size):
            start = (lattice[slabs.mine.lo + i], lattice[:, None], lattice[None, :])[axis]
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
    """Particles that touch this rank's planes of the counts, from all ranks: each is sent to its owner, or its two.

    `packed` [planes, M, M] as `positions` gives them; the result is flat.
    """
    if slabs.ranks == 1:
        return packed.reshape(-1)
    cic = settings.assignment == "cic"
    owner = np.empty(settings.voxels, np.int64)
    for rank, part in enumerate(layers(settings, slabs.ranks)):
        owner[part.lo : part.hi] = rank
    pieces: list[list[Whole]] = [[] for _ in range(slabs.ranks)]
    for plane in packed:
        lower = (unpacked(plane, 0) - _shift(cic=cic)) // STEPS % settings.voxels
        first = owner[lower]
        second = owner[(lower + 1) % settings.voxels] if cic else first
        for rank in range(slabs.ranks):
            pieces[rank].append(plane[(first == rank) | (second == rank)])
    sizes = torch.tensor([sum(piece.size for piece in of) for of in pieces], dtype=torch.int64)
    arriving = torch.empty_like(sizes)
    dist.all_to_all_single(arriving, sizes)
    sent = np.concatenate([piece for of in pieces for piece in of] or [packed.reshape(-1)])
    pieces.clear()
    return exchange(sent, sizes.tolist(), arriving.tolist())


def counts(settings: Settings, planes: Interval, packed: Whole) -> npt.NDArray[np.int16]:
    """What the particles add to the cells of `planes`: [planes, N, N], in `settings.unit` to a particle.

    Raises `DataError` when a cell holds more than an int16 can say.
    """
    cic = settings.assignment == "cic"
    sums = np.zeros((planes.size, settings.voxels, settings.voxels), np.int64)
    for start in range(0, packed.size, _BLOCK):
        _add(sums, planes, packed[start : start + _BLOCK], cic=cic)
    if cic:  # to the nearest unit
        sums *= settings.unit
        sums += 1 << (_WEIGHT_BITS - 1)
        sums >>= _WEIGHT_BITS
    if sums.max(initial=0) > _MOST:
        raise DataError(
            f"a cell holds {sums.max() // settings.unit} particles, more than the {_MOST // settings.unit} that the "
            "file can say; use fewer particles to a voxel, or smaller voxels"
        )
    return sums.astype(np.int16)


def _add(sums: Whole, planes: Interval, packed: Whole, *, cic: bool) -> None:
    """Add the weights of particles to the cells that they touch, of those in `planes`."""
    size, shift = sums.shape[1], _shift(cic=cic)
    near, beyond = zip(*(np.divmod(unpacked(packed, axis) - shift, STEPS) for axis in AXES), strict=True)
    for corner in range(8 if cic else 1):
        far = [corner >> (2 - axis) & 1 for axis in AXES]
        x, y, z = ((cell + one) % size for cell, one in zip(near, far, strict=True))
        weight = np.ones_like(packed)
        for away, one in zip(beyond if cic else (), far, strict=False):
            weight *= away if one else STEPS - away
        here = (x >= planes.lo) & (x < planes.hi)
        np.add.at(sums.reshape(-1), (((x - planes.lo) * size + y) * size + z)[here], weight[here])


def _shift(*, cic: bool) -> int:
    """From the position of a particle to the lower of the two cells between whose middles it lies, in 1/STEPS voxel."""
    return STEPS // 2 if cic else 0
