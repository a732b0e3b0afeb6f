"""Blocks whose optimizer lives on the host: their weights there, AdamW's state, and room for gradients.

Each block is flat, as `engines.model.flat_layout` lays it out, and cut into pieces that travel by themselves:
its vectors, which are not decayed, and its matrices in pieces of up to `PIECE_ELEMENTS`.

Pinned: the weights that go up, and gradients of some blocks, which wait there for the CPU. Pageable: the low
halves of master weights and both moments.
"""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from engines.costs.exact_offload import PIECE_ELEMENTS
from engines.cpu_updates.adamw import AdamWMemory, adamw, state_tensors
from engines.cpu_updates.pipeline import WAIT_LIMIT_S, StepShare
from engines.errors import UserError
from engines.model.flat_layout import BlockLayout
from engines.settings.exact_offload import ExactOffloadSettings
from engines.transfer.pinned import HostSlab, ReportProgress, host_slabs

_ALIGNMENT_BYTES = 64


@dataclass(kw_only=True, eq=False)
class BlockPiece:
    """Neighbouring weights of a block that decay alike. An `engines.cpu_updates.pipeline.TravellingPiece`."""

    deadline: int
    squared_norm: Tensor
    begin: int
    end: int
    """Elements of the block."""
    memory: AdamWMemory
    weight_decay: float
    settings: ExactOffloadSettings
    key: int
    """Of the noise that rounds its moments."""
    gradient: Tensor | None = None
    """(elements,) where the gradient arrives; from the download on until the update."""
    updates: int = 0

    @property
    def outgoing(self) -> Tensor:
        return self.memory.weight

    def update(self, share: StepShare) -> None:
        assert self.gradient is not None, "nothing has been downloaded"
        self.updates += 1
        adamw(
            self.gradient,
            self.memory,
            self.updates,
            learning_rate=share.learning_rate,
            weight_decay=self.weight_decay,
            beta1=self.settings.beta1,
            beta2=self.settings.beta2,
            eps=self.settings.adam_eps,
            scale=share.scale(),
            key=self.key + 0x9E3779B9 * self.updates,
        )


