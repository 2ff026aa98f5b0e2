"""The three-dimensional Fourier transform of a box that is split into slabs over ranks.

In space a rank holds the planes `mine` of the first dim, [planes, N, N] float64. In wave numbers it holds all of the
first dim and the rows `mine` of the second, [N, rows, N // 2 + 1] complex128: between the two lies one all-to-all. What
is computed is always the transform of one plane in two dims, or of one row's columns in the third. One rank makes the
very same calls as many, on arrays of the same shape, so their results are equal bit for bit. No memory is taken but
for what is sent and what arrives: 16 bytes for each point of the slab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from meshwright.plan.geometry import Interval, chunk, chunks

Real = npt.NDArray[np.float64]
Complex = npt.NDArray[np.complex128]
Number = TypeVar("Number", np.complex128, np.int64)
Planes = Callable[[int], Real]  # plane i of this rank's → [N, N]
Rows = Callable[[int], Complex]  # row j of this rank's → [N, N // 2 + 1]


@dataclass(frozen=True)
class Slabs:
    """A cubic grid of `size`³ points over `ranks`, of which this is number `rank`."""

    size: int
    rank: int = 0
    ranks: int = 1

    @property
    def mine(self) -> Interval:
        """The planes of the first dim (in space) and the rows of the second (in wave numbers) of this rank."""
        return chunk(self.size, self.ranks, self.rank)

    @property
    def half(self) -> int:
        """Wave numbers that are kept of the last dim: a real field has the others conjugate."""
        return self.size // 2 + 1

    def wave_numbers(self, row: int) -> tuple[Real, Real, Real]:
        """Whole wave numbers along each dim in a row of this rank's, [N, 1], [1, 1], [1, N // 2 + 1].

        In units of the fundamental one; the highest along the first two dims is negative.
        """
        full = np.fft.fftfreq(self.size, 1 / self.size).astype(np.float64)
        there = self.mine.lo + row
        return full[:, None], full[None, there : there + 1], np.arange(self.half, dtype=np.float64)[None, :]

    def forward(self, plane: Planes) -> Complex:
        """From space to wave numbers, unnormalised: [N, rows, N // 2 + 1]."""
        sizes = [self.mine.size * part.size * self.half for part in self._parts]
        buffer: Complex = np.empty(sum(sizes), np.complex128)  # piece by piece as it is sent
        pieces = [
            piece.reshape(self.mine.size, part.size, self.half)
            for piece, part in zip(np.split(buffer, np.cumsum(sizes)[:-1]), self._parts, strict=True)
        ]
        for i in range(self.mine.size):
            spectrum = np.fft.rfft2(plane(i))
            for piece, part in zip(pieces, self._parts, strict=True):
                piece[i] = spectrum[part.lo : part.hi]
        if self.ranks > 1:  # as many numbers come from each rank: all hold as many rows as planes
            buffer = exchange(buffer, sizes, sizes)
        modes = buffer.reshape(self.size, self.mine.size, self.half)
        for j in range(self.mine.size):
            modes[:, j] = np.fft.fft(modes[:, j].copy(), axis=0)
        return modes

    def backward(self, row: Rows) -> Real:
        """From wave numbers to space, with the factor 1/N³: [planes, N, N]."""
        modes = np.empty((self.size, self.mine.size, self.half), np.complex128)
        for j in range(self.mine.size):
            modes[:, j] = np.fft.ifft(row(j), axis=0)
        sizes = [part.size * self.mine.size * self.half for part in self._parts]
        buffer: Complex = modes.reshape(-1)
        del modes
        if self.ranks > 1:
            buffer = exchange(buffer, sizes, sizes)
        pieces = [
            piece.reshape(self.mine.size, part.size, self.half)
            for piece, part in zip(np.split(buffer, np.cumsum(sizes)[:-1]), self._parts, strict=True)
        ]
        field = np.empty((self.mine.size, self.size, self.size))
        for i in range(self.mine.size):
            field[i] = np.fft.irfft2(np.concatenate([piece[i] for piece in pieces]), s=(self.size, self.size))
        return field

    @property
    def _parts(self) -> tuple[Interval, ...]:
        return chunks(self.size, self.ranks)


def exchange(sent: npt.NDArray[Number], sizes: Sequence[int], arriving: Sequence[int]) -> npt.NDArray[Number]:
    """Send the next `sizes[r]` numbers of a flat array to each rank r; what came from all, `arriving[r]` from each."""
    words = sent.dtype.itemsize // 8  # complex numbers travel as two
    received = np.empty(sum(arriving), sent.dtype)
    dist.all_to_all_single(
        torch.from_numpy(received.view(np.int64)),
        torch.from_numpy(sent.view(np.int64)),
        [size * words for size in arriving],
        [size * words for size in sizes],
    )
    return received
