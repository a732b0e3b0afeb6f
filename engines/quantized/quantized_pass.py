"""What a zeroth-order step does to quantized matrices, in one pass over them: see
`engines.quantized.codec`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engines.costs.quantized import (
    TILE_ELEMENTS,
    matrix_bytes,
    tile_bytes,
)
from engines.kernels import triton_launch
from engines.noise import philox, weight_pass
from engines.noise.philox import NoiseKey
from engines.noise.tiles import LANES, Segment
from engines.noise.visits import Visit
from engines.quantized.codec import codes_of, decode_codes, encode, expanded_scales, put_codes, tile_ranges
from engines.settings.zeroth_order import Base


def visit_tiles(
    tiles: Tensor,
    segment: Segment,
    how: Visit,
    base: Base,
    *,
    store: bool,
    sides: Sequence[Tensor] = (),
    perturb: bool = False,
) -> None:
    """One pass over the matrices of `segment`, all with weight decay: see the module's docstring.

    `tiles` (bytes), those of one matrix after those of the other, are rewritten with `store`. `sides` are
    flat memories of the full dtype, laid out as `segment` says: none, one for w itself or, with `perturb`,
    for w + eps z, and one for w - eps z.
    """
    if tiles.is_cuda and triton_launch.has_triton():
        from engines.quantized import quantized_pass_kernels

        quantized_pass_kernels.visit_tiles(
            tiles, segment, how, base, store=store, sides=sides, perturb=perturb
        )
        return
    start = 0
    for number, offset, count in zip(segment.numbers, segment.offsets, segment.counts, strict=True):
        size = matrix_bytes(count, base)
        mine = [side[offset : offset + count] for side in sides]
        here = tiles[start : start + size]
        _visit_one(here, number, count, how, base, store=store, sides=mine, perturb=perturb)
        start += size


def _visit_one(
    tiles: Tensor,
    number: int,
    count: int,
    how: Visit,
    base: Base,
    *,
    store: bool,
    sides: Sequence[Tensor],
    perturb: bool,
) -> None:
    updates = how.log.in_fp32(how.first, how.last)
    tables = tiles.view(-1, tile_bytes(base))
    for first, last in tile_ranges(tables):
        here = tables[first:last]
        scales = expanded_scales(here)
        w = decode_codes(codes_of(here, base), scales, base).reshape(-1)
        uniform: Tensor | None = None
        for update in updates:
            z, uniform = weight_pass.tile_noise(
                how, number, update.draw, first, last, w.device, uniform=store
            )
            z.mul_(update.coefficient)
            if update.weight_decay != 0.0:
                z.add_(w * update.weight_decay)
            w = w - z.mul_(update.learning_rate)
        if store:
            w[max(0, count - first * TILE_ELEMENTS) :] = 0.0
            bits = uniform if how.rounding == "stochastic" else None
            codes = encode(w, scales.reshape(-1), base, bits).view(-1, 4, LANES)
            put_codes(codes, base, here)
            w = decode_codes(codes, scales, base).reshape(-1)
        place = slice(first * TILE_ELEMENTS, min(last * TILE_ELEMENTS, count))
        inside = place.stop - place.start
        if sides and not perturb:
            sides[0][place].copy_(w[:inside])
        elif sides:
            z, _ = weight_pass.tile_noise(how, number, how.step, first, last, w.device, uniform=False)
            z.mul_(how.eps)
            for side, moved in zip(sides, (w + z, w - z), strict=False):
                side[place].copy_(moved[:inside])


def add_low_rank_to_tiles(
    tiles: Tensor, base: Base, rows: Tensor, columns: Tensor, key: NoiseKey, *, stochastic: bool
) -> None:
    """Add the sum over k of rows[k] x columns[k], (rank, m) and (rank, n) fp32, to an (m, n) matrix in
    tiles, in place, with the bits of `key`'s rounding stream where `stochastic`.

    The sum is rounded to the grid once.
    """
    if tiles.is_cuda and triton_launch.has_triton():
        from engines.quantized import quantized_pass_kernels

        quantized_pass_kernels.add_low_rank_to_tiles(tiles, base, rows, columns, key, stochastic=stochastic)
        return
    width = columns.shape[1]
    count = rows.shape[1] * width
    tables = tiles.view(-1, tile_bytes(base))
    for first, last in tile_ranges(tables):
        here = tables[first:last]
        scales = expanded_scales(here)
        w = decode_codes(codes_of(here, base), scales, base).reshape(-1)
        start = first * TILE_ELEMENTS
        element = torch.arange(start, min(last * TILE_ELEMENTS, count), device=w.device)
        row, column = element // width, element % width
        change = torch.zeros_like(w)
        for k in range(rows.shape[0]):
            change[: element.numel()] += rows[k, row] * columns[k, column]
        w = w + change
        bits = philox.dither_bits(key, w.numel(), w.device, start) if stochastic else None
        put_codes(encode(w, scales.reshape(-1), base, bits).view(-1, 4, LANES), base, here)
