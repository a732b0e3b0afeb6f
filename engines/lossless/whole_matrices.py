"""Matrices of a lossless base that an update left no room for in their tiles: whole from then on.

A visit that stores a matrix whose weights no longer find room leaves its tiles as they are
(`engines.lossless.lossless_codec`). What they lack is then applied to a whole copy, in bf16, which takes the
matrix's updates from there on; its tiles keep their place in the block and mean nothing any more. Bits are
those of a full base: only where weights lie changes, and a visit of such a matrix waits for its copies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engines.noise.visits import Visit
from engines.transfer.link import Link
from engines.transfer.pinned import HostSlab
from engines.world import World


@dataclass(slots=True)
class WholeMatrix:
    """One of them."""

    weights: Tensor
    """(elements,) bf16, where the rest of its block lies: on the device, or in pinned host memory."""
    applied: int
    """Position in the log of the first update that it lacks."""
    slab: HostSlab | None
    """Its pinned memory."""

    def lacking(self, how: Visit) -> Visit:
        """`how`, a visit of its block, without the updates that it has: it may be ahead of the block."""
        return replace(how, first=max(how.first, min(self.applied, how.last)))


class WholeMatrices:
    """By block and part. On a CUDA device in the order of the compute stream."""

    def __init__(
        self, device: torch.device, link: Link | None = None, streamed: Collection[int] = ()
    ) -> None:
        """Those of the blocks in `streamed` lie on the host, and come and go over `link`."""
        self._device = device
        self._link = link
        self._streamed = frozenset(streamed)
        self._kept: dict[tuple[int, int], WholeMatrix] = {}

    def __contains__(self, place: tuple[int, int]) -> bool:
        return place in self._kept

    def __getitem__(self, place: tuple[int, int]) -> WholeMatrix:
        return self._kept[place]

    def items(self) -> list[tuple[tuple[int, int], WholeMatrix]]:
        return list(self._kept.items())

    def of_block(self, block: int) -> Mapping[int, WholeMatrix]:
        """By part."""
        return {part: kept for (of, part), kept in self._kept.items() if of == block}

    @property
    def pinned_bytes(self) -> int:
        slabs = [kept.slab for kept in self._kept.values() if kept.slab is not None]
        return sum(slab.num_bytes for slab in slabs if slab.pinned)

    def add(self, block: int, part: int, weights: Tensor, applied: int) -> None:
        """From now on the matrix is `weights`, flat on the device, with all updates before `applied`."""
        slab = None
        if block in self._streamed and self._link is not None:
            slab = HostSlab(weights.nbytes, self._device)
            kept = slab.view(0, weights.shape, weights.dtype)
        else:
            kept = torch.empty_like(weights)
        self._kept[block, part] = WholeMatrix(kept, applied, slab)
        self.store(block, part, weights, applied)

    def read(self, block: int, part: int, out: Tensor) -> None:
        """The matrix, to memory on the device that the compute stream has."""
        kept = self._kept[block, part]
        if kept.slab is None or self._link is None:
            out.copy_(kept.weights)
            return
        here = self._link.record()
        self._link.wait(self._link.upload(kept.weights, out, after=here, name=f"block {block}"))

    def store(self, block: int, part: int, weights: Tensor, applied: int) -> None:
        """It is now `weights`, on the device, with all updates before `applied`."""
        kept = self._kept[block, part]
        kept.applied = applied
        if kept.slab is None or self._link is None:
            kept.weights.copy_(weights)
            return
        # HAZARD: `weights` is scratch memory that is written again right after, and the next upload goes
        # after the compute stream, which therefore waits.
        here = self._link.record()
        self._link.wait(self._link.download(weights, kept.weights, after=here, name=f"block {block}"))

    def take_from_first(
        self, world: World, blocks: Collection[int], dtype: torch.dtype, num_applied: Callable[[int], int]
    ) -> None:
        """After weights were loaded or a log was replayed: of `blocks`, which rank 0 wrote for the others, it
        alone knows which matrices found no room, and hands those of `dtype` out. All ranks call it.
        `num_applied` is how many updates of the log a block has."""
        mine = [place for place in self._kept if place[0] in blocks]
        of_ranks = [json.loads(each) for each in world.exchange(json.dumps(mine).encode())]
        if all(each == of_ranks[0] for each in of_ranks):
            return
        for block, part in of_ranks[0]:
            content = b""
            if world.rank == 0:
                content = self._kept[block, part].weights.cpu().view(torch.uint8).numpy().tobytes()
            values = torch.frombuffer(bytearray(world.broadcast(content)), dtype=dtype)
            if world.rank > 0:
                self.add(block, part, values.to(self._device), num_applied(block))

    def clear(self) -> None:
        """All matrices are in tiles again. After the copies have ended."""
        slabs = [kept.slab for kept in self._kept.values() if kept.slab is not None]
        self._kept.clear()
        for slab in slabs:
            slab.close()


def names_of_ranks(names: Sequence[str], world: World) -> list[str]:
    """Those of all ranks, in their order: each has tried to write other blocks' matrices to tiles."""
    of_ranks = world.exchange("\n".join(names).encode())
    return [name for each in of_ranks for name in each.decode().split("\n") if name]
