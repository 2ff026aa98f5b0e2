"""Two studies that held out the same universes: how much smaller the errors of one are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cosmostudy import settings, study
from cosmostudy.laws import SIGMA_8, difference
from cosmostudy.report import label
from cosmostudy.study import Finished
from meshwright.errors import ConfigError


def against(found: list[Finished], other: Path) -> str:
    """A table of the paired differences between the errors of single cubes in `other` and in `found`.

    Raises `ConfigError` where `other` is no study, or the truth of its held-out universes is another one.
    """
    path = other / study.STUDY
    if not path.exists():
        raise ConfigError(f"--against {other}: there is no {path}")
    theirs = study.finished(settings.load(file=path), other)
    truths = [one.truth for one in (*found, *theirs)]
    if any(truth.shape != truths[0].shape or not np.array_equal(truth, truths[0]) for truth in truths):
        raise ConfigError(
            f"--against {other}: that study held out other universes; data.test, data.test_from and data.seed say which"
        )
    here, there = study.errors(found), study.errors(theirs)
    common = [key for key in here if key in there]
    if not common:
        raise ConfigError(f"--against {other}: no training of the same size is finished in both")
    lines = [f"Errors of one cube are smaller than in {other} by (same universes, ± 95 %):", ""]
    lines += ["| cubes | there | here | mean | σ_8 |", "|---|---|---|---|---|"]
    for key in common:
        worse, better = there[key].cube, here[key].cube
        mean, sigma_8 = (
            difference(a, b)
            for a, b in ((worse.mean(-1), better.mean(-1)), (worse[..., SIGMA_8], better[..., SIGMA_8]))
        )
        lines.append(f"| {label(key)} | {worse.mean():.3f} | {better.mean():.3f} | {mean} | {sigma_8} |")
    return "\n".join(lines)
