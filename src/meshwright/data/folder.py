"""A user's own folder: which files belong together. The rules are in docs/tutorial.md; what is ambiguous is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from meshwright.data import hdf5, zarrs
from meshwright.data.arrays import StoredArray
from meshwright.data.formats import ENDINGS, HDF5, ZARR, ending, open_array
from meshwright.data.index import missing_file, see_lengths
from meshwright.data.views import Channels, Sample
from meshwright.data.volumes import Pair, opened
from meshwright.errors import DataError

FOLDERS = (("images", "labels"), ("imagesTr", "labelsTr"))
Case = Callable[[], list[Pair]]  # opens the files of one case, or all samples of one file
_NUMBERED = re.compile(r"(.+)_(\d{4})")  # a channel of a case in a file of its own: scan7_0001.nii.gz


def find_pairs(
    folder: str | Path, image: str = "image", label: str = "label", bad: list[str] | None = None
) -> tuple[Pair, ...]:
    """The pairs in a folder, one HDF5 file or one Zarr group, in order of their names; headers are compared.

    `image` and `label` are the words in file names, and the names of datasets. Raises `DataError` when nothing or
    more than one kind of layout is found, when a partner is missing, and for files that are damaged, do not match, or
    are not what the folder's index says. With a list `bad` such samples are left out, and the reasons added to it.
    """
    path = Path(folder)
    if not path.exists():
        raise DataError(f"data.path: there is no {path}")
    ways: dict[str, list[Case]]
    if path.is_file() or zarrs.is_group(path):
        ways = {"datasets": [lambda: _inside(path, image, label)]}
    else:
        ways = {
            f"{first}/ + {second}/": list(_two_folders(path / first, path / second, image, label))
            for first, second in FOLDERS
            if (path / first).is_dir() and (path / second).is_dir()
        }
        ways |= {f"*_{image} + *_{label}": list(_two_endings(path, image, label)), "datasets": []}
        for file in sorted(path.iterdir()):
            if ending(file.name) in (*HDF5, *ZARR) and not stem(file).endswith((f"_{image}", f"_{label}")):
                ways["datasets"].append(lambda file=file: _inside(file, image, label))  # type: ignore[misc]
    reasons: list[str] = [] if bad is None else bad
    all_pairs = {how: opened(cases, None if bad is None else bad) for how, cases in ways.items()}
    found = {how: pairs for how, pairs in all_pairs.items() if pairs}
    if len(found) > 1:
        kinds = " and ".join(f"{len(pairs)} pair(s) as {how}" for how, pairs in found.items())
        raise DataError(
            f"{path}: {kinds}; it is not clear which are meant: move one kind elsewhere, or name data.images and "
            "data.labels"
        )
    if not found:
        raise DataError(
            f"{path}: no pairs of image and label found. Known are images/ + labels/ (or imagesTr/ + labelsTr/), "
            f"NAME_{image}.* + NAME_{label}.*, and HDF5 files or Zarr groups with datasets {image!r} and {label!r}; "
            f"endings: {', '.join(ENDINGS)}; other names: data.image, data.label"
            + (f"; left out: {'; '.join(reasons)}" if reasons else "")
        )
    pairs = next(iter(found.values()))
    if (gone := missing_file(path)) is not None:
        if bad is None:
            raise DataError(gone)
        bad.append(gone)
    return tuple(opened([lambda pair=pair: [_as_indexed(path, pair)] for pair in pairs], bad))  # type: ignore[misc]


def _as_indexed(folder: Path, pair: Pair) -> Pair:
    """The pair, if its files have the lengths that the folder's index says."""
    for array in (pair.image, pair.label):
        for part in array.parts if isinstance(array, Channels) else (array,):
            see_lengths(folder, part.path)
    return pair


def stem(path: Path) -> str:
    """The name without the ending of its format."""
    return path.name[: len(path.name) - len(ending(path.name))]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if ending(path.name) and not path.name.startswith("."))


def _open(path: Path, dataset: str) -> StoredArray:
    """The array of a file; of one that holds several, the one called `dataset`."""
    if ending(path.name) in HDF5 and len(hdf5.datasets(path)) > 1:
        return open_array(f"{path}::{dataset}")
    if path.is_dir() and zarrs.is_group(path):
        return open_array(f"{path}::{dataset}")
    return open_array(path)


