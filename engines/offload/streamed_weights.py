"""A model whose blocks' weights stay on the host and come up for each pass (`engines.offload.block_slots`).

Training tells of each block that it begins and leaves, forwards and backwards. For the model's own forward
pass, as in evaluation, hooks do. What is stored or exported is what the host has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engines.base import Blueprint
from engines.costs.resources.disk import WEIGHT_PLACES
from engines.model.blocks import find_blocks
from engines.model.flat_layout import BlockLayout
from engines.offload.block_slots import BlockSlots
from engines.offload.disk_weights import DiskWeights
from engines.settings.lsp_layout import WEIGHT_SLOTS
from engines.transfer.compute_clock import ComputeClock
from engines.transfer.link import Link


class StreamedWeights:
    """Weights of blocks on the host, and where they are on the GPU when they are there. Blocks are named by
    their index in the model; one that has nothing here is passed over."""

    def __init__(
        self,
        layouts: Mapping[int, BlockLayout],
        host: Sequence[Tensor],
        link: Link,
        clock: ComputeClock,
        is_ready: Callable[[int, bool], bool],
        on_disk: DiskWeights | None = None,
        *,
        slots: int = WEIGHT_SLOTS,
    ) -> None:
        """`layouts`, by block and in their order, say what of each is in `host`, (elements,) each; `is_ready`
        is that of `BlockSlots`, of a block of the model, and `on_disk` its own, of blocks by their order.
        There is room for `slots` blocks on the GPU."""
        self._layouts = dict(layouts)
        self._host = host
        self._blocks = list(layouts)
        self._places = {block: place for place, block in enumerate(self._blocks)}
        self._on_disk = on_disk
        self.slots = BlockSlots(
            host, slots, link, clock, lambda place, wait: is_ready(self._blocks[place], wait), on_disk
        )

    def memory(self, block: int) -> Tensor:
        """(elements,): where the block is whenever it is on the GPU."""
        return self.slots.memory(self._places[block])

    @torch.no_grad()
    def fill(self, block: int, blueprint: Blueprint, out: Tensor | None = None) -> dict[str, Tensor]:
        """Write a block's weights to the host, or to `out`; by name, where they are on the GPU from now
        on."""
        memory = self.memory(block)
        memory.zero_()
        its = self._layouts[block].views(memory)
        for name, tensor in its.items():
            blueprint.fill(name, tensor)
        (self._host[self._places[block]] if out is None else out).copy_(memory)
        return its

    def enter_forward(self, block: int) -> None:
        """The forward pass is about to use a block."""
        if (place := self._places.get(block)) is not None:
            self._enter(place, range(place + 1, len(self._blocks)))

    def enter_backward(self, block: int) -> None:
        """The backward pass is about to use a block."""
        if (place := self._places.get(block)) is not None:
            self._enter(place, range(place - 1, -1, -1))

    def _enter(self, place: int, ahead: Sequence[int]) -> None:
        if self._on_disk is not None:
            coming = (place, *ahead[:WEIGHT_PLACES])
            self._on_disk.ahead(
                [each for each in coming if self._host[each].is_meta and not self.slots.holds(each)]
            )
        self.slots.enter(place, ahead[: self.slots.count - 1])

    def leave(self, block: int) -> None:
        """All that uses the block for now has been enqueued."""
        if (place := self._places.get(block)) is not None:
            self.slots.leave(place)

    def write_back(self, block: int) -> None:
        """The block, which is on the GPU, has changed there; see `BlockSlots.write_back`."""
        self.slots.write_back(self._places[block])

    def forget(self, block: int) -> None:
        """The block changes on the host."""
        self.slots.forget(self._places[block])

    @contextmanager
    def coming_up(self, model: nn.Module) -> Iterator[None]:
        """Blocks come up for the model's own forward passes."""
        hooks = []
        blocks = find_blocks(model)[1]
        for place, block in enumerate(self._blocks):
            ahead = [(place + further) % len(self._blocks) for further in range(1, self.slots.count)]
            hooks += [
                blocks[block].register_forward_pre_hook(lambda *_, i=place, a=ahead: self.slots.enter(i, a)),
                blocks[block].register_forward_hook(lambda *_, i=place: self.slots.leave(i)),
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def stored(self, model: nn.Module) -> nn.Module:
        """What has the names of `model` and its weights, those of blocks on the host, without what is on
        disk."""
        on_host: dict[str, Tensor] = {}
        for layout, memory in zip(self._layouts.values(), self._host, strict=True):
            on_host |= layout.views(memory)
        named = {name: on_host.get(name, each) for name, each in model.named_parameters()}
        return _Named({name: each for name, each in named.items() if not each.is_meta})


class _Named(nn.Module):
    """Parameters by name, wherever they are."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
        return iter(self._tensors.items())
