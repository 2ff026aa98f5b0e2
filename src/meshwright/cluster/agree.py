"""Ranks compare what must be equal on all of them, before work starts: names, shapes and bytes, by digests.

Only 64-bit digests travel (the names themselves, as text, once something differs), never Python objects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright.errors import MismatchError


def assert_same_on_all_ranks(
    items: nn.Module | Mapping[str, Tensor | str], what: str = "the model", group: dist.ProcessGroup | None = None
) -> None:
    """Raise the same `MismatchError` on every rank unless `items` has equal names, shapes, dtypes and bytes on all.

    `items` is a module (its parameters and buffers, plain tensors) or a mapping of names to tensors or texts; `what`
    names it in the message. Collective over `group` (default: all ranks); without a process group nothing is done.
    Tensors on the meta device are compared by shape and dtype.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    if isinstance(items, nn.Module):
        items = {**dict(items.named_parameters()), **dict(items.named_buffers())}
    labels = [_label(name, item) for name, item in items.items()]
    text = "\n".join(labels)
    heads = gather([_digest(text.encode()), len(text.encode())], group)
    if len(set(heads)) > 1:
        texts = [found.split("\n") for found in _gather_text(text, max(size for _, size in heads), group)]
        position = next(i for i in range(max(map(len, texts)) + 1) if len({_at(found, i) for found in texts}) > 1)
        _raise(what, [_at(found, position) for found in texts])
    rows = gather([_digest(_bytes(item)) for item in items.values()], group)
    for index, label in enumerate(labels):
        column = [row[index] for row in rows]
        if len(set(column)) > 1:
            _raise(what, [f"{label} with digest {value & (2**64 - 1):016x}" for value in column])


def largest(value: int, group: dist.ProcessGroup | None = None) -> int:
    """The largest `value` of all ranks, the same answer on each. Collective; 8 bytes."""
    return max(row[0] for row in gather([value], group))


def least(value: int, group: dist.ProcessGroup | None = None) -> int:
    """The smallest `value` of all ranks, the same answer on each. Collective; 8 bytes."""
    return min(row[0] for row in gather([value], group))


def from_rank_0(text: str, group: dist.ProcessGroup | None = None) -> str:
    """The text that rank 0 gives, on every rank. Collective."""
    return _gather_text(text, largest(len(text.encode()), group), group)[0]


def _raise(what: str, found: Sequence[str]) -> None:
    """Name the first difference: who holds which of the versions in `found` (one entry per rank)."""
    versions: dict[str, list[int]] = {}
    for rank, version in enumerate(found):
        versions.setdefault(version, []).append(rank)
    held = "; ".join(
        f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: {version}" for version, ranks in versions.items()
    )
    raise MismatchError(
        f"{what} differs between ranks, first here: {held}. Every rank must start from the same values: seed alike "
        "(torch.manual_seed) before building, or load the same file on all."
    )


def _at(lines: Sequence[str], index: int) -> str:
    return lines[index] if index < len(lines) and lines[index] else "nothing more"


def _label(name: str, item: Tensor | str) -> str:
    if isinstance(item, str):
        return f"{name} (text)"
    return f"{name} {tuple(item.shape)} {str(item.dtype).removeprefix('torch.')}"


def _bytes(item: Tensor | str) -> bytes | memoryview:
    if isinstance(item, str):
        return item.encode()
    if item.is_meta:
        return b""
    line = item.detach().cpu().contiguous().as_strided((item.numel(),), (1,))  # one element may have any stride
    return memoryview(line.view(torch.uint8).numpy().data)


def _digest(data: bytes | memoryview) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def gather(values: Sequence[int], group: dist.ProcessGroup | None = None) -> list[tuple[int, ...]]:
    """The integers of every rank, in rank order. Every rank must give the same number of them. Collective."""
    if not dist.is_available() or not dist.is_initialized():
        return [tuple(values)]
    own = torch.tensor(values, dtype=torch.int64, device=_device(group))
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    if own.numel():
        dist.all_gather(rows, own, group=group)
    return [tuple(row.tolist()) for row in rows]


def _gather_text(text: str, longest: int, group: dist.ProcessGroup | None) -> list[str]:
    padded = text.encode().ljust(longest, b"\0")
    return [bytes(row).rstrip(b"\0").decode() for row in gather(list(padded), group)]


def _device(group: dist.ProcessGroup | None) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
