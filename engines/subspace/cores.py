"""Compressed gradients: where they lie on the GPU and on the host.

A core is made in its block's slot of GPU memory (`engines.subspace.core_matrix`) and travels with its
neighbours, as a chunk (`engines.cpu_updates.pipeline`). `engines.methods.lsp` is the method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from engines.base import ReportProgress
from engines.cpu_updates.chunks import OfRanks, UpdateStep
from engines.cpu_updates.cpu_adam import core_adam
from engines.cpu_updates.rounding import NEXT_UPDATE, noise_key
from engines.settings.lsp import LspSettings
from engines.settings.lsp_layout import CORE_SLOTS, chunk_ends
from engines.shapes import Workload
from engines.subspace.chunk_application import ChunkApplication
from engines.subspace.core_matrix import Calibrator, CoreMatrix, core_matrices
from engines.subspace.projector import Projector, transport_moments
from engines.subspace.residual import residual_buffers
from engines.subspace.subspaces import Subspace
from engines.transfer.link import Event
from engines.transfer.shared_memory import machine_slabs
from engines.world import ALONE, World


@dataclass(kw_only=True, eq=False)
class CoreState:
    """Cores that travel together, on the host. An `engines.cpu_updates.chunks.TravellingChunk`."""

    deadline: int
    number: int
    incoming: Tensor
    """(elements,) of the weights' dtype, pinned: where the gradient arrives."""
    outgoing: Tensor
    """The same memory, or with several ranks what they have together: its direction."""
    moment: Tensor
    variance: Tensor
    """(elements,) fp32 or bf16."""
    squared_norm: Tensor
    settings: LspSettings
    key: int
    """Of the noise that rounds bf16 moments."""
    updates: int = 0
    """Updates so far, the one under way included, for Adam's bias correction."""

    def update(self, step: UpdateStep, gradients: Sequence[Tensor] = ()) -> None:
        self.updates += 1
        core_adam(
            self.outgoing,
            self.moment,
            self.variance,
            self.updates,
            beta1=self.settings.beta1,
            beta2=self.settings.beta2,
            eps=self.settings.adam_eps,
            scale=step.scale(),
            gradients=gradients,
            key=self.key + NEXT_UPDATE * self.updates,
        )


@dataclass(kw_only=True, eq=False)
class CoreChunk:
    """Matrices whose cores travel together."""

    state: CoreState
    matrices: list[CoreMatrix]
    core: Tensor
    """(elements,) on the GPU, in its block's slot."""
    application: ChunkApplication
    """What brings its directions into the matrices."""


@dataclass(kw_only=True, eq=False)
class CoreBlock:
    chunks: list[CoreChunk]
    core: Tensor
    """(elements,) on the GPU: all its cores."""
    on_host: Tensor
    """(elements,) on the host: what goes up of all its chunks."""
    squared_norm: Tensor
    """(1,) fp32 on the GPU: of the block's compressed gradient in this step."""
    has_gradient: bool = False
    """It has gradient of this step that has not been submitted."""

    def state_of(self, number: int) -> CoreState:
        """Of the chunk of that number."""
        return next(chunk.state for chunk in self.chunks if chunk.state.number == number)

    @property
    def matrices(self) -> list[CoreMatrix]:
        return [matrix for chunk in self.chunks for matrix in chunk.matrices]

    @property
    def index(self) -> int:
        """Of the model's block."""
        return self.matrices[0].subspace.block

    def finish(self) -> None:
        """Its backward pass is over: the cores are whole, and their norm is taken."""
        for matrix in self.matrices:
            matrix.finish()
        norm = torch.linalg.vector_norm(self.core, dtype=torch.float32)
        self.squared_norm.copy_(norm.square())


