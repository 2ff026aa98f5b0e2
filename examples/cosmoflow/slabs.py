"""The three-dimensional Fourier transform of a box that is split into slabs over ranks.

In space a rank holds the planes `planes` of the first dim, [planes, N, N] float64. In wave numbers it holds all of the
first dim and the rows `rows` of the second, [N, rows, N // 2 + 1] complex128: between the two lies one all-to-all. What
is computed is a transform of one plane in two dims and a transform of one row of columns in the third, always of that
size. One rank makes the very same calls as many, so the results are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from meshwright.plan.geometry import Interval, chunk, chunks

Real = npt.NDArray[np.float64]
Complex = npt.NDArray[np.complex128]


@dataclass(frozen=True)
class Slabs:
    """A cubic grid of `size`³ points over `ranks`, of which this is number `rank`."""

    size: int
    rank: int = 0
    ranks: int = 1

    @property
    def planes(self) -> Interval:
        """The planes of the first dim (in space) and the rows of the second (in wave numbers) of this rank."""
        return chunk(self.size, self.ranks, self.rank)

    def wave_numbers(self) -> tuple[Real, Real, Real]:
        """Whole wave numbers of this rank's modes along each dim, in units of the fundamental one, to be broadcast."""
        full = np.fft.fftfreq(self.size, 1 / self.size).astype(np.float64)
        half = np.arange(self.size // 2 + 1, dtype=np.float64)
        return full[:, None, None], full[None, self.planes.lo : self.planes.hi, None], half[None, None, :]

    def forward(self, plane: Callable[[int], Real]) -> Complex:
        """From space to wave numbers (unnormalised); `plane(i)` gives the plane i of this rank's, [N, N]."""
        n, mine = self.size, self.planes
        spectra = np.empty((mine.size, n, n // 2 + 1), np.complex128)
        for i in range(mine.size):
            spectra[i] = np.fft.rfft2(plane(mine.lo + i))
        modes = self._turn(spectra, to_rows=True)
        del spectra
        for j in range(modes.shape[1]):
            modes[:, j] = np.fft.fft(modes[:, j], axis=0)
        return modes

    def backward(self, modes: Complex) -> Real:
        """From wave numbers to space, with the factor 1/N³. The content of `modes` is lost."""
        n = self.size
        for j in range(modes.shape[1]):
            modes[:, j] = np.fft.ifft(modes[:, j], axis=0)
        spectra = self._turn(modes, to_rows=False)
        field = np.empty((self.planes.size, n, n))
        for i in range(self.planes.size):
            field[i] = np.fft.irfft2(spectra[i], s=(n, n))
        return field

    def _turn(self, block: Complex, *, to_rows: bool) -> Complex:
        """[planes, N, M] ↔ [N, rows, M]: each rank sends (ranks - 1)/ranks of what it holds."""
        if self.ranks == 1:
            return block
        parts, mine, inner = chunks(self.size, self.ranks), self.planes.size, block.shape[2]
        spans = [slice(part.lo, part.hi) for part in parts]
        sent = [block[:, span] if to_rows else block[span] for span in spans]
        shapes = [(part.size, mine, inner) if to_rows else (mine, part.size, inner) for part in parts]
        pieces = exchange([piece.reshape(-1) for piece in sent], [int(np.prod(shape)) for shape in shapes])
        return np.concatenate(
            [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)], axis=0 if to_rows else 1
        )


def exchange(sent: Sequence[npt.NDArray[np.generic]], sizes: Sequence[int]) -> list[npt.NDArray[np.generic]]:
    """Send `sent[r]` to rank r; what came from each, `sizes[r]` numbers. All of one dtype, one-dimensional."""
    dtype = sent[0].dtype
    words = dtype.itemsize // 8  # complex numbers travel as two
    received = np.empty(sum(sizes), dtype)
    dist.all_to_all_single(
        torch.from_numpy(received.view(np.int64)),
        torch.from_numpy(np.concatenate(sent).view(np.int64)),
        [size * words for size in sizes],
        [piece.size * words for piece in sent],
    )
    return np.split(received, np.cumsum(sizes)[:-1])
