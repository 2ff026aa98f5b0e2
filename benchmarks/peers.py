"""Against others that split the same network: LBANN's DistConv and NVIDIA PhysicsNeMo's ShardTensor.

Two one-thread ranks train the benchmark U-Net (docs/performance.md) on one volume split in depth: same weights, same
volume, each library as its documents advise (peers_rank.py says how). Beside them the limit: two ranks that each
train on half of the volume and never talk, as plain torch runs them and with Meshwright's choice of kernels. Every
contender has two processes of its own, which live for the whole run. The rounds interleave them in random order and
only one pair computes at a time. Before any timing, loss and gradients are compared with one device. The peers run in
channels_last_3d and in torch's default format; the faster of the two counts.

    python benchmarks/peers.py --distconv ~/DistConv --shardtensor ~/physicsnemo/.venv/bin/python
    python benchmarks/peers.py --size 48 --rounds 3 --dtype fp32    # peers not given are skipped with a message

--distconv is a checkout of github.com/LBANN/DistConv; nothing of it is installed. --shardtensor is the Python of an
environment with nvidia-physicsnemo and torch; it needs nothing of Meshwright. Neither comes with Meshwright.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers_pair import Pair, PeerError
from peers_rank import CONTIGUOUS, EXACT_EDGE
from spatial import ratio

LIMITS = ("plain halves", "tuned halves")
PEERS = ("distconv", "shardtensor")
FORMATS = ("", CONTIGUOUS)  # each peer runs in channels_last_3d and in torch's default; the faster one counts
TARGETS = {"fp32": 1.00, "bf16": 1.10}  # a peer's step ÷ ours, at least
EXACT = 1e-8  # what a model may differ from one device in fp64
ROUNDED = 1e-6  # a wrong exchange is far above this, a factor that was rounded to fp32 below
NOISES = 10  # how many times the noise of one device a right answer may differ in the timed dtype …
FLOOR = 1e-5  # … which by chance may be none


def absent(options: argparse.Namespace) -> dict[str, str]:
    """Which peers are not here, and why."""
    missing = {}
    if options.distconv is None:
        missing["distconv"] = "no checkout given (--distconv PATH)"
    elif not (Path(options.distconv) / "distconv" / "__init__.py").is_file():
        missing["distconv"] = f"{options.distconv} is no checkout of DistConv: it has no distconv/__init__.py"
    if options.shardtensor is None:
        missing["shardtensor"] = "no environment given (--shardtensor PYTHON)"
    else:
        look = "import importlib.util as u, sys; sys.exit(u.find_spec('physicsnemo') is None)"
        try:
            found = subprocess.run([options.shardtensor, "-c", look], capture_output=True, check=False).returncode == 0
        except OSError:
            found = False
        if not found:
            missing["shardtensor"] = f"{options.shardtensor} is no Python with nvidia-physicsnemo"
    return missing


def start(name: str, options: argparse.Namespace, size: int, dtype: str, folder: Path) -> tuple[Pair, dict[str, float]]:
    """A contender's processes, built and compared with one device (the limit has no answer to compare)."""
    python = options.shardtensor if name.startswith("shardtensor") else sys.executable
    checkout = str(Path(options.distconv).resolve()) if name.startswith("distconv") else ""
    pair = Pair(name, python, size, dtype, folder, checkout)
    try:
        versions = {answer["torch"] for answer in pair.ask()}
        errors = {} if name in LIMITS else pair.ask("check")[0]
    except BaseException:
        pair.stop()
        raise
    print(f"  {name}: torch {', '.join(versions)}", flush=True)
    return pair, errors