class Cores:
    """Memory of all cores, on the GPU and on the host.

    Blocks take turns on a few slots of GPU memory; without `offload` each has its own.
    """

    def __init__(
        self,
        subspaces: Sequence[Sequence[Subspace]],
        calibrator: Calibrator,
        settings: LspSettings,
        *,
        dtype: torch.dtype,
        device: torch.device,
        workload: Workload,
        seed: int,
        progress: ReportProgress,
        world: World = ALONE,
    ) -> None:
        """Moments and what goes up are there once for the ranks of a machine in `world`.

        `subspaces` are those of each block that has any, in the order of the blocks. Where all micro-batches
        pass a block together, one block's sums are there at a time."""
        sizes = [_elements(members) for members in subspaces]
        moments = torch.bfloat16 if settings.moments == "bf16" else torch.float32
        pinned_for = device if settings.offload else None
        self._settings = settings
        self._moments = _Moments(sum(sizes), moments, world, progress)
        self._wire = _OnHost(len(sizes), sum(sizes), dtype, pinned_for, world, progress)
        self.first: list[int] = []
        """Of each chunk, by number: its first element among all cores."""
        self.squared_norms = torch.zeros(len(sizes), device=device)
        """(blocks,) fp32 on the GPU: of the compressed gradients of this step.

        HAZARD: a block's must not change before it has been downloaded, which may be as late as when the
        block's update is waited for.
        """
        num_slots = min(len(sizes), CORE_SLOTS) if settings.offload else len(sizes)
        slots = [torch.empty(max(sizes), dtype=dtype, device=device) for _ in range(num_slots)]
        self.slot_free = [Event() for _ in slots]
        """When the block that last had a slot has left it; block i has slot i modulo their number."""
        self._own_sums = not settings.block_major
        self._sums: list[Tensor | None] = [None] * len(sizes)
        """(elements,) fp32, of each block; block by block it is the same memory."""
        if workload.accumulation > 1:
            made = [torch.zeros(size, device=device) for size in (sizes if self._own_sums else [max(sizes)])]
            self._sums = [made[place % len(made)][:size] for place, size in enumerate(sizes)]
        left_out = residual_buffers(subspaces, dtype, device) if settings.residual else []
        matrices_in_all, pins = sum(map(len, subspaces)), settings.offload and device.type == "cuda"
        numbers = torch.zeros(matrices_in_all, 4, dtype=torch.int32, device=device)
        numbers_on_host = torch.zeros(matrices_in_all, 4, dtype=torch.int32, pin_memory=pins)
        self.blocks: list[CoreBlock] = []
        begin = first = 0  # of a chunk, among all cores and all matrices
        for place, members in enumerate(subspaces):
            core, sums = slots[place % len(slots)], self._sums[place]
            of_block, buffers = begin, iter(left_out)
            chunks: list[CoreChunk] = []
            for group in _grouped(members):
                end = begin + _elements(group)
                own = slice(begin - of_block, end - of_block)  # of its block's cores
                its_sums = None if sums is None else sums[own]
                matrices = core_matrices(
                    group, core[own], its_sums, calibrator, workload, settings.residual, buffers
                )
                rows = slice(first, first + len(group))
                chunks.append(
                    CoreChunk(
                        state=self._state(place, begin, end, noise_key(seed, place, len(chunks))),
                        matrices=matrices,
                        core=core[own],
                        application=ChunkApplication(
                            matrices, settings, seed, numbers=numbers[rows], on_host=numbers_on_host[rows]
                        ),
                    )
                )
                begin, first = end, rows.stop
            self.blocks.append(
                CoreBlock(
                    chunks=chunks,
                    core=core[: sizes[place]],
                    on_host=self._wire.outgoing[of_block:begin],
                    squared_norm=self.squared_norms[place : place + 1],
                )
            )
        self.place = {members[0].block: place for place, members in enumerate(subspaces)}
        """Where in `blocks` a block of the model is, by its index there."""

    def _state(self, place: int, begin: int, end: int, key: int) -> CoreState:
        """Of the next chunk, which is one of the block at `place` and has these elements of all cores."""
        self.first.append(begin)
        moment, variance = self._moments.take(end - begin)
        return CoreState(
            deadline=place,
            number=len(self.first) - 1,
            incoming=self._wire.own_incoming[begin:end],
            outgoing=self._wire.outgoing[begin:end],
            moment=moment,
            variance=variance,
            squared_norm=self._wire.own_norms[place : place + 1],
            settings=self._settings,
            key=key,
        )

    def of_ranks(self, place: int, state: CoreState, places: Sequence[int]) -> OfRanks:
        """What the ranks bring of a chunk of the block at `place`; `places` are of no meaning."""
        begin = self.first[state.number]
        end = begin + state.incoming.numel()
        return OfRanks(
            [each[begin:end] for each in self._wire.incoming],
            [norms[place : place + 1] for norms in self._wire.norms],
        )

    @property
    def matrices(self) -> list[CoreMatrix]:
        return [matrix for _, matrix in self.placed()]

    def placed(self) -> list[tuple[CoreChunk, CoreMatrix]]:
        """Every matrix, with the chunk that it is in."""
        return [(chunk, m) for block in self.blocks for chunk in block.chunks for m in chunk.matrices]

    def chunk_of(self, matrix: CoreMatrix) -> CoreChunk:
        """The chunk that a matrix is in."""
        chunks = self.blocks[self.place[matrix.subspace.block]].chunks
        return next(chunk for chunk in chunks if matrix in chunk.matrices)

    def begin_step(self) -> None:
        """No block has gradient."""
        for place, block in enumerate(self.blocks):
            block.has_gradient = False
            if self._own_sums:
                self.zero_sums(place)

    def zero_sums(self, place: int) -> None:
        """No micro-batch's gradient is in those of a block."""
        if (sums := self._sums[place]) is not None:
            sums.zero_()

    @property
    def pinned_bytes(self) -> int:
        """Of the host; counted by the first of the ranks that have it together."""
        return self._wire.pinned_bytes

    def close(self) -> None:
        """Unpin. The caller has waited for all copies."""
        self.blocks.clear()
        self._wire.close()
        self._moments.close()


