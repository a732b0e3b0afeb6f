"""Gradients summed over micro-batches, of blocks that take turns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engines.cpu_updates.gradient_slots import GradientSlots
from engines.model.flat_layout import BlockLayout, lay_out_group
from engines.transfer.link import Event, Link

SHAPES = {"a": torch.Size([3, 5]), "b": torch.Size([7]), "c": torch.Size([2, 4])}


def layouts(*names: str) -> list[BlockLayout]:
    return [lay_out_group(list(each), SHAPES, torch.float32) for each in names]


def parts(layout: BlockLayout, flat: Tensor) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layout.views(flat).items()}


@pytest.mark.parametrize("blocks", [("abc", "abc", "abc"), ("abc", "ac", "b")], ids=["alike", "unlike"])
def test_a_gradient_is_the_sum_of_its_own_micro_batches(blocks: tuple[str, ...]) -> None:
    """Also where a block had its slot before, and where a parameter has no gradient."""
    its = layouts(*blocks)
    slots = GradientSlots(its, 2, torch.float32, Link(torch.device("cpu")))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for block in (2, 1, 0):
            slots.enter(block)
            names = list(its[block].views(torch.zeros(its[block].size)))
            sums = {name: torch.zeros(SHAPES[name]) for name in names}
            for micro_batch in range(3):
                found = [
                    None
                    if name == names[-1] and micro_batch != 1
                    else torch.randn(SHAPES[name], generator=generator)
                    for name in names
                ]
                slots.add(block, found, first=micro_batch == 0)
                for name, gradient in zip(names, found, strict=True):
                    if gradient is not None:
                        sums[name] += gradient
            flat = slots.gradient(block)
            assert flat.shape == (its[block].size,)
            for name, tensor in parts(its[block], flat).items():
                torch.testing.assert_close(tensor, sums[name], rtol=0, atol=0)
            between = flat.clone()
            for view in its[block].views(between).values():
                view.zero_()
            assert not between.any(), "what lies between the tensors is sent too, and must be zero"
            slots.leave(block, Event())
