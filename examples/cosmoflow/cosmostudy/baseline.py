"""What a linear fit finds in the same cubes: the spectra of counts and of their logarithm, and the histogram of counts.

No network, no tuning: a ridge regression from about fifty numbers of a cube to the four targets, its one parameter
chosen on a fifth of the training universes. It says how much of what a network finds is in the spectrum already.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from cosmostudy.cubes import Cubes
from cosmostudy.laws import Errors
from cosmostudy.settings import Study
from meshwright.train import rundir

BINS = 16  # of wave numbers, at most
HISTOGRAM = 10  # counts 0 … 8, and more
RIDGES = tuple(10.0**power for power in range(-2, 5))
HELD = 5  # every fifth training universe chooses among them

Array = np.ndarray[Any, np.dtype[np.float64]]


def features(counts: np.ndarray[Any, np.dtype[np.int16]]) -> Array:
    """Cubes [n, C, s, s, s] → [n, numbers]: logarithms of mean powers in shells, of shares of counts, and the mean."""
    size = counts.shape[-1]
    whole, half = np.fft.fftfreq(size) * size, np.fft.rfftfreq(size) * size
    length = np.sqrt(whole[:, None, None] ** 2 + whole[None, :, None] ** 2 + half**2).ravel()
    edges = np.unique(np.round(np.geomspace(1, size / 2 * 3**0.5, BINS + 1), 1))
    twice = np.where((half == 0) | (half == size / 2), 1, 2)  # half of the modes stand for their mirror images too
    weight = np.broadcast_to(twice, (size, size, len(half))).ravel()
    shells = [np.flatnonzero((length >= lo - 0.5) & (length < hi - 0.5)) for lo, hi in itertools.pairwise(edges)]
    found = []
    for values in (counts.astype(np.float64), np.log1p(counts.astype(np.float64))):
        mean = values.mean((-3, -2, -1))
        power = np.abs(np.fft.rfftn(values - mean[..., None, None, None], axes=(-3, -2, -1))) ** 2
        power = power.reshape(*power.shape[:2], -1)
        found += [
            mean,
            *(np.log(power[..., shell] @ weight[shell] / weight[shell].sum() + 1) for shell in shells if len(shell)),
        ]
    clipped = np.minimum(counts, HISTOGRAM - 1)
    found += [np.log((clipped == number).mean((-3, -2, -1)) + 1 / size**3) for number in range(HISTOGRAM)]
    return np.concatenate(found, -1).reshape(len(counts), -1)


def of(source: Cubes) -> Array:
    """The features of every cube [universes, cubes, numbers]."""
    whole = [slice(0, source.size)] * 3
    rows = []
    for universe in range(source.universes):
        first = universe * source.per_universe
        cubes = np.stack([source.counts(first + cube, whole) for cube in range(source.per_universe)])
        rows.append(features(cubes))
    return np.stack(rows)


def fitted(seen: Array, targets: Array, ridge: float, asked: Array) -> Array:
    """Ridge regression on cubes `seen` [universes, cubes, numbers]: predictions for `asked`, [universes, cubes, 4]."""
    flat = seen.reshape(-1, seen.shape[-1])
    wanted = np.repeat(targets, seen.shape[1], 0)
    mean, spread, centre = flat.mean(0), flat.std(0) + 1e-12, wanted.mean(0)
    x = (flat - mean) / spread
    weights = np.linalg.solve(x.T @ x / len(x) * len(targets) + ridge * np.eye(x.shape[1]),
                              x.T @ (wanted - centre) / len(x) * len(targets))  # fmt: skip
    found: Array = (asked - mean) / spread @ weights + centre
    return found


def errors(study: Study, universes: str, size: int) -> Errors:
    """The errors of the fit to cubes of `size`, on the held-out universes."""
    data = study.data
    train, test = Cubes(universes, size, 0, data.train), Cubes(universes, size, data.first_test, data.test)
    seen, targets = of(train), train.targets.double().numpy()
    held = np.arange(len(seen)) % HELD == 0
    losses = [
        ((fitted(seen[~held], targets[~held], ridge, seen[held]) - targets[held][:, None]) ** 2).mean()
        for ridge in RIDGES
    ]
    best = RIDGES[int(np.argmin(losses))]
    return Errors.of([fitted(seen, targets, best, of(test))], test.targets.double().numpy())


def fit(study: Study, universes: str, out: Path) -> dict[int, Errors]:
    """The errors for every size; kept in `out`, so that they are found once."""
    found = {}
    for size in study.sizes:
        path = out / f"linear-fit-{size}.npz"
        if not path.exists():
            one = errors(study, universes, size)
            rundir.write_arrays(path, {"cube": one.cube, "universe": one.universe})
        with np.load(path, allow_pickle=False) as arrays:
            found[size] = Errors(arrays["cube"], arrays["universe"])
    return found
