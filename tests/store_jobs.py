"""Sources whose every value says where it belongs, and jobs that ranks run with a store."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

import meshwright as mw
from meshwright.data import transforms
from meshwright.data.intensity import Linear, Noise
from meshwright.data.moves import message_bytes
from meshwright.data.owners import Owners
from meshwright.data.packing import Packing
from meshwright.data.rearrange import Crop, Flip, Roll, rotate90
from meshwright.data.sampler import batch as batch_of
from meshwright.data.source import Field
from meshwright.data.store import Store
from meshwright.data.transforms import Compose, Transform
from meshwright.data.warp import Elastic
from meshwright.errors import DataError, MeshwrightError
from meshwright.train.memory import peak_bytes, reset_peak, resident_bytes

PLANS: dict[str, dict[str, int]] = {
    "one": {},
    "n2": {"data": 2},
    "n4": {"data": 4},
    "d2": {"depth": 2},
    "d4": {"depth": 4},
    "n2d2": {"data": 2, "depth": 2},
    "h2w2": {"height": 2, "width": 2},
}
FIELDS = {
    "image": Field("CDHW", (2,), torch.float32),
    "label": Field("DHW", (), torch.uint8),
    "target": Field("K", (3,), torch.float64),
}
MANY = 1 << 40


@dataclass
class Numbers:
    """Samples of given sizes; a voxel's value is a hash of sample, field and global position."""

    shapes: tuple[tuple[int, int, int], ...]
    fields: Mapping[str, Field] = field(default_factory=lambda: dict(FIELDS))
    bad: int | None = None  # a sample that cannot be read
    bad_rank: int = 0
    read_s: float = 0.0  # that a read takes; not a synchronisation: to have something to hide
    reads: Counter[int] = field(default_factory=Counter)
    threads: set[str] = field(default_factory=set)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"case_{index:02d}" for index in range(len(self.shapes)))

    def shape(self, index: int) -> tuple[int, int, int]:
        return self.shapes[index]

    def read(self, index: int, spans: Sequence[slice]) -> dict[str, Tensor]:
        assert all(0 <= s.start < s.stop <= size for s, size in zip(spans, self.shapes[index], strict=True)), spans
        self.reads[index] += 1
        self.threads.add(threading.current_thread().name)
        if self.read_s:
            time.sleep(self.read_s)
        if index == self.bad and (not dist.is_initialized() or dist.get_rank() == self.bad_rank):
            raise DataError("its last 17 bytes are missing")
        return self.part(index, spans)

    def part(self, index: int, spans: Sequence[slice]) -> dict[str, Tensor]:
        d, h, w = (torch.arange(span.start, span.stop) for span in spans)
        at = (d[:, None, None] * 1009 + h[:, None]) * 1013 + w
        found = {}
        for number, (name, kind) in enumerate(self.fields.items()):
            key = index * 7919 + number * 104729
            if "D" not in kind.layout:
                found[name] = (torch.arange(kind.sizes[0]) + key).to(kind.dtype)[None]
                continue
            lead = torch.arange(kind.sizes[0])[:, None, None, None] if kind.sizes else torch.zeros((), dtype=torch.long)
            found[name] = ((at * 31 + lead * 17 + key) % 251).to(kind.dtype)[None]
        return found


def truth(
    source: Numbers, indices: Sequence[int], plan: mw.Plan, rank: int, halo: tuple[int, int, int]
) -> dict[str, Tensor]:
    """This rank's part of the batch by a direct read."""
    shape = source.shape(indices[0])
    rows, _, *spans = mw.interval((len(indices), 1, *shape), plan, rank)
    wide = [
        slice(max(0, s.start - m), min(size, s.stop + m)) if s.stop > s.start else s
        for s, m, size in zip(spans, halo, shape, strict=True)
    ]
    parts = [source.part(index, wide) for index in indices[rows]]
    if not parts:
        edges = [s.stop - s.start for s in wide]
        return {name: torch.empty((0, *kind.shape(edges)), dtype=kind.dtype) for name, kind in source.fields.items()}
    return {name: torch.cat([part[name] for part in parts]) for name in source.fields}


