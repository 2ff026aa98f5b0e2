"""Make universes: random parameters, a Gaussian random field of their spectrum, matter moved by gravity, counts.

    python examples/cosmoflow/generate.py --out DIR --count 256 --voxels 64 --box 256 --workers 2

makes 256 files in DIR. A file holds `image`, the counts per cell (int16, [channels, depth, height, width]), and
`parameters`, (omega_m, sigma_8, n_s, h_0). The same seed gives the same files, whatever the number of
workers or ranks. A call after a kill makes what is missing; a larger --count adds to the folder. See docs/universes.md.
"""

from __future__ import annotations

import argparse
import fcntl
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import meshwright as mw
from displacement import potential, second_source
from fields import gaussian_modes
from meshwright.cluster.place import find_place
from meshwright.data import chance
from meshwright.errors import DataError, MeshwrightError
from particles import counts, delivered, layers, positions
from slabs import Slabs
from spectrum import power_spectrum
from universe_file import Writer
from universes import NOISE, Ranges, Settings, save


def make(settings: Settings, folder: Path, index: int, rank: int = 0, ranks: int = 1) -> int:
    """Make the file of universe `index`, together with the other ranks if there are any. Returns `index`."""
    slabs = Slabs(settings.grid, rank, ranks)
    parameters = settings.parameters(index)
    power = power_spectrum(parameters, settings.spectrum)
    modes = gaussian_modes(slabs, chance.key(NOISE, settings.seed, index), power, settings.box_mpc)
    second = second_source(slabs, modes) if settings.lpt == 2 else None
    planes = layers(settings, ranks)[rank]
    writer = Writer(settings, folder, index, rank, ranks)
    for channel, redshift in enumerate(settings.redshifts):
        moved = positions(settings, slabs, potential(slabs, modes, second, parameters.omega_m, redshift))
        arrived = delivered(settings, slabs, moved)
        del moved
        writer.write(channel, planes, counts(settings, planes, arrived))
    writer.finish()
    return index


def generate(settings: Settings, out: Path, workers: int = 1, *, ranks: int = 1, quiet: bool = False) -> None:
    """Make all universes of `settings` that are not in the folder `out` yet.

    In `workers` processes, each with a universe of its own; or with `ranks` above 1 one universe after the other, each
    split over that many ranks (under torchrun: over its ranks). Raises `DataError`.
    """
    if ranks > 1:
        mw.launch(_on_ranks, ranks, (settings, out, quiet))
        return
    with _alone(settings, out), _bar(settings, out, quiet) as done:
        missing = missing_universes(settings, out)
        if workers == 1 or len(missing) < 2:
            for index in missing:
                done(make(settings, out, index))
            return
        _in_processes(settings, out, missing, workers, done)


def missing_universes(settings: Settings, out: Path) -> list[int]:
    """The universes that have no file yet."""
    return [index for index in range(settings.count) if not settings.path(out, index).exists()]


