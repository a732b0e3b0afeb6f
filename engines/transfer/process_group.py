"""The ranks of one run through torch.distributed, over gloo: `engines.world.World`.

Losses are on the host when they are sent, so nothing here touches a GPU or its streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from engines.errors import PeerLost, UserError

JOIN_S = 300.0
"""For which the ranks wait for each other at the start."""
ANSWER_S = 4 * 3600.0
"""For which a rank waits for the others afterwards: one may fill a model, evaluate or export it meanwhile.
One that ends is noticed at once."""


class ProcessGroup:
    """Rank `rank` of `size`; of its machine, number `local_rank` of `local_size`."""

    def __init__(
        self, rank: int, size: int, local_rank: int, local_size: int, group: dist.ProcessGroup
    ) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.local_size = local_size
        self._group = group

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The values of every rank as fp64, 8 bytes each."""
        own = torch.tensor(values, dtype=torch.float64)
        found: list[list[float]] = [each.tolist() for each in self._all(own)]
        return found

    def exchange(self, content: bytes) -> list[bytes]:
        lengths = [int(count) for (count,) in self.gather([len(content)])]
        room = torch.zeros(max(lengths), dtype=torch.uint8)
        if content:
            room[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if not room.numel():
            return [b""] * self.size
        return [
            each[:length].numpy().tobytes() for each, length in zip(self._all(room), lengths, strict=True)
        ]

    def broadcast(self, content: bytes) -> bytes:
        return self.exchange(content if self.rank == 0 else b"")[0]

    def barrier(self) -> None:
        self.gather([0.0])

    def _all(self, own: Tensor) -> list[Tensor]:
        found = [torch.empty_like(own) for _ in range(self.size)]
        with _peers():
            dist.all_gather(found, own, group=self._group)
        return found


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerLost from error


def meet(
    where: str, rank: int, size: int, local_rank: int, local_size: int, join_s: float = JOIN_S
) -> ProcessGroup:
    """Meet the other ranks at `where`: `file:///...`, which all ranks of one machine see and which no run
    used before, or `tcp://host:port`, where rank 0 listens.

    Raises `UserError` if not all of them come within `join_s`.
    """
    try:
        # A store of the ranks' addresses first: its time limit is for waiting, that of the group for work.
        store, _, _ = next(iter(rendezvous(where, rank, size, timeout=timedelta(seconds=join_s))))
        store.set_timeout(timedelta(seconds=join_s))
        _wait_for_all(store, rank, size)
        store.set_timeout(timedelta(seconds=ANSWER_S))
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=ANSWER_S)
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"rank {rank} of {size}",
            f"the ranks did not meet ({_first_line(error)})",
            "start the same command on every machine, with the same MASTER_ADDR, MASTER_PORT and --nodes",
        ) from error
    group = dist.group.WORLD
    assert group is not None
    return ProcessGroup(rank, size, local_rank, local_size, group)


def _wait_for_all(store: Any, rank: int, size: int) -> None:
    store.set(f"rank-{rank}", "here")
    for other in range(size):
        try:
            store.wait([f"rank-{other}"])
        except RuntimeError:
            raise RuntimeError(f"rank {other} did not come") from None


def leave() -> None:
    """Close the connections to other ranks, if there are any; one that still waits then gets `PeerLost`."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:90] if lines else type(error).__name__
