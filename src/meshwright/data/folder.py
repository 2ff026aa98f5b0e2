"""A user's own folder: which files belong together. The rules are in docs/tutorial.md; what is ambiguous is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from meshwright.data import hdf5, zarrs
from meshwright.data.arrays import StoredArray
from meshwright.data.formats import ENDINGS, HDF5, ZARR, ending, open_array
from meshwright.data.index import missing_file, see_lengths
from meshwright.data.retry import file_errors, listed
from meshwright.data.views import Sample, files_of, stacked
from meshwright.data.volumes import Pair, opened
from meshwright.errors import DataError

FOLDERS = (("images", "labels"), ("imagesTr", "labelsTr"))
Case = Callable[[], list[Pair]]  # opens the files of one case, or all samples of one file
_NUMBERED = re.compile(r"(.+)_(\d{4})")  # a channel of a case in a file of its own: scan7_0001.nii.gz


@file_errors()
def find_pairs(
    folder: str | Path, image: str | Sequence[str] = "image", label: str = "label", bad: list[str] | None = None
) -> tuple[Pair, ...]:
    """The pairs in a folder, one HDF5 file or one Zarr group, in order of their names; headers are compared.

    `image` and `label` are the words in file names, and the names of datasets; several images, such as t1 and t2, are
    the channels of one, in this order. Raises `DataError` when nothing or
    more than one kind of layout is found, when a partner is missing, and for files that are damaged, do not match, or
    are not what the folder's index says. With a list `bad` such samples are left out, and the reasons added to it.
    """
    path = Path(folder)
    images = (image,) if isinstance(image, str) else tuple(image)
    if not images or len({*images, label}) <= len(images):
        raise DataError(f"data.image = {list(images)}, data.label = {label!r}: one word or more, each once, are needed")
    if not path.exists():
        raise DataError(f"data.path: there is no {path}")
    ways: dict[str, list[Case]]
    if path.is_file() or zarrs.is_group(path):
        ways = {"datasets": [lambda: _inside(path, images, label)]}
    else:
        ways = {
            f"{first}/ + {second}/": list(_two_folders(path / first, path / second, images, label))
            for first, second in FOLDERS
            if (path / first).is_dir() and (path / second).is_dir()
        }
        words = " + ".join(f"*_{word}" for word in (*images, label))
        ways |= {words: list(_endings(path, images, label)), "datasets": []}
        for file in listed(path):
            if ending(file.name) in (*HDF5, *ZARR) and not stem(file).endswith(_ends(images, label)):
                ways["datasets"].append(lambda file=file: _inside(file, images, label))  # type: ignore[misc]
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
            f"{' + '.join(f'NAME_{word}.*' for word in (*images, label))}, and HDF5 files or Zarr groups with datasets "
            f"{', '.join(map(repr, images))} and {label!r}; "
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
        for path in files_of(array):
            see_lengths(folder, path)
    return pair


def stem(path: Path) -> str:
    """The name without the ending of its format."""
    return path.name[: len(path.name) - len(ending(path.name))]


def files_in(folder: Path) -> list[Path]:
    """The data files directly inside a folder, in order of their names."""
    return [path for path in listed(folder) if ending(path.name) and not path.name.startswith(".")]


def open_named(path: Path, dataset: str, dims: int = 3) -> StoredArray:
    """The array of a file; of one that holds several, the one called `dataset`."""
    several = ending(path.name) in HDF5 and len(hdf5.datasets(path)) > 1
    if several or (path.is_dir() and zarrs.is_group(path)):
        return open_array(f"{path}::{dataset}", dims)
    return open_array(path, dims)


def _ends(images: Sequence[str], label: str) -> tuple[str, ...]:
    return tuple(f"_{word}" for word in (*images, label))


def _two_folders(images: Path, labels: Path, words: Sequence[str], label: str) -> Iterator[Case]:
    """Equal names; an image may say `_image` and a label `_label`. Of several words each has a file for a case; of one,
    numbered files are the channels of one case."""
    targets = by_name(files_in(labels), f"_{label}")
    if len(words) > 1:
        yield from _several(files_in(images), targets, words, label, labels, images)
        return
    (image,) = words
    cases = by_name(files_in(images), f"_{image}")
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
            yield _case([], None, words, "", f"{missing}; give all cases the same")
            continue
        yield _case(paths, targets.get(case), words, label, missing)
    yield from _left(set(targets) - set(channels), targets, images)


def _endings(folder: Path, words: Sequence[str], label: str) -> Iterator[Case]:
    files = files_in(folder)
    targets = by_name([path for path in files if stem(path).endswith(f"_{label}")], f"_{label}")
    yield from _several(files, targets, words, label, None, folder)


def _several(
    files: list[Path], targets: Mapping[str, Path], words: Sequence[str], label: str, labels: Path | None, images: Path
) -> Iterator[Case]:
    """A file NAME_word for each of the words, and the label NAME (in a folder of its own), or NAME_label."""
    found = {word: by_name([path for path in files if stem(path).endswith(f"_{word}")], f"_{word}") for word in words}
    known = list(dict.fromkeys(case for word in words for case in found[word]))
    for case in known:
        paths = [found[word][case] for word in words if case in found[word]]
        lost = next((word for word in words if case not in found[word]), None)
        if lost is not None:
            yield _case([], None, words, "", f"{paths[0]}: there is no {case}_{lost}.* beside it; each case needs one")
            continue
        where = f"label {case}.* in {labels}" if labels is not None else f"{case}_{label}.* beside it"
        yield _case(paths, targets.get(case), words, label, f"{paths[0]}: there is no {where}; each image needs one")
    yield from _left(set(targets) - set(known), targets, images)


def _left(names: set[str], targets: Mapping[str, Path], images: Path) -> Iterator[Case]:
    for name in sorted(names):
        yield _case([], None, "", "", f"{targets[name]}: there is no image for this label in {images}")


def _case(paths: list[Path], target: Path | None, words: Sequence[str], label: str, missing: str) -> Case:
    """The pair of some files, to be opened later; `missing` says what is wrong if there is no label."""

    def case() -> list[Pair]:
        if target is None:
            raise DataError(missing)
        return [_pair(paths, target, words, label)]

    return case


def by_name(files: list[Path], word: str) -> dict[str, Path]:
    """Files by their names without `word` and the ending. Raises `DataError` for two of one name."""
    found: dict[str, Path] = {}
    for path in files:
        name = stem(path).removesuffix(word)
        if name in found:
            raise DataError(f"{found[name]} and {path} are both called {name}: it is not clear which is meant")
        found[name] = path
    return found


def _pair(paths: list[Path], target: Path, words: Sequence[str], label: str) -> Pair:
    named = words if len(words) > 1 else [words[0]] * len(paths)
    arrays = [open_named(path, word) for path, word in zip(paths, named, strict=True)]
    return Pair(stacked(arrays), open_named(target, label), (paths[0] if len(arrays) == 1 else target).name)


def _inside(path: Path, images: Sequence[str], label: str) -> list[Pair]:
    """Every group with datasets `images` and `label`; a label [N, D, H, W] makes all of them stacks of N samples."""
    names, found = dataset_names(path), list[Pair]()
    for name in sorted(name for name in names if name.rpartition("/")[2] == images[0]):
        group, slash, _ = name.rpartition("/")
        whole = [f"{group}{slash}{word}" for word in (*images, label)]
        lost = next((partner for partner in whole if partner not in names), None)
        if lost is not None:
            raise DataError(f"{path}::{name}: there is no dataset {lost!r} beside it; it has: {', '.join(names)}")
        *firsts, second = (open_array(f"{path}::{one}") for one in whole)
        first, dims = firsts[0], len(firsts[0].shape)
        title = path.name + (f"::{group}" if group else "")
        one = second.shape[0] == 1 and (dims == 3 or (dims == 4 and first.shape[0] > 1 and len(firsts) == 1))
        if len(second.shape) == 3 or one:
            found.append(Pair(stacked(firsts), second, title))
            continue
        for other in firsts:
            if other.shape[0] != second.shape[0]:
                raise DataError(f"{other.name} holds {other.shape[0]} samples but {second.name} {second.shape[0]}")
        for index in range(first.shape[0]):
            samples = [Sample(array, index) for array in firsts]
            found.append(Pair(stacked(samples), Sample(second, index), f"{title}[{index}]"))
    return found


def dataset_names(path: Path) -> list[str]:
    """The datasets of an HDF5 file, or of a Zarr group and the groups directly in it, groups before names."""
    if path.is_dir():
        return [f"{group}{name}" for group in ("", *_groups(path)) for name in zarrs.arrays(path / group)]
    return list(hdf5.datasets(path))


def _groups(path: Path) -> list[str]:
    return sorted(f"{child.name}/" for child in listed(path) if child.is_dir() and zarrs.is_group(child))
