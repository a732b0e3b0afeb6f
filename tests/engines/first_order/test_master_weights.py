"""AdamW on the device with fp32 masters: many tensors in one go, none of them otherwise than by itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from engines.first_order import master_weights
from engines.first_order.master_weights import MasterWeights, grouped
from engines.settings.first_order import AdamWSettings

SETTINGS = AdamWSettings(learning_rate=1e-2, weight_decay=0.1)
SHAPES = [(8, 4), (4,), (16, 4), (3, 5), (7,), (2, 2)]


def trained(
    *, at_once: int, monkeypatch: pytest.MonkeyPatch, scale: float | None, in_fp32: frozenset[int]
) -> list[Tensor]:
    """Weights after four steps, in bf16 but for those of the numbers `in_fp32`. The fourth tensor has a
    gradient in the second step alone; the third step, whose norm is not finite, changes nothing."""
    monkeypatch.setattr(master_weights, "WIDENED_ELEMENTS", at_once)
    random = torch.Generator().manual_seed(0)
    dtypes = [torch.float32 if number in in_fp32 else torch.bfloat16 for number in range(len(SHAPES))]
    parameters = [
        nn.Parameter(torch.randn(shape, generator=random).to(dtype))
        for shape, dtype in zip(SHAPES, dtypes, strict=True)
    ]
    masters = MasterWeights(parameters, SETTINGS)
    for step in range(4):
        for number, each in enumerate(parameters):
            gradient = torch.randn(each.shape, generator=random).to(each.dtype)
            each.grad = None if number == 3 and step != 1 else gradient
        total = torch.tensor([float("nan") if step == 2 else 1.0])
        masters.step(1e-2, None if scale is None else torch.tensor([scale]), total)
        assert all(each.grad is None for each in parameters)
    return [each.detach().clone() for each in parameters]


@pytest.mark.parametrize("in_fp32", [frozenset(), frozenset({0, 4}), frozenset(range(len(SHAPES)))], ids=len)
@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("at_once", [40, 1 << 20])
def test_many_tensors_in_one_go_are_updated_as_each_by_itself(
    at_once: int, scale: float | None, in_fp32: frozenset[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = trained(at_once=1, monkeypatch=monkeypatch, scale=scale, in_fp32=in_fp32)
    together = trained(at_once=at_once, monkeypatch=monkeypatch, scale=scale, in_fp32=in_fp32)
    assert all(torch.equal(mine, its) for mine, its in zip(together, alone, strict=True))
    random = torch.Generator().manual_seed(0)
    first = [torch.randn(shape, generator=random) for shape in SHAPES]
    assert not any(torch.equal(mine, its.to(mine.dtype)) for mine, its in zip(together, first, strict=True))


@given(sizes=st.lists(st.integers(1, 1000), max_size=30), most=st.integers(1, 2000))
def test_groups_are_neighbours_that_have_no_more_together_than_is_allowed(
    sizes: list[int], most: int
) -> None:
    groups = grouped(sizes, most)
    assert [number for group in groups for number in group] == list(range(len(sizes)))
    limit = max(most, *sizes, 0)
    sums = [sum(sizes[number] for number in group) for group in groups]
    assert all(each <= limit for each in sums)
    # The next one would have had no room.
    for at, group in enumerate(groups[1:]):
        assert sums[at] + sizes[group[0]] > limit
