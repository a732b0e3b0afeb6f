"""A model whose matrices are in tiles from outside: its weights in plain form, and what share of an update
reaches them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from engines.costs.quantized import TILE_ELEMENTS, tile_bytes
from engines.lossless.whole_matrices import WholeMatrices
from engines.model.flat_layout import ModelLayout
from engines.noise.tiles import one
from engines.noise.visits import Visit
from engines.quantized import quantized_pass
from engines.quantized.block_form import BlockForm
from engines.quantized.codec import unpack

REALIZED_SAMPLE_TILES = 1 << 12


def plain_weights(
    layout: ModelLayout,
    forms: Sequence[BlockForm],
    non_block: Mapping[str, Tensor],
    memory: Callable[[int], Tensor],
    how: Callable[[int], Visit],
    device: torch.device,
    whole: WholeMatrices,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the model's order, of the full dtype, on the host, with its deferred updates (`how`).

    `memory` gives a block's bytes, which the matrices in `whole` are out of; they are not written. Made on
    `device`, block by block.
    """
    homes = {
        name: index
        for index, block in enumerate(layout.blocks)
        for part in block.own_parts
        for name in part.names
    }
    made: dict[str, Tensor] = {}
    for name in layout.shapes:
        if name in non_block:
            yield name, non_block[name].cpu()
            continue
        if name not in made:
            index = homes[name]
            plain = forms[index].plain(memory(index), how(index), device, whole.of_block(index))
            made = {each: weight.cpu() for each, weight in plain}
        yield name, made[name]


def realized_of_quantized(
    forms: Sequence[BlockForm],
    memory: Callable[[int], Tensor],
    how: Callable[[int], Visit],
    device: torch.device,
) -> float | None:
    """Share of the change that a block's updates (`how`) want which a rounding to the grid makes: its
    projection.

    On up to `REALIZED_SAMPLE_TILES` tiles of the largest trained low-bit matrix of a block. Nothing is
    stored. `None` without such a matrix, an update or a change.
    """
    found = [
        (part.size, -index, number)
        for index, form in enumerate(forms)
        for number, part in enumerate(form.layout.own_parts)
        if part.trained and form.in_tiles(part)
    ]
    if not found:
        return None
    _, index, number = max(found)
    form, visit = forms[-index], how(-index)
    if visit.first == visit.last:
        return None
    part = form.layout.parts[number]
    count = min(part.segment.counts[0], REALIZED_SAMPLE_TILES * TILE_ELEMENTS)
    kept = form.part(memory(-index), number)[: -(-count // TILE_ELEMENTS) * tile_bytes(form.base)]
    tiles = kept.to(device, copy=True)
    segment = one(part.segment.numbers[0], count, decays=True)
    before, wanted = unpack(tiles, form.base, count), torch.empty(count, device=device)
    quantized_pass.visit_tiles(tiles, segment, visit, form.base, store=False, sides=(wanted,))
    quantized_pass.visit_tiles(tiles, segment, visit, form.base, store=True)
    change = (wanted - before).double()
    norm = float(change.square().sum())
    realized = float(((unpack(tiles, form.base, count) - before).double() * change).sum())
    return realized / norm if norm > 0.0 else None
