# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# The compiler of Triton takes annotations of kernels for code, so kernels have none.
"""Triton kernels of `engines.noise.weight_pass`, bit for bit the same arithmetic. Imported only where Triton
is there.

Launched without contraction of multiply and add, which would round once where torch rounds twice.
Compute capability 7.0 and up. With TRITON_INTERPRET=1 they run on CPU tensors.

One program takes one tile: a lane's four normals belong to the four rows of the tile, so that every load
and store is of consecutive elements and nothing is moved between threads. Of signs a thread has those of 8
neighbours in each half of the tile, which it loads and stores in one go.

Longer than 400 lines: both kinds of noise, with and without updates, are one arithmetic.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.triton_launch import launch
from engines.noise import philox, philox_constants, visits
from engines.noise.philox import NoiseKey
from engines.noise.tiles import LANES, TILE, Segment
from engines.noise.visits import LOG_CAPACITY, Outputs, Visit

_L0, _L1, _L2, _L3, _L4 = (tl.constexpr(value) for value in philox_constants.LOG_Q)
_S0, _S1, _S2, _S3 = (tl.constexpr(value) for value in philox_constants.SIN_S)
_C0, _C1, _C2, _C3 = (tl.constexpr(value) for value in philox_constants.COS_C)
_M0, _M1 = (tl.constexpr(value) for value in philox_constants.MULTIPLIERS)
_W0, _W1 = (tl.constexpr(value) for value in philox_constants.WEYL)
_ROUNDS = tl.constexpr(philox_constants.ROUNDS)
_MINUS_2_LN_2 = tl.constexpr(philox_constants.MINUS_2_LN_2)
_SQRT_HALF_BITS = tl.constexpr(philox_constants.SQRT_HALF_BITS)
_ROOT_BITS = tl.constexpr(philox_constants.ROOT_BITS)
_INV_2_24 = tl.constexpr(2.0**-24)
_MEAN_COINS = tl.constexpr(philox_constants.COINS // 2)
_COINS_SCALE = tl.constexpr(philox_constants.COINS_SCALE)

_LANES = tl.constexpr(LANES)
_TILE = tl.constexpr(TILE)
_CAPACITY = tl.constexpr(LOG_CAPACITY)
_FP16_NORMAL = tl.constexpr(visits.FP16_NORMAL)

_NEAREST, _DITHER_BF16, _DITHER_FP16 = (tl.constexpr(mode) for mode in range(3))

_SIGN_LANES = tl.constexpr(philox.SIGN_LANES)
_SIGN_WIDTH = tl.constexpr(philox.SIGN_WIDTH)
_SIGN_TILES = tl.constexpr(philox.SIGN_TILES)
_DITHER = tl.constexpr(philox.DITHER)

NUM_WARPS = 4
_GROUP = tl.constexpr(32 * NUM_WARPS)

ROW_COLUMNS = 1024
"""Columns per program of `rows`."""


@triton.jit
def _pair(radius_word, angle_word):
    """Two normals of two words (uint32): as `philox._box_muller`, line by line."""
    bits = ((radius_word >> 8) + 1).to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True)
    bits = bits - _SQRT_HALF_BITS
    exponent = ((bits >> 23) - 24).to(tl.float32)
    f = ((bits & 0x7FFFFF) + _SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    q = (((f * _L4 + _L3) * f + _L2) * f + _L1) * f + _L0
    square = (q * f + -2.0) * f + exponent * _MINUS_2_LN_2
    half = square * 0.5
    root = (-(square.to(tl.int32, bitcast=True) >> 1) + _ROOT_BITS).to(tl.float32, bitcast=True)
    root = (half * root * root * -1.0 + 1.5) * root
    root = (half * root * root * -1.0 + 1.5) * root
    radius = square * root
    angle = angle_word.to(tl.int32, bitcast=True)
    radius = tl.where(angle < 0, -radius, radius)
    w = ((angle << 1) >> 8).to(tl.float32) * _INV_2_24
    square = w * w
    sine = (((square * _S3 + _S2) * square + _S1) * square + _S0) * w
    cosine = ((square * _C3 + _C2) * square + _C1) * square + _C0
    return radius * cosine, radius * sine


@triton.jit
def _round(c0, c1, c2, c3, k0, k1):
    """One round of Philox. Products are taken whole: their halves then cost nothing."""
    p0 = c0.to(tl.uint64) * _M0
    p1 = c2.to(tl.uint64) * _M1
    return (
        (p1 >> 32).to(tl.uint32) ^ c1 ^ k0,
        p1.to(tl.uint32),
        (p0 >> 32).to(tl.uint32) ^ c3 ^ k1,
        p0.to(tl.uint32),
    )


@triton.jit
def words(counter, tensor, step, seed):
    """The four Philox words of int64 counters."""
    c0 = (counter & 0xFFFFFFFF).to(tl.uint32)
    c3 = (counter >> 32).to(tl.uint32)
    c1 = c0 * 0 + tensor.to(tl.uint32)
    c2 = c0 * 0 + step.to(tl.uint32)
    key = seed.to(tl.uint64)
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
        k0 = (k0.to(tl.uint64) + _W0).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + _W1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def normals(counter, tensor, step, seed):
    """Normals of the four rows of a tile, for its (n,) int64 counters; and the two radius words."""
    x0, x1, x2, x3 = words(counter, tensor, step, seed)
    z0, z1 = _pair(x0, x1)
    z2, z3 = _pair(x2, x3)
    return z0, z1, z2, z3, x0, x2


@triton.jit
def _heads(word):
    """A binomial draw of each word (uint32). The compiler knows this way of counting for one instruction."""
    count = word - ((word >> 1) & 0x55555555)
    count = (count & 0x33333333) + ((count >> 2) & 0x33333333)
    count = (((count + (count >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24
    return (count.to(tl.int32) - _MEAN_COINS).to(tl.float32) * _COINS_SCALE


@triton.jit
def drawn(counter, tensor, step, seed, COINS: tl.constexpr):
    """Normals or, with COINS, binomial draws of the four rows of a tile, for its (n,) int64 counters; and the
    two words whose halves round them: of the second those of the first two rows."""
    if COINS:
        x0, x1, x2, x3 = words(counter, tensor, step, seed)
        return _heads(x0), _heads(x1), _heads(x2), _heads(x3), x0 ^ x1, x2 ^ x3
    return normals(counter, tensor, step, seed)


@triton.jit
def dithered_bf16(value, uniform):
    """fp32 rounded to what bf16 holds, as fp32: as `noise.dither`, line by line. `uniform` has 16 bits."""
    bits = value.to(tl.int32, bitcast=True) + uniform.to(tl.int32)
    return (bits & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def rounded_like(value, uniform, like, MODE: tl.constexpr):
    """fp32 rounded to the weights' dtype, as fp32: as `noise.dither`, line by line."""
    if MODE == _NEAREST:
        return value.to(like).to(tl.float32)
    if MODE == _DITHER_BF16:
        return dithered_bf16(value, uniform)
    size = tl.abs(value)
    lift = tl.where(size < _FP16_NORMAL, _FP16_NORMAL, 0.0)
    bits = (size + lift).to(tl.int32, bitcast=True) + (uniform >> 3).to(tl.int32)
    cut = (bits & -0x2000).to(tl.float32, bitcast=True) - lift
    return tl.where(value < 0, -cut, cut)


