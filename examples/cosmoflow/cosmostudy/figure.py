"""The plots of a study, drawn by matplotlib (extra `examples`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cosmostudy.laws import PARAMETERS, Errors, Key, Law, with_bar
from cosmostudy.study import Finished
from meshwright.errors import ConfigError

NAMES = (r"$\Omega_m$", r"$\sigma_8$", r"$n_s$", r"$H_0$")
COLOURS = ("#3f74a8", "#d9822b", "#4f9d69", "#7d5fb0")
INK, SOFT, GRID, BAD = "#1a2027", "#5a6570", "#e4e7ea", "#b3261e"
PAPER = {128: 0.0441, 256: 0.0169, 512: 0.00727}  # Oyama et al.: mean squared error of one cube, without batch norm
PAPER_NORMED = {512: 0.00445}  # with
VARIANCE = 1 / 3  # of a target, uniform in −1 … 1: the error of whoever always says 0
DPI = 110


def pyplot() -> Any:
    """matplotlib's, without a screen, in the colours of the report. Raises `ConfigError` without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ConfigError("the plots need matplotlib: pip install 'meshwright[examples]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plot

    plot.rcParams.update(
        {
            "font.size": 9,
            "axes.edgecolor": SOFT,
            "axes.labelcolor": INK,
            "text.color": INK,
            "xtick.color": SOFT,
            "ytick.color": SOFT,
            "axes.grid": True,
            "grid.color": GRID,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "savefig.dpi": DPI,
            "savefig.bbox": "tight",
        }
    )
    return plot


def errors(
    path: Path, by_key: Mapping[Key, Errors], linear: Mapping[int, Errors], said: Sequence[Law], note: str
) -> None:
    """Error against the edge of a cube: each parameter, then their mean beside the paper's, then the laws in words."""
    plot = pyplot()
    sizes = sorted(size for size, batch_norm in by_key if batch_norm)
    drawing, axes = plot.subplots(1, 3, figsize=(11.5, 4.1), width_ratios=(1, 1, 1.25))
    for axis, what, title in zip(axes, ("cube", "universe"), ("one cube", "mean of a universe's cubes"), strict=False):
        for at, (name, colour) in enumerate(zip(NAMES, COLOURS, strict=True)):
            _line(axis, sizes, [with_bar(getattr(by_key[size, True], what)[..., at]) for size in sizes], colour, name)
            fit = [getattr(linear[size], what)[..., at].mean() for size in sorted(linear)]
            axis.plot(sorted(linear), fit, ":", color=colour, lw=1.2)
        axis.axhline(VARIANCE, color=SOFT, lw=0.8)
        axis.set(title=f"error of {title}", xlabel="edge of a cube, voxels", ylabel="mean squared error")
        _logarithmic(axis, [*sizes, *linear])
        axis.legend(frameon=False, fontsize=8, loc="lower left")
    _beside_the_paper(axes[2], by_key, linear, sizes)
    broken = [law for law in said if not law.holds]
    words = f"All {len(said)} laws hold." if said and not broken else "No laws: fewer than two sizes."
    if broken:
        words = "BROKEN: " + "; ".join(f"{law.text} ({law.difference})" for law in broken)
    drawing.suptitle(note, fontsize=8.5, color=SOFT, y=1.0)
    drawing.text(0.01, 0.0, words, fontsize=9, color=BAD if broken else INK, wrap=True, va="top")
    drawing.tight_layout()
    drawing.savefig(path)
    plot.close(drawing)


def _beside_the_paper(
    axis: Any, by_key: Mapping[Key, Errors], linear: Mapping[int, Errors], sizes: Sequence[int]
) -> None:
    _line(axis, sizes, [with_bar(by_key[size, True].cube.mean(-1)) for size in sizes], INK, "here, mean of four")
    for size in (size for size, batch_norm in by_key if not batch_norm):
        value = with_bar(by_key[size, False].cube.mean(-1))
        axis.errorbar([size], [value.mean], [value.bar], fmt="x", color=BAD, capsize=3, label="here, no batch norm")
    axis.plot(sorted(linear), [linear[size].cube.mean() for size in sorted(linear)], ":", color=INK, label="linear fit")
    axis.plot(list(PAPER), list(PAPER.values()), "s--", color=SOFT, mfc="white", label="paper (N-body), no batch norm")
    axis.plot(list(PAPER_NORMED), list(PAPER_NORMED.values()), "*", color=SOFT, ms=10, label="paper, batch norm")
    axis.axhline(VARIANCE, color=SOFT, lw=0.8)
    axis.text(max(PAPER), VARIANCE * 1.04, "always the mean", ha="right", fontsize=7.5, color=SOFT)
    axis.set(title="one cube, beside the paper's", xlabel="edge of a cube, voxels")
    _logarithmic(axis, [*sizes, *PAPER])
    axis.legend(frameon=False, fontsize=8, loc="lower left")


def _line(axis: Any, sizes: Sequence[int], values: Sequence[Any], colour: str, name: str) -> None:
    bars = [value.bar for value in values]
    axis.errorbar(sizes, [v.mean for v in values], bars, fmt="o-", color=colour, capsize=3, ms=4, lw=1.4, label=name)


def _logarithmic(axis: Any, sizes: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sorted(set(sizes)), [f"{size}³" for size in sorted(set(sizes))])
    axis.minorticks_off()


def scatter(path: Path, found: Sequence[Finished]) -> None:
    """Predicted against true: a row for the smallest and the largest cubes, a column for each parameter.

    Faint dots are single cubes (2,000 at most), the others the mean of a universe's; the first seed with batch norm.
    """
    plot = pyplot()
    seed = found[0].training.seed
    own = [one for one in found if one.training.batch_norm and one.training.seed == seed] or list(found)
    ends = sorted({one.training.size for one in own})
    rows = [next(one for one in own if one.training.size == size) for size in dict.fromkeys((ends[0], ends[-1]))]
    drawing, axes = plot.subplots(
        len(rows), 4, figsize=(10.5, 2.7 * len(rows)), squeeze=False, sharex=True, sharey=True
    )
    for row, one in zip(axes, rows, strict=True):
        cubes = one.predicted.shape[1]
        for at, (axis, name, colour) in enumerate(zip(row, NAMES, COLOURS, strict=True)):
            if cubes > 1:
                true, said = np.repeat(one.truth[:, at], cubes), one.predicted[..., at].ravel()
                step = -(-len(true) // 2000)
                axis.plot(true[::step], said[::step], ".", color=colour, alpha=0.15, ms=2.5, mew=0, rasterized=True)
            axis.plot(one.truth[:, at], one.predicted[..., at].mean(1), "o", color=colour, ms=3, alpha=0.8, mew=0)
            axis.plot([-1, 1], [-1, 1], color=SOFT, lw=0.8)
            axis.set(xlim=(-1.1, 1.1), ylim=(-1.4, 1.4), title=f"{name} from {one.training.size}³")
        row[0].set_ylabel("predicted")
    for axis in axes[-1]:
        axis.set_xlabel("true, −1 … 1 over its range")
    drawing.tight_layout()
    drawing.savefig(path)
    plot.close(drawing)
    assert len(NAMES) == len(PARAMETERS)