def planned_bytes(source: Numbers, owners: Owners, steps: Sequence[Sequence[int]], rank: int) -> tuple[int, int]:
    """(sent, received) by this rank over the steps, as the plan of moves has it."""
    packing, sent, received = Packing(source.fields), 0, 0
    for number, indices in enumerate(steps):
        owners.note(indices)
        moves = owners.moves(number, indices, rank)
        for peer in range(owners.plan.ranks):
            if peer != rank:
                sent += message_bytes(packing, [p for p in moves.leaving if p.target == peer])
                received += message_bytes(packing, [p for p in moves.arriving if p.source == peer])
    return sent, received


def serve(
    plan_name: str,
    reading: str | None,
    shapes: tuple[tuple[int, int, int], ...],
    size: int,
    epochs: int = 3,
    budget: int = MANY,
    spill: str | None = None,
    halo: tuple[int, int, int] = (0, 0, 0),
    seed: int = 3,
) -> dict[str, int]:
    """Every batch of some epochs equals a direct read, bit for bit; what was sent is what the plan of moves says."""
    plan = mw.Plan.uniform(**PLANS[plan_name])
    other = None if reading is None else mw.Plan.uniform(**PLANS[reading])
    source = Numbers(shapes)
    steps = [batch_of(seed, step, len(shapes), size) for step in range(epochs * -(-len(shapes) // size))]
    rank = dist.get_rank() if dist.is_initialized() else 0
    with Store(
        source, plan, steps.__getitem__, budget_bytes=budget, last=len(steps), reading=other, halo=halo, spill=spill
    ) as store:
        for number, batch in enumerate(store):
            want = truth(source, steps[number], plan, rank, halo)
            assert (batch.step, batch.indices) == (number, tuple(steps[number]))
            assert batch.shape == (size, *source.shape(steps[number][0]))
            assert set(batch.fields) == set(want)
            for name, value in want.items():
                assert torch.equal(batch[name], value), (rank, number, name, batch[name].shape, value.shape)
        assert number == len(steps) - 1
    stats, cache = store.stats, store.cache_stats
    sent, received = planned_bytes(source, Owners(source.shape, plan, other, halo), steps, rank)
    assert (stats.sent_bytes, stats.received_bytes) == (sent, received), (stats, sent, received)
    assert store.peak_bytes <= budget
    left = [thread.name for thread in threading.enumerate() if thread.name in ("meshwright-read", "meshwright-moves")]
    assert left == []
    return {
        "sent": sent,
        "reads": sum(source.reads.values()),
        "again": sum(count > 1 for count in source.reads.values()),
        "spilled": cache.spilled,
        "from_disk": cache.from_disk,
        "damaged": cache.damaged,
    }


@dataclass
class Made:
    """Samples that are made, not read: what memory they take is the store's alone."""

    samples: int
    edge: int
    fields: Mapping[str, Field] = field(default_factory=lambda: {k: FIELDS[k] for k in ("label",)})

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.samples)))

    def shape(self, index: int) -> tuple[int, int, int]:
        return (self.edge,) * 3

    def read(self, index: int, spans: Sequence[slice]) -> dict[str, Tensor]:
        return {"label": torch.full((1, *(span.stop - span.start for span in spans)), index, dtype=torch.uint8)}


