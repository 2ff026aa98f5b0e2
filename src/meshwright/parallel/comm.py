"""Collectives along mesh axes on plain local tensors. Every byte that leaves this rank is counted here.

Nothing is converted by objects or pickled: only tensors travel. All results are the same bits on every rank and
in every run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from meshwright.errors import ExchangeError
from meshwright.parallel.account import Ledger, sent, totals
from meshwright.parallel.collective import Gather, Sum, summed_bytes
from meshwright.parallel.kernels import memory_format
from meshwright.parallel.layout import global_strides
from meshwright.parallel.mesh import coordinates, group, sizes
from meshwright.parallel.transport import Transfer
from meshwright.plan.geometry import chunk

Place = tuple[str, str]  # (layer, op) on whose behalf something is sent


@dataclass(frozen=True)
class Cause:
    """Who causes an exchange: the record to write to, and the (layer, op) to write it under."""

    ledger: Ledger | None
    place: Place

    def sent(self, nbytes: int, messages: int = 1) -> None:
        sent(self.ledger, self.place, nbytes, messages)

    def failed(self, error: Exception) -> ExchangeError:
        layer, op = self.place
        return ExchangeError(
            f"rank {dist.get_rank()}: a neighbour did not answer in {op} of layer {layer!r}: {error}. "
            "It died, hangs, or took another path through the model (every rank must run the same calls)."
        )


def wait(works: Sequence[Transfer | Sum | Gather], cause: Cause) -> None:
    """Wait for posted work; the time is counted as waiting for neighbours."""
    start = time.perf_counter()
    try:
        for work in works:
            work.wait()
    except RuntimeError as error:
        raise cause.failed(error) from error
    totals.exchange_wait_s += time.perf_counter() - start


def all_reduce(
    local: torch.Tensor, mesh: DeviceMesh, axes: Sequence[int], cause: Cause, op: str = "sum"
) -> torch.Tensor:
    """The sum (or "max", "min", "product") of `local` over the ranks along `axes`; a new tensor, equal on all."""
    out = local.clone(memory_format=torch.contiguous_format)
    small = out.dtype in (torch.bool, torch.int16, torch.uint16)  # types gloo cannot reduce
    work = out.to(torch.int32) if small else out
    for axis in axes:
        ranks = sizes(mesh)[axis]
        if ranks == 1:
            continue
        cause.sent(summed_bytes(work.numel() * work.element_size(), ranks))
        try:
            total = Sum([work.view(-1)], group(mesh, axis), op)
        except RuntimeError as error:
            raise cause.failed(error) from error
        wait([total], cause)
    return work.to(out.dtype) if small else work


def all_gather_stack(local: torch.Tensor, mesh: DeviceMesh, axis: int, cause: Cause) -> torch.Tensor:
    """Equal-shaped `local` of all ranks along `axis`, stacked in a new first dim."""
    ranks = sizes(mesh)[axis]
    if ranks == 1:
        return local.unsqueeze(0)
    local = local.contiguous()
    cause.sent((ranks - 1) * local.numel() * local.element_size(), ranks - 1)
    out = local.new_empty((ranks, *local.shape))
    try:
        gather = Gather(local, out, group(mesh, axis))
    except RuntimeError as error:
        raise cause.failed(error) from error
    wait([gather], cause)
    return out


def dense_strides(reference: torch.Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a dense tensor of `shape` whose dims lie in memory in the order of `reference`."""
    return global_strides(tuple(shape), reference.stride())


def all_gather_dim(local: torch.Tensor, mesh: DeviceMesh, axis: int, dim: int, size: int, cause: Cause) -> torch.Tensor:
    """The whole of a dim of global `size` from its chunks along `axis`, uneven and empty ones included."""
    ranks = sizes(mesh)[axis]
    if ranks == 1:
        return local
    me = coordinates(mesh)[axis]
    peers = [rank for rank in range(ranks) if rank != me]
    spans = [chunk(size, ranks, rank) for rank in range(ranks)]
    shape = list(local.shape)
    buffers = []
    for peer in peers:
        shape[dim] = spans[peer].size
        buffers.append((peer, local.new_empty(shape)))
    cause.sent(len(peers) * local.numel() * local.element_size(), len(peers) if local.numel() else 0)
    try:
        transfer = Transfer(group(mesh, axis), [(peer, local) for peer in peers], buffers)
    except RuntimeError as error:
        raise cause.failed(error) from error
    shape[dim] = size  # dense in the memory order of the part, as one device would hold it
    out = torch.empty_strided(shape, dense_strides(local, shape), dtype=local.dtype, device=local.device)
    out.narrow(dim, spans[me].lo, spans[me].size).copy_(local)
    wait([transfer], cause)
    for peer, buffer in buffers:
        out.narrow(dim, spans[peer].lo, spans[peer].size).copy_(buffer)
    return out


def swap_dims(
    local: torch.Tensor, mesh: DeviceMesh, axis: int, old: int, new: int, shape: tuple[int, ...], cause: Cause
) -> torch.Tensor:
    """From chunks of dim `old` to chunks of dim `new` along `axis` (all-to-all); `shape` is global along both."""
    ranks, me = sizes(mesh)[axis], coordinates(mesh)[axis]
    mine = chunk(shape[new], ranks, me)
    sends, receives, parts = [], [], []
    for peer in range(ranks):
        theirs = chunk(shape[new], ranks, peer)
        piece = local.narrow(new, theirs.lo, theirs.size)
        if peer == me:
            parts.append(piece)
            continue
        size = list(local.shape)
        size[old], size[new] = chunk(shape[old], ranks, peer).size, mine.size
        parts.append(local.new_empty(size))
        receives.append((peer, parts[-1]))
        if piece.numel():
            sends.append((peer, piece))
            cause.sent(piece.numel() * piece.element_size())
    try:
        transfer = Transfer(group(mesh, axis), sends, receives)
    except RuntimeError as error:
        raise cause.failed(error) from error
    wait([transfer], cause)
    return torch.cat(parts, dim=old).contiguous(memory_format=memory_format(local))  # cat forgets channels_last
