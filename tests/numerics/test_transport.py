"""Shared memory and messages carry the same pieces; a dead, late or confused neighbour is an error, not a hang."""

from __future__ import annotations

import os
import resource
import select
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import meshwright as mw
from meshwright.cluster.process_group import leave
from meshwright.errors import RankError
from meshwright.models.small_unet import benchmark_unet
from meshwright.parallel import bells
from meshwright.parallel.bells import MOST_UNREAD
from meshwright.parallel.collective import Gather, Sum, SumQueue
from meshwright.parallel.shared import LARGEST_KEPT_BYTES
from meshwright.parallel.transport import VARIABLE, Transfer, channels


def _numbers(seed: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-100, 100, (size,), generator=generator).to(dtype)


def everybody_to_everybody() -> dict[str, int]:
    """Pieces of many sizes, types and strides in several posts, waited for in the opposite order."""
    group = dist.new_group()
    me, ranks = dist.get_rank(), dist.get_world_size()
    peers = [peer for peer in range(ranks) if peer != me]
    for turn in range(3):
        posted = []
        for number, (size, dtype) in enumerate(
            [(5, torch.float64), (0, torch.float32), (70_000, torch.bfloat16), (300_001, torch.int64), (1, torch.bool)]
        ):
            key = 100 * turn + 10 * number
            sends = [(peer, _numbers(key + me * ranks + peer, 2 * size, dtype)[::2]) for peer in peers]
            buffers = [(peer, torch.empty(size, dtype=dtype)) for peer in peers]
            posted.append((key, Transfer(group, sends, buffers), buffers))
        for key, transfer, buffers in reversed(posted):
            transfer.wait()
            for peer, got in buffers:
                want = _numbers(key + peer * ranks + me, 2 * len(got), got.dtype)[::2]
                assert torch.equal(got, want), (turn, key, peer)
    found = channels(group)
    return {"channels": len(found), "slots": max((len(c._slots) for c in found.values()), default=0)}


def everybody_by_bytes() -> dict[str, int]:
    """The same as on a processor that may show a counter before what it counts: every count is a byte in a pipe."""
    bells.ORDERED = False
    assert dist.get_world_size() != 2 or one_rank_runs_ahead()[1]
    return everybody_to_everybody()


@pytest.mark.parametrize("ranks", [2, 3])
def test_counts_may_travel_as_bytes(ranks: int) -> None:
    """Pieces arrive whole and in order then, too."""
    assert all(found["channels"] == ranks - 1 for found in mw.launch(everybody_by_bytes, ranks=ranks))


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_pieces_arrive_whole_and_in_order(ranks: int) -> None:
    """All ranks of this host use shared memory, and slots are used again."""
    for found in mw.launch(everybody_to_everybody, ranks=ranks):
        assert found["channels"] == ranks - 1
        assert found["slots"] <= 8  # five pieces under way at most, of three sizes


def test_messages_carry_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs between hosts: no channel, same pieces."""
    monkeypatch.setenv(VARIABLE, "messages")
    assert all(found["channels"] == 0 for found in mw.launch(everybody_to_everybody, ranks=3))


def test_an_unknown_transport_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable takes two values."""
    monkeypatch.setenv(VARIABLE, "pigeons")
    with pytest.raises(RankError, match="pigeons"):
        mw.launch(everybody_to_everybody, ranks=2)


def one_rank_lies_elsewhere() -> int:
    """Rank 1 asks for messages: all must agree on them."""
    if dist.get_rank() == 1:
        os.environ[VARIABLE] = "messages"
    return everybody_to_everybody()["channels"]


def test_all_ranks_decide_alike() -> None:
    """One rank without shared memory turns it off for all."""
    assert mw.launch(one_rank_lies_elsewhere, ranks=3) == [0, 0, 0]


def trained() -> list[torch.Tensor]:
    """Two steps of a network whose every exchange is posted early and waited for late."""
    torch.manual_seed(0)
    plan = mw.Plan.uniform(depth=2, height=2)
    model = mw.parallelize(benchmark_unet().double(), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = mw.shard(torch.randn(1, 4, 12, 20, 16, generator=torch.Generator().manual_seed(1)).double(), plan)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) ** 2).mean().backward()
        optimizer.step()
    return [p.full_tensor().detach() for p in model.parameters()]


