"""What splitting the deep convolutions of ResNet-18 by filters instead of space saves, and from which weights on.

Two one-thread ranks train on images of 512 squared, split in height. All variants share one parallelized module: before
each step the constants of `plan/filters.py` are set. Variants are interleaved in a fresh random order each round, with
barriers around each; printed are medians of the slower rank's seconds and paired ratios to no split by filters.

    python benchmarks/by_filters.py                  # one image, fp32, 15 rounds: the table in docs/constants.md
    python benchmarks/by_filters.py --batch 8 --dtype bf16
"""

from __future__ import annotations

import argparse
import math
import statistics
from functools import cache
from typing import Any

import torch
from spatial import DTYPES, NETWORKS, ratio, rounds_of, trainer

import meshwright as mw
from meshwright.parallel.rules import conv as rule
from meshwright.plan import filters

NEVER = "in space"
# fewest weights, weights ÷ input elements, and the same of an input that is split by channels already
VARIANTS: dict[str, tuple[float, float, float]] = {
    NEVER: (math.inf, math.inf, math.inf),
    "weights ÷ input ≥ 2": (filters.FEWEST_WEIGHTS, 2, filters.STAY),
    "as it is": (filters.FEWEST_WEIGHTS, filters.WEIGHTS_PER_INPUT, filters.STAY),
    "back to space between": (filters.FEWEST_WEIGHTS, filters.WEIGHTS_PER_INPUT, math.inf),
    "twice the fewest weights": (2 * filters.FEWEST_WEIGHTS, filters.WEIGHTS_PER_INPUT, filters.STAY),
    "half, ÷ input ≥ 0.5": (filters.FEWEST_WEIGHTS // 2, 0.5, filters.STAY),
}


def work(batch: int, dtype_name: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of this rank's steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network, dtype = NETWORKS["resnet18"], DTYPES[dtype_name]
    plan, kind = network.plan(), {"dtype": dtype, "memory_format": network.format()}
    x = torch.randn(network.shape(network.edge, batch)).to(**kind)
    model = mw.parallelize(network.make(network.edge, False).to(**kind), plan, strict=True)
    step, decide = trainer(model, mw.shard(x, plan)), rule.by_filters.__wrapped__

    def variant(constants: tuple[float, float, float]) -> Any:
        @cache
        def chosen(*given: Any) -> Any:
            filters.FEWEST_WEIGHTS, filters.WEIGHTS_PER_INPUT, filters.STAY = constants  # type: ignore[assignment]
            return decide(*given)

        def run() -> None:
            rule.by_filters = chosen
            step()

        return run

    return rounds_of({name: variant(constants) for name, constants in VARIANTS.items()}, rounds)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="images of a step")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    found = mw.launch(work, ranks=2, args=(options.batch, options.dtype, options.rounds), threads=1)
    seconds = {name: [max(pair) for pair in zip(*(rank[name] for rank in found), strict=True)] for name in VARIANTS}
    print(f"torch {torch.__version__}, {options.batch} image(s) of 512², {options.dtype}, {options.rounds} rounds")
    for name, values in seconds.items():
        middle, low, high = ratio(values, seconds[NEVER], 1)
        print(f"  {name:28s} {statistics.median(values):7.4f} s   {middle:.3f}  [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
