"""What is decided about tensors, once: found again by the specs themselves, of which there is one object per value.

Hashing a spec would run Python for its mesh and for each placement, in every call of every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

from meshwright.cluster.process_group import when_leaving

MOST_KNOWN = 16384  # decisions of one kind; then they are made anew
P = ParamSpec("P")
T = TypeVar("T")


class Decided(Generic[P, T]):
    """A function of positional arguments with its results: see `decided`."""

    def __init__(self, decide: Callable[P, T], by_identity: int) -> None:
        self._known: dict[tuple[Any, ...], tuple[T, tuple[Any, ...]]] = {}
        self._decide, self._by_identity = decide, by_identity
        update_wrapper(self, decide)
        when_leaving(self.cache_clear)  # specs hold meshes, which hold groups

    def __call__(self, *args: P.args, **none: P.kwargs) -> T:
        specs = args[: self._by_identity]
        key = (*map(id, specs), args[self._by_identity :])
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            # the specs are kept, so that no other object has their number
            found = self._known[key] = self._decide(*args, **none), specs
        return found[0]

    def cache_clear(self) -> None:
        """Decide anew."""
        self._known.clear()


def decided(by_identity: int) -> Callable[[Callable[P, T]], Decided[P, T]]:
    """A cache of a function of positional arguments, of which the first `by_identity` (specs, or None) are told apart
    as objects, the others by value."""

    def decorate(decide: Callable[P, T]) -> Decided[P, T]:
        return Decided(decide, by_identity)

    return decorate
