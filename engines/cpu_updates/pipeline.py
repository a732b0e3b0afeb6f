"""The way of gradients from the GPU through Adam on the CPU and of what that makes back to the GPU.

What travels is a chunk (`engines.cpu_updates.chunks`). It is downloaded, Adam runs on it, and what it leaves
is uploaded: weights straight to where the model has them, or directions into a slot, from which the GPU
applies them. Four resources, each with one queue: the download stream, this file's thread, the upload stream
and the stream that applies. The thread takes what has arrived by deadline: the block that the next forward
pass needs first. Its dependencies only go forward, so it cannot deadlock.

Methods decide what to submit and where it goes; this file decides the order, and keeps failures from hanging
and from spreading. With several ranks the thread takes what has arrived on all, if this rank is to update it,
and what other ranks have updated is uploaded as it comes (`engines.cpu_updates.rank_updates`).
"""

from __future__ import annotations

import heapq
import itertools
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engines.costs.resources.traffic import SWITCH_INTERVAL_S
from engines.cpu_updates.chunks import ChunkUpdate, TravellingChunk, UploadTarget, update_chunk
from engines.cpu_updates.cpu_adam import compiled, squared_norm_of_sum
from engines.cpu_updates.cpu_threads import AdamThreads
from engines.cpu_updates.rank_numbers import POLL_S
from engines.cpu_updates.rank_updates import RankUpdates
from engines.errors import NonFiniteLoss, PeerLost, UserError
from engines.transfer.clock import EventPair, now_s, on_stream
from engines.transfer.compute_clock import ComputeClock
from engines.transfer.engine_clocks import Clocks
from engines.transfer.link import Event, Link

WAIT_LIMIT_S = 600.0
"""Most time that one update is waited for: a hang becomes an error."""

_cuda: Any = torch.cuda  # most of it is without annotations


class GradientNotFinite(Exception):
    """A gradient was infinite or NaN. Its block keeps its weights and moments."""

    def __init__(self, step: int) -> None:
        super().__init__(f"a gradient of step {step} is not finite")
        self.step = step


class _Job(NamedTuple):
    """What is awaited, and then done, together."""

    updates: list[ChunkUpdate]
    is_of_norms: bool = False
    """Nothing is updated: norms are taken."""


APPLY_PRIORITY = 0
"""Of the stream that applies, among the GPU's: below 0 it goes before the one that computes."""