def _two_folders(images: Path, labels: Path, image: str, label: str) -> Iterator[Case]:
    """Equal names; an image may say `_image` and a label `_label`, and numbered images are channels of one case."""
    cases = _by_name(_files(images), f"_{image}")
    targets = _by_name(_files(labels), f"_{label}")
    channels: dict[str, list[Path]] = {}
    for name, path in cases.items():
        numbered = _NUMBERED.fullmatch(name)
        case = numbered[1] if numbered and name not in targets and numbered[1] in targets else name
        channels.setdefault(case, []).append(path)
    expected: list[str] | None = None
    for case, paths in channels.items():
        missing = f"{paths[0]}: there is no label {case}.* in {labels}; each image needs one"
        numbers = [stem(path).removesuffix(f"_{image}").removeprefix(case) for path in paths]
        if expected is None and numbers != [""]:
            expected = numbers
        if numbers not in ([""], expected):  # two channels of other numbers would be another kind of image in one place
            missing = f"{paths[0]}: case {case} has the channels {numbers}, the first case {expected}"
            yield _case([], None, "", "", f"{missing}; give all cases the same")
            continue
        yield _case(paths, targets.get(case), image, label, missing)
    yield from _left(set(targets) - set(channels), targets, images)


def _two_endings(folder: Path, image: str, label: str) -> Iterator[Case]:
    files = _files(folder)
    cases = _by_name([path for path in files if stem(path).endswith(f"_{image}")], f"_{image}")
    targets = _by_name([path for path in files if stem(path).endswith(f"_{label}")], f"_{label}")
    for case, path in cases.items():
        missing = f"{path}: there is no {case}_{label}.* beside it; each image needs one label"
        yield _case([path], targets.get(case), image, label, missing)
    yield from _left(set(targets) - set(cases), targets, folder)


def _left(names: set[str], targets: Mapping[str, Path], images: Path) -> Iterator[Case]:
    for name in sorted(names):
        yield _case([], None, "", "", f"{targets[name]}: there is no image for this label in {images}")


def _case(paths: list[Path], target: Path | None, image: str, label: str, missing: str) -> Case:
    """The pair of some files, to be opened later; `missing` says what is wrong if there is no label."""

    def case() -> list[Pair]:
        if target is None:
            raise DataError(missing)
        return [_pair(paths, target, image, label)]

    return case


def _by_name(files: list[Path], word: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in files:
        name = stem(path).removesuffix(word)
        if name in found:
            raise DataError(f"{found[name]} and {path} are both called {name}: it is not clear which is meant")
        found[name] = path
    return found


def _pair(paths: list[Path], target: Path, image: str, label: str) -> Pair:
    arrays = [_open(path, image) for path in paths]
    if len(arrays) == 1:
        return Pair(arrays[0], _open(target, label), paths[0].name)
    for array in arrays[1:]:
        if array.shape != arrays[0].shape or len(array.shape) != 3:
            raise DataError(
                f"{arrays[0].name} has shape {arrays[0].shape} but {array.name} has {array.shape}; the channels of one "
                "case need one shape (D, H, W)"
            )
    return Pair(Channels(tuple(arrays)), _open(target, label), target.name)


def _inside(path: Path, image: str, label: str) -> list[Pair]:
    """Every group with datasets `image` and `label`; a label [N, D, H, W] makes both a stack of N samples."""
    if path.is_dir():
        names = [f"{group}{name}" for group in ("", *_groups(path)) for name in zarrs.arrays(path / group)]
    else:
        names = list(hdf5.datasets(path))
    found: list[Pair] = []
    for name in sorted(name for name in names if name.rpartition("/")[2] == image):
        group, slash, _ = name.rpartition("/")
        partner = f"{group}{slash}{label}"
        if partner not in names:
            raise DataError(f"{path}::{name}: there is no dataset {partner!r} beside it; it has: {', '.join(names)}")
        first, second = open_array(f"{path}::{name}"), open_array(f"{path}::{partner}")
        title = path.name + (f"::{group}" if group else "")
        one = second.shape[0] == 1 and (len(first.shape) == 3 or (len(first.shape) == 4 and first.shape[0] > 1))
        if len(second.shape) == 3 or one:
            found.append(Pair(first, second, title))
            continue
        if first.shape[0] != second.shape[0]:
            raise DataError(f"{first.name} holds {first.shape[0]} samples but {second.name} {second.shape[0]}")
        for index in range(first.shape[0]):
            found.append(Pair(Sample(first, index), Sample(second, index), f"{title}[{index}]"))
    return found


def _groups(path: Path) -> list[str]:
    return sorted(f"{child.name}/" for child in path.iterdir() if child.is_dir() and zarrs.is_group(child))
