"""Random numbers that every plan draws alike: functions of seed, call and global position.

Two parts. (1) While a parallelized module runs forward, the global generators hold a state made from (seed, call)
that is equal on all ranks; so plain factories (`torch.randn`) inside the module agree, and `checkpoint`, which saves
and restores that state, recomputes the same numbers. Outside, the generators of the ranks are left alone and never
assumed to agree. (2) Random work on split tensors draws one 63-bit key from that state and hashes it with the
*global* position of each element, so a rank computes just its part of the mask.
"""

from __future__ import annotations

from typing import Any

import torch

from meshwright.parallel.account import Ledger, where
from meshwright.parallel.layout import Placements, owned
from meshwright.parallel.tensor import wrap

_MASK = (1 << 63) - 1


def mix(value: int) -> int:
    """splitmix64 finaliser (Steele, Lea and Flood 2014), 63 bits."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (value ^ (value >> 31)) & _MASK


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
_outside: dict[int, int] = {}  # calls outside any module, per ledger
_recorded: dict[int, int] = {}  # generator state -> key, so that a checkpoint around outside work recomputes it


def _fingerprint() -> int:
    return hash(torch.get_rng_state().numpy().tobytes())


def draw_key(ledger: Ledger | None) -> int:
    """A key for one random call: equal on all ranks, and the same again when a checkpoint recomputes."""
    if where.stack:
        return int(torch.randint(_MASK, ()).item())
    mark = _fingerprint()
    recomputing = torch._C._current_graph_task_id() != -1
    if recomputing:
        if mark in _recorded:
            torch.rand(())
            return _recorded[mark]
        return int(torch.randint(_MASK, ()).item())
    owner = 0 if ledger is None else id(ledger)
    _outside[owner] = _outside.get(owner, 0) + 1
    key = mix(mix(0 if ledger is None else ledger.seed) ^ (_outside[owner] << 32))
    if len(_recorded) > 4096:
        _recorded.clear()
    _recorded[mark] = key
    torch.rand(())  # the next call finds another state
    return key


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _hash(x: torch.Tensor) -> torch.Tensor:
    """splitmix64 finaliser on int64 tensors (arithmetic wraps; shifts made logical by masking)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def bits(key: int, mesh: Any, placements: Placements, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """53 random bits (int64) for each position of this rank's part of a tensor of global `shape`."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    step = 1
    for dim in reversed(range(len(shape))):
        span = owned(mesh, placements, dim, shape[dim])
        along = torch.arange(span.lo, span.hi, dtype=torch.int64, device=device) * step
        index = index + along.view(-1, *(1 for _ in range(len(shape) - 1 - dim)))
        step *= max(1, shape[dim])
    return (_hash(_hash(index ^ key) + key) >> 11) & ((1 << 53) - 1)


def uniform(key: int, mesh: Any, placements: Placements, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Uniform numbers in [0, 1), fp64, for this rank's part."""
    return bits(key, mesh, placements, shape, device).double() * 2.0**-53


def uniform_like(x: Any, key: int, shape: tuple[int, ...] | None = None, placements: Placements | None = None) -> Any:
    """A mesh tensor of uniform numbers (fp64) with the layout of `x`, or the given shape and placements."""
    shape = tuple(x._spec.shape) if shape is None else shape
    placements = tuple(x._spec.placements) if placements is None else placements
    mesh = x._spec.mesh
    return wrap(uniform(key, mesh, placements, shape, x._local_tensor.device), mesh, placements, shape, x._ledger)
