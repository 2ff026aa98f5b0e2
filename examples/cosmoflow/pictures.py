"""The pictures of docs/universes.md: slices of universes, and their spectra beside the input.

    python examples/cosmoflow/pictures.py docs/images

Everything follows from the seeds below; camb (extra `cosmology`) and matplotlib (extra `examples`) are needed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cosmology import Array, Parameters, growth
from cosmostudy.figure import COLOURS, INK, SOFT, pyplot
from displacement import potential, second_source
from fields import gaussian_modes
from measure import Modes, contrast
from meshwright.data import chance
from meshwright.plan.geometry import Interval
from particles import counts, positions
from slabs import Slabs
from spectrum import power_spectrum
from universes import Settings

MIDDLE = Parameters(0.30, 0.865, 0.95, 0.67)
SLICES = Settings(voxels=96, box_mpc=192, particles=2, assignment="cic", lpt=2)  # 2 Mpc/h to a voxel
SPECTRA = Settings(voxels=64, box_mpc=512, particles=2, assignment="cic")
THICK = 8  # planes of a slice
ORIGINAL_REDSHIFTS = (3.0, 1.5, 0.5, 0.0)


def universe(settings: Settings, parameters: Parameters, redshift: float, key: int) -> npt.NDArray[np.float64]:
    """Particles per cell over their mean, [N, N, N]."""
    slabs = Slabs(settings.grid)
    power = power_spectrum(parameters, settings.spectrum)
    modes = gaussian_modes(slabs, chance.key(key), power, settings.box_mpc)
    second = second_source(slabs, modes) if settings.lpt == 2 else None
    packed = positions(settings, slabs, potential(slabs, modes, second, parameters.omega_m, redshift))
    return 1 + contrast(counts(settings, Interval(0, settings.voxels), packed.reshape(-1)))


def slices(path: Path) -> None:
    """One universe at four redshifts; below it what changes with σ_8 and Ω_m alone, everything else the same."""
    plot = pyplot()
    early = [(MIDDLE, redshift, f"z = {redshift:g}") for redshift in ORIGINAL_REDSHIFTS]
    other = [(replace(MIDDLE, sigma_8=value), 0.0, rf"z = 0, $\sigma_8$ = {value:g}") for value in (0.78, 0.95)] + [
        (replace(MIDDLE, omega_m=value), 0.0, rf"z = 0, $\Omega_m$ = {value:g}") for value in (0.25, 0.35)
    ]
    figure, axes = plot.subplots(2, 4, figsize=(9.2, 4.9), layout="constrained")
    for axis, (parameters, redshift, title) in zip(axes.flat, early + other, strict=True):
        density = universe(SLICES, parameters, redshift, 7)[:THICK].mean(axis=0)
        axis.imshow(np.log10(0.05 + density), cmap="magma", vmin=-1.1, vmax=0.9, interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    figure.savefig(path)
    plot.close(figure)


def spectra(path: Path) -> None:
    """Left the spectra, right their ratio to the input, with twice the scatter that a box has by chance."""
    plot = pyplot()
    figure, (left, right) = plot.subplots(1, 2, figsize=(9.2, 3.8), layout="constrained")
    modes = Modes(SPECTRA.voxels, SPECTRA.box_mpc)
    power = power_spectrum(MIDDLE, "eh")
    k, shells = modes.of(lambda k: k), modes.of(power)
    fine = np.geomspace(0.005, 1.0, 400)
    for name, label, style in (
        ("eh", "Eisenstein & Hu", "-"),
        ("eh-nowiggle", "without oscillations", ":"),
        ("camb", "camb", "--"),
    ):
        line = power_spectrum(MIDDLE, name)(fine)  # type: ignore[arg-type]
        left.loglog(fine, line, style, color=INK, linewidth=1, label=label)
        if name != "eh":
            right.semilogx(fine, line / power(fine), style, color=INK, linewidth=1)
    groups = _groups(len(k))
    at = _mean(k, modes.count, groups)
    by_chance = np.sqrt([2 / modes.count[group].sum() for group in groups])
    right.fill_between(at, 1 - 2 * by_chance, 1 + 2 * by_chance, color=SOFT, alpha=0.18, linewidth=0)
    for (label, found), colour in zip(_measured(modes), COLOURS, strict=False):
        left.loglog(at, _mean(found, modes.count, groups), ".", color=colour, markersize=4, label=label)
        ratio = _mean(found / shells, modes.count, groups)
        right.semilogx(at, ratio, ".-", color=colour, markersize=4, linewidth=0.8)
    left.set(xlabel="k [h/Mpc]", ylabel="P(k) [(Mpc/h)³]", xlim=(0.01, 1), ylim=(30, 4e4))
    right.set(xlabel="k [h/Mpc]", ylabel="P(k) ÷ Eisenstein & Hu", xlim=(0.01, 1), ylim=(0.6, 1.4))
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path)
    plot.close(figure)


def _measured(modes: Modes) -> Sequence[tuple[str, Array]]:
    slabs = Slabs(SPECTRA.voxels)
    field = gaussian_modes(slabs, chance.key(8), power_spectrum(MIDDLE, "eh"), SPECTRA.box_mpc)
    scale = SPECTRA.box_mpc**3 / SPECTRA.voxels**6

    def of_particles(settings: Settings, redshift: float) -> Array:
        found = universe(settings, MIDDLE, redshift, 8) - 1
        unwindowed = np.abs(np.fft.rfftn(found) / modes.cloud()) ** 2
        return modes.mean(unwindowed) * scale / growth(MIDDLE.omega_m, redshift) ** 2

    return (
        ("Gaussian field", modes.power(slabs.backward(lambda row: field[:, row].copy()))),
        ("particles, z = 9, ÷ D²", of_particles(SPECTRA, 9.0)),
        ("particles, z = 0, Zel'dovich", of_particles(SPECTRA, 0.0)),
        ("particles, z = 0, second order", of_particles(replace(SPECTRA, lpt=2), 0.0)),
    )


def _groups(shells: int) -> list[slice]:
    """At most 24 groups of neighbouring shells, even in the logarithm."""
    edges = np.unique(np.geomspace(1, shells + 1, 25).astype(int))
    return [slice(lo - 1, hi - 1) for lo, hi in pairwise(edges)]


def _mean(values: Array, count: Array, groups: Sequence[slice]) -> Array:
    return np.array([np.average(values[group], weights=count[group]) for group in groups])


def main(arguments: Sequence[str]) -> int:
    """Write the pictures into the folder that is named."""
    if len(arguments) != 1:
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("universe_slices.png", slices), ("universe_spectra.png", spectra)):
        draw(folder / name)
        print(folder / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
