"""Weight matrices in subspaces that stay on the host: what `engines.methods.lsp` trains larger models with.

A block's matrices come up for the forward pass and again for the backward pass. The update of a step is
applied when its block comes up for the next forward pass: its directions come up beside it, are applied to it
there, and the new weights go down while the pass goes on. What else a block has, its vectors, stays on the
GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from engines.base import Blueprint, ReportProgress
from engines.errors import UserError
from engines.model.blocks import set_parameter
from engines.model.flat_layout import BlockLayout, lay_out_group
from engines.offload.block_slots import BlockSlots
from engines.offload.streamed_weights import StreamedWeights
from engines.settings.lsp_layout import WEIGHT_SLOTS
from engines.subspace.cores import CoreBlock
from engines.subspace.subspaces import block_matrices
from engines.transfer.compute_clock import ComputeClock
from engines.transfer.link import Link
from engines.transfer.pinned import host_slabs


def matrix_layouts(model: nn.Module, dtype: torch.dtype) -> dict[int, BlockLayout]:
    """By block, where its matrices lie in one flat memory. Weights need not be there."""
    names: dict[int, list[str]] = {}
    for index, name, _ in block_matrices(model):
        names.setdefault(index, []).append(name)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {index: lay_out_group(its, shapes, dtype) for index, its in names.items()}


class StreamedMatrices:
    """The blocks' matrices on the host, and the directions that are on their way to them."""

    def __init__(
        self,
        blueprint: Blueprint,
        dtype: torch.dtype,
        link: Link,
        clock: ComputeClock,
        progress: ReportProgress,
    ) -> None:
        """Fill them, and let the model compute with where they are on the GPU when they are there.

        Raises `UserError` for a model that has none.
        """
        self._link, self._clock = link, clock
        layouts = matrix_layouts(blueprint.model, dtype)
        if not layouts:
            name = type(blueprint.model).__name__
            raise UserError(name, "has no matrices in its blocks", "use another model")
        self._slabs = host_slabs(
            [dtype.itemsize * each.size for each in layouts.values()], link.device, progress
        )
        host = [memory.view(dtype) for memory in self._slabs.views]
        self.weights = StreamedWeights(layouts, host, link, clock, lambda block, wait: True)
        self.names: set[str] = set()
        """Of what is placed here."""
        for done, index in enumerate(layouts):
            for name, tensor in self.weights.fill(index, blueprint).items():
                set_parameter(blueprint.model, name, nn.Parameter(tensor))
                self.names.add(name)
            progress("filling blocks", done + 1, len(layouts))
        self._blocks: Sequence[CoreBlock] = ()
        self._directions: BlockSlots | None = None

    def follow(self, blocks: Sequence[CoreBlock], is_updated: Callable[[int, bool], bool]) -> None:
        """Bring up the directions of `blocks`. `is_updated(block, wait)` says whether a block's have been
        made; asked to wait, it returns when they have."""
        self._blocks = blocks
        self._directions = BlockSlots(
            [block.on_host for block in blocks],
            WEIGHT_SLOTS,
            self._link,
            self._clock,
            is_updated,
        )

    def apply_update(self, place: int, apply: Callable[[int, Tensor], None]) -> None:
        """Apply the block's update, in the order of the compute stream: `apply` is given its
        directions on the GPU, (elements,), when the block's weights are there too."""
        assert self._directions is not None
        block, slots = self._blocks[place], self._directions
        self.weights.enter_forward(block.index)
        slots.enter(place, range(place + 1, min(place + slots.count, len(self._blocks))))
        apply(place, slots.memory(place))
        slots.leave(place)
        slots.forget(place)
        self.weights.write_back(block.index)
        self.weights.leave(block.index)

    @property
    def pinned_bytes(self) -> int:
        return self._slabs.pinned_bytes

    def close(self) -> None:
        """Unpin. The caller has waited for all copies."""
        self._slabs.close()
