"""What a zeroth-order step does to a weight, in one pass over it, with noise that is made where it is needed.

`visit`, z being the noise of the tensor (`engines.noise.philox`):

    w <- round(w - lr (g z_s + wd w))      for each deferred update, z_s being the noise of its step s
    theta = w,   plus = w + eps z,   minus = w - eps z

`round` is to the weights' dtype, by default stochastic: up with the probability that is the distance to the
neighbour below, in units of the distance of the neighbours. The expectation of a rounded weight is then the
weight, so that updates far below half a unit in the last place arrive (nearest rounding loses them whole).
fp32 is rounded to nearest; its unit is small enough.

With `noise="rademacher"` z is a sign, the perturbation of SPSA (Spall, IEEE Trans. Automatic Control 37(3),
1992), and E z z^T = I as well. With `noise="binomial"` it is the sum of 32 signs over sqrt(32): near a
normal, at half its instructions.

Two implementations: torch operations for any device, and Triton kernels (`engines.noise.weight_pass_kernels`)
for CUDA, which give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engines.kernels.triton_launch import has_triton
from engines.noise.philox import (
    binomials_at,
    draw_binomials,
    draw_normals,
    draw_signs,
    normals_at,
    signs_at,
)
from engines.noise.tiles import CHUNK_LANES, LANES, TILE, Segment, TileRange, chunks, scatter
from engines.noise.visits import FP16_NORMAL, Outputs, Visit


def visit(weight: Tensor, segment: Segment, how: Visit, out: Outputs, start: int = 0) -> None:
    """One pass over `weight`, flat memory laid out as `segment` says: see the module's docstring.

    Outputs have the weight's dtype and layout, and are rounded once (the perturbed ones to nearest).
    `start`, a multiple of `TILE`, is where the memory begins within the one tensor of the segment.
    """
    if start % TILE:
        raise ValueError(f"a range of a tensor begins at a multiple of {TILE}")
    if weight.is_cuda and has_triton():
        from engines.noise import weight_pass_kernels

        weight_pass_kernels.visit(weight, segment, how, out, start)
        return
    stochastic = how.rounding == "stochastic" and weight.dtype in (torch.bfloat16, torch.float16)
    updates = how.log.in_fp32(how.first, how.last)
    perturbed = out.plus is not None or out.minus is not None
    for ranges in chunks(segment, start, CHUNK_LANES[weight.device.type]):
        current = torch.cat([tiles.of(weight) for tiles in ranges]).float()
        for update in updates:
            z, uniform = _draw(how, update.draw, ranges, weight.device, uniform=stochastic)
            z.mul_(update.coefficient)
            if update.weight_decay != 0.0:
                _decay(z, current, update.weight_decay, ranges)
            moved = current - z.mul_(update.learning_rate)
            current = (
                moved.to(weight.dtype).float() if uniform is None else dither(moved, uniform, weight.dtype)
            )
        if out.theta is not None:
            scatter(current, out.theta, ranges)
        if perturbed:
            z, _ = _draw(how, how.step, ranges, weight.device, uniform=False)
            z.mul_(how.eps)  # not torch.add(..., alpha=eps): it may fuse the two roundings into one, or not
            if out.plus is not None:
                scatter(current + z, out.plus, ranges)
            if out.minus is not None:
                scatter(current - z, out.minus, ranges)


def rows(weight: Tensor, number: int, indices: Tensor, how: Visit) -> Tensor:
    """weight[indices] + eps z, of the dtype of `weight` (n, width): (*indices.shape, width).

    For embeddings: noise is drawn for the rows that are looked up only. `how.eps` may be negative.
    """
    if weight.is_cuda and has_triton():
        from engines.noise import weight_pass_kernels

        return weight_pass_kernels.rows(weight, number, indices, how)
    width = weight.shape[1]
    flat = indices.reshape(-1)
    used, places = torch.unique(flat, return_inverse=True)
    element = used.unsqueeze(1) * width + torch.arange(width, device=weight.device)
    draws = {"gaussian": normals_at, "binomial": binomials_at, "rademacher": signs_at}
    z = draws[how.noise](element.view(-1), number, how.step, how.seed).view(-1, width)
    moved = (z.mul_(how.eps) + weight[used].float()).to(weight.dtype)
    return moved[places].view(*indices.shape, width)


def tile_noise(
    how: Visit, number: int, step: int, first: int, last: int, device: torch.device, *, uniform: bool
) -> tuple[Tensor, Tensor | None]:
    """Noise of tiles `first` to `last` - 1 of a tensor, (2048 each,) fp32; and 16 random bits, (2048 each,)
    int32, of each element if wanted."""
    tiles = TileRange(number, 0, (last - first) * TILE, first * LANES, decays=False)
    return _draw(how, step, [tiles], device, uniform=uniform)


def _draw(
    how: Visit, step: int, ranges: Sequence[TileRange], device: torch.device, *, uniform: bool
) -> tuple[Tensor, Tensor | None]:
    """Noise of all ranges, (count,) fp32; 16 random bits each, (count,) int32, if wanted."""
    draws = {"gaussian": draw_normals, "binomial": draw_binomials, "rademacher": draw_signs}
    return draws[how.noise](how.seed, step, ranges, device, uniform=uniform)


def _decay(z: Tensor, current: Tensor, weight_decay: float, ranges: Sequence[TileRange]) -> None:
    first = 0
    for tiles in ranges:
        here = slice(first, first + tiles.count)
        if tiles.decays:
            z[here].add_(current[here] * weight_decay)
        first += tiles.count


def dither(value: Tensor, uniform: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 `value` rounded stochastically to `dtype`, bf16 or fp16, as fp32; `uniform` (int32) has 16 bits.

    Adding random bits below the last place that stays, then cutting off, carries with the right probability.
    In fp16 a number below 2^-14 has the unit 2^-24 whatever its exponent: 2^-14 is added to it and taken off
    again, so that its unit is at the usual place.
    """
    if dtype == torch.bfloat16:
        bits = value.view(torch.int32) + uniform
        return bits.bitwise_and_(-0x10000).view(torch.float32)
    size = value.abs()
    lift = torch.where(size < FP16_NORMAL, FP16_NORMAL, 0.0)
    bits = (size + lift).view(torch.int32) + (uniform >> 3)
    cut = bits.bitwise_and_(-0x2000).view(torch.float32) - lift
    return torch.where(value < 0, -cut, cut)
