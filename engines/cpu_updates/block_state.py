"""Blocks whose optimizer lives on the host: their weights there, and AdamW's state.

Each block is flat, as `engines.model.flat_layout` lays it out, and cut into chunks that travel by themselves:
its vectors, which are not decayed, and its matrices in chunks of up to `CHUNK_ELEMENTS`.

Pinned: the weights that go up. Pageable: the low halves of master weights and both moments, the state; that
of some blocks may be elsewhere, and is here only while it is updated (`attach`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from engines.base import ReportProgress
from engines.costs.exact_offload import CHUNK_ELEMENTS
from engines.cpu_updates.adamw import AdamWMemory, adamw, state_tensors
from engines.cpu_updates.chunks import UpdateStep
from engines.cpu_updates.rounding import NEXT_UPDATE, noise_key
from engines.errors import UserError
from engines.model.flat_layout import BlockLayout
from engines.settings.exact_offload import ExactOffloadSettings
from engines.transfer.pinned import HostSlab, HostSlabs
from engines.transfer.shared_memory import machine_slabs, shared_slabs
from engines.world import ALONE, World

_ALIGNMENT_BYTES = 64

HEAD_ALIGNMENT_BYTES = 4096
"""Weights that are elsewhere with their state come first there, in a multiple of this: they are also read
alone, past the page cache."""


@dataclass(kw_only=True, eq=False)
class BlockChunk:
    """Neighbouring weights of a block that decay alike. An `engines.cpu_updates.chunks.TravellingChunk`."""

    deadline: int
    number: int
    squared_norm: Tensor
    begin: int
    end: int
    """Elements of the block."""
    weight: Tensor
    """(elements,): what the model computes with."""
    memory: AdamWMemory | None
    """`None`: the state is elsewhere."""
    weight_decay: float
    settings: ExactOffloadSettings
    key: int
    """Of the noise that rounds its moments."""
    gradient: Tensor | None = None
    """(elements,) where the gradient arrives; from the download on until the update."""
    updates: int = 0
    failure: UserError | None = None
    """What kept the state from coming here."""

    @property
    def outgoing(self) -> Tensor:
        return self.weight

    def update(self, step: UpdateStep, gradients: Sequence[Tensor] = ()) -> None:
        assert self.gradient is not None, "nothing has been downloaded"
        if self.failure is not None:
            raise self.failure
        assert self.memory is not None, "its state is elsewhere"
        self.updates += 1
        adamw(
            gradients or self.gradient,
            self.memory,
            self.updates,
            learning_rate=step.learning_rate,
            weight_decay=self.weight_decay,
            beta1=self.settings.beta1,
            beta2=self.settings.beta2,
            eps=self.settings.adam_eps,
            scale=step.scale(),
            key=self.key + NEXT_UPDATE * self.updates,
        )


@dataclass(frozen=True, slots=True)
class _Extent:
    """Of a tensor, in bytes of one memory."""

    offset: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def spans(layout: BlockLayout) -> list[tuple[int, int, bool]]:
    """Chunks of a block: begin, end, and whether they decay."""
    found: list[tuple[int, int, bool]] = []
    for decays in (False, True):
        parts = [part for part in layout.own_parts if part.segment.decays[0] is decays]
        if not parts:
            continue
        begin, end = parts[0].start, parts[-1].start + parts[-1].size
        found += [(at, min(at + CHUNK_ELEMENTS, end), decays) for at in range(begin, end, CHUNK_ELEMENTS)]
    return found


class BlockStates:
    """All blocks' memory on the host."""

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        settings: ExactOffloadSettings,
        *,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        progress: ReportProgress,
        elsewhere: Collection[int] = (),
        weights_elsewhere: Collection[int] = (),
        world: World = ALONE,
    ) -> None:
        """All of it is there once for the ranks of a machine in `world`, but for norms, of which each has its
        own.

        Nothing is pinned for a `device` that is the CPU. Weights are what the memory happens to hold; the
        rest is zero. All of it is written to once, so that what the host cannot hold is missed here.

        The states of the blocks that `elsewhere` names, by index, are the caller's; of those among them that
        `weights_elsewhere` names the weights are, too.
        """
        self._elsewhere = frozenset(elsewhere)
        self._weights_elsewhere = frozenset(weights_elsewhere)
        self._dtype, self._kind = dtype, settings.moments
        here = [each.size for index, each in enumerate(layouts) if index not in self._weights_elsewhere]
        weights_bytes = [dtype.itemsize * size for size in here]
        self._shared: list[HostSlabs] = []
        self._norms = machine_slabs([4 * len(layouts)] * world.local_size, device, progress, world)
        self._weights = machine_slabs(weights_bytes, device, progress, world)
        self.norms_of_ranks = [view.view(torch.float32) for view in self._norms.views]
        """(blocks,) fp32 of each rank of this machine: squared, of its gradients in this step."""
        norms = self.norms_of_ranks[world.local_rank]
        self._is_first = world.local_rank == 0
        self._states: list[HostSlab] = []
        self._memories: Iterator[Tensor] | None = None
        if world.local_size > 1:
            sizes = [
                self._extents(end - begin)[1]
                for index, each in enumerate(layouts)
                if index not in self._elsewhere
                for begin, end, _ in spans(each)
            ]
            self._shared = [shared_slabs(sizes, torch.device("cpu"), progress, world)]
            self._memories = iter(self._shared[0].views)
        self._numbers = itertools.count()
        self.chunks: list[list[BlockChunk]] = []
        self.weights: list[Tensor] = []
        """Of each block, (elements,): what the model computes with; on no device while it is elsewhere."""
        views = iter(self._weights.views)
        for index, layout in enumerate(layouts):
            away = index in self._weights_elsewhere
            weight = _nowhere(layout.size, dtype) if away else next(views).view(dtype)
            self.weights.append(weight)
            self.chunks.append(
                [
                    self._make_chunk(weight, index, number, span, settings, norms[index : index + 1], seed)
                    for number, span in enumerate(spans(layout))
                ]
            )
            progress("making room for the optimizer (blocks)", index + 1, len(layouts))

    def _make_chunk(
        self,
        weights: Tensor,
        index: int,
        number: int,
        span: tuple[int, int, bool],
        settings: ExactOffloadSettings,
        squared_norm: Tensor,
        seed: int,
    ) -> BlockChunk:
        begin, end, decays = span
        weight = weights[begin:end]
        memory = None
        extents, size = self._extents(weight.numel())
        if index in self._elsewhere:
            pass
        elif self._memories is not None:  # shared, and zero
            memory = self._on(weight, extents, next(self._memories))
        else:
            slab = HostSlab(size, torch.device("cpu"))
            self._states.append(slab)
            memory = self._on(weight, extents, slab.view(0, (size,), torch.uint8))
            for tensor in memory.state().values():
                tensor.zero_()
        return BlockChunk(
            deadline=index,
            number=next(self._numbers),
            squared_norm=squared_norm,
            begin=begin,
            end=end,
            weight=weight,
            memory=memory,
            weight_decay=settings.weight_decay if decays else 0.0,
            settings=settings,
            key=noise_key(seed, index, number),
        )

    def _extents(self, elements: int) -> tuple[dict[str, _Extent], int]:
        """Where each tensor of a state lies in one memory, and the bytes of that."""
        found, offset = {}, 0
        for name, (dtype, shape) in state_tensors(elements, self._dtype, self._kind).items():
            size = dtype.itemsize * prod(shape)
            found[name] = _Extent(offset, size, dtype, shape)
            offset += -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return found, offset

    def _on(self, weight: Tensor, extents: Mapping[str, _Extent], memory: Tensor) -> AdamWMemory:
        """`weight` and the state in `memory`, (bytes,)."""
        state = {
            name: memory[each.offset : each.offset + each.size].view(each.dtype).view(*each.shape)
            for name, each in extents.items()
        }
        return AdamWMemory(
            weight=weight,
            rest=state.get("rest"),
            kind=self._kind,
            moment=state["moment"],
            variance=state["variance"],
            moment_scales=state.get("moment_scales"),
            variance_scales=state.get("variance_scales"),
        )

    def head_bytes(self, index: int) -> int:
        """Of a block's weights at the beginning of what is elsewhere of it."""
        if index not in self._weights_elsewhere:
            return 0
        size = self.weights[index].numel() * self._dtype.itemsize
        return -(-size // HEAD_ALIGNMENT_BYTES) * HEAD_ALIGNMENT_BYTES

    def state_bytes(self, index: int) -> int:
        """Of a block's state, and of its weights where they are elsewhere with it."""
        states = sum(self._extents(chunk.weight.numel())[1] for chunk in self.chunks[index])
        return self.head_bytes(index) + states

    def attach(self, index: int, memory: Tensor | None, failure: UserError | None = None) -> None:
        """The state of a block that is elsewhere is in `memory`, (bytes,), or no longer; `failure` is what
        kept it from coming there."""
        begin = self.head_bytes(index)
        if begin:
            size = self.weights[index].numel()
            weights = _nowhere(size, self._dtype)
            if memory is not None:
                weights = memory[: size * self._dtype.itemsize].view(self._dtype)
            self.weights[index] = weights
        at = begin
        for chunk in self.chunks[index]:
            chunk.failure = failure
            if begin:
                chunk.weight = self.weights[index][chunk.begin : chunk.end]
            if memory is None:
                chunk.memory = None
                continue
            extents, size = self._extents(chunk.weight.numel())
            chunk.memory = self._on(chunk.weight, extents, memory[at : at + size])
            at += size

    @property
    def pinned_bytes(self) -> int:
        """Counted by the first of the ranks that have it together."""
        return self._weights.pinned_bytes + self._norms.pinned_bytes if self._is_first else 0

    def state(self, index: int) -> dict[str, Tensor]:
        """What belongs to a block's weights and is here, by the names of checkpoints; with the weights where
        they are elsewhere at other times."""
        found: dict[str, Tensor] = {}
        for number, chunk in enumerate(self.chunks[index]):
            if chunk.memory is not None:
                named = chunk.memory.state()
                if index in self._weights_elsewhere:
                    named["weight"] = chunk.weight
                found |= {f"{name}.{index}.{number}": tensor for name, tensor in named.items()}
        return found

    def updates(self) -> list[int]:
        """How often each block was updated."""
        return [chunks[0].updates if chunks else 0 for chunks in self.chunks]

    def load(self, index: int, tensors: Mapping[str, Tensor], updates: int, folder: str) -> None:
        """Take back what `state` gave, of a block that was updated so often. Raises `UserError`, naming
        `folder`, where that is of other moments."""
        for chunk in self.chunks[index]:
            chunk.updates = updates
        for name, tensor in self.state(index).items():
            found = tensors.get(name)
            if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
                key = name.partition(".")[0]
                raise UserError(
                    folder,
                    f"has no {key} of {tuple(tensor.shape)} {tensor.dtype} for block {index}",
                    "resume with the same dtype, moments and disk_weights",
                )
            tensor.copy_(found)

    def close(self) -> None:
        """Unpin. The caller has waited for all copies."""
        self.chunks.clear()
        self.weights.clear()
        self._norms.close()
        self._weights.close()
        for slab in self._states:
            slab.close()
        for slabs in self._shared:
            slabs.close()


def _nowhere(elements: int, dtype: torch.dtype) -> Tensor:
    """Says how many there are of what is not here."""
    return torch.empty(elements, dtype=dtype, device="meta")
