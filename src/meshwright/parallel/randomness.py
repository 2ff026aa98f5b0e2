"""Random numbers that every plan draws alike: functions of seed, call and global position.

Two parts. (1) While a parallelized module runs forward, the global generators hold a state made from (seed, call)
that is equal on all ranks; so plain factories (`torch.randn`) inside the module agree, and `checkpoint`, which saves
and restores that state, recomputes the same numbers; one around the whole module restores the state outside, by which
the call is found again. Outside, the generators of the ranks are left alone and never assumed to agree. (2) Random
work on split tensors draws one 63-bit key from that state and hashes it with the *global* position of each element, so
a rank computes just its part of the mask.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from meshwright.errors import UnsupportedError
from meshwright.parallel.account import Ledger, where
from meshwright.parallel.noise import mix

_KEYS = (1 << 63) - 1
_REMEMBERED = 1 << 16  # draws outside modules that a checkpoint may still have to repeat


States = tuple[torch.Tensor, torch.Tensor | None]  # of the generators of CPU and GPU


def _states() -> States:
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None


class _Entered(NamedTuple):
    """A module that runs forward: `call` is None where it goes on with the state that it found."""

    before: States
    mark: int | None
    call: int | None
    in_backward: bool
    seeded: States


class _Forward:
    """Swaps the state of the global generators while a parallelized module runs."""

    def __init__(self) -> None:
        self._entered: dict[int, list[_Entered]] = {}
        self._drawn: WeakKeyDictionary[Ledger, dict[int, set[int]]] = WeakKeyDictionary()  # calls by the state before

    def enter(self, ledger: Ledger) -> None:
        """Raises `UnsupportedError` where a checkpoint repeats a whole call and several could be meant."""
        before, in_backward = _states(), torch._C._current_graph_task_id() != -1
        # in transforms of torch.func, which rules refuse by name, no number can be looked at
        mark = None if torch._C._are_functorch_transforms_active() else _fingerprint()
        if in_backward:  # a checkpoint recomputes: within the module it has restored the state of the first time
            calls: set[int] = set() if mark is None else self._drawn.get(ledger, {}).get(mark, set())
            if len(calls) > 1:
                raise UnsupportedError(_WHICH)
            call = next(iter(calls), None)
        else:
            ledger.calls += 1
            call = ledger.calls
        if call is not None:
            key = mix(mix(ledger.seed) ^ call)
            torch.random.default_generator.manual_seed(key)
            if before[1] is not None:
                torch.cuda.manual_seed(key)
        self._entered.setdefault(id(ledger), []).append(_Entered(before, mark, call, in_backward, _states()))

    def leave(self, ledger: Ledger) -> None:
        (cpu, cuda), mark, call, in_backward, seeded = self._entered[id(ledger)].pop()
        if call is None:
            return
        if mark is not None and not in_backward and not _same(seeded, _states()):
            drawn = self._drawn.setdefault(ledger, {})
            if len(drawn) >= _REMEMBERED:
                del drawn[next(iter(drawn))]
            calls = drawn.setdefault(mark, set())
            if len(calls) < 2:  # more cannot be told apart anyway
                calls.add(call)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def _same(one: States, other: States) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a is None or b is None or torch.equal(a, b) for a, b in pairs)


# A checkpoint around the whole module restores the state outside of it, which calls may share.
_WHICH = (
    "a checkpoint repeats a call of a whole parallelized module that draws random numbers, and several such calls "
    "began with the same state of torch's generator: which of them is meant cannot be told. Checkpoint the modules "
    "within it instead, or draw a number (torch.rand(())) before each call"
)


forward_seeded = _Forward()
_INSIDE = -1  # in `_recorded`: drawn while a module ran
_no_module = Ledger()  # stands for tensors that no module has made
_outside: WeakKeyDictionary[Ledger, int] = WeakKeyDictionary()  # calls outside any module
_recorded: dict[int, int] = {}  # generator state -> key, so that a checkpoint around outside work recomputes it


def _fingerprint() -> int:
    return hash(torch.get_rng_state().numpy().tobytes())


def _next_key(generator: torch.Generator | None = None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(_KEYS, (), generator=generator, device=device).item())


def _record(mark: int, key: int) -> None:
    if len(_recorded) >= _REMEMBERED:
        del _recorded[next(iter(_recorded))]
    _recorded[mark] = key


def draw_key(ledger: Ledger | None, generator: torch.Generator | None = None) -> int:
    """A key for one random call: equal on all ranks, and the same again when a checkpoint recomputes.

    A `generator` that the caller passes counts as equal on every rank, as plain tensors do.
    """
    if generator is not None:
        return _next_key(generator)
    mark, in_backward = _fingerprint(), torch._C._current_graph_task_id() != -1
    if where.stack or (in_backward and _recorded.get(mark) == _INSIDE):
        _record(mark, _INSIDE)  # the state was made by the module, or restored by a checkpoint: equal on all ranks
        return _next_key()
    if in_backward and mark in _recorded:  # a checkpoint around outside work recomputes
        key = _recorded[mark]
    else:
        owner = ledger or _no_module
        _outside[owner] = _outside.get(owner, 0) + 1
        key = mix(mix(owner.seed) ^ (_outside[owner] << 32))
        if not in_backward:
            _record(mark, key)
    torch.rand((), device="cpu")  # the next call finds another state
    return key