def spans(layout: BlockLayout) -> list[tuple[int, int, bool]]:
    """Pieces of a block: begin, end, and whether they decay."""
    found: list[tuple[int, int, bool]] = []
    for decays in (False, True):
        parts = [part for part in layout.own_parts if part.segment.decays[0] is decays]
        if not parts:
            continue
        begin, end = parts[0].start, parts[-1].start + parts[-1].size
        found += [(at, min(at + PIECE_ELEMENTS, end), decays) for at in range(begin, end, PIECE_ELEMENTS)]
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
    ) -> None:
        """Nothing is pinned for a `device` that is the CPU. Weights are what the memory happens to hold; the
        rest is zero. All of it is written to once, so that what the host cannot hold is missed here."""
        self._norms = HostSlab(4 * len(layouts), device)
        norms = self._norms.view(0, (len(layouts),), torch.float32)
        self._weights = host_slabs([dtype.itemsize * each.size for each in layouts], device, progress)
        self._states: list[HostSlab] = []
        self.pieces: list[list[BlockPiece]] = []
        self.weights: list[Tensor] = []
        """Of each block, (elements,): what the model computes with."""
        for index, (layout, memory) in enumerate(zip(layouts, self._weights.views, strict=True)):
            weight = memory.view(dtype)
            self.weights.append(weight)
            self.pieces.append(
                [
                    self._piece(weight, index, number, span, settings, norms[index : index + 1], seed)
                    for number, span in enumerate(spans(layout))
                ]
            )
            progress("making room for the optimizer (blocks)", index + 1, len(layouts))

    def _piece(
        self,
        weights: Tensor,
        index: int,
        number: int,
        span: tuple[int, int, bool],
        settings: ExactOffloadSettings,
        squared_norm: Tensor,
        seed: int,
    ) -> BlockPiece:
        begin, end, decays = span
        state = self._room(state_tensors(end - begin, weights.dtype, settings.moments))
        return BlockPiece(
            deadline=index,
            squared_norm=squared_norm,
            begin=begin,
            end=end,
            memory=AdamWMemory(
                weight=weights[begin:end],
                rest=state.get("rest"),
                kind=settings.moments,
                moment=state["moment"],
                variance=state["variance"],
                moment_scales=state.get("moment_scales"),
                variance_scales=state.get("variance_scales"),
            ),
            weight_decay=settings.weight_decay if decays else 0.0,
            settings=settings,
            key=(0x85EBCA6B * (seed + 1) + 0xC2B2AE35 * (4096 * index + number)) & 0xFFFFFFFF,
        )

    def _room(self, wanted: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
        """Tensors of these dtypes and shapes, zero, in one mapping."""
        sizes = {name: dtype.itemsize * prod(shape) for name, (dtype, shape) in wanted.items()}
        extents = {name: -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for name, size in sizes.items()}
        slab = HostSlab(sum(extents.values()), torch.device("cpu"))
        self._states.append(slab)
        found, offset = {}, 0
        for name, (dtype, shape) in wanted.items():
            found[name] = slab.view(offset, shape, dtype).zero_()
            offset += extents[name]
        return found

    @property
    def pinned_bytes(self) -> int:
        norms = self._norms.num_bytes if self._norms.pinned else 0
        return self._weights.pinned_bytes + norms

    @property
    def pageable_bytes(self) -> int:
        """Of what stays on the host: moments and low halves of masters."""
        return sum(slab.num_bytes for slab in self._states)

    def save(self, state: dict[str, Tensor]) -> list[int]:
        """Add what belongs to the blocks' weights to `state`; how often each block was updated."""
        for index, pieces in enumerate(self.pieces):
            for number, piece in enumerate(pieces):
                for name, tensor in piece.memory.state().items():
                    state[f"{name}.{index}.{number}"] = tensor
        return [pieces[0].updates if pieces else 0 for pieces in self.pieces]

    def load(self, tensors: Mapping[str, Tensor], updates: Sequence[int], folder: str) -> None:
        """Take back what `save` gave. Raises `UserError`, naming `folder`, where that is of other moments."""
        for index, (pieces, count) in enumerate(zip(self.pieces, updates, strict=True)):
            for number, piece in enumerate(pieces):
                piece.updates = count
                for name, tensor in piece.memory.state().items():
                    found = tensors.get(f"{name}.{index}.{number}")
                    if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
                        raise UserError(
                            folder,
                            f"has no {name} of {tuple(tensor.shape)} {tensor.dtype} for block {index}",
                            "resume with the same dtype and moments",
                        )
                    tensor.copy_(found)

    def close(self) -> None:
        """Unpin. The caller has waited for all copies."""
        self.pieces.clear()
        self.weights.clear()
        self._norms.close()
        self._weights.close()
        for slab in self._states:
            slab.close()


class GradientRoom:
    """Host memory for the gradients of some blocks, pinned for a CUDA `device`. Used from several threads."""

    def __init__(
        self, places: int, elements: int, dtype: torch.dtype, device: torch.device, progress: ReportProgress
    ):
        self._slabs = host_slabs([dtype.itemsize * elements] * places, device, progress)
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for memory in self._slabs.views:
            self._free.put(memory.view(dtype))

    @property
    def pinned_bytes(self) -> int:
        return self._slabs.pinned_bytes

    def take(self) -> Tensor:
        """(elements,): a free place, once there is one. Raises `RuntimeError` if none gets free."""
        try:
            return self._free.get(timeout=WAIT_LIMIT_S)
        except queue.Empty:
            raise RuntimeError(f"the CPU freed no gradient within {WAIT_LIMIT_S:.0f} s") from None

    def give(self, place: Tensor) -> None:
        self._free.put(place)

    def close(self) -> None:
        """Unpin. The caller has waited for all copies."""
        while not self._free.empty():
            self._free.get()
        self._slabs.close()