def one_rank_runs_ahead() -> tuple[int, bool]:
    """Thousands of pieces one way, to a rank that begins late; then as many both ways, all posted before any wait."""
    group, me = dist.new_group(), dist.get_rank()
    (channel,) = channels(group).values()
    whole, pieces = True, 3000
    if me:
        dist.barrier()
    for number in range(pieces):
        buffer = torch.empty(3, dtype=torch.int64)
        Transfer(group, [(1, buffer.fill_(number))] if not me else [], [(0, buffer)] if me else []).wait()
        whole = whole and buffer.tolist() == [number] * 3
        if number == MOST_UNREAD // 2 and not me:
            dist.barrier()
    posted, buffers = [], [torch.empty(2, dtype=torch.int64) for _ in range(pieces)]
    for number, buffer in enumerate(buffers):
        posted.append(Transfer(group, [(1 - me, torch.full((2,), number))], [(1 - me, buffer)]))
    for transfer in posted:
        transfer.wait()
    return len(channel._slots), whole and all(int(b[1]) == number for number, b in enumerate(buffers))


def test_a_rank_that_runs_ahead_waits_for_its_neighbour() -> None:
    """Few pieces lie unread, so that neither memory nor open files grow with the lead."""
    for slots, whole in mw.launch(one_rank_runs_ahead, ranks=2):
        assert slots <= MOST_UNREAD
        assert whole


def test_both_train_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transport changes no byte that it moves; sums of more than two ranks differ by the order of the summands."""
    shared = mw.launch(trained, ranks=4)
    assert all(torch.equal(a, b) for other in shared[1:] for a, b in zip(shared[0], other, strict=True))
    monkeypatch.setenv(VARIABLE, "messages")
    for ours, theirs in zip(shared[0], mw.launch(trained, ranks=4)[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


FOLDS = {"sum": torch.sum, "max": torch.amax, "min": torch.amin, "product": torch.prod}


def sums_and_gathers() -> bool:
    """Every fold and type, sizes below the number of ranks too, against the fold of what all ranks hold."""
    group, me, ranks = dist.new_group(), dist.get_rank(), dist.get_world_size()
    used = bool(channels(group))
    for dtype in (torch.float64, torch.float32, torch.int64, torch.int32):
        for size in (1, 2, 5, 70_001):
            every = torch.stack([_numbers(rank, size, dtype) for rank in range(ranks)])
            for op, fold in FOLDS.items():
                flat = every[me].clone()
                Sum([flat[: size // 2], flat[size // 2 :]], group, op).wait()
                assert torch.allclose(flat, fold(every, 0).to(dtype)), (dtype, size, op)
            out = torch.empty_like(every)
            Gather(every[me].clone(), out, group).wait()
            assert torch.equal(out, every), (dtype, size)
    halves = torch.full((3,), 1.0 if me else 256.0, dtype=torch.bfloat16)  # one by one in bf16, no 1 would count
    Sum([halves], group).wait()
    assert not used or halves.tolist() == [float(torch.tensor(255.0 + ranks).bfloat16())] * 3
    return used


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_sums_and_gathers(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory and messages."""
    assert all(mw.launch(sums_and_gathers, ranks=ranks))
    monkeypatch.setenv(VARIABLE, "messages")
    assert not any(mw.launch(sums_and_gathers, ranks=ranks))


def sums_under_way() -> bool:
    """Many sums at once, folded early by some ranks and late by others, on a lane of their own."""
    group, me, ranks = dist.new_group(), dist.get_rank(), dist.get_world_size()
    channels(group, 1)
    late = dist.new_group()
    posted, queue = [], SumQueue()
    for number in range(98):
        flat = torch.full((1000 + number,), float(number * (me + 1)))
        posted.append((number, flat, Sum([flat], group, lane=1)))
        queue.add(posted[-1][2])
        if number % 7 == me:
            dist.barrier(late)  # ranks run ahead of each other by turns
    queue.fold(under_way for _, _, under_way in posted)
    for number, flat, under_way in reversed(posted):
        under_way.wait()
        assert flat.eq(number * ranks * (ranks + 1) / 2).all(), number
    return True


def test_sums_overtake_no_other() -> None:
    """Early and late folds meet in the right order."""
    assert all(mw.launch(sums_under_way, ranks=3))


def large_slots_are_given_back() -> int:
    """Bytes of slots that stay after pieces larger than what is kept, though smaller ones need no new slot."""
    group = dist.new_group()
    peer = 1 - dist.get_rank()
    small = torch.zeros(1)
    Transfer(group, [(peer, torch.ones(1))], [(peer, small)]).wait()
    for _ in range(3):
        buffer = torch.empty(LARGEST_KEPT_BYTES + 1, dtype=torch.uint8)
        Transfer(group, [(peer, torch.ones_like(buffer))], [(peer, buffer)]).wait()
        assert int(buffer.sum()) == len(buffer)
    dist.barrier()
    Transfer(group, [(peer, torch.ones(1))], [(peer, small)]).wait()
    (channel,) = channels(group).values()
    return sum(slot.memory.size for slot in channel._slots)


def test_large_pieces_leave_nothing() -> None:
    """An all-to-all of a volume must not hold its memory for ever."""
    assert all(left <= LARGEST_KEPT_BYTES for left in mw.launch(large_slots_are_given_back, ranks=2))


