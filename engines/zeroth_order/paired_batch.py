"""Both sides as one batch: the first half of the rows is the plus side's, the second the minus side's.

For whatever a module is called with and gives back: tensors, and tuples, lists and mappings of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engines.model.blocks import BlockCall


@dataclass(frozen=True, slots=True)
class Apart:
    """What each side's block is called with, where blocks run for one side after the other."""

    plus: Any
    minus: Any

    def side(self, side: int) -> Any:
        return self.minus if side else self.plus


def halved(value: Any, stacked: int, side: int) -> Any:
    """One side's half of every stacked tensor in `value`; what is not stacked is for both."""
    if isinstance(value, Apart):
        return value.side(side)
    if isinstance(value, Tensor):
        if value.dim() < 2 or value.shape[0] % stacked != 0 or value.shape[0] == 0:
            return value
        return value.chunk(2)[side]
    return _mapped(value, lambda each: halved(each, stacked, side))


def stack(results: Sequence[Any], stacked: int) -> Any:
    """One value of the two sides' results."""
    plus, minus = results
    if isinstance(plus, Tensor):
        if plus.dim() > 0 and plus.shape[0] == 1 and stacked > 2:
            plus, minus = (each.expand(stacked // 2, *each.shape[1:]) for each in (plus, minus))
        return torch.cat((plus, minus))
    if isinstance(plus, tuple | list):
        return type(plus)(stack(pair, stacked) for pair in zip(plus, minus, strict=True))
    return plus


def join_calls(
    plus: Sequence[BlockCall], minus: Sequence[BlockCall], rows: int, apart: Collection[int] = ()
) -> list[BlockCall]:
    """What each block is called with beside the stacked hidden state, whose halves have `rows` sequences.
    Blocks `apart` run for one side after the other."""
    joined: dict[tuple[int, int], Any] = {}
    return [
        _kept_apart(one, other)
        if index in apart
        else BlockCall(join(one.args, other.args, rows, joined), join(one.kwargs, other.kwargs, rows, joined))
        for index, (one, other) in enumerate(zip(plus, minus, strict=True))
    ]


def _kept_apart(plus: BlockCall, minus: BlockCall) -> BlockCall:
    return BlockCall(
        tuple(Apart(one, other) for one, other in zip(plus.args, minus.args, strict=True)),
        {name: Apart(plus.kwargs[name], minus.kwargs[name]) for name in plus.kwargs},
    )


def join(plus: Any, minus: Any, rows: int, joined: dict[tuple[int, int], Any]) -> Any:
    """What both sides' blocks are called with, for the stacked batch.

    A tensor with a row per sequence is stacked. One with a single row for all is kept, unless it may depend
    on weights. Tensors that blocks have in common are joined once (`joined`, while both are alive).
    """
    if isinstance(plus, Tensor):
        key = (id(plus), id(minus))
        if key not in joined:
            if plus.dim() < 2:
                joined[key] = plus
            elif plus.shape[0] == rows or (
                plus.dim() > 2 and plus.shape[0] > 1 and plus.shape[0] % rows == 0
            ):
                joined[key] = torch.cat((plus, minus))  # also of batch x heads, as Bloom's alibi
            elif plus.shape[0] != 1:
                joined[key] = plus
            elif plus.is_floating_point():
                pair = (each.expand(rows, *each.shape[1:]) for each in (plus, minus))
                joined[key] = torch.cat(tuple(pair))
            else:
                joined[key] = plus
        return joined[key]
    if isinstance(plus, Mapping):
        return {name: join(plus[name], minus[name], rows, joined) for name in plus}
    if isinstance(plus, tuple | list):
        return type(plus)(join(one, other, rows, joined) for one, other in zip(plus, minus, strict=True))
    return plus


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {name: change(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(change(each) for each in value)
    return value
