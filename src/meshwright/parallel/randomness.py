"""Random numbers that every plan draws alike: functions of seed, call and global position.

Two parts. (1) While a parallelized module runs forward, the global generators hold a state made from (seed, call)
that is equal on all ranks; so plain factories (`torch.randn`) inside the module agree, and `checkpoint`, which saves
and restores that state, recomputes the same numbers. Outside, the generators of the ranks are left alone and never
assumed to agree. (2) Random work on split tensors draws one 63-bit key from that state and hashes it with the
*global* position of each element, so a rank computes just its part of the mask.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

from meshwright.parallel.account import Ledger, where
from meshwright.parallel.noise import mix

_KEYS = (1 << 63) - 1
_REMEMBERED = 1 << 16  # draws outside modules that a checkpoint may still have to repeat


class _Forward:
    """Swaps the state of the global generators while a parallelized module runs."""

    def __init__(self) -> None:
        self._saved: dict[int, list[Any]] = {}

    def enter(self, ledger: Ledger) -> None:
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        in_backward = torch._C._current_graph_task_id() != -1
        state = [torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None, in_backward]
        self._saved.setdefault(id(ledger), []).append(state)
        if in_backward:
            return  # a checkpoint recomputes: it has restored the state of the first time
        ledger.calls += 1
        key = mix(mix(ledger.seed) ^ ledger.calls)
        torch.random.default_generator.manual_seed(key)
        if cuda:
            torch.cuda.manual_seed(key)

    def leave(self, ledger: Ledger) -> None:
        cpu, cuda, in_backward = self._saved[id(ledger)].pop()
        if in_backward:
            return
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


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
