"""One step of one rank: what it reserves, exchanges and puts together. The threads that call this are in `pipeline`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from meshwright.data import moves as messages
from meshwright.data.buffers import Recycled, buffer, empty
from meshwright.data.moves import Exchange
from meshwright.data.owners import Box, Moves, Owners, Piece, Shape, cell, sizes
from meshwright.data.packing import Packing, field_bytes, within
from meshwright.data.source import Field, Part
from meshwright.data.store_views import Augment, Views
from meshwright.errors import DataError, ExchangeError

ByPeer = dict[int, list[Piece]]


class Readable(Protocol):
    """What the store asks of data: a `VolumeSource`, or less. `read` may be called from several threads."""

    @property
    def names(self) -> tuple[str, ...]:
        """One name per sample."""

    @property
    def fields(self) -> Mapping[str, Field]:
        """What a sample consists of."""

    def shape(self, index: int) -> Shape:
        """D, H, W of a sample."""

    def read(self, index: int, spans: Sequence[slice]) -> Mapping[str, Tensor]:
        """The box `spans` (slices of D, H, W) of a sample, each field as [1, …]; raises `DataError`."""


@dataclass(frozen=True)
class Batch:
    """This rank's part of a step's samples: each field [n, …]. `shape` is N, D, H, W of the whole batch."""

    step: int
    indices: tuple[int, ...]
    shape: tuple[int, int, int, int]
    fields: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.fields[name]


@dataclass
class Step:
    """A step under way. `parts` fills up until nothing of `missing` is left; `error` is the first thing that failed."""

    moves: Moves
    shape: Shape  # of its samples, augmented
    arriving: ByPeer
    leaving: ByPeer
    reserved_bytes: int
    batch_bytes: int
    largest_bytes: int  # of the parts it reads, if they must come from the source
    missing: set[int]
    views: Views | None
    parts: dict[int, Tensor] = field(default_factory=dict)
    error: BaseException | None = None
    read_s: float = 0.0


class Delivery:
    """What a rank needs to know to serve its steps; pure but for `load` and `swap`."""

    def __init__(
        self,
        source: Readable,
        owners: Owners,
        rank: int,
        order: Callable[[int], Sequence[int]],
        augment: Augment | None,
        pages: Recycled | None,
    ) -> None:
        self.source, self.owners, self.rank, self.order = source, owners, rank, order
        self.pages = pages  # for batches; None: pinned memory, of which torch keeps what is free
        self.augment = augment
        self.packing = Packing(source.fields)
        self.sent_bytes = self.received_bytes = self.messages = 0

    def step(self, number: int) -> Step:
        """The moves of a step and the bytes it holds: its batch, its messages, the parts that may not be kept.

        Raises `DataError` for samples of several sizes. Called in the order of the steps.
        """
        indices = tuple(self.order(number))
        views = None if self.augment is None else Views(self.augment, number, indices, self.source.shape, self.owners)
        shapes = [self.source.shape(sample) for sample in indices] if views is None else views.shapes
        self._see_one_size(number, indices, shapes)
        self.owners.note(indices)
        moves = self.owners.moves(number, indices, self.rank, None if views is None else views.boxes)
        served = moves.samples_served(self.rank)
        part_bytes = [self.nbytes(sample) for sample in served]
        wanted = [sizes(cell(self.owners.plan, shapes[0], self.rank, self.owners.halo)) for _ in moves.positions]
        fields = self.packing.fields.values()
        batch_bytes = sum(field_bytes(f, box) for box in wanted for f in fields)
        before = [box for j in moves.positions for box in views.boxes(j, self.rank)] if views is not None else []
        arriving, leaving = (self._by_peer(pieces) for pieces in (moves.arriving, moves.leaving))
        inward, outward = (sum(map(self._message_bytes, peers.values())) for peers in (arriving, leaving))
        # a message lies in memory twice: packed, and what is shared with the other rank
        reserved = sum(part_bytes) + batch_bytes + 2 * (inward + outward)
        if views is not None:  # what augmentation is made from, and once more what it makes
            reserved += sum(field_bytes(f, sizes(box)) for box in before for f in fields) + batch_bytes
        largest = max(part_bytes, default=0)
        return Step(moves, shapes[0], arriving, leaving, reserved, batch_bytes, largest, set(served), views)

    def nbytes(self, sample: int) -> int:
        """The bytes that this rank keeps of a sample, if it keeps it."""
        return self.packing.nbytes(sizes(self.owners.held(sample, self.rank)))

    def load(self, sample: int) -> Tensor:
        """What this rank keeps of a sample, packed, from the source. Raises `DataError` that names rank and sample."""
        box = self.owners.held(sample, self.rank)
        # of an empty box, which sources need not know, a neighbouring voxel, cut to nothing
        spans = [slice(span.lo, span.hi) if span.size else slice(0, 1) for span in box]
        try:
            part = self.source.read(sample, spans)
            volume = dict(zip("DHW", sizes(box), strict=True))
            fields = {
                name: part[name][0][tuple(slice(volume.get(letter)) for letter in f.layout)]
                for name, f in self.packing.fields.items()
                if name in part
            }
            packed = part.packed if isinstance(part, Part) else None
            if packed is not None and self.packing.is_packed(packed, fields, sizes(box)):
                return packed
            return self.packing.pack(fields, sizes(box))
        except (DataError, OSError, ValueError, RuntimeError, KeyError, IndexError) as error:
            kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
            raise DataError(f"rank {self.rank}: sample {self._named([sample])}: {kind}{error}") from error

    def swap(self, step: Step, exchange: Exchange) -> dict[Piece, Tensor]:
        """The packed pieces from other ranks; `step.error` where one of them says no. All messages are exchanged.

        Raises `ExchangeError` when a rank does not answer; nothing can be exchanged any more then.
        """
        number, sends = step.moves.step, {}
        if step.error is None:
            try:
                for peer, pieces in step.leaving.items():
                    sends[peer] = messages.write(self.packing, pieces, number, [self._cut(step, p) for p in pieces])
            except Exception as error:  # noqa: BLE001  whatever it is, the others are waiting for a message
                step.error = error
        if step.error is not None:
            words = str(step.error)
            sends = {p: self._excuse(pieces, number, messages.FAILED, words) for p, pieces in step.leaving.items()}
        buffers = self._exchanged(exchange, step, sends)
        self.messages += len(sends)
        self.sent_bytes += sum(message.numel() for message in sends.values())
        self.received_bytes += sum(buffer.numel() for buffer in buffers.values())
        arrived: dict[Piece, Tensor] = {}
        for peer, pieces in step.arriving.items():
            where = f"{self._place(number, pieces)} from rank {peer}"
            try:
                parts = messages.read(self.packing, pieces, number, buffers[peer], where)
            except (DataError, ExchangeError) as error:  # this step is lost, yet the exchange goes on
                step.error = step.error or error
            else:
                arrived |= dict(zip(pieces, parts, strict=True))
        return arrived

    def decline(self, step: Step, exchange: Exchange, words: str) -> None:
        """Answer what other ranks expect of this one in a step that it takes no part in any more."""
        number = step.moves.step
        sends = {p: self._excuse(pieces, number, messages.CLOSED, words) for p, pieces in step.leaving.items()}
        self._exchanged(exchange, step, sends)

    def batch(self, step: Step, arrived: Mapping[Piece, Tensor]) -> Batch:
        """This rank's batch, of what it keeps and what has arrived: new tensors, pinned where a GPU is to get them."""
        moves, want = step.moves, cell(self.owners.plan, step.shape, self.rank, self.owners.halo)
        fields = self._room(len(moves.positions), sizes(want))
        for row, position in enumerate(moves.positions):
            pieces = [piece for piece in moves.arriving if piece.position == position]
            rows = {name: value[row] for name, value in fields.items()}
            if step.views is None:
                self._fill(rows, want, step, pieces, arrived)
                continue
            boxes = step.views.boxes(position, self.rank)
            parts = [{n: empty(f.shape(sizes(b)), f.dtype) for n, f in self.packing.fields.items()} for b in boxes]
            for k, (part, box) in enumerate(zip(parts, boxes, strict=True)):
                self._fill(part, box, step, [piece for piece in pieces if piece.part == k], arrived)
            volumes = [name for name, f in self.packing.fields.items() if f.is_volume]
            for name, value in step.views.built(position, parts, want, volumes).items():
                rows[name].copy_(value)
        return Batch(moves.step, moves.indices, (len(moves.indices), *step.shape), fields)

    def _fill(
        self,
        fields: Mapping[str, Tensor],
        box: Box,
        step: Step,
        pieces: Sequence[Piece],
        arrived: Mapping[Piece, Tensor],
    ) -> None:
        """Copy pieces to where they belong in tensors that hold `box`."""
        for piece in pieces:
            if piece.source != self.rank and piece not in arrived:
                continue  # a piece of no bytes
            packed = self._cut(step, piece) if piece.source == self.rank else arrived[piece]
            views = self.packing.views(packed, sizes(piece.box))
            for name, f in self.packing.fields.items():
                fields[name][within(f, piece.box, box)].copy_(views[name])

    def _see_one_size(self, number: int, indices: Sequence[int], shapes: Sequence[Shape]) -> None:
        for sample, shape in zip(indices, shapes, strict=True):
            if shape != shapes[0]:
                raise DataError(
                    f"step {number}: sample {self._named(indices[:1])} has shape {shapes[0]} but "
                    f"{self._named([sample])} has {shape} (D, H, W); samples of one batch need one size: crop or "
                    "resample them, or set the batch to 1"
                )

    def _room(self, count: int, box: Shape) -> dict[str, Tensor]:
        """Fields [count, …] in one buffer: two of them would leave twice as much that fills no huge page."""
        nbytes = sum(count * field_bytes(f, box) for f in self.packing.fields.values())
        memory = (
            torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) if self.pages is None else self.pages.buffer(nbytes)
        )
        return self.packing.rows(memory, count, box)

    def _by_peer(self, pieces: Sequence[Piece]) -> ByPeer:
        return messages.by_peer(pieces, self.rank, self.packing)

    def _message_bytes(self, pieces: Sequence[Piece]) -> int:
        return messages.message_bytes(self.packing, pieces)

    def _excuse(self, pieces: Sequence[Piece], number: int, status: int, words: str) -> Tensor:
        return messages.excuse(self.packing, pieces, number, status, words)

    def _cut(self, step: Step, piece: Piece) -> Tensor:
        held = self.owners.held(piece.sample, self.rank)
        return self.packing.cut(step.parts[piece.sample], held, piece.box)

    def _exchanged(self, exchange: Exchange, step: Step, sends: dict[int, Tensor]) -> dict[int, Tensor]:
        buffers = {peer: buffer(self._message_bytes(pieces)) for peer, pieces in step.arriving.items()}
        try:
            exchange.swap(sends, buffers)
        except ExchangeError as error:
            pieces = [piece for found in (step.arriving or step.leaving).values() for piece in found]
            raise ExchangeError(f"{self._place(step.moves.step, pieces)}: {error}") from error
        return buffers

    def _place(self, number: int, pieces: Sequence[Piece]) -> str:
        return f"rank {self.rank}: step {number}, sample {self._named([piece.sample for piece in pieces])}"

    def _named(self, samples: Sequence[int]) -> str:
        return ", ".join(f"{sample} ({self.source.names[sample]})" for sample in dict.fromkeys(samples))


def on_device(
    batch: Batch, device: torch.device | None, stream: torch.cuda.Stream | None
) -> tuple[Batch, torch.cuda.Event | None]:
    """With a stream: the batch copied to its GPU from pinned memory, behind the step that is computed now, and when."""
    if stream is None:
        return batch, None
    with torch.cuda.stream(stream):
        fields = {name: value.to(device, non_blocking=True) for name, value in batch.fields.items()}
        event = torch.cuda.Event()
        event.record(stream)
    event.synchronize()  # in this thread: only then may the pinned memory be used again
    return Batch(batch.step, batch.indices, batch.shape, fields), event
