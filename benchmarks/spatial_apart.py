"""Plain torch and Meshwright as their users run them: each in processes of its own, one after the other by turns.

In spatial.py all variants share their processes, so what Meshwright arranges for a process (on CPUs, that freed memory
stays with it) serves plain torch as well. Here it does not; and on two ranks two more sorts of halves that never talk
tell the one from the other: with Meshwright's choice of kernels ("tuned"), and these keeping their memory too ("kept").

    python benchmarks/spatial_apart.py --ranks 1 --dtype bf16            # the benchmark U-Net, 96 cubed, 21 rounds
    python benchmarks/spatial_apart.py --network resnet18 --dtype fp32   # two ranks against two halves that never talk
    git worktree add ../before COMMIT
    python benchmarks/spatial_apart.py --network resnet18 --before ../before   # what a change gains, in one run
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peers_pair import Pair
from peers_rank import seconds_of
from spatial import DTYPES, NETWORKS, ratio, same_kernels, trainer

import meshwright as mw
from meshwright.cluster.pages import keep_pages

NAMES = ("plain torch", "tuned halves", "kept halves", "meshwright")
BEFORE = "before"  # Meshwright of another checkout


def names(ranks: int) -> tuple[str, ...]:
    """Who is timed."""
    return NAMES if ranks == 2 else (NAMES[0], NAMES[-1])


def serve(
    name: str, edge: int, dtype_name: str, rank: int, folder: Path, what: str, say: Callable[[Any], None]
) -> None:
    """Build, and take a step whenever the parent asks for one; `what` is the network and how many ranks and samples."""
    network, (ranks, batch), dtype = NETWORKS[what.split()[0]], map(int, what.split()[1:]), DTYPES[dtype_name]
    store = dist.FileStore(str(folder / name.replace(" ", "-")), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    torch.manual_seed(0)
    split = ranks == 2 and name != "meshwright"
    model = network.make(edge, split).to(dtype=dtype, memory_format=network.format())
    x = torch.randn(network.shape(edge, batch)).to(dtype=dtype, memory_format=network.format())
    plan = network.plan() if ranks == 2 else mw.Plan.uniform()
    if name == "meshwright":
        step = trainer(mw.parallelize(model, plan, strict=True), mw.shard(x, plan))
    else:
        if name != "plain torch":
            same_kernels(model)
        if name == "kept halves" and not keep_pages():
            raise SystemExit("glibc could not be told to keep memory")
        step = trainer(model, x[mw.interval(tuple(x.shape), plan, rank)].clone(memory_format=torch.preserve_format))
    del x
    say({})
    for _ in sys.stdin:
        say({"seconds": seconds_of(step)})
    dist.destroy_process_group()


def timed(
    what: str, edge: int, dtype: str, rounds: int, launches: int, before: Path | None = None
) -> dict[str, list[float]]:
    """Seconds of the slowest rank in each round, in fresh processes for each launch. `before`: of that checkout too."""
    order, timed_names = random.Random(0), names(int(what.split()[1])) + ((BEFORE,) if before else ())
    seconds: dict[str, list[float]] = {name: [] for name in timed_names}
    for _ in range(launches):
        with tempfile.TemporaryDirectory() as folder:
            there = Path(folder)
            python, rest = (sys.executable, edge, dtype), (what, int(what.split()[1]))
            pairs = {name: Pair(name, *python, there, *rest, Path(__file__)) for name in timed_names if name in NAMES}
            if before:
                (there / BEFORE).mkdir()
                script = before / "benchmarks" / Path(__file__).name
                pairs[BEFORE] = Pair("meshwright", *python, there / BEFORE, *rest, script, before / "src")
            try:
                for pair in pairs.values():
                    pair.ask()
                for turn in range(-3, rounds):  # to warm up
                    for name in order.sample(timed_names, len(timed_names)):
                        step = max(answer["seconds"] for answer in pairs[name].ask("step"))
                        if turn >= 0:
                            seconds[name].append(step)
            finally:
                for pair in pairs.values():
                    pair.stop()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), default="unet")
    parser.add_argument("--size", type=int, help="edge of the input (default: that of the network)")
    parser.add_argument("--ranks", type=int, choices=[1, 2], default=2)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--batch", type=int, default=1, help="samples of a step")
    parser.add_argument("--rounds", type=int, default=21, help="counted rounds of each launch")
    parser.add_argument("--launches", type=int, default=1, help="how often all of it runs, in fresh processes")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="time the Meshwright of this checkout as well")
    options = parser.parse_args()
    before = options.before and options.before.resolve()
    if before and not (before / "benchmarks" / Path(__file__).name).is_file():
        parser.error(f"--before {options.before}: no checkout of Meshwright with benchmarks/{Path(__file__).name}")
    size = options.size or NETWORKS[options.network].edge
    print(
        f"torch {torch.__version__}, {options.network}, {options.batch} of edge {size}, {options.dtype}, "
        f"{options.ranks} rank(s), {options.launches} × {options.rounds} rounds"
    )
    what = f"{options.network} {options.ranks} {options.batch}"
    seconds = timed(what, size, options.dtype, options.rounds, options.launches, before)
    for name, values in seconds.items():
        print(f"  {name:12s} {statistics.median(values):8.4f} s  (min {min(values):.4f}, max {max(values):.4f})")
    for name in (name for name in seconds if name != NAMES[-1]):
        middle, low, high = ratio(seconds["meshwright"], seconds[name], options.launches)
        print(f"  meshwright / {name:12s} {middle:.3f}  [{low:.3f}, {high:.3f}]")


def _rank() -> None:
    name, edge, dtype, rank, folder, what = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    torch.set_num_threads(1)
    try:
        serve(name, int(edge), dtype, int(rank), Path(folder), what, say)
    except Exception as error:  # noqa: BLE001 (the parent ends all of it and says why)
        traceback.print_exc()
        say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    _rank() if len(sys.argv) == 7 and sys.argv[1] in NAMES else main()