def _in_processes(
    settings: Settings, out: Path, missing: Sequence[int], workers: int, done: Callable[[int], None]
) -> None:
    with ProcessPoolExecutor(min(workers, len(missing)), _context(), torch.set_num_threads, (1,)) as pool:
        running = [pool.submit(make, settings, out, index) for index in missing]
        try:
            for one in as_completed(running):
                done(one.result())
        except BrokenProcessPool:
            raise DataError(
                f"{out}: a worker was killed (out of memory?); call again to make what is missing"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _context() -> BaseContext:
    """A fork server imports torch once instead of once a worker; forking is not safe with macOS's libraries."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor", "meshwright.cluster.worker", "meshwright"])
    return context


def _on_ranks(settings: Settings, out: Path, quiet: bool) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if rank:
        dist.barrier()  # rank 0 has made the folder
        missing = missing_universes(settings, out)
        dist.barrier()  # all have looked before anything changes
        for index in missing:
            make(settings, out, index, rank, ranks)
        return
    with _alone(settings, out), _bar(settings, out, quiet) as done:
        dist.barrier()
        missing = missing_universes(settings, out)
        dist.barrier()
        for index in missing:
            done(make(settings, out, index, rank, ranks))


@contextmanager
def _alone(settings: Settings, out: Path) -> Iterator[None]:
    """Hold the folder's lock and see that its settings are ours. Raises `DataError`."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out}: another call is making universes there; wait until it has ended") from None
        save(settings, out)
        yield


@contextmanager
def _bar(settings: Settings, out: Path, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar in a terminal, nothing elsewhere; the callback hears of each universe that is done."""
    console = Console(file=sys.stdout)
    columns = (TextColumn("universes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=settings.count, completed=settings.count - len(missing_universes(settings, out)))
        yield lambda index: bar.advance(task)


def _parser() -> argparse.ArgumentParser:
    title, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=title, epilog=rest, formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=110)
    )
    s = Settings()
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="the folder; a call after a kill goes on there")
    add("--count", type=int, default=s.count, metavar="N", help=f"universes (default: {s.count})")
    add("--voxels", type=int, default=s.voxels, metavar="N", help=f"along each edge, even (default: {s.voxels})")
    add("--box", type=float, default=s.box_mpc, metavar="L", help=f"edge in Mpc/h (default: {s.box_mpc:g})")
    add("--seed", type=int, default=s.seed, help=f"of parameters and noise (default: {s.seed})")
    add(
        "--particles", type=int, default=1, metavar="P", help="along each edge of a voxel; 2: 8 to a voxel (default: 1)"
    )
    add(
        "--lpt",
        type=int,
        default=1,
        choices=(1, 2),
        help="1: Zel'dovich (default); 2: second order, about twice the time",
    )
    add("--assign", default="ngp", choices=("ngp", "cic"), help="a particle counts in its own voxel, or spread over 8")
    add("--redshifts", default="0", metavar="Z,…", help="a channel each, as 3,1.5,0.5,0 (default: 0)")
    add(
        "--spectrum",
        default="eh",
        choices=("eh", "eh-nowiggle", "camb"),
        help="Eisenstein & Hu 1998 (default), or camb",
    )
    add("--format", default="hdf5", choices=("hdf5", "zarr"), help="a file each, or a Zarr folder each")
    for known in fields(Ranges):
        lo, hi = getattr(s.ranges, known.name)
        add(
            f"--{known.name.replace('_', '-')}",
            default=f"{lo:g},{hi:g}",
            metavar="LO,HI",
            help=f"default: {lo:g},{hi:g}",
        )
    add("--workers", type=int, default=1, metavar="N", help="processes, each with a universe of its own (default: 1)")
    add(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="split each universe over N ranks, each with 1/N of its memory",
    )
    return parser


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that a command line asks for. Raises `DataError`."""
    ranges = Ranges(*(_numbers(getattr(args, known.name), known.name) for known in fields(Ranges)))
    return Settings(
        seed=args.seed, count=args.count, voxels=args.voxels, box_mpc=args.box, particles=args.particles,
        lpt=args.lpt, assignment=args.assign, redshifts=_numbers(args.redshifts, "redshifts"),
        spectrum=args.spectrum, format=args.format, ranges=ranges,
    )  # fmt: skip


def _numbers(text: str, name: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise DataError(f"--{name.replace('_', '-')} {text!r}: numbers with commas between them are expected") from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    args = _parser().parse_args(argv)
    try:
        settings = settings_of(args)
        if min(args.workers, args.ranks) < 1:
            raise DataError(f"--workers {args.workers} --ranks {args.ranks}: at least 1 of both")
        place = find_place(os.environ)
        generate(settings, args.out, args.workers, ranks=args.ranks if place.launcher == "local" else place.ranks)
    except (MeshwrightError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if place.rank == 0:
        print(f"{args.out}: {settings.count} universes of {settings.voxels}³ voxels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