class _OnHost:
    """Where cores and their norms arrive on the host, and where their directions wait to go up."""

    def __init__(
        self,
        num_blocks: int,
        elements: int,
        dtype: torch.dtype,
        pinned_for: torch.device | None,
        world: World,
        progress: ReportProgress,
    ) -> None:
        """Of so many blocks with so many elements in all. The ranks of a machine have the directions once,
        and each sees what has arrived of the others."""
        device = torch.device("cpu") if pinned_for is None else pinned_for
        head_bytes = -(-4 * num_blocks // 64) * 64
        core_bytes = dtype.itemsize * elements
        sizes_bytes = [head_bytes + core_bytes] * world.local_size
        if world.local_size > 1:
            sizes_bytes.append(core_bytes)
        self._held = machine_slabs(sizes_bytes, device, progress, world)
        outgoing = self._held.views[-1][head_bytes if world.local_size == 1 else 0 :]
        self.outgoing = outgoing.view(dtype)
        """(elements,) of all cores; of one process the memory in which they have arrived."""
        of_ranks = self._held.views[: world.local_size]
        self.norms = [memory[: 4 * num_blocks].view(torch.float32) for memory in of_ranks]
        """(blocks,) fp32 of each rank of this machine: squared, of its gradients in this step."""
        self.incoming = [memory[head_bytes:].view(dtype) for memory in of_ranks]
        """(elements,) of each rank: all its cores."""
        self.own_norms, self.own_incoming = self.norms[world.local_rank], self.incoming[world.local_rank]
        self._is_first = world.local_rank == 0

    @property
    def pinned_bytes(self) -> int:
        """0 but for the first of the ranks that have it together."""
        return self._held.pinned_bytes if self._is_first else 0

    def close(self) -> None:
        self._held.close()


class _Moments:
    """Both moments of all cores: one mapping, which the kernel may back with huge pages. Adam is bound by
    memory, and through pages of 4 KiB two cores of a virtual machine read and wrote 86 GB/s in place of
    107."""

    def __init__(self, elements: int, dtype: torch.dtype, world: World, progress: ReportProgress) -> None:
        """There once for the ranks of a machine."""
        num_bytes, cpu = 2 * elements * dtype.itemsize, torch.device("cpu")
        self._held = machine_slabs([num_bytes], cpu, progress, world)
        if world.local_size == 1:
            # Written to once, so that what the host cannot hold is missed here.
            self._held.views[0].zero_()
        self._left = self._held.views[0].view(dtype)

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        """(count,) each, zero: those of the next cores."""
        moment, variance, self._left = self._left.tensor_split([count, 2 * count])
        return moment, variance

    def close(self) -> None:
        self._held.close()


def _elements(subspaces: Sequence[Subspace]) -> int:
    """Of their cores together."""
    return sum(each.d**2 for each in subspaces)


def _grouped(subspaces: Sequence[Subspace]) -> Iterator[list[Subspace]]:
    """Neighbours whose cores travel together."""
    ends = chunk_ends([_elements([each]) for each in subspaces])
    for begin, end in pairwise([0, *ends]):
        yield list(subspaces[begin:end])


def move_moments(state: CoreState, matrix: CoreMatrix, left: Projector, right: Projector) -> int:
    """Move Adam's moments to the subspace of a new pair, in fp32 on the device; bytes that go each way."""
    subspace, dtype, device = matrix.subspace, matrix.core.dtype, matrix.core.device
    moments = [matrix.of(state.moment), matrix.of(state.variance)]
    on_device = [moment.to(device).float() for moment in moments]
    # The new pair as it will be stored.
    moved = transport_moments(
        on_device[0], on_device[1], subspace.left, left.cast(dtype), subspace.right, right.cast(dtype)
    )
    for moment, result in zip(moments, moved, strict=True):
        moment.copy_(result.to(moment.dtype))
    return sum(moment.nbytes for moment in moments)
