"""What lies outside a model's blocks (embeddings, final norm, head) where the host updates it, each tensor
for itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from engines.cpu_updates.block_state import BlockStates
from engines.cpu_updates.gradient_buffers import GradientBuffers
from engines.cpu_updates.update_dispatch import UpdateDispatch
from engines.cpu_updates.updates_in_flight import UpdatesInFlight
from engines.model.flat_layout import BlockLayout


class OutsideBlocks:
    """Tensors that are groups of one, numbered after the blocks.

    What the head uses is wanted after the last block and has its gradient when the losses are known. What
    comes before the blocks, or is used in them, is wanted first, and autograd adds to its gradient until the
    step's end. Which is which a step's losses tell, and the next one goes by it:

        begin          what is wanted first: its update has come, its gradient is zero
        begin_others   behind the last block: the same for the others
        send_others    the losses are known, and their gradients with them
        send           at the end: those of what is wanted first
    """

    def __init__(
        self,
        layouts: Sequence[BlockLayout],
        parameters: Sequence[nn.Parameter],
        states: BlockStates,
        in_flight: UpdatesInFlight,
        dispatch: UpdateDispatch,
        make_buffers: Callable[[Sequence[int]], GradientBuffers],
    ) -> None:
        """`layouts`: of each of the `parameters` in its own flat memory. What `states` and `in_flight` hold
        of them comes after what they hold of the blocks. `make_buffers` is given how many elements the
        places have."""
        self.parameters = list(parameters)
        self._states, self._in_flight, self._dispatch = states, in_flight, dispatch
        count = len(states.chunks)
        self.indices = range(count - len(self.parameters), count)
        """Of the groups."""
        self._gradients: list[Tensor] = []
        """(elements,) on the GPU, of each: where autograd adds them up."""
        for layout, parameter in zip(layouts, self.parameters, strict=True):
            memory = torch.zeros(layout.size, dtype=parameter.dtype, device=parameter.device)
            (parameter.grad,) = layout.views(memory).values()
            self._gradients.append(memory)
        self.wanted_first = set(self.indices)
        """Indices of those that come before the blocks, or are used in them, as the last step told; at first
        all."""
        self._buffers = make_buffers([layout.size for layout in layouts])

    def begin(self) -> None:
        self._begin(self.wanted_first)

    def begin_others(self) -> None:
        self._begin(index for index in self.indices if index not in self.wanted_first)

    def send_others(self, used_before: Collection[Tensor]) -> None:
        """`used_before`: parameters whose gradients go on after the losses."""
        pairs = list(zip(self.indices, self.parameters, strict=True))
        self.wanted_first = {index for index, parameter in pairs if parameter in used_before}
        self._send(index for index in self.indices if index not in self.wanted_first)

    def send(self) -> None:
        self._send(sorted(self.wanted_first))

    @torch.no_grad()
    def _begin(self, indices: Iterable[int]) -> None:
        for index in indices:
            # HAZARD: the last gradient is on its way down until its update is settled.
            self._in_flight.settle(index)
            self._gradients[index - self.indices.start].zero_()

    @torch.no_grad()
    def _send(self, indices: Iterable[int]) -> None:
        num_blocks = self.indices.start
        for index in indices:
            for chunk in self._states.chunks[index]:
                chunk.deadline = -1 if index in self.wanted_first else num_blocks
            number = index - num_blocks
            self._dispatch.send(index, self._gradients[number], self._buffers, number, goes_up=True)

    @property
    def pinned_bytes(self) -> int:
        return self._buffers.pinned_bytes

    def close(self) -> None:
        """Unpin. The caller has waited for all copies."""
        self._buffers.close()
