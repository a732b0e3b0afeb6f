"""The processes of one run, one for each GPU, as an engine sees them. Imports no torch.

What goes between hosts is little: losses, a few bytes at the start. GPUs of one machine may exchange what
they brought up (`all_gather`). `engines.transfer.process_group` does it through torch.distributed; a run of
one process has `ALONE`, which does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from engines.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Each = TypeVar("Each")


class World(Protocol):
    """All ranks call the same methods in the same order. Each raises `PeerLost` where another is gone."""

    @property
    def rank(self) -> int:
        """Of this process, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def local_rank(self) -> int:
        """Of this process among those of its machine, from 0."""

    @property
    def local_size(self) -> int:
        """How many of them are on this machine, which have neighbouring ranks."""

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """What every rank hands in, in the order of ranks, bit for bit. As many values on every rank."""

    def exchange(self, content: bytes) -> list[bytes]:
        """Likewise of bytes, of any length."""

    def broadcast(self, content: bytes) -> bytes:
        """What rank 0 hands in."""

    def barrier(self) -> None:
        """Returns when every rank has called it."""

    def between_machines(self, own: Tensor) -> list[Tensor]:
        """Of each machine what its rank of this one's number there hands in, a flat tensor of one size on the
        CPU, in the order of the machines: as many copies as there are machines."""

    def all_gather(self, memory: Tensor) -> None:
        """Among the ranks of this machine: `memory`, (local_size n,) contiguous, has this rank's n elements
        in their place before, and those of all ranks after. On a GPU in the order of the current stream.

        Raises `UserError`, the first time, where their GPUs cannot reach each other.
        """


@dataclass(frozen=True, slots=True)
class Alone:
    """One process: nothing is waited for and nothing sent."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        return [list(values)]

    def exchange(self, content: bytes) -> list[bytes]:
        return [content]

    def broadcast(self, content: bytes) -> bytes:
        return content

    def barrier(self) -> None:
        """There is nobody to wait for."""

    def between_machines(self, own: Tensor) -> list[Tensor]:
        return [own.clone()]

    def all_gather(self, memory: Tensor) -> None:
        """They are its own."""


ALONE = Alone()


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """The part of a step that a rank computes: some of its micro-batches, and some of its probes of each.

    A probe is a number of forward passes that go together (`engines.zeroth_order.estimators`).
    """

    batches: range
    probes: range

    def of_batches(self, batches: Sequence[Each]) -> Sequence[Each]:
        return batches[self.batches.start : self.batches.stop]

    def of_probes(self, probes: Sequence[Each]) -> Sequence[Each]:
        return probes[self.probes.start : self.probes.stop]


def divide(size: int, num_batches: int, num_probes: int = 1) -> list[Share]:
    """What each of `size` ranks computes of a step of `num_batches` micro-batches of `num_probes` probes.

    Micro-batches are divided first; where there are fewer of them than ranks, several ranks share one and
    divide its probes. Raises `UserError` where a rank would have nothing to do.
    """
    groups = min(size, num_batches)
    ranks = range(size)
    of_group = [[rank for rank in ranks if rank % groups == group] for group in range(groups)]
    if any(len(members) > num_probes for members in of_group):
        raise UserError(
            f"--gpus {size}",
            f"a step has only {num_batches} micro-batches x {num_probes} queries to divide"
            if num_probes > 1
            else f"a step has only {num_batches} micro-batches to divide",
            f"set --accumulation {size}, or use fewer GPUs",
        )
    found: list[Share] = []
    for rank in ranks:
        group = rank % groups
        members = of_group[group]
        found.append(
            Share(
                batches=part(num_batches, groups, group),
                probes=part(num_probes, len(members), members.index(rank)),
            )
        )
    return found


def part(count: int, of: int, which: int) -> range:
    """Number `which` of `of` parts of 0 to `count` - 1, which differ by one at most; the first are longer."""
    each, more = divmod(count, of)
    start = which * each + min(which, more)
    return range(start, start + each + (which < more))
