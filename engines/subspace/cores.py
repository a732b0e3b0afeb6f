"""Compressed gradients: how they are made, and where they lie on the GPU and on the host.

A core is made in its block's slot of GPU memory and travels with its neighbours, as a chunk
(`engines.cpu_updates.pipeline`). `engines.methods.lsp` is the method.

Longer than 400 lines: a core's places on the GPU and on the host are laid out together.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engines.base import ReportProgress
from engines.costs.lsp import CHUNK_ELEMENTS, CORE_SLOTS, forms_gradient
from engines.cpu_updates.chunks import OfRanks, StepShare
from engines.cpu_updates.cpu_adam import core_adam
from engines.cpu_updates.rounding import NEXT_UPDATE, noise_key
from engines.settings.lsp import LspSettings
from engines.shapes import Workload
from engines.subspace.bias_check import Subspace
from engines.subspace.projector import Projector, compress, transport_moments
from engines.subspace.residual import Residual, make_residual, residual_buffers
from engines.transfer.link import Event
from engines.transfer.pinned import HostSlab, HostSlabs
from engines.transfer.shared_memory import shared_slabs
from engines.world import ALONE, World


class Calibrator(Protocol):
    """Says when gradients are formed to test the projectors, and tests them."""

    calibrates: bool
    """The backward pass under way tests the bias of every matrix."""

    def check(self, matrix: CoreMatrix, gradient: Tensor) -> None:
        """Test the pair on this gradient (m, n), before its core is made."""


@dataclass(kw_only=True, eq=False)
class CoreMatrix:
    """A weight matrix in its subspace, and where its core lies. An
    `engines.subspace.compressed_linear.Collector`."""

    calibrator: Calibrator
    subspace: Subspace
    forms_gradient: bool
    """G is formed and compressed, which costs less than compressing its factors."""
    core: Tensor
    """(d, d) on the GPU, in its block's slot: the compressed gradient, of the weights' dtype."""
    sum: Tensor | None
    """(d, d) fp32: the sum over micro-batches, if there are several."""
    residual: Residual | None
    """What the core leaves out takes a step too."""
    offset: int
    """Of its core, in elements, in its chunk."""
    is_collected: bool = False
    """The core holds gradient of the backward pass under way."""

    def of(self, chunk: Tensor) -> Tensor:
        """Its part, (d, d), of what a chunk holds, (elements,)."""
        d = self.subspace.d
        return chunk[self.offset : self.offset + d * d].view(d, d)

    @property
    def kept_width(self) -> int | None:
        """Columns of what `keep` gives in a step that tests no projector; `None`: its input."""
        return None if self.forms_gradient else self.subspace.d

    def keep(self, x: Tensor) -> Tensor:
        """What the forward pass keeps of its input (tokens, in): it, or its compression (tokens, d)."""
        if self.forms_gradient or self.calibrator.calibrates:
            return x
        subspace = self.subspace
        return (subspace.left if subspace.inputs_are_rows else subspace.right).project(x)

    @torch.no_grad()
    def collect(self, kept: Tensor, gradient: Tensor) -> None:
        """S = (dY P)^T (X Q), (d, d), of dY (tokens, out); with P and Q swapped where W^T is stored."""
        subspace = self.subspace
        whole = self.forms_gradient or self.calibrator.calibrates
        if not whole:
            gradient = (subspace.right if subspace.inputs_are_rows else subspace.left).project(gradient)
        above, across = (kept, gradient) if subspace.inputs_are_rows else (gradient, kept)
        if whole:
            formed = above.T @ across
            if self.calibrator.calibrates:
                self.calibrator.check(self, formed)
            core = compress(formed, subspace.left, subspace.right)
            if self.residual is not None:
                self.residual.take(formed, core, subspace.left, subspace.right, adds=self.is_collected)
            self._take(core)
        elif self.sum is not None and above.is_cuda and above.dtype != torch.float32:
            self._take(torch.ops.aten.mm.dtype(above.T, across, torch.float32))
        elif self.sum is None and not self.is_collected:
            torch.mm(above.T, across, out=self.core)
            self.is_collected = True
        else:
            self._take(above.T @ across)

    def _take(self, core: Tensor) -> None:
        if self.sum is not None:
            self.sum.add_(core)
        elif self.is_collected:
            self.core.add_(core)
        else:
            self.core.copy_(core)
        self.is_collected = True

    def finish(self) -> None:
        """The backward pass of the block is over."""
        if self.sum is not None:
            self.core.copy_(self.sum)
        elif not self.is_collected:
            self.core.zero_()
        if self.residual is not None:
            self.residual.finish(self.core if self.is_collected else None)


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

    def update(self, share: StepShare, gradients: Sequence[Tensor] = ()) -> None:
        self.updates += 1
        core_adam(
            self.outgoing,
            self.moment,
            self.variance,
            self.updates,
            beta1=self.settings.beta1,
            beta2=self.settings.beta2,
            eps=self.settings.adam_eps,
            scale=share.scale(),
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
        offload, block_major = settings.offload, settings.block_major
        sizes = [sum(each.d**2 for each in members) for members in subspaces]
        kept = torch.bfloat16 if settings.moments == "bf16" else torch.float32
        self._moments = _Moments(sum(sizes), kept, world, progress)
        self._wire = _OnHost(len(sizes), sum(sizes), dtype, device if offload else None, world, progress)
        norms_on_host, incoming, outgoing = self._wire.own_norms, self._wire.own_incoming, self._wire.outgoing
        self.first: list[int] = []
        """Of each chunk, by number: its first element among all cores."""
        self.squared_norms = torch.zeros(len(sizes), device=device)
        """(blocks,) fp32 on the GPU: of the compressed gradients of this step.

        HAZARD: a block's must not change before it has been downloaded, which may be as late as when the
        block's update is waited for.
        """
        slots = [
            torch.empty(max(sizes), dtype=dtype, device=device)
            for _ in range(min(len(sizes), CORE_SLOTS) if offload else len(sizes))
        ]
        self.slot_free = [Event() for _ in slots]
        """When the block that last had a slot has left it; block i has slot i modulo their number."""
        self._own_sums = not block_major
        self._sums: list[Tensor | None] = [None] * len(sizes)
        """(elements,) fp32, of each block; block by block it is the same memory."""
        if workload.accumulation > 1:
            buffer_sizes = [max(sizes)] if block_major else sizes
            made = [torch.zeros(size, device=device) for size in buffer_sizes]
            self._sums = [made[i % len(made)][:size] for i, size in enumerate(sizes)]
        self.blocks: list[CoreBlock] = []
        begin = 0
        buffers_for_residuals = residual_buffers(subspaces, dtype, device) if settings.residual else []
        for index, members in enumerate(subspaces):
            core = slots[index % len(slots)][: sizes[index]]
            on_host = outgoing[begin : begin + sizes[index]]
            sums = self._sums[index]
            chunks: list[CoreChunk] = []
            first = 0
            for group in _grouped(members):
                count = sum(each.d**2 for each in group)
                moment, variance = self._moments.take(count)
                state = CoreState(
                    deadline=index,
                    number=len(self.first),
                    incoming=incoming[begin : begin + count],
                    outgoing=outgoing[begin : begin + count],
                    moment=moment,
                    variance=variance,
                    squared_norm=norms_on_host[index : index + 1],
                    settings=settings,
                    key=noise_key(seed, index, len(chunks)),
                )
                part = core[first : first + count]
                of_part = None if sums is None else sums[first : first + count]
                left_out = buffers_for_residuals[sum(len(chunk.matrices) for chunk in chunks) :]
                matrices = _matrices(group, part, of_part, calibrator, workload, settings.residual, left_out)
                chunks.append(CoreChunk(state=state, matrices=matrices, core=part))
                self.first.append(begin)
                first += count
                begin += count
            norm = self.squared_norms[index : index + 1]
            self.blocks.append(CoreBlock(chunks=chunks, core=core, on_host=on_host, squared_norm=norm))
        self.place = {members[0].block: place for place, members in enumerate(subspaces)}
        """Where in `blocks` a block of the model is, by its index there."""

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
        if world.local_size == 1:
            slab = HostSlab(head_bytes + core_bytes, device, progress)
            self._held = HostSlabs([slab], [slab.view(0, (slab.num_bytes,), torch.uint8)])
            outgoing = self._held.views[0][head_bytes:]
        else:
            each_bytes = [head_bytes + core_bytes] * world.local_size
            self._held = shared_slabs([*each_bytes, core_bytes], device, progress, world)
            outgoing = self._held.views[-1]
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
        if world.local_size == 1:
            slab = HostSlab(num_bytes, cpu)
            self._held = HostSlabs([slab], [slab.view(0, (num_bytes,), torch.uint8)])
            # Written to once, so that what the host cannot hold is missed here.
            self._held.views[0].zero_()
        else:
            self._held = shared_slabs([num_bytes], cpu, progress, world)
        self._left = self._held.views[0].view(dtype)

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        """(count,) each, zero: those of the next cores."""
        moment, variance, self._left = self._left.tensor_split([count, 2 * count])
        return moment, variance

    def close(self) -> None:
        self._held.close()


def _matrices(
    subspaces: Sequence[Subspace],
    core: Tensor,
    sums: Tensor | None,
    calibrator: Calibrator,
    workload: Workload,
    residual: float,
    buffers: Sequence[Tensor],
) -> list[CoreMatrix]:
    """`buffers` are for what `residual`, if any, steps along: for each matrix one."""
    offset, found = 0, []
    for place, each in enumerate(subspaces):
        d, rows, columns = each.d, each.left.rows, each.right.rows
        found.append(
            CoreMatrix(
                calibrator=calibrator,
                subspace=each,
                forms_gradient=residual > 0 or forms_gradient(rows, columns, d, workload),
                core=core[offset : offset + d * d].view(d, d),
                sum=None if sums is None else sums[offset : offset + d * d].view(d, d),
                residual=make_residual(residual, each.weight.shape, buffers[place]) if residual else None,
                offset=offset,
            )
        )
        offset += d * d
    return found


def _grouped(subspaces: Sequence[Subspace]) -> Iterator[list[Subspace]]:
    """Neighbours whose cores make up `CHUNK_ELEMENTS` at most, or a single larger one."""
    group: list[Subspace] = []
    for each in subspaces:
        if group and sum(member.d**2 for member in group) + each.d**2 > CHUNK_ELEMENTS:
            yield group
            group = []
        group.append(each)
    yield group


class IdleMatrixWarning(UserWarning):
    """A matrix in a subspace took no part in a step."""


def warn_of_idle(matrices: Iterable[CoreMatrix]) -> None:
    """Name those of which the step that has ended collected no gradient."""
    idle = [each.subspace.name for each in matrices if not each.is_collected]
    if idle:
        names = f"{idle[0]} and {len(idle) - 1} more" if len(idle) > 1 else idle[0]
        warnings.warn(
            f"no gradient was collected of {names}: lsp does not train a weight that the model uses without "
            "calling its layer (an expert without tokens waits for some); use native where it matters",
            IdleMatrixWarning,
            stacklevel=3,
        )


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
