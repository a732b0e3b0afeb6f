# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# The compiler of Triton takes annotations of kernels for code, so kernels have none.
"""Triton kernel of `engines.zeroth_order.low_rank.low_rank_noise.add_low_rank`, bit for bit the same
arithmetic.
Imported only where Triton is there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.triton_launch import launch
from engines.noise import philox
from engines.noise.philox import NoiseKey
from engines.noise.tiles import TILE
from engines.noise.weight_pass_kernels import dither_of_half, rounded_like, unsigned_seed

_TILE = tl.constexpr(TILE)
_LANES = tl.constexpr(philox.SIGN_LANES)
_WIDTH = tl.constexpr(philox.SIGN_WIDTH)


@triton.jit
def low_rank(rows, columns, element, inside, height, width, RANK: tl.constexpr):
    """What is to be added to elements (int64) of a matrix, fp32; 0 where they are not `inside`."""
    row, column = element // width, element % width
    change = tl.load(rows + row, mask=inside, other=0.0) * tl.load(columns + column, mask=inside, other=0.0)
    for k in tl.static_range(1, RANK):
        left = tl.load(rows + k * height + row, mask=inside, other=0.0)
        change = change + left * tl.load(columns + k * width + column, mask=inside, other=0.0)
    return change


@triton.jit(do_not_specialize=["tensor", "step", "seed"])
def _add_kernel(
    weight, rows, columns, count, height, width, tensor, step, seed, RANK: tl.constexpr, MODE: tl.constexpr
):
    """One tile."""
    tile = tl.program_id(0).to(tl.int64)
    base = tile * _TILE
    like = weight.dtype.element_ty
    for half in tl.static_range(2):
        lane = tl.arange(0, _LANES)[:, None] * _WIDTH + tl.arange(0, _WIDTH)[None, :]
        element = base + half * _LANES * _WIDTH + lane
        inside = element < count
        change = low_rank(rows, columns, element, inside, height, width, RANK)
        value = tl.load(weight + element, mask=inside, other=0.0).to(tl.float32) + change
        if MODE == 0:
            tl.store(weight + element, value.to(like), mask=inside)
        else:
            bits = dither_of_half(tile, half, tensor, step, seed)
            tl.store(weight + element, rounded_like(value, bits, like, MODE).to(like), mask=inside)


def add_low_rank(weight: Tensor, rows: Tensor, columns: Tensor, key: NoiseKey, *, stochastic: bool) -> None:
    """weight (m n,) += the sum over k of rows[k] (m,) x columns[k] (n,), in place, rounded once."""
    mode = {torch.bfloat16: 1, torch.float16: 2}[weight.dtype] if stochastic else 0
    launch(
        _add_kernel, (triton.cdiv(weight.numel(), TILE),),
        weight, rows, columns, weight.numel(), rows.shape[1], columns.shape[1], key.tensor, key.step,
        unsigned_seed(key.seed), RANK=rows.shape[0], MODE=mode, enable_fp_fusion=False, num_warps=4,
    )  # fmt: skip
