"""Which files and datasets make the samples of `open_fields`. One of these, and what fits two of them is refused:

one HDF5 file or Zarr group     datasets WORD, or in each group of it datasets WORD
a folder of such                the same in each of them
a folder with folders WORD/     files of equal names: image/a.npy + parameters/a.npy
a folder with files NAME_WORD   a_image.npy + a_parameters.npy; without a name, image.npy + parameters.npy
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from meshwright.data import zarrs
from meshwright.data.arrays import StoredArray
from meshwright.data.folder import by_name, dataset_names, files_in, open_named, stem
from meshwright.data.formats import ENDINGS, HDF5, ZARR, ending, open_array
from meshwright.data.index import missing_file, see_lengths
from meshwright.data.retry import file_errors, listed
from meshwright.data.views import Sample
from meshwright.errors import DataError

Words = Mapping[str, Sequence[str]]  # the words of each field
Case = Callable[[], tuple[str, dict[str, StoredArray]]]  # opens what lies together: its name, and an array a word


@dataclass(frozen=True)
class Found:
    """A sample: for each field the arrays, one a word."""

    name: str
    arrays: Mapping[str, tuple[StoredArray, ...]]


@file_errors()
def find_samples(path: Path, words: Words, dims: Mapping[str, int], bad: list[str] | None) -> list[Found]:
    """The samples at `path`; `dims` is how many dims the array of each word has. Raises `DataError`; with a list `bad`
    what cannot be opened is left out instead, and the reason added to it."""
    if not path.exists():
        raise DataError(f"there is no {path}")
    every = [word for own in words.values() for word in own]
    found: list[Found] = []
    for case in _cases(path, every, dims):
        try:
            name, arrays = case()
            for array in arrays.values():
                see_lengths(path, array.path)
            found += _samples(name, arrays, words, dims)
        except DataError as error:
            if bad is None:
                raise
            bad.append(str(error))
    gone = missing_file(path) if path.is_dir() else None
    if gone is not None:
        if bad is None:
            raise DataError(gone)
        bad.append(gone)
    return found


def _cases(path: Path, every: Sequence[str], dims: Mapping[str, int]) -> list[Case]:
    if path.is_file() or zarrs.is_group(path):
        ways = {"datasets": list(_datasets(path, every, dims))}
    else:
        ways = {
            " + ".join(f"{word}/" for word in every): list(_folders(path, every, dims)),
            " + ".join(f"*_{word}" for word in every): list(_endings(path, every, dims)),
            "datasets": [
                case
                for file in listed(path)
                if ending(file.name) in (*HDF5, *ZARR) and not _ends_with(file, every)
                for case in _datasets(file, every, dims)
            ],
        }
    used = {how: cases for how, cases in ways.items() if cases}
    if len(used) > 1:
        kinds = " and ".join(f"{len(cases)} as {how}" for how, cases in used.items())
        raise DataError(
            f"{path}: samples of several kinds, {kinds}; it is not clear which are meant: move one elsewhere"
        )
    if not used:
        raise DataError(
            f"{path}: no samples found. Known are HDF5 files and Zarr groups with datasets {', '.join(every)}, folders "
            f"{', '.join(f'{word}/' for word in every)} with files of equal names, and files "
            f"{', '.join(f'NAME_{word}.*' for word in every)}; endings: {', '.join(ENDINGS)}"
        )
    return next(iter(used.values()))


def _datasets(path: Path, every: Sequence[str], dims: Mapping[str, int]) -> Iterator[Case]:
    """The groups of a file that have a dataset of the first word; without one the file is an error of its own."""

    def case(group: str, names: Sequence[str]) -> Case:
        def opened() -> tuple[str, dict[str, StoredArray]]:
            lost = next((word for word in every if f"{group}{word}" not in names), None)
            if lost is not None:
                raise DataError(f"{path}: there is no dataset {group + lost!r}; it has: {', '.join(names) or 'none'}")
            title = path.name + (f"::{group.rstrip('/')}" if group else "")
            return title, {word: open_array(f"{path}::{group}{word}", dims[word]) for word in every}

        return opened

    def damaged(error: DataError) -> Case:
        def opened() -> tuple[str, dict[str, StoredArray]]:
            raise error

        return opened

    try:
        names = dataset_names(path) if path.is_file() or zarrs.is_group(path) else []
    except DataError as error:
        yield damaged(error)
        return
    groups = dict.fromkeys(
        f"{group}/" if group else "" for group, _, word in (name.rpartition("/") for name in names) if word in every
    )
    yield from (case(group, names) for group in groups)


def _folders(path: Path, every: Sequence[str], dims: Mapping[str, int]) -> Iterator[Case]:
    if not all((path / word).is_dir() for word in every):
        return
    yield from _named({word: by_name(files_in(path / word), f"_{word}") for word in every}, dims, path)


def _endings(path: Path, every: Sequence[str], dims: Mapping[str, int]) -> Iterator[Case]:
    files = files_in(path)
    longest = sorted(every, key=len, reverse=True)  # "_t1_image" is no image if there is a word t1_image
    own = {file: next((word for word in longest if _ends_with(file, [word])), None) for file in files}
    found = {word: by_name([file for file in files if own[file] == word], word) for word in every}
    yield from _named({w: {name.removesuffix("_"): file for name, file in found[w].items()} for w in every}, dims, path)


def _ends_with(file: Path, words: Sequence[str]) -> bool:
    return stem(file) in words or stem(file).endswith(tuple(f"_{word}" for word in words))


def _named(files: Mapping[str, Mapping[str, Path]], dims: Mapping[str, int], folder: Path) -> Iterator[Case]:
    """One case for each name; `files` has the file of each word and name."""

    def case(name: str) -> Case:
        def opened() -> tuple[str, dict[str, StoredArray]]:
            lost = [word for word in files if name not in files[word]]
            if lost:
                there = next(own[name] for own in files.values() if name in own)
                raise DataError(f"{there}: there is no {lost[0]} of this name in {folder}; every sample needs one")
            return name or folder.name, {word: open_named(own[name], word, dims[word]) for word, own in files.items()}

        return opened

    yield from (case(name) for name in sorted({name for own in files.values() for name in own}))


def _samples(name: str, arrays: Mapping[str, StoredArray], words: Words, dims: Mapping[str, int]) -> Iterator[Found]:
    """One sample, or each of a stack: then all arrays have one dim more than their layouts, of one size."""
    more = {word: len(array.shape) - dims[word] for word, array in arrays.items()}
    if not any(more.values()):
        yield Found(name, {field: tuple(arrays[word] for word in own) for field, own in words.items()})
        return
    for word, array in arrays.items():
        if more[word] not in (0, 1):
            raise DataError(
                f"{array.name} has shape {array.shape}; {dims[word]} dims are expected by its layout, or "
                f"{dims[word] + 1} in a stack of samples"
            )
    lengths = {array.shape[0] if more[word] else None for word, array in arrays.items()}
    if len(lengths) > 1:
        shapes = ", ".join(f"{array.name} {array.shape}" for array in arrays.values())
        raise DataError(f"{shapes}: some are stacks of samples along the first dim, and not all of one length")
    for index in range(next(iter(arrays.values())).shape[0]):
        own_arrays = {f: tuple(Sample(arrays[word], index) for word in own) for f, own in words.items()}
        yield Found(f"{name}[{index}]", own_arrays)
