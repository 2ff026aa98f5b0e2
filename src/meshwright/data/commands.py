"""`meshwright data index` and `meshwright data convert`: what is done to data before training, with a progress bar."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from meshwright.data import convert, index
from meshwright.data.folder import find_pairs
from meshwright.errors import DataError
from meshwright.plan.plan import Plan


def add_to(sub: argparse.ArgumentParser) -> None:
    """The subcommands of `meshwright data`."""
    commands = sub.add_subparsers(required=True, metavar="index | convert")
    one = commands.add_parser("index", help="write lengths and checksums of all data files beside them, or compare")
    one.add_argument("folder", metavar="FOLDER", type=Path)
    one.add_argument("--check", action="store_true", help="read everything and compare with the index")
    one.set_defaults(command=lambda args: _index(args.folder, check=args.check))
    one = commands.add_parser("convert", help="write pairs of image and label as Zarr, HDF5 or npy, cut for a plan")
    one.add_argument("source", metavar="SOURCE", type=Path, help="as data.path: a folder, an HDF5 file, a Zarr group")
    one.add_argument("target", metavar="TARGET", type=Path, help="a folder; a call after a kill goes on there")
    one.add_argument("--to", choices=("zarr", "hdf5", "npy"), default="zarr", help="default: zarr")
    for axis in ("depth", "height", "width"):
        one.add_argument(f"--{axis}", type=int, default=1, metavar="N", help=f"ranks along {axis}: no chunk is cut")
    one.add_argument("--image", default=["image"], nargs="+", metavar="WORD", help="as data.image; several: channels")
    one.add_argument("--label", default="label", metavar="WORD", help="as data.label")
    one.set_defaults(command=_convert)


def _index(folder: Path, *, check: bool) -> int:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    total = sum((folder / name).stat().st_size for name in index.data_files(folder))
    with _progress("comparing" if check else "indexing", total) as done:
        if not check:
            count = index.write_index(folder, done)
        else:
            wrong = index.differences(folder, done)
    if not check:
        print(f"{folder / index.INDEX}: {count} files, {total:,} bytes")
        return 0
    for line in wrong:
        print(line)
    print(f"{folder}: {len(wrong)} difference{'s' * (len(wrong) != 1)} from the index")
    return 1 if wrong else 0


def _convert(args: argparse.Namespace) -> int:
    if not args.target.parent.is_dir():
        raise DataError(f"{args.target.parent}: no such folder; the target is made inside it")
    plan = Plan.uniform(depth=args.depth, height=args.height, width=args.width)
    pairs = find_pairs(args.source, args.image, args.label)
    targets = convert.targets(pairs, args.target, args.to, plan)
    total = sum(math.prod(target.array.shape) * target.dtype.itemsize for target in targets)
    with _progress("converting", total) as done:
        for target in targets:
            convert.convert(target, args.to, done)
    print(
        f"{args.target}: {len(pairs)} pairs, {total:,} bytes of numbers; train on them: --set data.path={args.target}"
    )
    return 0


@contextmanager
def _progress(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar in a terminal, nothing elsewhere; the callback hears bytes that are done."""
    console = Console()
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda size: bar.advance(task, size)
