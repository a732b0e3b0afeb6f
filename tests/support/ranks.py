"""Ranks of one run as threads of the test's process, one of which runs at a time: a rank goes on until it
waits for the others. Which one is next is drawn, so that ranks arrive in any order."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from engines.errors import PeerLost

Result = TypeVar("Result")


class Meeting:
    """What the ranks share."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.gathered = 0
        """Values that went round, of one rank."""
        self._turn = threading.Condition()
        self._random = random.Random(seed)
        self._running: int | None = None
        self._able = set(range(size))
        self._left: set[int] = set()
        self._content: dict[int, object] = {}
        self._round: list[object] = []

    def begin(self, rank: int) -> None:
        with self._turn:
            if self._running is None:
                self._next()
            self._turn.wait_for(lambda: self._running == rank)

    def leave(self, rank: int) -> None:
        with self._turn:
            self._left.add(rank)
            self._able.discard(rank)
            self._content.pop(rank, None)
            self._able |= set(self._content)  # they hear that one is gone
            self._next()

    def pass_round(self, rank: int, content: object) -> list[object]:
        with self._turn:
            if self._left:
                raise PeerLost
            self._content[rank] = content
            self._able.discard(rank)
            if len(self._content) == self.size:
                self._round = [self._content[each] for each in range(self.size)]
                self._content = {}
                self._able = set(range(self.size))
            self._next()
            self._turn.wait_for(lambda: self._running == rank)
            if rank in self._content:
                raise PeerLost
            return self._round

    def _next(self) -> None:
        self._running = self._random.choice(sorted(self._able)) if self._able else None
        self._turn.notify_all()


class ThreadWorld:
    """`engines.world.World` of one of the threads."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank = self.local_rank = rank
        self.size = self.local_size = meeting.size
        self.meeting = meeting

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        self.meeting.gathered += len(values)
        found = [list(each) for each in self.meeting.pass_round(self.rank, tuple(values))]  # type: ignore[call-overload]
        assert len({len(each) for each in found}) == 1
        return found

    def exchange(self, content: bytes) -> list[bytes]:
        return [each for each in self.meeting.pass_round(self.rank, content) if isinstance(each, bytes)]

    def broadcast(self, content: bytes) -> bytes:
        return self.exchange(content)[0]

    def between_machines(self, own: torch.Tensor) -> list[torch.Tensor]:
        return [own.clone()]  # all of them are on one

    def barrier(self) -> None:
        self.meeting.pass_round(self.rank, None)

    def all_gather(self, memory: torch.Tensor) -> None:
        own = memory.view(self.size, -1)[self.rank].clone()
        for rank, each in enumerate(self.meeting.pass_round(self.rank, own)):
            assert isinstance(each, torch.Tensor)  # else ranks came for unlike things
            memory.view(self.size, -1)[rank].copy_(each)


def in_ranks(size: int, act: Callable[[ThreadWorld], Result], seed: int = 0) -> list[Result]:
    """What `act` gives on every rank. Raises what the first rank that failed of itself raised."""
    meeting = Meeting(size, seed)
    results: dict[int, Result] = {}
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        meeting.begin(rank)
        try:
            results[rank] = act(ThreadWorld(rank, meeting))
        except BaseException as error:
            errors[rank] = error
        finally:
            meeting.leave(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors.values(), key=lambda each: isinstance(each, PeerLost)):
        raise error
    return [results[rank] for rank in range(size)]


class Round:
    """What ranks that run side by side share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.content: list[object] = [None] * size


class SideBySideWorld:
    """`engines.world.World` of one of several threads that all run at the same time: for engines whose
    threads wait for those of other ranks."""

    def __init__(self, rank: int, shared: Round, machines: int = 1) -> None:
        self.rank, self.size = rank, shared.size
        self.local_size = shared.size // machines
        self.local_rank = rank % self.local_size
        self._shared = shared

    def _pass_round(self, content: object) -> list[object]:
        try:
            self._shared.content[self.rank] = content
            self._shared.barrier.wait()
            found = list(self._shared.content)
            self._shared.barrier.wait()
        except threading.BrokenBarrierError:
            raise PeerLost from None
        return found

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        return [list(each) for each in self._pass_round(tuple(values))]  # type: ignore[call-overload]

    def exchange(self, content: bytes) -> list[bytes]:
        return [each for each in self._pass_round(content) if isinstance(each, bytes)]

    def broadcast(self, content: bytes) -> bytes:
        return self.exchange(content)[0]

    def between_machines(self, own: torch.Tensor) -> list[torch.Tensor]:
        every = self._pass_round(own.clone())
        found = every[self.local_rank :: self.local_size]
        return [each.clone() for each in found if isinstance(each, torch.Tensor)]

    def barrier(self) -> None:
        self._pass_round(None)

    def all_gather(self, memory: torch.Tensor) -> None:
        parts, first = memory.view(self.local_size, -1), self.rank - self.local_rank
        own = parts[self.local_rank].clone()
        every = self._pass_round(own)
        for number, each in enumerate(every[first : first + self.local_size]):
            assert isinstance(each, torch.Tensor)
            parts[number].copy_(each)


def side_by_side(size: int, act: Callable[[SideBySideWorld], Result], machines: int = 1) -> list[Result]:
    """What `act` gives on every rank, of which each of the machines has as many. Raises what the first rank
    that failed of itself raised."""
    shared = Round(size)
    results: dict[int, Result] = {}
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = act(SideBySideWorld(rank, shared, machines))
        except BaseException as error:
            errors[rank] = error
            shared.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A rank that ended a stance of torch's compiler put back what another had begun, as a process has one.
    compiler: Any = torch.compiler  # its methods are without annotations
    compiler.set_stance("default")
    for error in sorted(errors.values(), key=lambda each: isinstance(each, PeerLost)):
        raise error
    return [results[rank] for rank in range(size)]
