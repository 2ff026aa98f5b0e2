"""How close a split network comes to no communication at all.

Two one-thread ranks train the benchmark U-Net (docs/performance.md) on one volume split in depth, against two
one-thread ranks that each train on half of the volume and never talk: the limit. The halves run three times, as plain
torch runs them, with Meshwright's choice of kernels, and with these while they meet as often as the split network
(spatial_meetings.py): what is left of the distance to them is Meshwright's own. Another comparison runs the whole
volume on one rank, plain and under `parallelize`. All variants of a comparison run in the same processes, interleaved;
every figure is a median of paired ratios with a bootstrap confidence interval. Where its memory lies makes a model up
to 4 % faster or slower than its equal in the same process, for as long as that lives: `--launches` repeats all in fresh
processes, and the interval is over them too.

    python benchmarks/spatial.py                 # fp32 and bf16, 96 cubed, 21 rounds
    python benchmarks/spatial.py --size 64 --rounds 7 --dtype fp32
    python benchmarks/spatial.py --network cosmoflow        # 128 cubed, 4 channels, split in depth
    python benchmarks/spatial.py --network resnet18 --batch 4    # images of 512 squared, split in height
    python benchmarks/spatial.py --network cliff --ranks 1  # 64 cubed, base 8, where plain torch falls off its cliff
    python benchmarks/spatial.py --network tiny --ranks 1   # 8 cubed: the overhead of an operation
    python benchmarks/spatial.py --launches 6 --rounds 7    # where a few per cent matter
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from spatial_meetings import meeting
from torch import nn

import meshwright as mw
from meshwright.models.cosmoflow import CosmoFlow
from meshwright.models.resnet import resnet18
from meshwright.models.small_unet import SmallUNet, benchmark_unet
from meshwright.parallel.account import Totals, totals
from meshwright.parallel.functions import tuple_of
from meshwright.parallel.pool_kernels import Boxes, average
from meshwright.parallel.rules.halo_conv import SpatialConv, Work
from meshwright.parallel.signature import Conv

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Network:
    """A network, the size of its input's edge, and how many dims of space it has (the first of them is split)."""

    make: Callable[[int, bool], nn.Module]  # of (edge, whether for half of the input)
    edge: int
    channels: int = 4
    dims: int = 3

    def shape(self, edge: int, batch: int) -> tuple[int, ...]:
        return (batch, self.channels, *(edge,) * self.dims)

    def plan(self) -> mw.Plan:
        return mw.Plan.uniform(depth=2) if self.dims == 3 else mw.Plan.uniform(height=2)

    def format(self) -> torch.memory_format:
        return torch.channels_last_3d if self.dims == 3 else torch.channels_last


