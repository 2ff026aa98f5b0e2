"""The plan files of `examples/cosmoflow/plans`: how 8 to 2,048 ranks share cubes of 128³ to 512³ and a batch of 64.

    python -m cosmostudy.plans           (in examples/cosmoflow) writes them anew

A cube is split over up to `GROUP` ranks, in depth first and then in height: slabs talk to two neighbours only, and 8
of them are equally thick in every layer down to 8³ positions; more would be thin (16 planes of 128³ are left on each
rank), so further ranks split the height. The rest of the ranks shares the batch.
"""

from __future__ import annotations

from pathlib import Path

from meshwright.plan.plan import Plan

FOLDER = Path(__file__).resolve().parents[1] / "plans"
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
BATCH = 64  # samples a step, as published
DEPTH = 8  # ranks along depth at most
GROUP = 32  # ranks that share a cube at most


def plan_for(ranks: int) -> Plan:
    """Groups of four ranks or more share a cube, up to 64 groups share the batch.

    8 ranks: 2 groups of depth 4. 2,048: 64 groups of depth 8 × height 4. Raises `ValueError` if `ranks` is no power of
    two from 8 to 2,048.
    """
    if ranks not in RANKS:
        raise ValueError(f"{ranks} ranks: plans are made for {', '.join(map(str, RANKS))}")
    group = min(GROUP, max(4, ranks // BATCH))
    data = ranks // group
    depth = min(DEPTH, group)
    return Plan.uniform(data=data, depth=depth, height=group // depth)


def write(folder: Path = FOLDER) -> list[Path]:
    """One file for each number of ranks."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{ranks}.yaml" for ranks in RANKS]
    for ranks, path in zip(RANKS, paths, strict=True):
        plan_for(ranks).save(path)
    return paths


if __name__ == "__main__":
    print(*write(), sep="\n")
