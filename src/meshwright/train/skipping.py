"""`data.on_bad` = skip while reading: a sample that one rank cannot read is left out by all of them.

After each reading the ranks agree (8 bytes) on whether somebody failed, and on which sample. In training the next one
takes its place; in validation it does not count. The place of a sample in the order stays, so a resumed run, which
finds the damage again, goes on the same way. A store reads ahead in the order that it knows, so of a step with such a
sample nothing that it has is used: the ranks read that batch themselves, of the samples that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from meshwright.cluster import agree
from meshwright.data.counted import Counted
from meshwright.errors import DataError

T = TypeVar("T")


def agreed(reads: Counted, load: Callable[[], T], *, together: bool) -> T | None:
    """What `load` gives, or None on all ranks if a sample of `reads` could not be read on one: it is then left out.

    Collective if `together`. Raises `DataError` for what is not the fault of a sample, and when none is left.
    """
    failed, result, wrong = -1, None, None
    try:
        result = load()
    except DataError as error:
        failed, wrong = reads.blamed(error), error
    worst = agree.largest(failed) if together else failed
    if worst < 0:
        if wrong is not None:
            raise wrong
        return result
    known = wrong if failed == worst else "another rank could not read it"
    reads.left_out.setdefault(worst, f"{reads.names[worst]}: {known}")
    if len(reads.left_out) == len(reads.names):
        raise DataError(f"none of the {len(reads.names)} samples can be read; the last one: {reads.left_out[worst]}")
    return None


def replaced(indices: Sequence[int], reads: Counted) -> tuple[int, ...]:
    """The samples of a batch, each that is left out replaced by the next one that is not."""
    count = len(reads.names)
    return tuple(
        next(other % count for other in range(index, index + count) if other % count not in reads.left_out)
        for index in indices
    )