def _cosmoflow(edge: int, half: bool) -> nn.Module:
    """Without dropout, which would add noise; half of the cube has half of the features."""
    model = CosmoFlow(edge, keep=1.0)
    if half:
        model.regressor[1] = nn.Linear(model.regressor[1].in_features // 2, 2048)
        *_, last = (i for i, layer in enumerate(model.features) if isinstance(layer, nn.AvgPool3d))
        model.features[last] = nn.AvgPool3d((2, 3, 3), 2, (0, 1, 1))  # two planes are left, and torch refuses three
    return model


NETWORKS = {
    "unet": Network(lambda edge, half: benchmark_unet(), 96),
    "cosmoflow": Network(_cosmoflow, 128),
    "resnet18": Network(lambda edge, half: resnet18(), 512, channels=3, dims=2),
    "cliff": Network(lambda edge, half: SmallUNet(4, base=8, norm="none"), 64),
    "tiny": Network(lambda edge, half: benchmark_unet(), 8),
}


def same_kernels(model: nn.Module) -> nn.Module:
    """Plain modules whose convolutions and average pooling use Meshwright's choice of kernels, without any mesh."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        edges = zip(x.shape[2:], self.kernel_size, self.padding, self.stride, strict=True)
        sizes = tuple((size + 2 * p - k) // s + 1 for size, k, p, s in edges)
        conv = Conv(self.stride, self.dilation, self.groups)
        work = Work(conv, tuple((p, p) for p in self.padding), sizes)
        return SpatialConv.apply(x, self.weight, self.bias, work)

    def pool(self: Any, x: torch.Tensor) -> torch.Tensor:
        kernel, stride, pads = (tuple_of(v, 3) for v in (self.kernel_size, self.stride, self.padding))
        return average(x, Boxes(kernel, stride, pads, self.ceil_mode, math.prod(kernel)))

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.forward = forward.__get__(module)
        elif isinstance(module, nn.AvgPool3d):
            module.forward = pool.__get__(module)
    return model


def trainer(model: nn.Module, x: Any) -> Callable[[], None]:
    """One SGD step on the mean of squares, as a function."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (model(x).float() ** 2).mean().backward()
        optimizer.step()

    return step


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def rounds_of(steps: dict[str, Callable[[], None]], rounds: int) -> tuple[dict[str, list[float]], Totals]:
    """Seconds per step of each variant, interleaved in a fresh random order each round, barriers around each."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    spent = Totals()
    for turn in range(-2, rounds):  # two rounds to warm up
        names = list(steps)
        order.shuffle(names)
        for name in names:
            before = totals.copy()
            barrier()
            start = time.perf_counter()
            steps[name]()
            barrier()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
                if name == "meshwright":
                    change = totals - before
                    spent = Totals(*(a + b for a, b in zip(vars(spent).values(), vars(change).values(), strict=True)))
    return seconds, spent


def two_ranks(name: str, size: int, batch: int, rounds: int, dtype_name: str, plain: bool) -> dict[str, Any]:
    """Runs on each of two ranks: split against independent halves."""
    torch.set_num_threads(1)
    network, dtype, rank = NETWORKS[name], DTYPES[dtype_name], dist.get_rank()
    torch.manual_seed(0)
    base = network.make(size, False).to(dtype=dtype, memory_format=network.format())
    lone = network.make(size, True).to(dtype=dtype, memory_format=network.format())
    plan = network.plan()
    x = torch.randn(network.shape(size, batch)).to(dtype=dtype, memory_format=network.format())
    half = x[mw.interval(tuple(x.shape), plan, rank)].clone(memory_format=torch.preserve_format)
    steps = {
        "plain halves": trainer(copy.deepcopy(lone), half),
        "tuned halves": trainer(same_kernels(copy.deepcopy(lone)), half),
        "met halves": trainer(meeting(same_kernels(copy.deepcopy(lone))), half),
        "meshwright": trainer(mw.parallelize(copy.deepcopy(base), plan, strict=True), mw.shard(x, plan)),
    }
    seconds, spent = rounds_of({name: step for name, step in steps.items() if plain or "plain" not in name}, rounds)
    return {"seconds": seconds, "spent": vars(spent)}


def one_rank(name: str, size: int, batch: int, rounds: int, dtype_name: str, plain: bool) -> dict[str, Any]:
    """Runs on one rank: the whole volume, plain and under `parallelize`."""
    torch.set_num_threads(1)
    network, dtype = NETWORKS[name], DTYPES[dtype_name]
    torch.manual_seed(0)
    base = network.make(size, False).to(dtype=dtype, memory_format=network.format())
    plan = mw.Plan.uniform()
    x = torch.randn(network.shape(size, batch)).to(dtype=dtype, memory_format=network.format())
    steps = {
        "plain": trainer(copy.deepcopy(base), x),
        "meshwright": trainer(mw.parallelize(copy.deepcopy(base), plan, strict=True), mw.shard(x, plan)),
    }
    seconds, spent = rounds_of({name: step for name, step in steps.items() if plain or "plain" not in name}, rounds)
    return {"seconds": seconds, "spent": vars(spent)}


def ratio(above: list[float], below: list[float], launches: int = 1) -> tuple[float, float, float]:
    """Median of paired ratios and its 95 % bootstrap interval: launches are drawn, then rounds of each."""
    pairs = [a / b for a, b in zip(above, below, strict=True)]
    draw, each = random.Random(1), len(pairs) // launches
    parts = [pairs[i * each : (i + 1) * each] for i in range(launches)]

    def drawn() -> list[float]:
        return [pair for part in draw.choices(parts, k=launches) for pair in draw.choices(part, k=each)]

    medians = sorted(statistics.median(drawn()) for _ in range(2000))
    return statistics.median(pairs), medians[50], medians[1949]


def launched(work: Callable[..., dict[str, Any]], ranks: int, arguments: tuple[Any, ...], launches: int) -> Any:
    """Seconds of the slowest rank in each round, launch after launch, and what the rank that spent most did in all."""
    seconds: dict[str, list[float]] = {}
    spent: dict[str, float] = {}
    for _ in range(launches):
        results = mw.launch(work, ranks=ranks, args=arguments, threads=1)
        for name in results[0]["seconds"]:
            slowest = [max(times) for times in zip(*(r["seconds"][name] for r in results), strict=True)]
            seconds.setdefault(name, []).extend(slowest)
        for key in results[0]["spent"]:
            spent[key] = spent.get(key, 0.0) + max(r["spent"][key] for r in results)
    return seconds, spent


def show(title: str, seconds: dict[str, list[float]], spent: dict[str, float], launches: int) -> dict[str, Any]:
    """Print one comparison; returns it as plain values."""
    print(f"\n{title}")
    rounds = len(seconds["meshwright"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"  {name:14s} {middle:8.4f} s  (min {min(values):.4f}, max {max(values):.4f})")
    found = {}
    for name in seconds:
        if name != "meshwright":
            found[name] = ratio(seconds["meshwright"], seconds[name], launches)
            middle, low, high = found[name]
            print(f"  meshwright / {name:14s} {middle:.3f}  [{low:.3f}, {high:.3f}]")
    if "met halves" in seconds:
        found["met by tuned"] = ratio(seconds["met halves"], seconds["tuned halves"], launches)
        middle, low, high = found["met by tuned"]
        print(f"  met / tuned halves          {middle:.3f}  [{low:.3f}, {high:.3f}]")
    for key in ("exchange_post_s", "exchange_wait_s", "boundary_s", "reduction_s"):
        print(f"  per step: {key:16s} {1e3 * spent[key] / rounds:8.2f} ms")
    print(f"  per step: {spent['sent_bytes'] / rounds / 2**20:.2f} MiB in {spent['messages'] / rounds:.0f} messages")
    return {"seconds": {name: statistics.median(v) for name, v in seconds.items()}, "ratios": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), default="unet")
    parser.add_argument("--size", type=int, help="edge of the input (default: that of the network)")
    parser.add_argument("--batch", type=int, default=1, help="samples of a step")
    parser.add_argument("--rounds", type=int, default=21, help="counted rounds of each launch")
    parser.add_argument("--launches", type=int, default=1, help="how often each comparison runs, in fresh processes")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "both"], default="both")
    parser.add_argument("--ranks", choices=["1", "2", "both"], default="both", help="which comparisons to run")
    parser.add_argument("--no-plain", action="store_true", help="leave plain torch out (bf16 without AVX512: minutes)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    options = parser.parse_args()
    size = options.size or NETWORKS[options.network].edge
    print(
        f"torch {torch.__version__}, {platform.machine()}, {options.network}, {options.batch} of edge {size}, "
        f"{options.launches} × {options.rounds} rounds"
    )
    figures: dict[str, Any] = {}
    for dtype in ["fp32", "bf16"] if options.dtype == "both" else [options.dtype]:
        arguments = (options.network, size, options.batch, options.rounds, dtype, not options.no_plain)
        for ranks, work, title in (
            (2, two_ranks, "two ranks, the first dim of space split"),
            (1, one_rank, "one rank, the whole"),
        ):
            if options.ranks in (str(ranks), "both"):
                seconds, spent = launched(work, ranks, arguments, options.launches)
                name = f"{dtype} {'two ranks' if ranks == 2 else 'one rank'}"
                figures[name] = show(f"{dtype}, {title}", seconds, spent, options.launches)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
