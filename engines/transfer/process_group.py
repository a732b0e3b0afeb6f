"""The ranks of one run through torch.distributed: `engines.world.World`.

Losses are on the host when they are sent, over gloo. What GPUs of one machine exchange goes through NCCL, and
through the host where two ranks share a GPU, which NCCL refuses, or there is none.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from engines.errors import PeerLost, UserError
from engines.world import World

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
        self._local: dist.ProcessGroup | None = None
        """Of this machine; `None`: nothing was exchanged yet."""
        self._by_nccl = False
        self._like: dist.ProcessGroup | None = None
        """Of the ranks that have this one's number on their machines; `None`: nothing was exchanged yet."""

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The values of every rank as fp64, 8 bytes each."""
        own = torch.tensor(values, dtype=torch.float64)
        found: list[list[float]] = [each.tolist() for each in self._all(own)]
        return found

    def exchange(self, content: bytes) -> list[bytes]:
        lengths = [int(count) for (count,) in self.gather([len(content)])]
        buffer = torch.zeros(max(lengths), dtype=torch.uint8)
        if content:
            buffer[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if not buffer.numel():
            return [b""] * self.size
        return [
            each[:length].numpy().tobytes() for each, length in zip(self._all(buffer), lengths, strict=True)
        ]

    def broadcast(self, content: bytes) -> bytes:
        return self.exchange(content if self.rank == 0 else b"")[0]

    def barrier(self) -> None:
        self.gather([0.0])

    def between_machines(self, own: Tensor) -> list[Tensor]:
        found = [torch.empty_like(own) for _ in range(self.size // self.local_size)]
        with peers():
            if self._like is None:
                for number in range(self.local_size):  # all ranks ask for every group
                    ranks = list(range(number, self.size, self.local_size))
                    made = dist.new_group(ranks, backend="gloo", timeout=timedelta(seconds=ANSWER_S))
                    if number == self.local_rank:
                        self._like = made
            dist.all_gather(found, own, group=self._like)
        return found

    def all_gather(self, memory: Tensor) -> None:
        """Through the host it waits for what the current stream has, and for the others."""
        group = self.of_this_machine(memory.device)
        own = memory.view(self.local_size, -1)[self.local_rank]
        with peers():
            if self._by_nccl:
                dist.all_gather_into_tensor(memory, own, group=group)
                return
            found = [torch.empty_like(own, device="cpu") for _ in range(self.local_size)]
            dist.all_gather(found, own.cpu(), group=group)
        memory.copy_(torch.cat(found))

    def of_this_machine(self, device: torch.device) -> dist.ProcessGroup:
        """The group of this machine's ranks, whose tensors lie on `device`. All ranks ask for it at the same
        time. Raises `UserError`, the first time, where their GPUs cannot reach each other."""
        if self._local is None:
            self._local = self._meet_on_this_machine(device)
        return self._local

    @property
    def has_gpus_of_their_own(self) -> bool:
        """After `of_this_machine`: each of this machine's ranks has another GPU."""
        return self._by_nccl

    def _meet_on_this_machine(self, device: torch.device) -> dist.ProcessGroup:
        """Raises `UserError`, on every rank, where ranks have GPUs of their own and one lacks NCCL."""
        gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
        told = [json.loads(each) for each in self.exchange(json.dumps([gpu, _has_nccl()]).encode())]
        first = self.rank - self.local_rank
        gpus = [each for each, _ in told[first : first + self.local_size]]
        self._by_nccl = device.type == "cuda" and len(set(gpus)) == len(gpus)
        for rank, (_, has_nccl) in enumerate(told):
            if self._by_nccl and not has_nccl:
                raise UserError(
                    f"rank {rank}", "its torch has no NCCL, through which GPUs exchange what they have",
                    "install torch's build for CUDA on Linux, or leave out --gpus (zo2: sharded_upload)",
                )  # fmt: skip
        found: Any = None
        for begin in range(0, self.size, self.local_size):  # all ranks ask for every machine's
            try:
                made = dist.new_group(
                    list(range(begin, begin + self.local_size)),
                    backend="nccl" if self._by_nccl else "gloo",
                    timeout=timedelta(seconds=ANSWER_S),
                )
            except RuntimeError as error:
                raise UserError(
                    f"rank {self.rank}", f"its GPU does not reach the others ({_first_line(error)})",
                    "leave out --gpus (zo2: sharded_upload), or set NCCL_DEBUG=WARN for more",
                ) from error  # fmt: skip
            if begin == first:
                found = made
        return found  # type: ignore[no-any-return]

    def _all(self, own: Tensor) -> list[Tensor]:
        found = [torch.empty_like(own) for _ in range(self.size)]
        with peers():
            dist.all_gather(found, own, group=self._group)
        return found


def mesh_of(world: World, device: torch.device) -> DeviceMesh:
    """This machine's ranks as torch's FSDP takes them. All ranks ask for it at the same time.

    Raises `UserError` where two of them share a GPU, or cannot reach each other.
    """
    assert isinstance(world, ProcessGroup), "its ranks are no processes"
    group = world.of_this_machine(device)
    if device.type == "cuda" and not world.has_gpus_of_their_own:
        raise UserError(
            f"--gpus {world.size}", "two ranks share a GPU, between which FSDP2 divides nothing",
            "use as many GPUs as ranks",
        )  # fmt: skip
    return DeviceMesh.from_group(group, device.type)


def _has_nccl() -> bool:
    return bool(dist.is_nccl_available())


@contextlib.contextmanager
def library_peers() -> Iterator[None]:
    """Where a library lets ranks exchange something in the midst of other work: what tells of one that is
    gone is `PeerLost`, all else stays what it is."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "by peer" in str(error):  # gloo's are without a class
            raise PeerLost from error
        raise


@contextlib.contextmanager
def peers() -> Iterator[None]:
    """Where ranks exchange something: an error of it is `PeerLost`."""
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
