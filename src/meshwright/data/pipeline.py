"""From the order of the steps to batches that are ready before they are asked for, in threads of this rank.

    workers    admit steps in order (moves, bytes reserved), bring the parts this rank keeps into memory
    conductor  takes the steps in order: exchange with other ranks, the batch, its copy on the device
    take()     the caller's thread: waits where the batch of its step is not there yet

The exchange runs at most `EXCHANGE_AHEAD` steps before the step that was asked for last, the same on all ranks: when
all have closed after the same step, each message that one sends is one that another takes.
"""

from __future__ import annotations

import threading
import time
from collections import deque

import torch

from meshwright.data.buffers import give_back
from meshwright.data.cache import Cache
from meshwright.data.delivery import Batch, Delivery, Step, on_device
from meshwright.data.moves import Exchange
from meshwright.data.prefetch import MOST_WORKERS, Pace, PipelineStats, Workers, workers_for
from meshwright.errors import ConfigError, DataError, ExchangeError

EXCHANGE_AHEAD = 2  # one step travels while the one before it waits to be asked for
TRIM_SHARE = 50  # memory that sources have freed is given back to the system whenever it is 1 / 50 of the budget
CLOSE_S = 5.0  # for threads to end; one that a file system or a dead rank holds is left behind


class Pipeline:
    """The threads of one store. `ahead` is the most steps that are read ahead, `workers` fixes their number."""

    def __init__(
        self,
        delivery: Delivery,
        cache: Cache,
        exchange: Exchange | None,
        first: int,
        last: int | None,
        ahead: int,
        workers: int | None,
        device: torch.device | None,
    ) -> None:
        self.next_step = first
        self._delivery, self._cache, self._exchange = delivery, cache, exchange
        self._last, self._ahead, self._fixed, self._device = last, max(ahead, EXCHANGE_AHEAD), workers, device
        self._lock = threading.Lock()  # of all that threads share; each condition is for those who wait for one thing
        self._work_there, self._may_move, self._given = (threading.Condition(self._lock) for _ in range(3))
        self._asked, self._admitted, self._admitting, self._conducted = first - 1, first, False, first
        self._planned: Step | None = None  # the next one to be admitted, where it did not fit yet
        self._tasks: deque[tuple[Step, int]] = deque()
        self._steps: dict[int, Step] = {}
        self._ready: dict[int, tuple[Batch, torch.cuda.Event | None]] = {}
        self._errors: dict[int, BaseException] = {}
        self._fatal: BaseException | None = None  # no step after it can be had either
        self._stopping = self._closed = False
        self._handed_bytes, self._freed_bytes, self._given_s, self._count = 0, 0, 0.0, 0
        self._wait_s = self._read_s = self._exchange_s = 0.0
        self._pace, self._window = Pace(), EXCHANGE_AHEAD
        self._stream = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None
        self._workers = Workers(self._work, "meshwright-read")
        self._workers.resize(workers or 2)
        self._conductor = Workers(self._conduct, "meshwright-moves")
        self._conductor.resize(1)

    @property
    def is_over(self) -> bool:
        return self.next_step == self._last

    @property
    def workers(self) -> int:
        return self._workers.count

    @property
    def stats(self) -> PipelineStats:
        moved = self._delivery
        seconds = (self._wait_s, self._read_s, self._exchange_s)
        return PipelineStats(self._count, *seconds, moved.sent_bytes, moved.received_bytes, moved.messages)

    def take(self, step: int) -> Batch:
        """The batch of `next_step`; raises what went wrong with it."""
        if self._closed or self.is_over or step != self.next_step:
            state = "is closed" if self._closed else f"is at step {self.next_step}, its last is before {self._last}"
            raise ConfigError(f"step {step} was asked for, but the store {state}; each step can be had once, in order")
        begin_s = time.perf_counter()
        if self._given_s:
            self._pace.saw_step(begin_s - self._given_s)
        self._cache.reserve(-self._handed_bytes)
        self._handed_bytes = 0
        self._tune()
        with self._lock:
            self._asked = step
            self._work_there.notify()
            self._may_move.notify()
            while step not in self._ready and step not in self._errors and self._fatal is None:
                self._given.wait()
            if step not in self._ready:
                error = self._errors.get(step, self._fatal)
                assert error is not None
                raise error
            batch, event = self._ready.pop(step)
        self._handed_bytes = sum(value.numel() * value.element_size() for value in batch.fields.values())
        if event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            for value in batch.fields.values():
                value.record_stream(current)
        self.next_step, self._count = step + 1, self._count + 1
        self._given_s = time.perf_counter()
        self._wait_s += self._given_s - begin_s
        return batch

    def pass_over(self, step: int) -> None:
        """Go on behind `step`, which was asked for last and could not be had. Raises what ended the exchange."""
        if self._fatal is not None:
            raise self._fatal
        if step == self.next_step:
            self.next_step = step + 1

    def _tune(self) -> None:
        """As many threads as the measured times ask for, and steps enough for them to work on."""
        if not self._pace.known:
            return
        count = self._fixed or workers_for(self._pace.read_s, self._pace.step_s, MOST_WORKERS)
        if count != self._workers.count:
            self._workers.resize(count)
        self._window = min(self._ahead, max(EXCHANGE_AHEAD, count + 1))

    def _work(self) -> bool:
        """A worker: one part of an admitted step, or else the next step admitted."""
        with self._lock:
            while not (self._stopping or self._tasks or self._may_admit()):
                self._work_there.wait()
            if self._stopping:
                return False
            task = self._tasks.popleft() if self._tasks else None
            self._admitting = self._admitting or task is None
        if task is None:
            self._admit(self._admitted)
        else:
            self._bring(*task)
        return True

    def _may_admit(self) -> bool:
        number = self._admitted
        if self._admitting or number in self._errors or number == self._last or number > self._asked + self._window:
            return False
        # a step that the caller waits for is admitted or refused; nothing else is under way then
        return self._planned is None or number <= self._asked or self._bytes_with(self._planned) <= self._limit(number)

    def _bytes_with(self, step: Step) -> int:
        """What is under way once `step` is, each worker with a part of the source in its hands."""
        hands = min(self._workers.count, len(step.missing)) * step.largest_bytes
        return self._cache.reserved_bytes + step.reserved_bytes + hands

    def _limit(self, number: int) -> int:
        """Beyond what the exchange needs, half of the budget is left for what is kept."""
        return self._cache.budget_bytes // (1 if number <= self._asked + EXCHANGE_AHEAD else 2)

    def _admit(self, number: int) -> None:
        step, error, fits = self._planned, None, False
        try:
            step = step or self._delivery.step(number)
            under_way, budget = self._bytes_with(step), self._cache.budget_bytes
            with self._lock:
                fits = under_way <= self._limit(number)
                needed = number <= self._asked
            if fits:
                self._cache.reserve(step.reserved_bytes)
                for sample in tuple(step.missing):  # what is in memory needs no other thread
                    packed = self._cache.at_hand(sample, number)
                    if packed is not None:
                        step.parts[sample] = packed
                        step.missing.discard(sample)
            elif needed:
                raise ConfigError(
                    f"budget_bytes = {budget} is too small for rank {self._delivery.rank}: step {number} alone "
                    f"has {under_way} bytes under way"
                )
        except Exception as caught:  # noqa: BLE001  handed to the thread that asks for the step
            error = caught
        with self._lock:
            self._admitting = False
            self._planned = None if fits else step
            if error is not None or step is None:  # the steps before it can still be had
                self._errors[number] = error or DataError(f"step {number} has no moves")
                self._given.notify()
            elif fits:
                self._admitted, self._steps[number] = number + 1, step
                wanted = step.moves.samples_served(self._delivery.rank)
                self._tasks.extend((step, sample) for sample in wanted if sample in step.missing)
                self._may_move.notify()
            self._work_there.notify(1 + len(self._tasks))

    def _bring(self, step: Step, sample: int) -> None:
        packed, error, begin_s = None, None, time.perf_counter()
        try:
            packed = self._cache.get(sample, step.moves.step, lambda: self._load(sample))
        except Exception as caught:  # noqa: BLE001  handed to the thread that asks for the step
            error = caught
        with self._lock:
            step.read_s += time.perf_counter() - begin_s
            if packed is not None:
                step.parts[sample] = packed
            step.error = step.error or error
            step.missing.discard(sample)
            self._work_there.notify()  # what reading needed besides has been given back
            self._may_move.notify()

    def _load(self, sample: int) -> torch.Tensor:
        nbytes = self._delivery.nbytes(sample)
        self._cache.reserve(nbytes)  # for the source's own tensors
        try:
            return self._delivery.load(sample)
        finally:
            self._freed_bytes += nbytes
            if TRIM_SHARE * self._freed_bytes > self._cache.budget_bytes:
                self._freed_bytes = 0
                give_back()
            self._cache.reserve(-nbytes)

    def _conduct(self) -> bool:
        """The conductor: the next step, once its parts are there and the exchange may go on to it."""
        number = self._conducted
        with self._lock:
            while not (self._stopping or self._is_conductable(number)):
                self._may_move.wait()
            step = None if self._stopping else self._steps[number]
        if step is None:
            self._say_goodbye()
            return False
        try:
            self._finish(number, step)
        except ExchangeError as error:
            with self._lock:
                self._fatal = error
                self._given.notify()
            return False
        self._conducted = number + 1
        return True

    def _is_conductable(self, number: int) -> bool:
        there = number in self._steps and not self._steps[number].missing
        return there and (self._exchange is None or number <= self._asked + EXCHANGE_AHEAD)

    def _finish(self, number: int, step: Step) -> None:
        """Exchange what the step needs, put its batch together, and have it ready."""
        result, begin_s = None, time.perf_counter()
        try:
            arrived = {} if self._exchange is None else self._delivery.swap(step, self._exchange)
            self._exchange_s += time.perf_counter() - begin_s
            if step.error is None:
                result = on_device(self._delivery.batch(step, arrived), self._device, self._stream)
            del arrived
        except ExchangeError:
            raise
        except Exception as caught:  # noqa: BLE001  handed to the thread that asks for the step
            step.error = step.error or caught
        step.parts.clear()
        # a batch that failed is never handed out, so nothing gives its bytes back later
        self._cache.reserve((step.batch_bytes if result is not None else 0) - step.reserved_bytes)
        with self._lock:
            self._read_s += step.read_s
            self._pace.saw_read(step.read_s)
            del self._steps[number]
            if result is None:
                self._errors[number] = step.error or DataError(f"step {number} has no batch")
            else:
                self._ready[number] = result
            self._given.notify()
            self._work_there.notify()

    def _say_goodbye(self) -> None:
        """Answer what other ranks still expect of this one, up to where all may have come."""
        if self._exchange is None:
            return
        end = self._asked + EXCHANGE_AHEAD + 1
        words = str(self._fatal or (self._errors[min(self._errors)] if self._errors else "it stopped early"))
        try:
            for number in range(self._conducted, end if self._last is None else min(end, self._last)):
                step = self._steps.get(number) or self._delivery.step(number)
                self._delivery.decline(step, self._exchange, words)
        except (ExchangeError, DataError):
            return  # the others are gone already, or stop at the same samples

    def close(self) -> bool:
        """End the threads; False if one is left behind that did not return in `CLOSE_S` seconds."""
        with self._lock:
            self._stopping = self._closed = True
            for condition in (self._work_there, self._may_move, self._given):
                condition.notify_all()
        read, conducted = self._workers.join(CLOSE_S), self._conductor.join(CLOSE_S)
        if conducted and self._exchange is not None:
            self._exchange.hang_up()
            self._exchange = None
        with self._lock:
            for held in (self._ready, self._steps, self._tasks):
                held.clear()
        return read and conducted
