"""The command `meshwright`: doctor · data · train · report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from meshwright import __version__, config
from meshwright.cluster.cluster import Cluster
from meshwright.cluster.launch import launch
from meshwright.config import Config
from meshwright.data import commands as data_commands
from meshwright.errors import MeshwrightError, RankError
from meshwright.report.console import summary
from meshwright.report.doctor import doctor
from meshwright.report.page import write_report
from meshwright.train import check, job, loop, plans, precision, rundir, signals

RUNS = Path("runs")

_EXAMPLES = """examples:
  meshwright doctor                                what this machine offers and what is missing
  meshwright data convert scans/ cut/ --depth 2    your NIfTI pairs as Zarr, no chunk cut between 2 ranks
  meshwright train                                 a 3-D U-Net on a real MRI volume, split over 2 local ranks
  meshwright train --ranks 4 --set model.base=16   four ranks, a wider network
  meshwright train --check                         is the split run the same as one device? in numbers
  meshwright train --resume                        go on with the newest run in runs/, to the same bits
  meshwright report runs/20261121-101500           write the page of a run and print its summary
"""
_TRAIN_EXAMPLES = """examples:
  meshwright train --print-config > job.yaml       every setting and its default; edit, then
  meshwright train --config job.yaml
  meshwright train --set plan.depth=2 --set plan.height=2        four ranks, split in two directions
  meshwright train --set data.path=scans           your own folder: NIfTI, HDF5, Zarr or .npy pairs
  meshwright train --set data.name=folder --set "data.images='scans/*_t1.nii.gz'" \\
                   --set "data.labels='scans/*_seg.nii.gz'" --set "data.classes=[other, tumour]"
  torchrun --nproc-per-node 2 -m meshwright train  the ranks of torchrun (or Slurm, OpenMPI) instead of local ones
                                                   (torchrun takes --run for its own: write --set run=DIR)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 for an error, 2 for wrong usage, 128 + n after signal n."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.command(args))
    except RankError as error:
        headline, _, details = str(error).partition("\n")
        before, on_purpose, message = headline.partition("meshwright.errors.")
        if on_purpose:  # one clear message; where in Meshwright it was raised helps nobody
            _complain(before + message)
        else:
            print(details.strip(), file=sys.stderr)  # the rank's own traceback comes first
            _complain(headline)
        return 1
    except MeshwrightError as error:
        _complain(str(error))
        return 1
    except KeyboardInterrupt:
        _complain("stopped at once; checkpoints written so far stay")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="meshwright",
        description="Train an unmodified torch.nn.Module on samples larger than one device, with the same result.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"meshwright {__version__}")
    commands = parser.add_subparsers(required=True, metavar="doctor | data | train | report")

    sub = commands.add_parser("doctor", help="what this machine offers, and what is missing")
    sub.set_defaults(command=lambda args: doctor())

    sub = commands.add_parser("data", help="checksums of data files; conversion to chunks that fit a plan")
    data_commands.add_to(sub)

    sub = commands.add_parser(
        "train",
        help="train a network on volumes split over ranks",
        epilog=_TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("--config", metavar="FILE", help="settings as YAML; unknown keys are errors")
    sub.add_argument("--set", metavar="A.B=C", action="append", default=[], help="one setting; may be repeated")
    sub.add_argument("--ranks", type=int, metavar="N", help="number of ranks (default 2), split along depth unless set")
    sub.add_argument("--steps", type=int, metavar="N", help="short for --set train.steps=N; with --check: how many")
    where = sub.add_mutually_exclusive_group()
    where.add_argument("--run", metavar="DIR", help="where to write (default runs/<date>-<time>)")
    resume = "go on from the last checkpoint of RUN (default: the newest in runs/)"
    where.add_argument("--resume", nargs="?", const="", metavar="RUN", help=resume)
    sub.add_argument("--check", action="store_true", help="compare the plan with one rank in fp64, then end")
    sub.add_argument("--print-config", action="store_true", help="print all settings as YAML, then end")
    sub.set_defaults(command=_train)

    sub = commands.add_parser("report", help="write the page of a run and print its summary")
    sub.add_argument("run", metavar="RUN", help="a run directory")
    sub.set_defaults(command=lambda args: _report(Path(args.run)))
    return parser


def _train(args: argparse.Namespace) -> int:
    place = Cluster.detect()
    started = None if place.launcher == "local" else place.ranks
    resumed = args.resume is not None
    path = _resumed_path(args.resume) if resumed else None
    saved = path / rundir.CONFIG if path is not None else None
    settings = config.load(args.config or saved, args.set, args.ranks)
    if args.steps is not None and not args.check:
        settings = config.override(settings, f"train.steps={args.steps}")
    plan = plans.resolve_plan(settings, started)
    settings = precision.resolve(replace(settings, ranks=plan.ranks, plan=_absolute(settings.plan)))
    if args.print_config:
        print(settings.yaml(), end="")
        return 0
    # what can be wrong is found here, before any rank starts
    job.batch_size(settings, plan)
    settings = job.settled(settings, job.sources(settings)[0])
    if args.check:
        return _check(settings, 3 if args.steps is None else args.steps)
    path = path or Path(args.run or settings.run or rundir.default_path(RUNS))
    settings = replace(settings, run=str(path))
    if place.rank == 0:
        rundir.prepare(path, resume=resumed)
        print(
            f"run {path}: {settings.data.path or settings.data.name}, plan {plan}, {settings.train.precision}",
            flush=True,
        )
    with signals.passed_on() if started is None else nullcontext(signals.Noted()) as seen:
        try:
            result = launch(loop.run, plan.ranks, (settings, str(path), resumed), threads=settings.threads)[0]
        except RankError:
            if not seen.number:
                raise
            _complain(f"stopped by signal {seen.number} before the ranks could write a checkpoint")
            return 128 + seen.number
    if result["stopped"]:
        number = seen.number or result["stopped"]
        _complain(
            f"stopped by signal {number} after step {result['step']}, checkpoint written; --resume {path} goes on"
        )
        return 128 + number
    return _report(path) if result["rank"] == 0 else 0


def _resumed_path(given: str) -> Path:
    path = Path(given) if given else rundir.newest(RUNS)
    rundir.prepare(path, resume=True)
    return path


def _absolute(plan: config.PlanConfig) -> config.PlanConfig:
    """A plan file is found again when the run is resumed from another directory."""
    return plan if plan.file is None else replace(plan, file=str(Path(plan.file).resolve()))


def _check(settings: Config, steps: int) -> int:
    plan = plans.resolve_plan(settings)
    found = launch(check.run, plan.ranks, (settings, steps), threads=settings.threads)[0]
    if found is None:  # not rank 0 under torchrun
        return 0
    print(f"{steps} steps in fp64: plan {plan} against plain torch on one rank, largest relative difference")
    for row in found:
        verdict = "ok" if row.ok else "TOO LARGE"
        print(f"  {row.quantity:<10} {row.value:9.2e}  allowed {check.TOLERANCE:.0e}  {verdict:<9}  ({row.where})")
    return 0 if all(row.ok for row in found) else 1


def _report(path: Path) -> int:
    page = write_report(path)
    summary(path)
    print(f"report: {page}", flush=True)
    return 0


def _complain(text: str) -> None:
    print(f"meshwright: error: {text}", file=sys.stderr, flush=True)