def timed(pairs: dict[str, Pair], rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds per step of the slower rank, interleaved in a fresh random order each round; and who fell out, why."""
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in pairs}
    failed: dict[str, str] = {}
    for turn in range(-2, rounds):  # two rounds to warm up
        names = [name for name in pairs if name not in failed]
        order.shuffle(names)
        for name in names:
            try:
                step = max(answer["seconds"] for answer in pairs[name].ask("step"))
            except PeerError as error:
                if not name.startswith(PEERS):
                    raise
                failed[name] = str(error)
                continue
            if turn >= 0:
                seconds[name].append(step)
    return {name: values for name, values in seconds.items() if name not in failed}, failed


def verdict(errors: dict[str, float], noise: dict[str, float]) -> str:
    """Whether a contender's answer is that of one device, in a word; NaN is wrong."""
    if not errors:
        return "has no answer"
    bound = max(FLOOR, NOISES * max(noise.values()))
    if errors["fp64"] <= ROUNDED and all(errors[key] <= bound for key in noise):
        return "right" if errors["fp64"] <= EXACT else "right to fp32"
    return "WRONG"


def compare(options: argparse.Namespace, dtype: str, missing: dict[str, str]) -> dict[str, Any]:
    """One dtype: start, check, time, print the table; returns it as plain values."""
    print(f"\n{dtype}, two ranks of one thread, {options.size} cubed split in depth")
    peers = [peer + memory_format for peer in PEERS if peer not in missing for memory_format in FORMATS]
    pairs: dict[str, Pair] = {}
    errors: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        alone = Pair("one device", sys.executable, options.size, dtype, folder, "", ranks=1)
        try:
            (noise,) = alone.ask()
            for name in (*LIMITS, "meshwright", *peers):
                try:
                    pairs[name], errors[name] = start(name, options, options.size, dtype, folder)
                except PeerError as error:
                    if name not in peers:
                        raise
                    failed[name] = str(error)
            seconds, fallen = timed(pairs, options.rounds)
        finally:
            for pair in (alone, *pairs.values()):
                pair.stop()
    failed |= fallen
    return report(dtype, options.size, seconds, errors, noise, missing | failed)


def report(
    dtype: str,
    size: int,
    seconds: dict[str, list[float]],
    errors: dict[str, dict[str, float]],
    noise: dict[str, float],
    without: dict[str, str],
) -> dict[str, Any]:
    """Print the table of one dtype."""
    print(f"\n| {dtype}, {size}³ | a step (min, max) | ÷ Meshwright | fp64 | loss | gradients | answer |")
    print("|---|---|---|---|---|---|---|")
    ratios = {name: ratio(values, seconds["meshwright"]) for name, values in seconds.items()}
    for name, values in seconds.items():
        middle, low, high = ratios[name]
        against = "1" if name == "meshwright" else f"{middle:.3f} [{low:.3f}, {high:.3f}]"
        figures = " | ".join(
            f"{errors[name][key]:.1e}" if errors[name] else "" for key in ("fp64", "loss", "gradients")
        )
        span = f"{statistics.median(values):.3f} s ({min(values):.3f}, {max(values):.3f})"
        print(f"| {name} | {span} | {against} | {figures} | {verdict(errors[name], noise)} |")
    for name, why in without.items():
        print(f"| {name} | {why} | | | | | |")
    print(
        f"\nfp64: largest error on {EXACT_EDGE}³ against one device. loss, gradients: those of {dtype} against fp32 on"
    )
    print(f"one device, where one device itself has {noise['loss']:.1e} and {noise['gradients']:.1e}")
    for peer in PEERS:
        if found := [ratios[name] for name in ratios if name.startswith(peer)]:
            middle, low, _ = min(found)
            met = "met" if low >= TARGETS[dtype] else "within the noise" if middle >= TARGETS[dtype] else "missed"
            print(f"{peer}: {middle:.2f} × Meshwright's step; at least {TARGETS[dtype]:.2f} wanted: {met}")
    return {"seconds": seconds, "ratios": ratios, "errors": errors, "noise": noise, "without": without}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=96, help="edge of the volume (default: 96)")
    parser.add_argument(
        "--rounds", type=int, default=21, help="counted rounds (default: 21; 0: only say which are here)"
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16", "both"], default="both")
    parser.add_argument("--distconv", metavar="PATH", help="a checkout of DistConv")
    parser.add_argument("--shardtensor", metavar="PYTHON", help="the Python of an environment with nvidia-physicsnemo")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    options = parser.parse_args()
    missing = absent(options)
    for name, why in missing.items():
        print(f"{name}: skipped: {why}")
    if options.rounds < 1:
        return
    print(f"{platform.machine()}, {options.rounds} rounds")
    dtypes = ["fp32", "bf16"] if options.dtype == "both" else [options.dtype]
    figures = {dtype: compare(options, dtype, missing) for dtype in dtypes}
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