class UpdatePipeline:
    """A thread that updates chunks, one that sends them back, and the stream that applies them.

    Jobs are lists of chunks: a list's downloads are awaited together, then all are updated, then all are
    uploaded. Among the jobs whose downloads have ended, the one with the earliest deadline is next; if none
    has, the oldest.

    After an exception every update, also one submitted later, is released at once, and `wait` raises.
    """

    def __init__(
        self,
        link: Link,
        clocks: Clocks,
        *,
        slots: int = 0,
        slot_elements: int = 0,
        dtype: torch.dtype = torch.float32,
        name: str = "cpu-updates",
        ranks: RankUpdates | None = None,
    ) -> None:
        """With `ranks` every chunk is updated by one of them, for all.

        `slots` are for chunks that are applied on the GPU, each of up to `slot_elements` of `dtype`.
        Threads are named after `name`."""
        self._link = link
        self._ranks = ranks
        self._timeline, self._exposure = clocks.timeline, clocks.exposure
        device = link.device
        self._stream = _cuda.Stream(device, priority=APPLY_PRIORITY) if device.type == "cuda" else None
        # Allocated once: they cross streams, and the caching allocator knows nothing of that.
        self._slots = [torch.empty(slot_elements, dtype=dtype, device=device) for _ in range(slots)]
        self._slot_free = [Event() for _ in self._slots]
        compiled()  # here, and not in the first step
        self.adam_threads = AdamThreads()
        self._switch_interval_s = sys.getswitchinterval()
        sys.setswitchinterval(min(self._switch_interval_s, SWITCH_INTERVAL_S))
        self._changed = threading.Condition()
        self._arriving: deque[_Job] = deque()
        self._ready: list[tuple[int, int, _Job]] = []
        self._order = itertools.count()
        self._error: BaseException | None = None
        self._is_closed = False
        self._busy_s = 0.0
        self._updated: queue.SimpleQueue[ChunkUpdate | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-adam", daemon=True),
            threading.Thread(target=self._return, name=f"{name}-return", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def direction(self, state: TravellingChunk) -> Tensor:
        """(elements,) on the GPU: where what is to be applied of a chunk arrives, at each update. Neighbours,
        which come back one after the other, have different slots."""
        return self._slots[state.number % len(self._slots)][: state.outgoing.numel()]

    def submit(self, updates: Sequence[ChunkUpdate]) -> None:
        """Take a job whose downloads are enqueued. Does not wait."""
        if updates:
            self._add([_Job(list(updates))])

    def submit_each(self, updates: Sequence[ChunkUpdate]) -> None:
        """`submit` each by itself; the thread is woken once."""
        self._add([_Job([update]) for update in updates])

    def submit_norms(self, updates: Sequence[ChunkUpdate]) -> None:
        """With several ranks, take the norm of the sum of their gradients of some chunks, which are submitted
        when that of all chunks is known (`wait_for_norm`). Does not wait."""
        self._add([_Job(list(updates), is_of_norms=True)])

    def _add(self, jobs: Sequence[_Job]) -> None:
        with self._changed:
            self._arriving.extend(jobs)
            self._changed.notify()

    def wait_for_norm(self, step: int) -> float:
        """With several ranks: the squared norm of all chunks' gradients of a step, whose norms are submitted.
        Raises what kept this rank or another from it."""
        assert self._ranks is not None
        while (found := self._ranks.squared_norm(step)) is None:
            if self._error is not None:
                raise self._error
            self._ranks.look_for_peers()
            time.sleep(POLL_S)
        return found

    def wait(self, update: ChunkUpdate) -> Event:
        """Hold the calling thread until the chunk's application is enqueued; the event of its end.

        Raises `GradientNotFinite`, `RuntimeError` with its cause if the worker failed, and one if the update
        does not come.
        """
        is_done = update.done.wait(WAIT_LIMIT_S)
        if self._error is not None:
            raise RuntimeError(f"the CPU update failed: {self._error!r}") from self._error
        if not is_done:
            raise RuntimeError(f"the CPU update did not come within {WAIT_LIMIT_S:.0f} s")
        if update.failed:
            raise GradientNotFinite(update.step.number)
        return update.applied

    def compute_waits(self, updates: Sequence[ChunkUpdate], clock: ComputeClock) -> None:
        """Let the compute stream wait for the application of chunks, which is no compute.

        Raises `NonFiniteLoss` for a gradient that was not finite, the `UserError` or `PeerLost` that kept the
        worker from it, and what `wait` raises.
        """
        if not updates:
            return
        try:
            with clock.standing():
                for update in updates:
                    self._link.wait(self.wait(update))
        except GradientNotFinite as error:
            raise NonFiniteLoss(str(error)) from None
        except RuntimeError as error:
            if isinstance(error.__cause__, UserError | PeerLost):
                raise error.__cause__ from None
            raise

    def wait_out(self, updates: Sequence[ChunkUpdate], wait: Callable[[Event], None]) -> None:
        """Wait until all `updates` are applied, finite or not; the argument `wait` waits for an event."""
        for update in updates:
            with suppress(GradientNotFinite):
                wait(self.wait(update))

    def step_ended(self, hiding_s: float | None) -> dict[str, Any]:
        """To be called once at the end of each step, with the seconds that the GPU was busy while there can
        be updates, if it is known. What updates took since the last call and their threads, by the names of
        `engines.base.StepStats`."""
        threads = self.adam_threads.count
        with self._changed:
            busy_s, self._busy_s = self._busy_s, 0.0
        self.adam_threads.step_ended(busy_s, hiding_s)
        return {"cpu_s": busy_s, "cpu_threads": threads}

    def close(self) -> None:
        """Finish what was submitted and end the thread. May be called twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        for thread in self._threads:
            thread.join(WAIT_LIMIT_S)
        # The longer one: of two pipelines the first that was made may be the first to end.
        sys.setswitchinterval(max(self._switch_interval_s, sys.getswitchinterval()))

    def _run(self) -> None:
        try:
            count = 0
            while (job := self._take()) is not None:
                try:
                    if count != self.adam_threads.count:
                        count = self.adam_threads.count
                        torch.set_num_threads(count)  # of this thread alone
                    if self._error is None:
                        self._process(job)
                except BaseException as error:  # it belongs to the thread that waits
                    self._error = error
                for update in () if job.is_of_norms else job.updates:
                    if self._ranks is None:
                        update.consumed()
                    self._updated.put(update)
        finally:
            self._updated.put(None)

    def _return(self) -> None:
        """Upload and apply, in the order of the updates, while Adam goes on: starting a chunk's kernels takes
        the CPU up to a millisecond, half of what its Adam takes."""
        for update in self._to_bring_back():
            try:
                if self._error is None and not update.failed:
                    self._bring_back(update)
            except BaseException as error:
                self._error = error
            finally:
                update.done.set()

    def _to_bring_back(self) -> Iterator[ChunkUpdate]:
        """What has been updated, also by other ranks, and the earliest deadline first of what has then."""
        if self._ranks is None:
            while (update := self._updated.get()) is not None:
                yield update
            return
        waiting: list[ChunkUpdate] = []
        goes_on = True
        while goes_on or waiting:
            with suppress(queue.Empty):
                while goes_on:
                    found = self._updated.get(timeout=POLL_S) if waiting else self._updated.get()
                    goes_on = found is not None
                    waiting += [found] if found is not None else []
            ready = [each for each in waiting if self._is_updated(each)]
            if not ready and not goes_on:
                time.sleep(POLL_S)
            for update in sorted(ready, key=lambda each: each.state.deadline):
                waiting.remove(update)
                update.consumed()
                yield update

    def _is_updated(self, update: ChunkUpdate) -> bool:
        """Also what will not be, after an error."""
        if self._error is not None or self._ranks is None:
            return True
        number, step = update.state.number, update.step.number
        if self._ranks.is_updated(number, step):
            update.failed = self._ranks.has_failed(number, step)
            return True
        try:
            self._ranks.look_for_peers()
        except PeerLost as error:
            if not self._ranks.is_updated(number, step):  # else it has ended since, having done its part
                self._error = error
        return self._error is not None

    def _take(self) -> _Job | None:
        """The next job; `None` once closed and empty."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._arriving or self._ready or self._is_closed)
                if not (self._arriving or self._ready):
                    return None
                if (job := self._next()) is not None:
                    return job

    def _next(self) -> _Job | None:
        """The next of the jobs that there are, any one after an error; `None`: none has arrived on all
        ranks."""
        try:
            # Downloads end in the order of submission: they share a stream.
            while self._arriving and _has_happened(self._arriving[0].updates[-1].downloaded):
                job = self._arriving.popleft()
                self._report_arrived(job)
                heapq.heappush(self._ready, (job.updates[0].state.deadline, next(self._order), job))
            if self._ranks is not None and self._error is None:
                if (found := self._arrived_on_all_ranks(self._ranks)) is None:
                    self._ranks.look_for_peers()
                    self._changed.wait(POLL_S)
                return found
        except BaseException as error:  # an earlier kernel's, told by any call to the driver
            self._error = error
        return heapq.heappop(self._ready)[2] if self._ready else self._arriving.popleft()

    def _report_arrived(self, job: _Job) -> None:
        for update in job.updates if self._ranks is not None else ():
            assert self._ranks is not None
            self._ranks.report_arrived(update.state.number, update.step.number, update.place)

    def _arrived_on_all_ranks(self, ranks: RankUpdates) -> _Job | None:
        """The first job by deadline of which that can be said, or which is other ranks' to update."""
        for entry in sorted(self._ready):
            job = entry[2]
            own = [update for update in job.updates if ranks.owns(update.state.number)]
            if all(ranks.all_arrived(update.state.number, update.step.number) for update in own):
                self._ready.remove(entry)
                heapq.heapify(self._ready)
                return job
        return None

    def _process(self, job: _Job) -> None:
        for update in job.updates:
            self._link.host_wait(update.downloaded)
        self._link.host_wait(job.updates[0].step.total_known)
        begin_s = now_s()
        for update in job.updates:
            if job.is_of_norms:
                self._take_norm(update)
            else:
                self._update(update)
        end_s = now_s()
        with self._changed:
            self._busy_s += end_s - begin_s
        self._exposure.on_host(begin_s, end_s)
        if self._timeline is not None:
            self._timeline.host_span("cpu adam", f"block {job.updates[0].state.deadline}", begin_s, end_s)

    def _update(self, update: ChunkUpdate) -> None:
        state, ranks, of_ranks = update.state, self._ranks, update.of_ranks
        if ranks is None or of_ranks is None:
            update.failed = not update_chunk(state, update.step, None if of_ranks is None else of_ranks(()))
        elif ranks.owns(state.number):
            if update.step.max_norm is not None and not ranks.is_norm_known(state.number, update.step.number):
                self._take_norm(update)
            update.failed = not update_chunk(state, update.step, of_ranks(ranks.places(state.number)))
            ranks.report_updated(state.number, update.step.number, failed=update.failed)
        else:
            state.updates += 1

    def _take_norm(self, update: ChunkUpdate) -> None:
        """Of what all ranks bring of a chunk that is this one's to update."""
        number, ranks = update.state.number, self._ranks
        if ranks is None or update.of_ranks is None or not ranks.owns(number):
            return
        squared = squared_norm_of_sum(update.of_ranks(ranks.places(number)).gradients)
        ranks.report_norm(number, update.step.number, squared)

    def _bring_back(self, update: ChunkUpdate) -> None:
        name = f"block {update.state.deadline}"
        outgoing, destination = update.state.outgoing, update.destination
        if destination is None:
            return
        if isinstance(destination, UploadTarget):
            update.applied = self._link.upload(
                outgoing, destination.memory, after=destination.free, name=name
            )
            return
        slot = update.state.number % len(self._slots)
        direction = self.direction(update.state)
        # HAZARD: the slot's last direction must have been applied before this one is written over it.
        arrived = self._link.upload(outgoing, direction, after=self._slot_free[slot], name=name)
        if self._stream is None:
            destination(direction, update.step)
            return
        with on_stream(self._stream):
            self._link.wait(arrived)
            span = self._timeline.begin("apply", name) if self._timeline is not None else None
            start = _timed_event(self._stream)
            destination(direction, update.step)
            self._exposure.between("gpu", EventPair(start, _timed_event(self._stream)))
            if span is not None and self._timeline is not None:
                self._timeline.end(span)
            update.applied = self._slot_free[slot] = self._link.record()


def _timed_event(stream: torch.cuda.Stream) -> Any:
    event = _cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def _has_happened(event: Event) -> bool:
    cuda: Any = event.cuda  # its methods are without annotations
    return cuda is None or bool(cuda.query())