def memory_gained(plan_name: str, samples: int, edge: int, budget: int, folder: str) -> tuple[int, int]:
    """(the most resident bytes gained, the most bytes counted) while three epochs are served."""
    plan = mw.Plan.uniform(**PLANS[plan_name])
    size, source = 2 if plan_name == "n2" else 1, Made(samples, edge)
    cpu = torch.device("cpu")

    def order(step: int) -> tuple[int, ...]:
        return batch_of(1, step, samples, size)

    with Store(source, plan, order, budget_bytes=budget, last=2, spill=folder) as store:
        assert len(list(store)) == 2  # what torch, threads and shared memory take once is no part of any budget
    before = resident_bytes(cpu)
    reset_peak(cpu)
    with Store(source, plan, order, budget_bytes=budget, last=3 * samples // size, spill=folder) as store:
        for batch in store:
            assert int(batch["label"].max()) in batch.indices
    return peak_bytes(cpu) - before, store.peak_bytes


def drawn(step: int, position: int, sample: int) -> Transform:
    """Another augmentation for each sample of each step, all of one output size; boxes from everywhere."""
    key = 100 * step + position
    kinds: list[tuple[Transform, ...]] = [
        (Flip(("depth", "width")),),
        (Roll(("depth", "height"), (5, 3)), Noise(0.1, key)),
        (rotate90(("depth", "width")), Linear(1.5, 0.25)),
        (Elastic(spacing=6, amplitude=1, key=key), Flip(("height",))),
        (),
    ]
    return Compose((*kinds[(step + 2 * position + sample) % len(kinds)], Crop((2, 1, 0), (9, 10, 12))))


def serve_augmented(plan_name: str, reading: str | None, size: int, samples: int = 5) -> int:
    """Augmented batches out of memory equal the whole sample, augmented and cut, bit for bit; the sum of reads."""
    plan = mw.Plan.uniform(**PLANS[plan_name])
    other = None if reading is None else mw.Plan.uniform(**PLANS[reading])
    source, full = Numbers(((12, 12, 12),) * samples), (12, 12, 12)
    steps = [batch_of(7, step, samples, size) for step in range(3 * samples)]
    rank = dist.get_rank() if dist.is_initialized() else 0
    with Store(
        source, plan, steps.__getitem__, budget_bytes=MANY, last=len(steps), reading=other, augment=drawn
    ) as store:
        for batch in store:
            indices = steps[batch.step]
            assert batch.shape == (size, 9, 10, 12)
            rows, _, *spans = mw.interval((size, 1, 9, 10, 12), plan, rank)
            for row, position in enumerate(range(size)[rows]):
                whole = {n: v[0] for n, v in source.part(indices[position], [slice(0, n) for n in full]).items()}
                transform = drawn(batch.step, position, indices[position])
                volumes = ("image", "label")
                out = [slice(0, n) for n in (9, 10, 12)]
                want = transforms.build(
                    transform,
                    [
                        {n: v[(..., *box)] if n in volumes else v for n, v in whole.items()}
                        for box in transforms.source_spans(transform, out, full)
                    ],
                    out,
                    full,
                    volumes,
                )
                for name, value in want.items():
                    cut = value[(..., *spans)] if name in volumes else value
                    assert torch.equal(batch[name][row], cut), (rank, batch.step, position, name)
            assert batch["image"].shape[0] == len(range(size)[rows])
    assert max(source.reads.values(), default=0) <= 1, "each part is read once, whatever the augmentation"
    return sum(source.reads.values())


def train_until(fault_step: int, kind: str, where: str, bad: int | None = None, timeout_s: float = 60.0) -> int:
    """Two sample groups take batches; `kind` happens to rank 1 at `fault_step`: "kill" in the exchange, "close", …"""
    plan = mw.Plan.uniform(data=2)
    source = Numbers(((6, 5, 4),) * 8, bad=bad, bad_rank=1)
    steps = [batch_of(5, step, 8, 2) for step in range(24)]
    rank, done = dist.get_rank(), 0
    with Store(source, plan, steps.__getitem__, budget_bytes=MANY, last=24, timeout_s=timeout_s) as store:
        if rank == 1 and where == "swap":
            exchange = store._pipeline._exchange
            assert exchange is not None
            swap, calls = exchange.swap, []

            def dying(sends: dict[int, Tensor], receives: dict[int, Tensor]) -> None:
                calls.append(1)
                if len(calls) == fault_step:
                    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])
                swap(sends, receives)

            exchange.swap = dying  # type: ignore[method-assign]
        for batch in store:
            if kind == "raise" and rank == 1 and batch.step == fault_step:
                raise ValueError("enough")
            if kind == "close" and batch.step == fault_step:
                break
            want = truth(source, steps[batch.step], plan, rank, (0, 0, 0))
            assert torch.equal(batch["image"], want["image"])
            done += 1
    assert [t.name for t in threading.enumerate() if t.name.startswith("meshwright-") and "parent" not in t.name] == []
    return done


def caught(fault_step: int, kind: str, where: str, bad: int | None = None) -> str:
    """The text of what a rank raises."""
    try:
        train_until(fault_step, kind, where, bad)
    except (MeshwrightError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def caught_split(bad: int) -> str:
    """The same where whole samples are read and halves are used: each rank needs what the other reads."""
    source = Numbers(((6, 5, 4),) * 8, bad=bad, bad_rank=1)
    plan, reading = mw.Plan.uniform(depth=2), mw.Plan.uniform(data=2)
    try:
        with Store(source, plan, lambda s: [2 * s, 2 * s + 1], budget_bytes=MANY, last=4, reading=reading) as store:
            for batch in store:
                assert batch.step < bad // 2
    except MeshwrightError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
