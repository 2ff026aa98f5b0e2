"""The command line of `examples/cosmoflow/run`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cosmostudy import baseline, compare, report, scaling, scaling_figure, settings, study
from cosmostudy.laws import laws
from meshwright.cluster.cluster import Cluster
from meshwright.errors import MeshwrightError, RankError

BROKEN = 3  # exit code where a law does not hold

_EXAMPLES = """examples:
  examples/cosmoflow/run --quick                      about 10 minutes: one seed, fewer universes
  examples/cosmoflow/run                              all of it: every size, three seeds; 75 minutes on two cores
  examples/cosmoflow/run                              once more after a kill: goes on where it was
  examples/cosmoflow/run --report                     table and plots anew, of what is finished
  examples/cosmoflow/run --scaling                    seconds, bytes and memory of a step on 1 to 8 ranks

  examples/cosmoflow/run --report --against runs/pilot    how much smaller the errors are than another study's
  examples/cosmoflow/run --set train.recipe=original --out runs/original      Adam and a linear decay
  examples/cosmoflow/run --print-settings > mine.yaml; examples/cosmoflow/run --config mine.yaml --out runs/mine

  examples/cosmoflow/run --out runs/512 --set data.voxels=512 --set data.box_mpc=2048 --set "sizes=[128, 256, 512]" \\
      --set plain=256 --set network.width=16 --set train.batch=64 \\
      --set split.largest=examples/cosmoflow/plans/2048.yaml --set split.others=examples/cosmoflow/plans/512.yaml

  A plan says how many ranks a training needs. Under torchrun or Slurm these are its ranks; else they start here.

exit code: 0 all laws hold, 3 one is broken (the output says which), 1 an error, 128 + n after signal n.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="examples/cosmoflow/run",
        description="Larger cubes of the universe teach a network more: makes universes, trains CosmoFlow on cubes of "
        "each size (the largest split in space over ranks), writes a table and plots of the error against the size, "
        "and asserts that larger is better.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one seed and a quarter of the universes")
    add("--out", type=Path, metavar="DIR", help="where everything goes (default runs/cosmoflow, or …-quick)")
    add("--config", metavar="FILE", help="settings as YAML; unknown keys are errors")
    add("--set", metavar="A.B=C", action="append", default=[], help="one setting; may be repeated")
    add("--print-settings", action="store_true", help="print all settings as YAML, then end")
    add("--scaling", action="store_true", help="instead: measure how a step of the largest size scales with ranks")
    add("--report", action="store_true", help="train nothing: write the table and the plots of what is finished")
    add("--against", type=Path, metavar="DIR", help="also: errors beside those of another study, on the same universes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = _parser().parse_args(arguments)
    out = args.out or Path("runs") / ("cosmoflow-quick" if args.quick else "cosmoflow")
    try:
        wanted = settings.load(args.quick, args.config, args.set)
        if args.print_settings:
            print(wanted.yaml(), end="")
            return 0
        if args.scaling:
            return _scaling(wanted, out)
        if not args.report:
            stopped = study.train(wanted, out, study.prepare(wanted, out))
            if stopped:
                print(f"stopped by signal {stopped}; the same command goes on where it was", file=sys.stderr)
                return 128 + stopped
        return _report(wanted, out, args.against) if Cluster.detect().rank == 0 else 0
    except RankError as error:
        print(error.cause or error, file=sys.stderr)
        print(f"error: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return 1
    except MeshwrightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _scaling(wanted: settings.Study, out: Path) -> int:
    folder = study.prepare(wanted, out)
    rows = scaling.measure(wanted, folder, study.scale(wanted, folder, out), out)
    scaling_figure.draw(out / "scaling.png", rows, max(wanted.sizes))
    print(f"{out}/scaling.json, scaling.png")
    return 0


def _report(wanted: settings.Study, out: Path, other: Path | None) -> int:
    found = study.finished(wanted, out)
    if not found:
        print(f"error: no training in {out} is finished", file=sys.stderr)
        return 1
    said = laws(study.errors(found))
    linear = baseline.fit(wanted, study.universes_of(wanted, out), out)
    print(report.write(report.Results(wanted, found, linear, said), out))
    if other is not None:
        print(compare.against(found, other) + "\n")
    broken = [law for law in said if not law.holds]
    if broken:
        print(f"{len(broken)} of {len(said)} laws do not hold; nothing above is hidden", file=sys.stderr)
    return BROKEN if broken else 0


if __name__ == "__main__":
    sys.exit(main())
