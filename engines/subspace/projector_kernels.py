# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# The compiler of Triton takes annotations of kernels for code, so kernels have none.
"""Triton kernels for block-diagonal projectors. With TRITON_INTERPRET=1 they run on CPU tensors (fp32 only:
its products take the bits of bf16 for integers).

A program takes some neighbouring rows of a projector with the columns of the blocks that they are in. There a
projector is a small matrix, made in registers from its values with zeros beside the blocks, and a tensor core
multiplies by it. The zeros cost arithmetic that is there for the taking; what limits these kernels is memory:
they read and write each element once. At m = n = 4096, d = 2048 and 4096 tokens of bf16 that floor is 12 us
for x P at 4.2 TB/s, and 16 us for an update, which reads and writes the weight.

Rows are taken from multiples of 8 on, whatever the blocks' sizes, or loads would be of one element at a time
(measured at that shape: 43 us for x P and 146 us for an update with rows taken from a block's first on, and
factors gathered entry by entry).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.triton_launch import launch
from engines.noise import stochastic_rounding
from engines.noise.weight_pass_kernels import dithered_bf16

_GOLDEN, _MIX_1, _MIX_2 = (
    tl.constexpr(value)
    for value in (stochastic_rounding.GOLDEN, stochastic_rounding.MIX_1, stochastic_rounding.MIX_2)
)

COLUMNS = 32
"""Columns of a projector per program of `block_project`."""


@dataclass(frozen=True, slots=True)
class ProgramSizes:
    """Of a program."""

    edge: int
    """Rows of x, rows of a projector at a time, and both dimensions of the tile of a weight that it
    updates."""
    warps: int


SIZES = {2: ProgramSizes(edge=64, warps=4), 4: ProgramSizes(edge=32, warps=8)}
"""By bytes of an element. In fp32 no tensor core multiplies exactly: values are in registers then, and with
64 x 64 of them the compiler ran out (up to 6 kB of a thread's 255 registers were spilled)."""


@triton.jit
def _factor(
    values, begin, block, rows, blocks,
    STRIP: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows `begin` to `begin` + STRIP of a projector in the columns of GROUP blocks from `block` on:
    (STRIP, GROUP WIDTH), WIDTH being the power of two that holds R."""
    row = begin + tl.arange(0, STRIP)
    inside = tl.arange(0, WIDTH)
    there = (row < rows)[:, None] & (inside < R)[None, :]
    narrow = tl.load(values + row[:, None] * R + inside[None, :], mask=there, other=0.0)
    wide = tl.broadcast_to(tl.expand_dims(narrow, 1), (STRIP, GROUP, WIDTH))
    wide = tl.reshape(wide, (STRIP, GROUP * WIDTH))
    mine = (row * blocks) // rows - block
    column = tl.arange(0, GROUP * WIDTH)
    return tl.where(mine[:, None] == (column // WIDTH)[None, :], wide, tl.zeros_like(wide))


@triton.jit
def _places(block, blocks, GROUP: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of the projector that `_factor` has, and which of them there are."""
    column = tl.arange(0, GROUP * WIDTH)
    if WIDTH == R:
        place = block * R + column
        return place, place < blocks * R
    group = block + column // WIDTH
    return group * R + column % WIDTH, (group < blocks) & (column % WIDTH < R)


@triton.jit(do_not_specialize=["tokens"])
def _project_kernel(
    x, values, out, tokens, x_token, x_row, rows, blocks,
    TOKENS: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """x P for some tokens and a group of blocks."""
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    block = tl.program_id(0) * GROUP
    first = (block * rows + blocks - 1) // blocks // 8 * 8
    total = tl.zeros((TOKENS, GROUP * WIDTH), tl.float32)
    line = x + token.to(tl.int64)[:, None] * x_token
    for strip in range(STRIPS):
        begin = tl.multiple_of(first + strip * STRIP, 8)
        row = begin + tl.arange(0, STRIP)
        factor = _factor(values, begin, block, rows, blocks, STRIP, GROUP, R, WIDTH)
        # Rows of other blocks are multiplied by zero.
        there = (token < tokens)[:, None] & (row < rows)[None, :]
        part = tl.load(line + row[None, :] * x_row, mask=there, other=0.0)
        total = tl.dot(part, factor, total, input_precision="ieee")
    place, known = _places(block, blocks, GROUP, R, WIDTH)
    target = out + token.to(tl.int64)[:, None] * (blocks * R) + place[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & known[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _lift_kernel(
    x, values, out, tokens, x_token, x_column, rows, blocks,
    TOKENS: tl.constexpr, STRIP: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """x P^T for some tokens and a strip of rows of P."""
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    begin = tl.program_id(0) * STRIP
    row = begin + tl.arange(0, STRIP)
    block = (begin * blocks) // rows
    place, known = _places(block, blocks, GROUP, R, WIDTH)
    source = x + token.to(tl.int64)[:, None] * x_token + place[None, :] * x_column
    part = tl.load(source, mask=(token < tokens)[:, None] & known[None, :], other=0.0)
    factor = _factor(values, begin, block, rows, blocks, STRIP, GROUP, R, WIDTH)
    lifted = tl.dot(part, tl.trans(factor), input_precision="ieee")
    target = out + token.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(target, lifted.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & (row < rows)[None, :])


@triton.jit
def _hash_rounded(value, element, key, DITHER: tl.constexpr):
    """fp32 rounded stochastically to what bf16 holds: as `rounding.dithered`, line by line."""
    if DITHER:
        word = element.to(tl.uint32) * _GOLDEN + key.to(tl.uint32)
        word = (word ^ (word >> 16)) * _MIX_1
        word = (word ^ (word >> 13)) * _MIX_2
        word = word ^ (word >> 16)
        value = dithered_bf16(value, word >> 16)
    return value


@triton.jit
def _block_update_kernel(
    weight, core, left, right, m, n, left_blocks, right_blocks, numbers,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEFT_GROUP: tl.constexpr, RIGHT_GROUP: tl.constexpr,
    R: tl.constexpr, WIDTH: tl.constexpr, DITHER: tl.constexpr,
):  # fmt: skip
    """W <- round(W decay - rate P S Q^T) for one tile of W. `numbers`: see `block_update`."""
    rate = tl.load(numbers).to(tl.float32, bitcast=True)
    decay = tl.load(numbers + 1).to(tl.float32, bitcast=True)
    key = tl.load(numbers + 2)
    top = tl.program_id(1) * ROWS
    start = tl.program_id(0) * COLUMNS
    left_block = (top * left_blocks) // m
    right_block = (start * right_blocks) // n
    above, above_known = _places(left_block, left_blocks, LEFT_GROUP, R, WIDTH)
    across, across_known = _places(right_block, right_blocks, RIGHT_GROUP, R, WIDTH)
    source = core + above.to(tl.int64)[:, None] * (right_blocks * R) + across[None, :]
    middle = tl.load(source, mask=above_known[:, None] & across_known[None, :], other=0.0)
    factor = _factor(left, top, left_block, m, left_blocks, ROWS, LEFT_GROUP, R, WIDTH)
    lifted = tl.dot(factor, middle, input_precision="ieee").to(middle.dtype)
    other = _factor(right, start, right_block, n, right_blocks, COLUMNS, RIGHT_GROUP, R, WIDTH)
    delta = tl.dot(lifted, tl.trans(other), input_precision="ieee")
    row = top + tl.arange(0, ROWS)
    column = start + tl.arange(0, COLUMNS)
    here = (row < m)[:, None] & (column < n)[None, :]
    element = row.to(tl.int64)[:, None] * n + column[None, :]
    value = tl.load(weight + element, mask=here, other=0.0).to(tl.float32)
    value = _hash_rounded(value * decay - delta * rate, element, key, DITHER)
    tl.store(weight + element, value.to(weight.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["count", "rate", "decay", "key"])
def _plain_update_kernel(weight, delta, count, rate, decay, key, SIZE: tl.constexpr, DITHER: tl.constexpr):
    """W <- round(W decay - rate delta), elements in a row."""
    element = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    here = element < count
    value = tl.load(weight + element, mask=here, other=0.0).to(tl.float32)
    change = tl.load(delta + element, mask=here, other=0.0).to(tl.float32)
    value = _hash_rounded(value * decay - change * rate, element, key, DITHER)
    tl.store(weight + element, value.to(weight.dtype.element_ty), mask=here)


def block_project(x: Tensor, values: Tensor, d: int) -> Tensor:
    """x P, (t, d), of `x` (t, rows), with any strides, and a block-diagonal P's `values` (rows, r)."""
    rows, r = values.shape
    blocks, width = d // r, triton.next_power_of_2(r)
    out = torch.empty(x.shape[0], d, dtype=x.dtype, device=x.device)
    sizes = SIZES[x.element_size()]
    group = max(1, max(16, COLUMNS) // width)
    span = -(-group * rows // blocks)
    slack = 0 if (group * rows) % (8 * blocks) == 0 else 7
    grid = (triton.cdiv(blocks, group), triton.cdiv(x.shape[0], sizes.edge))
    launch(
        _project_kernel, grid,
        x, values, out, x.shape[0], x.stride(0), x.stride(1), rows, blocks,
        TOKENS=sizes.edge, STRIP=sizes.edge, STRIPS=triton.cdiv(span + slack, sizes.edge), GROUP=group,
        R=r, WIDTH=width, num_warps=sizes.warps,
    )  # fmt: skip
    return out


def block_lift(x: Tensor, values: Tensor, d: int) -> Tensor:
    """x P^T, (t, rows), of `x` (t, d), with any strides, and a block-diagonal P's `values` (rows, r)."""
    rows, r = values.shape
    blocks, width = d // r, triton.next_power_of_2(r)
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    sizes = SIZES[x.element_size()]
    edge = sizes.edge
    launch(
        _lift_kernel, (triton.cdiv(rows, edge), triton.cdiv(x.shape[0], edge)),
        x, values, out, x.shape[0], x.stride(0), x.stride(1), rows, blocks,
        TOKENS=edge, STRIP=edge, GROUP=_blocks_within(edge, rows, blocks, width), R=r, WIDTH=width,
        num_warps=sizes.warps,
    )  # fmt: skip
    return out


def block_update(
    weight: Tensor,
    core: Tensor,
    left: Tensor,
    right: Tensor,
    numbers: Tensor,
    *,
    dither: bool,
) -> None:
    """W <- round(W decay - rate P S Q^T), of contiguous `weight` (m, n) and `core` (d, d), with the values of
    block-diagonal projectors, all of one dtype. P S is rounded to it; all sums are in fp32.

    `numbers`, (4,) int32, has the bits of rate and decay in fp32 and the key of the rounding; they lie beside
    the weight, so that a CUDA graph finds those of its step."""
    (m, n), r = weight.shape, left.shape[1]
    blocks, width = core.shape[0] // r, triton.next_power_of_2(r)
    sizes = SIZES[weight.element_size()]
    edge = sizes.edge
    launch(
        _block_update_kernel, (triton.cdiv(n, edge), triton.cdiv(m, edge)),
        weight, core, left, right, m, n, blocks, blocks, numbers,
        ROWS=edge, COLUMNS=edge, LEFT_GROUP=_blocks_within(edge, m, blocks, width),
        RIGHT_GROUP=_blocks_within(edge, n, blocks, width), R=r, WIDTH=width, DITHER=dither,
        num_warps=sizes.warps, enable_fp_fusion=False,
    )  # fmt: skip


def plain_update(weight: Tensor, delta: Tensor, rate: float, decay: float, key: int, *, dither: bool) -> None:
    """weight <- round(weight decay - rate delta), contiguous, of one shape; by bits of `key` if `dither`."""
    launch(
        _plain_update_kernel, (triton.cdiv(weight.numel(), 1024),),
        weight, delta, weight.numel(), rate, decay, key, SIZE=1024, DITHER=dither, enable_fp_fusion=False,
    )  # fmt: skip


def _blocks_within(strip: int, rows: int, blocks: int, width: int) -> int:
    """Blocks that `strip` rows from any multiple of it on can be in, up to a power of two that a tensor core
    takes."""
    most = strip * blocks // rows if strip * blocks % rows == 0 else strip * blocks // rows + 2
    return int(max(triton.next_power_of_2(min(most, blocks)), 16 // width, 1))
