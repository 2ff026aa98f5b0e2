"""Dice against the size of the sub-volume: the published 3-D U-Net on phantoms of a liver with tumours.

    examples/unet/run                       64 cubed, sub-volumes of 16, 32 and 64, three seeds
    examples/unet/run --quick               two sizes, one seed, few steps
    examples/unet/run --size 128 --edges 32 64 128 --ranks 4 --set model.base=32

Every training is a run of `meshwright train` on files; only `augment.patch`, the batch and the split differ, so that
each step sees the same number of voxels: smaller sub-volumes come in batches split over the ranks, the whole volume is
split in depth. Validation is always on whole volumes that were not trained on. What is finished is not repeated; what
was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phantom import CLASSES
from phantom_files import write_all

DICE = "dice_against_size"
_ALL = (
    f"data.classes=[{', '.join(CLASSES)}]",
    "optim.lr=0.01",
    "checkpoint.every=25",
    "train.validate_every=0",
    "data.held_out=0.2",
)


@dataclass(frozen=True)
class Training:
    """One run: sub-volumes of `edge`, weights and order of samples by `seed`."""

    edge: int
    seed: int

    def folder(self, out: Path) -> Path:
        return out / f"edge{self.edge}-seed{self.seed}"


def command(training: Training, args: argparse.Namespace, data: Path) -> list[str]:
    """The call of `meshwright train`; the last settings are the user's."""
    parts = (args.size // training.edge) ** 3
    settings = [f"data.path={data}", "model.name=unet3d", f"model.base={args.base}", f"train.steps={args.steps}"]
    settings += [f"seed={training.seed}", f"train.batch={parts}", *_ALL]
    if parts > 1:
        settings += [f"augment.patch=[{training.edge}, {training.edge}, {training.edge}]", f"plan.data={args.ranks}"]
    else:
        # a step of one volume trains on that volume's own statistics: no running average is like them
        settings += [f"plan.depth={args.ranks}", "train.validate_norm=own"]
    begin = [sys.executable, "-m", "meshwright", "train", "--ranks", str(args.ranks)]
    return begin + [word for setting in (*settings, *args.set) for word in ("--set", setting)]


def train(training: Training, args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """The summary of a run and its ranks, after what is left of it has been trained."""
    folder = training.folder(args.out)
    if not (folder / "summary.json").exists():
        begun = (folder / "config.yaml").exists()
        where = ["--resume", str(folder)] if begun else ["--run", str(folder)]
        call = [*command(training, args, data), *where]
        if begun:  # its settings are those in the folder
            call = [sys.executable, "-m", "meshwright", "train", *where]
        subprocess.run(call, check=True)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text("utf-8"))
    ranks = json.loads((folder / "ranks.json").read_text("utf-8"))
    dice = dict(zip(summary["classes"], summary["dice"], strict=True))
    return summary | {"dice": [dice[name] for name in CLASSES[1:]], "peak_bytes": max(r["peak_bytes"] for r in ranks)}


def spread(values: Sequence[float]) -> float:
    """The standard error of the mean over seeds; 0 for one seed."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def law(by_edge: dict[int, list[float]]) -> str | None:
    """What does not hold of "the whole volume is better than the smallest sub-volume, by more than the bars"."""
    small, large = min(by_edge), max(by_edge)
    gain = statistics.mean(by_edge[large]) - statistics.mean(by_edge[small])
    bars = spread(by_edge[small]) + spread(by_edge[large])
    if gain > bars:
        return None
    return f"mean Dice at {large} minus at {small} is {gain:.3f}, the error bars are {bars:.3f}"


def table(results: dict[Training, dict[str, Any]]) -> str:
    """The results as Markdown, a row for each edge: means over seeds ± standard errors."""
    lines = [
        "| sub-volume | Dice liver | Dice tumour | mean | seconds a run | peak MiB of a rank |",
        "|---|---|---|---|---|---|",
    ]
    for edge in sorted({training.edge for training in results}):
        rows = [result for training, result in results.items() if training.edge == edge]
        columns = [[row["dice"][i] for row in rows] for i in range(len(rows[0]["dice"]))]
        columns.append([statistics.mean(row["dice"]) for row in rows])
        dice = " | ".join(f"{statistics.mean(values):.3f} ± {spread(values):.3f}" for values in columns)
        seconds = statistics.median(row["train_s"] for row in rows)
        peak = max(row["peak_bytes"] for row in rows) / 2**20
        lines.append(f"| {edge}³ | {dice} | {seconds:.0f} | {peak:.0f} |")
    return "\n".join(lines)


def plot(results: dict[Training, dict[str, Any]], path: Path) -> None:
    """Dice of liver and tumour against the edge of the sub-volume: a point each run, a line through the means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    edges = sorted({training.edge for training in results})
    for index, (name, colour) in enumerate(zip(CLASSES[1:], ("#3f74a8", "#d9822b"), strict=True)):
        found = [[r["dice"][index] for t, r in results.items() if t.edge == edge] for edge in edges]
        means = [statistics.mean(values) for values in found]
        axes.errorbar(edges, means, [spread(values) for values in found], color=colour, marker="o", label=name)
        for edge, values in zip(edges, found, strict=True):
            axes.plot([edge] * len(values), values, ".", color=colour, alpha=0.4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(edges, [f"{edge}³" for edge in edges])
    axes.set(xlabel="sub-volume that the network trains on", ylabel="Dice on whole held-out volumes", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of the study. Exits with a message where they do not fit together."""
    parser = argparse.ArgumentParser(
        prog="examples/unet/run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/unet"), help="where phantoms and runs go (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="voxels a side of a volume (%(default)s)")
    parser.add_argument("--edges", type=int, nargs="+", help="of the sub-volumes (a quarter, half and all of --size)")
    parser.add_argument(
        "--volumes", type=int, default=30, help="how many, of which a fifth only validates (%(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each size (%(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="of a training (%(default)s)")
    parser.add_argument("--base", type=int, default=8, help="channels of the first convolution; 32 as published (8)")
    parser.add_argument("--ranks", type=int, default=2, help="(%(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="--size 32 --edges 16 32 --seeds 1 --steps 20 --volumes 10"
    )
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="a setting of meshwright train")
    args = parser.parse_args(arguments)
    if args.quick:
        args.size, args.edges, args.seeds, args.steps, args.volumes = 32, [16, 32], 1, 20, 10
    args.edges = sorted(args.edges or (args.size // 4, args.size // 2, args.size))
    for edge in args.edges:
        if edge < 8 or edge % 8 or args.size % edge:
            parser.error(f"--edges {edge}: a multiple of 8 (three poolings) that divides --size {args.size} is needed")
        if edge < args.size and (args.size // edge) ** 3 < args.ranks:
            parser.error(f"--edges {edge}: a batch of {(args.size // edge) ** 3} sub-volumes for {args.ranks} ranks")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Phantoms, trainings, table and plot; 1 if larger sub-volumes were not better."""
    args = parse(arguments)
    data = write_all(args.out / "phantoms", args.volumes, args.size)
    results = {}
    for seed in range(args.seeds):  # a study that is cut short has every size
        for edge in args.edges:
            results[Training(edge, seed)] = train(Training(edge, seed), args, data)
    text = table(results)
    (args.out / f"{DICE}.md").write_text(text + "\n", encoding="utf-8")
    plot(results, args.out / f"{DICE}.png")
    print(f"\n{text}\n\nplot: {args.out / DICE}.png")
    dice = {edge: [statistics.mean(r["dice"]) for t, r in results.items() if t.edge == edge] for edge in args.edges}
    broken = law(dice)
    print(f"larger sub-volumes are better: {'holds' if broken is None else f'DOES NOT HOLD: {broken}'}")
    return 0 if broken is None else 1


if __name__ == "__main__":
    sys.exit(main())
