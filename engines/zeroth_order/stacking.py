"""Which blocks can run for both sides at once, tried before anything is filled.

Running both sides stacked (`engines.zeroth_order.perturbed_model`) takes for granted that a module of a
block treats the rows of its inputs alike, and computes with no weights but its own. Mixtures of experts that
sort tokens, attention with biases for each head and layers that read the weights of others do not; their
blocks run for one side after the other, with all of their weights perturbed at once.

Directions of each example (`engines.zeroth_order.low_rank.example_noise`) take more for granted: that in
every linear layer of a block a sequence's rows lie together, in the order of the sequences, as many of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engines.base import Blueprint, Context
from engines.errors import UserError
from engines.model.blocks import BlockCall, BlockDriver, find_blocks, first_names
from engines.model.model_check import FAILURES, close_to
from engines.model.stand_ins import on_stand_ins
from engines.zeroth_order.low_rank.linear_matrices import is_linear
from engines.zeroth_order.paired_batch import halved, join_calls, stack
from engines.zeroth_order.units import ModuleUnit, block_units, swapped


@torch.no_grad()
def blocks_apart(blueprint: Blueprint, context: Context) -> frozenset[int]:
    """Blocks that give something else, or nothing, when both sides run through them stacked. Tried in fp32,
    where what is wrong is told from what is rounded."""
    model = blueprint.model
    path, blocks = find_blocks(model)
    with on_stand_ins(blueprint, context, torch.float32) as inputs:
        model.eval()
        places = first_names(model)
        names = {place.rpartition(".")[::2]: name for place, name in places.items()}
        owners = {place: module for place, module in model.named_modules() if module._parameters}
        units: dict[int, list[ModuleUnit]] = {}
        for unit in block_units(blocks, path, owners, names, apart=()):
            units.setdefault(unit.block, []).append(unit)
        driver = BlockDriver(model)
        plus, minus = driver.record(inputs), driver.record(_other_rows(inputs))
        sides = [plus.hidden, minus.hidden]
        rows = sides[0].shape[0]
        joined: Sequence[BlockCall] | None
        try:
            joined = join_calls(plus.calls, minus.calls, rows)
        except FAILURES:
            return frozenset(range(len(blocks)))
        apart: set[int] = set()
        for index in range(len(blocks)):
            stacked = torch.cat(tuple(sides))
            sides = [
                driver.run(index, each.calls[index], state)
                for each, state in zip((plus, minus), sides, strict=True)
            ]
            try:
                with _stacking(blocks[index], units.get(index, []), stacked.shape[0]):
                    found = driver.run(index, joined[index], stacked)
            except torch.OutOfMemoryError:
                raise
            except FAILURES:
                apart.add(index)
                continue
            if found.shape != torch.cat(tuple(sides)).shape or not close_to(torch.cat(tuple(sides)), found):
                apart.add(index)
        return frozenset(apart)


@torch.no_grad()
def check_rows_of_sequences(blueprint: Blueprint, context: Context) -> None:
    """Raises `UserError` unless the linear layers of all blocks see the rows of each sequence together:
    another first sequence must change the first rows that come to them, and no others."""
    model = blueprint.model
    _, blocks = find_blocks(model)
    with on_stand_ins(blueprint, context, torch.float32) as inputs:
        model.eval()
        driver = BlockDriver(model)
        recording = driver.record(inputs)
        count = recording.hidden.shape[0]
        other = recording.hidden.clone()
        other[0] = other[0].flip(0) * 0.5 + other[0].roll(1, 1)
        for index, block in enumerate(blocks):
            came = []
            for hidden in (recording.hidden, other):
                with _watched(block) as seen:
                    driver.run(index, recording.calls[index], hidden)
                came.append(seen)
            if not _same_but_the_first(came[0], came[1], count):
                raise UserError(
                    type(model).__name__,
                    "has linear layers in its blocks that do not see the rows of an example together",
                    "use estimator=spsa",
                )


@contextmanager
def _watched(block: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Each call of a linear layer within, and what came to it."""
    seen: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append((module, args[0].clone()))

    hooks = [each.register_forward_pre_hook(note) for each in block.modules() if is_linear(each)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _same_but_the_first(
    before: Sequence[tuple[nn.Module, Tensor]], after: Sequence[tuple[nn.Module, Tensor]], count: int
) -> bool:
    """Of `count` groups of rows, at every call."""
    if [module for module, _ in before] != [module for module, _ in after]:
        return False
    for (_, one), (_, other) in zip(before, after, strict=True):
        rows = one.numel() // one.shape[-1]
        if one.shape != other.shape or rows % count:
            return False
        mine, others = (each.reshape(count, rows // count, -1) for each in (one, other))
        if torch.equal(mine[0], others[0]) or not close_to(mine[1:], others[1:]):
            return False
    return True


def _other_rows(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same sequences in another order: what is mistaken for the other side's shows."""
    return {name: each.flip(0) for name, each in inputs.items()}


@contextmanager
def _stacking(block: nn.Module, units: Sequence[ModuleUnit], stacked: int) -> Iterator[None]:
    """Within it `units` run for both halves of their inputs, and nothing else of `block` has weights."""
    own = [[owner._parameters[leaf] for owner, leaf, _ in unit.places] for unit in units]

    def both(unit: ModuleUnit, weights: Sequence[Any]) -> Callable[..., Any]:
        original = unit.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            results = []
            for side in (0, 1):
                with swapped(unit.places, weights):
                    mine = halved((args, kwargs), stacked, side)
                    results.append(original(*mine[0], **mine[1]))
            return stack(results, stacked)

        return forward

    try:
        for unit, weights in zip(units, own, strict=True):
            vars(unit.module)["forward"] = both(unit, weights)
            for (owner, leaf, _), weight in zip(unit.places, weights, strict=True):
                assert weight is not None
                nothing = weight.new_full((), torch.nan).expand(weight.shape)
                owner._parameters[leaf] = nn.Parameter(nothing, requires_grad=False)
        yield
    finally:
        for unit, weights in zip(units, own, strict=True):
            vars(unit.module).pop("forward", None)
            for (owner, leaf, _), weight in zip(unit.places, weights, strict=True):
                owner._parameters[leaf] = weight