@triton.jit
def _moved(value, z, uniform, lr, g, decay, like, DECAYS: tl.constexpr, MODE: tl.constexpr):
    change = z * g
    if DECAYS:
        change = change + value * decay
    return rounded_like(value - change * lr, uniform, like, MODE)


@triton.jit
def sign_bits(tile, lane, tensor, step, seed):
    """The 16 sign bits of lanes (n,) of a tile, of which the lower 8 are those of its first half."""
    tile = tile.to(tl.int64)
    counter = tile // _SIGN_TILES * _SIGN_LANES + lane
    x0, x1, x2, x3 = words(counter, tensor, step, seed)
    part = (tile % _SIGN_TILES).to(tl.int32)
    word = tl.where(part < 4, tl.where(part < 2, x0, x1), tl.where(part < 6, x2, x3))
    return (word >> (part % 2 * 2 * _SIGN_WIDTH).to(tl.uint32)).to(tl.int32)


@triton.jit
def signs_of_half(bits, half):
    """Noise of one half of a tile: (lanes, 8) fp32."""
    shift = tl.arange(0, _SIGN_WIDTH) + half * _SIGN_WIDTH
    return 1.0 - 2.0 * ((bits[:, None] >> shift[None, :]) & 1).to(tl.float32)


@triton.jit
def _signs_at(element, tensor, step, seed):
    """Noise of any elements, (n,) int64: (n,) fp32."""
    tile, place = element // _TILE, (element % _TILE).to(tl.int32)
    lane = place % (_SIGN_LANES * _SIGN_WIDTH) // _SIGN_WIDTH
    x0, x1, x2, x3 = words(tile // _SIGN_TILES * _SIGN_LANES + lane, tensor, step, seed)
    part = (tile % _SIGN_TILES).to(tl.int32)
    word = tl.where(part < 4, tl.where(part < 2, x0, x1), tl.where(part < 6, x2, x3))
    half = place // (_SIGN_LANES * _SIGN_WIDTH)
    shift = part % 2 * 2 * _SIGN_WIDTH + half * _SIGN_WIDTH + place % _SIGN_WIDTH
    return 1.0 - 2.0 * ((word >> shift.to(tl.uint32)) & 1).to(tl.float32)


@triton.jit
def dither_of_half(tile, half, tensor, step, seed):
    """16 random bits for each element of one half of a tile: (lanes, 8) uint32."""
    counter = (tile.to(tl.int64) * 2 + half) * _SIGN_LANES + tl.arange(0, _SIGN_LANES) + _DITHER
    x0, x1, x2, x3 = words(counter, tensor, step, seed)
    j = tl.arange(0, _SIGN_WIDTH)[None, :]
    low = tl.where(j < 2, x0[:, None], x1[:, None])
    high = tl.where(j < 6, x2[:, None], x3[:, None])
    return (tl.where(j < 4, low, high) >> (j % 2 * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def dither_at(tile, place, tensor, step, seed):
    """16 random bits, uint32, for any places (n,) of a tile: those of `dither_of_half`, a call for each."""
    counter = tile * (2 * _SIGN_LANES) + place // _SIGN_WIDTH + _DITHER
    x0, x1, x2, x3 = words(counter, tensor, step, seed)
    j = place % _SIGN_WIDTH
    word = tl.where(j < 4, tl.where(j < 2, x0, x1), tl.where(j < 6, x2, x3))
    return (word >> (j % 2 * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def _visit_tile_with_signs(
    weight, theta, plus, minus, base, count, tile, tensor, decays, table, first, num_updates, step, seed, eps,
    DECAYS: tl.constexpr, MODE: tl.constexpr, THETA: tl.constexpr, PLUS: tl.constexpr, MINUS: tl.constexpr,
):  # fmt: skip
    like = weight.dtype.element_ty
    lane = tl.arange(0, _SIGN_LANES)
    element = lane[:, None] * _SIGN_WIDTH + tl.arange(0, _SIGN_WIDTH)[None, :]
    e0, e1 = element, element + _SIGN_LANES * _SIGN_WIDTH
    source = weight + base
    w0 = tl.load(source + e0, mask=e0 < count, other=0.0).to(tl.float32)
    w1 = tl.load(source + e1, mask=e1 < count, other=0.0).to(tl.float32)
    visit_halves(
        w0, w1, theta, plus, minus, base, count, tile, tensor, decays, table, first, num_updates, step, seed,
        eps, like, DECAYS, MODE, THETA, PLUS, MINUS,
    )  # fmt: skip


@triton.jit
def visit_halves(
    w0, w1, theta, plus, minus, base, count, tile, tensor, decays, table, first, num_updates, step, seed, eps,
    like, DECAYS: tl.constexpr, MODE: tl.constexpr, THETA: tl.constexpr, PLUS: tl.constexpr,
    MINUS: tl.constexpr,
):  # fmt: skip
    """What is done to the weights of a tile, (128, 8) fp32 of each half, with signs."""
    lane = tl.arange(0, _SIGN_LANES)
    element = lane[:, None] * _SIGN_WIDTH + tl.arange(0, _SIGN_WIDTH)[None, :]
    e0, e1 = element, element + _SIGN_LANES * _SIGN_WIDTH
    m0, m1 = e0 < count, e1 < count
    for i in range(num_updates):
        row = table + ((first + i) % _CAPACITY) * 4
        lr = tl.load(row + 1).to(tl.float32, bitcast=True)
        g = tl.load(row + 2).to(tl.float32, bitcast=True)
        decay = tl.load(row + 3).to(tl.float32, bitcast=True) * decays
        then = tl.load(row)
        bits = sign_bits(tile, lane, tensor, then, seed)
        if MODE == _NEAREST:
            u0, u1 = bits[:, None], bits[:, None]  # of no use
        else:
            u0 = dither_of_half(tile, 0, tensor, then, seed)
            u1 = dither_of_half(tile, 1, tensor, then, seed)
        w0 = _moved(w0, signs_of_half(bits, 0), u0, lr, g, decay, like, DECAYS, MODE)
        w1 = _moved(w1, signs_of_half(bits, 1), u1, lr, g, decay, like, DECAYS, MODE)
    if THETA:
        tl.store(theta + base + e0, w0.to(like), mask=m0)
        tl.store(theta + base + e1, w1.to(like), mask=m1)
    if PLUS or MINUS:
        bits = sign_bits(tile, lane, tensor, step, seed)
        z0, z1 = signs_of_half(bits, 0) * eps, signs_of_half(bits, 1) * eps
        if PLUS:
            tl.store(plus + base + e0, (w0 + z0).to(like), mask=m0)
            tl.store(plus + base + e1, (w1 + z1).to(like), mask=m1)
        if MINUS:
            tl.store(minus + base + e0, (w0 - z0).to(like), mask=m0)
            tl.store(minus + base + e1, (w1 - z1).to(like), mask=m1)


@triton.jit
def _visit_tile(
    weight, theta, plus, minus, base, count, tile, tensor, decays, table, first, num_updates, step, seed, eps,
    DECAYS: tl.constexpr, MODE: tl.constexpr, THETA: tl.constexpr, PLUS: tl.constexpr, MINUS: tl.constexpr,
    COINS: tl.constexpr,
):  # fmt: skip
    # As many lanes at a time as there are threads. With more, Triton would load and compute in different
    # layouts, and move every value through shared memory in between.
    like = weight.dtype.element_ty
    for group in range(_LANES // _GROUP):
        lane = group * _GROUP + tl.arange(0, _GROUP)
        e0, e1, e2, e3 = lane, lane + _LANES, lane + 2 * _LANES, lane + 3 * _LANES
        source = weight + base
        w0 = tl.load(source + e0, mask=e0 < count, other=0.0).to(tl.float32)
        w1 = tl.load(source + e1, mask=e1 < count, other=0.0).to(tl.float32)
        w2 = tl.load(source + e2, mask=e2 < count, other=0.0).to(tl.float32)
        w3 = tl.load(source + e3, mask=e3 < count, other=0.0).to(tl.float32)
        visit_lanes(
            w0, w1, w2, w3, lane, theta, plus, minus, base, count, tile, tensor, decays, table, first,
            num_updates, step, seed, eps, like, DECAYS, MODE, THETA, PLUS, MINUS, COINS,
        )  # fmt: skip


@triton.jit
def visit_lanes(
    w0, w1, w2, w3, lane, theta, plus, minus, base, count, tile, tensor, decays, table, first, num_updates,
    step, seed, eps, like, DECAYS: tl.constexpr, MODE: tl.constexpr, THETA: tl.constexpr, PLUS: tl.constexpr,
    MINUS: tl.constexpr, COINS: tl.constexpr,
):  # fmt: skip
    """What is done to the weights of some lanes of a tile, fp32 of each row, with normals or binomial
    draws."""
    counter = tile.to(tl.int64) * _LANES + lane
    e0, e1, e2, e3 = lane, lane + _LANES, lane + 2 * _LANES, lane + 3 * _LANES
    m0, m1, m2, m3 = e0 < count, e1 < count, e2 < count, e3 < count
    for i in range(num_updates):
        row = table + ((first + i) % _CAPACITY) * 4
        lr = tl.load(row + 1).to(tl.float32, bitcast=True)
        g = tl.load(row + 2).to(tl.float32, bitcast=True)
        decay = tl.load(row + 3).to(tl.float32, bitcast=True) * decays
        z0, z1, z2, z3, x0, x2 = drawn(counter, tensor, tl.load(row), seed, COINS)
        w0 = _moved(w0, z0, x2 >> 16, lr, g, decay, like, DECAYS, MODE)
        w1 = _moved(w1, z1, x2 & 0xFFFF, lr, g, decay, like, DECAYS, MODE)
        w2 = _moved(w2, z2, x0 >> 16, lr, g, decay, like, DECAYS, MODE)
        w3 = _moved(w3, z3, x0 & 0xFFFF, lr, g, decay, like, DECAYS, MODE)
    if THETA:
        target = theta + base
        tl.store(target + e0, w0.to(like), mask=m0)
        tl.store(target + e1, w1.to(like), mask=m1)
        tl.store(target + e2, w2.to(like), mask=m2)
        tl.store(target + e3, w3.to(like), mask=m3)
    if PLUS or MINUS:
        z0, z1, z2, z3, _, _ = drawn(counter, tensor, step, seed, COINS)
        z0, z1, z2, z3 = z0 * eps, z1 * eps, z2 * eps, z3 * eps
        if PLUS:
            target = plus + base
            tl.store(target + e0, (w0 + z0).to(like), mask=m0)
            tl.store(target + e1, (w1 + z1).to(like), mask=m1)
            tl.store(target + e2, (w2 + z2).to(like), mask=m2)
            tl.store(target + e3, (w3 + z3).to(like), mask=m3)
        if MINUS:
            target = minus + base
            tl.store(target + e0, (w0 - z0).to(like), mask=m0)
            tl.store(target + e1, (w1 - z1).to(like), mask=m1)
            tl.store(target + e2, (w2 - z2).to(like), mask=m2)
            tl.store(target + e3, (w3 - z3).to(like), mask=m3)


_VARYING = ["start_tile", "tensor", "first", "num_updates", "step", "seed", "eps"]


@triton.jit(do_not_specialize=_VARYING)
def _matrix_kernel(
    weight, theta, plus, minus, count, start_tile, tensor, table, first, num_updates, step, seed, eps,
    DECAYS: tl.constexpr, MODE: tl.constexpr, THETA: tl.constexpr, PLUS: tl.constexpr, MINUS: tl.constexpr,
    SIGNS: tl.constexpr, COINS: tl.constexpr,
):  # fmt: skip
    """One tensor that fills the memory."""
    here = tl.program_id(0)
    base = here.to(tl.int64) * _TILE
    if SIGNS:
        _visit_tile_with_signs(
            weight, theta, plus, minus, base, count - base, start_tile + here, tensor, 1.0, table, first,
            num_updates, step, seed, eps, DECAYS, MODE, THETA, PLUS, MINUS,
        )  # fmt: skip
    else:
        _visit_tile(
            weight, theta, plus, minus, base, count - base, start_tile + here, tensor, 1.0, table, first,
            num_updates, step, seed, eps, DECAYS, MODE, THETA, PLUS, MINUS, COINS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first", "num_updates", "step", "seed", "eps"])
def _tensors_kernel(
    weight, theta, plus, minus, tiles, table, first, num_updates, step, seed, eps,
    DECAYS: tl.constexpr, MODE: tl.constexpr, THETA: tl.constexpr, PLUS: tl.constexpr, MINUS: tl.constexpr,
    SIGNS: tl.constexpr, COINS: tl.constexpr, GRID: tl.constexpr,
):  # fmt: skip
    """Many tensors: `tiles` says where each program's tile lies, and whose it is. They begin at multiples of
    GRID."""
    row = tiles + tl.program_id(0) * 4
    base, tensor, tile, count = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    base = tl.multiple_of(base, GRID)
    decays = (count >> 16).to(tl.float32)
    count = count & 0xFFFF
    if SIGNS:
        # Only where it is known that all of the tile is there can a thread load 8 neighbours in one go.
        if count == _TILE:
            _visit_tile_with_signs(
                weight, theta, plus, minus, base, _TILE, tile, tensor, decays, table, first, num_updates,
                step, seed, eps, DECAYS, MODE, THETA, PLUS, MINUS,
            )  # fmt: skip
        else:
            _visit_tile_with_signs(
                weight, theta, plus, minus, base, count, tile, tensor, decays, table, first, num_updates,
                step, seed, eps, DECAYS, MODE, THETA, PLUS, MINUS,
            )  # fmt: skip
    else:
        _visit_tile(
            weight, theta, plus, minus, base, count, tile, tensor, decays, table, first, num_updates, step,
            seed, eps, DECAYS, MODE, THETA, PLUS, MINUS, COINS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tensor", "step", "seed", "eps"])
def _rows_kernel(
    weight, indices, out, width, tensor, step, seed, eps,
    COLUMNS: tl.constexpr, SIGNS: tl.constexpr, COINS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    element = tl.load(indices + place).to(tl.int64) * width + column
    if SIGNS:
        z = _signs_at(element, tensor, step, seed)
    else:
        lane = element % _LANES
        z0, z1, z2, z3, _, _ = drawn(element // _TILE * _LANES + lane, tensor, step, seed, COINS)
        word = element % _TILE // _LANES
        z = tl.where(word == 0, z0, tl.where(word == 1, z1, tl.where(word == 2, z2, z3)))
    value = tl.load(weight + element, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place * width + column, (z * eps + value).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_lane", "tensor", "step", "seed"])
def _words_kernel(out, first_lane, tensor, step, seed, COUNT: tl.constexpr):
    lane = tl.arange(0, COUNT)
    x0, x1, x2, x3 = words(first_lane.to(tl.int64) + lane, tensor, step, seed)
    tl.store(out + lane, x0.to(tl.int64))
    tl.store(out + COUNT + lane, x1.to(tl.int64))
    tl.store(out + 2 * COUNT + lane, x2.to(tl.int64))
    tl.store(out + 3 * COUNT + lane, x3.to(tl.int64))


def visit(weight: Tensor, segment: Segment, how: Visit, out: Outputs, start: int) -> None:
    """The kernel of `weight_pass.visit`, with the same arguments: `weight` is flat, (elements,)."""
    flat = weight.view(-1)
    mode = 0
    if how.rounding == "stochastic":
        mode = {torch.bfloat16: 1, torch.float16: 2}.get(weight.dtype, 0)
    theta, plus, minus = (
        flat if each is None else each.view(-1) for each in (out.theta, out.plus, out.minus)
    )
    log = (how.log.table, how.first, how.last - how.first)
    noise_of = (how.step, unsigned_seed(how.seed), how.eps)
    flags: dict[str, Any] = {
        "MODE": mode,
        "THETA": out.theta is not None,
        "PLUS": out.plus is not None,
        "MINUS": out.minus is not None,
        "SIGNS": how.noise == "rademacher",
        "COINS": how.noise == "binomial",
        "enable_fp_fusion": False,
        "num_warps": NUM_WARPS,
    }
    alone = len(segment.numbers) == 1 and segment.offsets[0] == 0
    tensors = zip(segment.numbers, segment.offsets, segment.counts, segment.decays, strict=True)
    for index, (number, offset, count, decays) in enumerate(tensors):
        if count and (alone or segment.is_large(index)):
            here = slice(offset, offset + count)
            memories = (each[here] for each in (flat, theta, plus, minus))
            grid = (triton.cdiv(count, TILE),)
            launch(
                _matrix_kernel, grid, *memories, count, start // TILE, number, *log, *noise_of,
                DECAYS=how.decays and decays, **flags,
            )  # fmt: skip
    if not alone and len(tiles := segment.tiles(weight.device)):
        launch(
            _tensors_kernel, (len(tiles),), flat, theta, plus, minus, tiles, *log, *noise_of,
            DECAYS=how.decays and any(segment.decays), GRID=gcd(segment.grid, 16 // weight.element_size()),
            **flags,
        )  # fmt: skip


def rows(weight: Tensor, number: int, indices: Tensor, how: Visit) -> Tensor:
    """weight[indices] + eps z for `weight` (n, width): (*indices.shape, width), noise of these rows alone."""
    width = weight.shape[1]
    out = torch.empty((*indices.shape, width), dtype=weight.dtype, device=weight.device)
    if out.numel():
        grid = (indices.numel(), triton.cdiv(width, ROW_COLUMNS))
        launch(
            _rows_kernel, grid,
            weight, indices.reshape(-1), out, width, number, how.step, unsigned_seed(how.seed), how.eps,
            COLUMNS=ROW_COLUMNS, SIGNS=how.noise == "rademacher", COINS=how.noise == "binomial",
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def philox_words(key: NoiseKey, first_lane: int, num_lanes: int, device: torch.device) -> Tensor:
    """The integer stream of a power of two of lanes, for tests: (4, num_lanes) int64."""
    out = torch.empty((4, num_lanes), dtype=torch.int64, device=device)
    launch(
        _words_kernel, (1,), out, first_lane, key.tensor, key.step, unsigned_seed(key.seed), COUNT=num_lanes
    )
    return out


def unsigned_seed(seed: int) -> int:
    """The 64 bits of a seed that may be negative, as the kernels take them."""
    return seed & 0xFFFFFFFFFFFFFFFF