def a_piece_of_another_size() -> None:
    """Rank 1 took another path and sends less than rank 0 expects."""
    group = dist.new_group()
    me = dist.get_rank()
    buffer = torch.empty(8)
    Transfer(group, [(1 - me, torch.ones(8 - 4 * me))], [(1 - me, buffer)]).wait()


def test_another_size_is_an_error() -> None:
    """Never a buffer half full."""
    with pytest.raises(RankError, match="sent 16 bytes where 32 were expected"):
        mw.launch(a_piece_of_another_size, ranks=2)


def a_neighbour_is_killed(folder: str) -> None:
    """Rank 1 dies while rank 0 waits for its piece and a process that it forked lives on; rank 0 notes what it saw."""
    group = dist.new_group()
    channels(group)
    dist.barrier()
    if dist.get_rank() == 1:
        child = os.fork()
        if not child:
            signal.pause()
        Path(folder, "child").write_text(str(child), encoding="ascii")
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        Transfer(group, [], [(1, torch.empty(8))]).wait()
    except RuntimeError as error:
        Path(folder, "seen").write_text(str(error), encoding="utf-8")
        raise


def test_a_killed_neighbour_is_noticed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the end of its pipe, long before the time limit; the job names the rank that was killed."""
    monkeypatch.setenv("MESHWRIGHT_TIMEOUT_S", "300")
    try:
        with pytest.raises(RankError, match="rank 1"):
            mw.launch(a_neighbour_is_killed, ranks=2, args=(str(tmp_path),))
    finally:
        os.kill(int((tmp_path / "child").read_text(encoding="ascii")), signal.SIGKILL)
    assert "has ended" in (tmp_path / "seen").read_text(encoding="utf-8")


def a_neighbour_is_late() -> None:
    """Rank 1 sends nothing."""
    group = dist.new_group()
    channels(group)
    if dist.get_rank() == 0:
        Transfer(group, [], [(1, torch.empty(8))]).wait()


def test_a_late_neighbour_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit of the exchange holds for shared memory too."""
    monkeypatch.setenv("MESHWRIGHT_TIMEOUT_S", "2")
    with pytest.raises(RankError, match=r"no answer within 2 s|has ended"):
        mw.launch(a_neighbour_is_late, ranks=2)


def no_more_files() -> None:
    """A piece that needs new memory, in a process that may open nothing."""
    group, peer = dist.new_group(), 1 - dist.get_rank()
    channels(group)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        Transfer(group, [(peer, torch.ones(8))], [(peer, torch.empty(8))]).wait()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_no_more_files_is_said() -> None:
    """It is not the neighbour that has ended."""
    with pytest.raises(RankError, match=r"Too many open files.*ulimit -n"):
        mw.launch(no_more_files, ranks=2)


def files_after_leaving(ordered: bool) -> tuple[int, int, int]:
    """Open files before the first channel, after all have been dropped, and how many of these are shared memory."""
    bells.ORDERED = ordered
    before = len(os.listdir("/proc/self/fd"))
    group, peer = dist.new_group(), 1 - dist.get_rank()
    for _ in range(3):
        buffer = torch.empty(100_000)
        Transfer(group, [(peer, torch.ones(100_000))], [(peer, buffer)]).wait()
    dist.barrier()
    assert len(channels(group)) == 1
    del group
    leave()
    files = [Path(f"/proc/self/fd/{file}") for file in os.listdir("/proc/self/fd")]
    return before, len(files), sum("memfd:meshwright" in os.readlink(file) for file in files if file.is_symlink())


@pytest.mark.parametrize("ordered", [True, False])
def test_no_file_stays_open(ordered: bool) -> None:
    """Pipes and memory go with the channels."""
    for before, after, shared in mw.launch(files_after_leaving, ranks=2, args=(ordered and bells.ORDERED,)):
        assert shared == 0
        assert after <= before  # the sockets of the first group are gone, too


def one_rank_leaves_first() -> float:
    """Rank 0 sends and leaves at once; rank 1 comes to read much later."""
    group, me = dist.new_group(), dist.get_rank()
    channels(group)
    buffer = torch.zeros(1000)
    if me == 0:
        Transfer(group, [(1, torch.ones(1000))], [])
        leave()
        return 1000.0
    later = Transfer(group, [], [(0, buffer)])
    (channel,) = channels(group).values()
    hung_up = select.poll()
    hung_up.register(channel.bell.bell_in, 0)  # reports the end of the other side alone
    assert hung_up.poll(10_000)
    later.wait()
    return float(buffer.sum())


def test_the_last_pieces_of_a_rank_that_leaves_arrive() -> None:
    """Their memory stays until they have been read."""
    assert mw.launch(one_rank_leaves_first, ranks=2) == [1000.0, 1000.0]
