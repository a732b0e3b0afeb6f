# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# The compiler of Triton takes annotations of kernels for code, so kernels have none.
"""Triton kernels of `engines.quantized.codec`, bit for bit the same arithmetic. Imported only where Triton
is.

One program takes one tile: 128 lanes at a time, which share a scale in each row of the tile, load their
codes as one word each. Where noise is signs and nothing is written back, a thread has the elements whose
signs its one Philox call gives: 8 neighbours in each half of the tile. Launched without contraction of
multiply and add. With TRITON_INTERPRET=1 they run on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.costs.quantized import CODE_BITS, GROUP_ELEMENTS, TILE_ELEMENTS, tile_bytes
from engines.kernels.triton_launch import launch
from engines.noise.low_rank_kernels import low_rank
from engines.noise.philox import SIGN_LANES, SIGN_WIDTH, NoiseKey
from engines.noise.tiles import LANES, Segment
from engines.noise.visits import LOG_CAPACITY, Visit
from engines.noise.weight_pass_kernels import (
    NUM_WARPS,
    dither_at,
    drawn,
    sign_bits,
    signs_of_half,
    unsigned_seed,
)
from engines.quantized import codec
from engines.settings.zeroth_order import Base

_LANES = tl.constexpr(LANES)
_TILE = tl.constexpr(TILE_ELEMENTS)
_GROUP = tl.constexpr(GROUP_ELEMENTS)
_GROUPS = tl.constexpr(codec.GROUPS_PER_ROW)
_CAPACITY = tl.constexpr(LOG_CAPACITY)
_SIGN_LANES = tl.constexpr(SIGN_LANES)
_SIGN_WIDTH = tl.constexpr(SIGN_WIDTH)
_INVERSE_BITS = tl.constexpr(codec.INVERSE_BITS)
_FP8_LARGEST = tl.constexpr(codec.FP8_LARGEST)
_FP8_NORMAL = tl.constexpr(codec.FP8_NORMAL)
_INV_2_16 = tl.constexpr(2.0**-16)
_INV_256 = tl.constexpr(2.0**-8)

_INT4, _INT8, _FP8 = (tl.constexpr(form) for form in range(3))
_FORMS: dict[Base, int] = {"int4": 0, "int8": 1, "fp8": 2}


@triton.jit
def _decoded(code, scale, FORM: tl.constexpr):
    """What codes stand for, in fp32: `codec.decode_codes`. `code` has its unsigned bits in an int32."""
    if FORM == _FP8:
        half = ((code & 0x7F) << 7) | ((code & 0x80) << 8)
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0 * scale
    if FORM == _INT8:
        return ((code << 24) >> 24).to(tl.float32) * scale
    return ((code << 28) >> 28).to(tl.float32) * scale


@triton.jit
def _encoded(w, scale, uniform, STOCHASTIC: tl.constexpr, FORM: tl.constexpr):
    """Codes of fp32 `w` at their `scale`: what `codec.encode` does, line by line."""
    if FORM == _FP8:
        inverse = (-scale.to(tl.int32, bitcast=True) + 0x7F000000).to(tl.float32, bitcast=True)
        size = tl.abs(w * inverse)
        lift = tl.where(size < _FP8_NORMAL, _FP8_NORMAL, 0.0)
        bits = (tl.minimum(size, _FP8_LARGEST) + lift).to(tl.int32, bitcast=True)
        bits = bits + ((uniform << 4) + 8).to(tl.int32) if STOCHASTIC else bits + (1 << 19)
        cut = (bits & -0x100000).to(tl.float32, bitcast=True) - lift
        half = (tl.minimum(cut, _FP8_LARGEST) * _INV_256).to(tl.float16)
        code = half.to(tl.int16, bitcast=True).to(tl.int32) >> 7
        return code | tl.where((w < 0) & (code > 0), 0x80, 0)
    inverse = (-scale.to(tl.int32, bitcast=True) + _INVERSE_BITS).to(tl.float32, bitcast=True)
    inverse = (2.0 - scale * inverse) * inverse
    inverse = (2.0 - scale * inverse) * inverse
    inverse = (2.0 - scale * inverse) * inverse
    value = tl.floor(w * inverse + 0.5)
    if STOCHASTIC:
        rest = (w - value * scale) * inverse
        threshold = (uniform.to(tl.float32) + 0.5) * _INV_2_16
        value = value + tl.where(rest > threshold, 1.0, 0.0) - tl.where(-rest > threshold, 1.0, 0.0)
    if FORM == _INT8:
        return tl.minimum(tl.maximum(value, -127.0), 127.0).to(tl.int32) & 0xFF
    return tl.minimum(tl.maximum(value, -7.0), 7.0).to(tl.int32) & 0xF


@triton.jit
def _places(codes, scales, tile, FORM: tl.constexpr, WORDS: tl.constexpr):
    """Where a tile has its codes, and where the scales that are its end."""
    return codes + tile * WORDS, scales + (tile + 1) * (WORDS * (1 if FORM == _INT4 else 2)) - 4 * _GROUPS


@triton.jit
def _opened(words, kept, group, FORM: tl.constexpr):
    """The scales and values of a group's lanes in each row of the tile."""
    s0 = tl.load(kept + group).to(tl.float32)
    s1 = tl.load(kept + _GROUPS + group).to(tl.float32)
    s2 = tl.load(kept + 2 * _GROUPS + group).to(tl.float32)
    s3 = tl.load(kept + 3 * _GROUPS + group).to(tl.float32)
    word = tl.load(words + group * _GROUP + tl.arange(0, _GROUP)).to(tl.int32)
    width: tl.constexpr = 4 if FORM == _INT4 else 8
    mask: tl.constexpr = 15 if FORM == _INT4 else 255
    w0 = _decoded(word & mask, s0, FORM)
    w1 = _decoded((word >> width) & mask, s1, FORM)
    w2 = _decoded((word >> (2 * width)) & mask, s2, FORM)
    w3 = _decoded((word >> (3 * width)) & mask, s3, FORM)
    return s0, s1, s2, s3, w0, w1, w2, w3


@triton.jit
def _word(c0, c1, c2, c3, FORM: tl.constexpr):
    width: tl.constexpr = 4 if FORM == _INT4 else 8
    return c0 | (c1 << width) | (c2 << (2 * width)) | (c3 << (3 * width))


@triton.jit
def _moved(w, z, lr, g, decay, DECAYS: tl.constexpr):
    change = z * g
    if DECAYS:
        change = change + w * decay
    return w - change * lr


@triton.jit
def _whose(index, places, num_matrices, GRID: tl.constexpr):
    """Tile, tensor, place of its first element, and elements from there on, of a tile by its index among all:
    see `Segment.places`. Matrices begin at multiples of GRID."""
    mine = places
    for i in range(1, num_matrices):
        mine = tl.where(tl.load(places + i * 4) <= index, places + i * 4, mine)
    tile, tensor = index - tl.load(mine), tl.load(mine + 2)
    # Said here, where the sum is made: the compiler forgets it of what a function returns.
    base = tl.multiple_of(tl.load(mine + 1) + tile * _TILE, GRID)
    return tile, tensor, base, tl.load(mine + 3) - tile * _TILE


@triton.jit
def _drawn(tile, lane, tensor, step, seed, SIGNS: tl.constexpr, COINS: tl.constexpr):
    """Noise of lanes in each row of the tile and, unless it is signs, the two words that round it."""
    if SIGNS:
        # Neighbours ask for the same bits: moving values between threads would take longer.
        there = lane // _SIGN_WIDTH
        even = sign_bits(tile, there, tensor, step, seed) >> lane % _SIGN_WIDTH
        odd = sign_bits(tile, there + _SIGN_LANES // 2, tensor, step, seed) >> lane % _SIGN_WIDTH
        unused = (lane * 0).to(tl.uint32)
        return _sign(even), _sign(odd), _sign(even >> _SIGN_WIDTH), _sign(odd >> _SIGN_WIDTH), unused, unused
    return drawn(tile * _LANES + lane, tensor, step, seed, COINS)


@triton.jit
def _sign(bits):
    return 1.0 - 2.0 * (bits & 1).to(tl.float32)


@triton.jit
def _dithers(tile, lane, tensor, step, seed):
    """16 random bits of lanes in each row of the tile, of the rounding stream."""
    u0 = dither_at(tile, lane, tensor, step, seed)
    u1 = dither_at(tile, lane + _LANES, tensor, step, seed)
    u2 = dither_at(tile, lane + 2 * _LANES, tensor, step, seed)
    u3 = dither_at(tile, lane + 3 * _LANES, tensor, step, seed)
    return u0, u1, u2, u3


@triton.jit(do_not_specialize=["num_matrices", "first", "num_updates", "step", "seed", "eps"])
def _visit_kernel(
    codes, scales, side, other, places, num_matrices, table, first, num_updates, step, seed, eps,
    FORM: tl.constexpr, WORDS: tl.constexpr, STORE: tl.constexpr, STOCHASTIC: tl.constexpr,
    SIDES: tl.constexpr, PERTURB: tl.constexpr, SIGNS: tl.constexpr, COINS: tl.constexpr,
    DECAYS: tl.constexpr, GRID: tl.constexpr,
):  # fmt: skip
    """`codes` is the tiles' memory as words of one lane's codes (int16 or int32), `WORDS` to a tile;
    `scales` is the same memory as bf16. `places` tells whose tiles those are (`Segment.places`)."""
    index = tl.program_id(0).to(tl.int64)
    tile, tensor, base, left = _whose(index, places, num_matrices, GRID)
    words, kept = _places(codes, scales, index, FORM, WORDS)
    for group in range(_GROUPS):
        lane = group * _GROUP + tl.arange(0, _GROUP)
        s0, s1, s2, s3, w0, w1, w2, w3 = _opened(words, kept, group, FORM)
        x0 = (lane * 0).to(tl.uint32)
        x2 = x0
        for i in range(num_updates):
            row = table + ((first + i) % _CAPACITY) * 4
            lr = tl.load(row + 1).to(tl.float32, bitcast=True)
            g = tl.load(row + 2).to(tl.float32, bitcast=True)
            decay = tl.load(row + 3).to(tl.float32, bitcast=True)
            z0, z1, z2, z3, x0, x2 = _drawn(tile, lane, tensor, tl.load(row), seed, SIGNS, COINS)
            w0 = _moved(w0, z0, lr, g, decay, DECAYS)
            w1 = _moved(w1, z1, lr, g, decay, DECAYS)
            w2 = _moved(w2, z2, lr, g, decay, DECAYS)
            w3 = _moved(w3, z3, lr, g, decay, DECAYS)
        m0, m1 = lane < left, lane + _LANES < left
        m2, m3 = lane + 2 * _LANES < left, lane + 3 * _LANES < left
        if STORE:
            u0, u1, u2, u3 = x2 >> 16, x2 & 0xFFFF, x0 >> 16, x0 & 0xFFFF
            if SIGNS and STOCHASTIC:
                # Without an update any bits will do: what is on the grid stays there.
                latest = tl.load(table + (tl.maximum(first + num_updates, 1) - 1) % _CAPACITY * 4)
                u0, u1, u2, u3 = _dithers(tile, lane, tensor, latest, seed)
            c0 = _encoded(tl.where(m0, w0, 0.0), s0, u0, STOCHASTIC, FORM)
            c1 = _encoded(tl.where(m1, w1, 0.0), s1, u1, STOCHASTIC, FORM)
            c2 = _encoded(tl.where(m2, w2, 0.0), s2, u2, STOCHASTIC, FORM)
            c3 = _encoded(tl.where(m3, w3, 0.0), s3, u3, STOCHASTIC, FORM)
            tl.store(words + lane, _word(c0, c1, c2, c3, FORM).to(codes.dtype.element_ty))
            w0, w1 = _decoded(c0, s0, FORM), _decoded(c1, s1, FORM)
            w2, w3 = _decoded(c2, s2, FORM), _decoded(c3, s3, FORM)
        if SIDES > 0 and not PERTURB:
            like = side.dtype.element_ty
            target = side + base + lane
            tl.store(target, w0.to(like), mask=m0)
            tl.store(target + _LANES, w1.to(like), mask=m1)
            tl.store(target + 2 * _LANES, w2.to(like), mask=m2)
            tl.store(target + 3 * _LANES, w3.to(like), mask=m3)
        if SIDES > 0 and PERTURB:
            z0, z1, z2, z3, _, _ = _drawn(tile, lane, tensor, step, seed, SIGNS, COINS)
            z0, z1, z2, z3 = z0 * eps, z1 * eps, z2 * eps, z3 * eps
            like = side.dtype.element_ty
            target = side + base + lane
            tl.store(target, (w0 + z0).to(like), mask=m0)
            tl.store(target + _LANES, (w1 + z1).to(like), mask=m1)
            tl.store(target + 2 * _LANES, (w2 + z2).to(like), mask=m2)
            tl.store(target + 3 * _LANES, (w3 + z3).to(like), mask=m3)
            if SIDES == 2:
                target = other + base + lane
                tl.store(target, (w0 - z0).to(like), mask=m0)
                tl.store(target + _LANES, (w1 - z1).to(like), mask=m1)
                tl.store(target + 2 * _LANES, (w2 - z2).to(like), mask=m2)
                tl.store(target + 3 * _LANES, (w3 - z3).to(like), mask=m3)


@triton.jit(do_not_specialize=["num_matrices", "first", "num_updates", "step", "seed", "eps"])
def _signs_kernel(
    codes, scales, side, other, places, num_matrices, table, first, num_updates, step, seed, eps,
    FORM: tl.constexpr, WORDS: tl.constexpr, SIDES: tl.constexpr, PERTURB: tl.constexpr,
    DECAYS: tl.constexpr, GRID: tl.constexpr,
):  # fmt: skip
    """Perturbs by signs and does not store. Two threads have elements in the same words, and
    both load them: codes are few bytes, and a Philox call for every lane would take four times as long."""
    index = tl.program_id(0).to(tl.int64)
    tile, tensor, base, left = _whose(index, places, num_matrices, GRID)
    words, kept = _places(codes, scales, index, FORM, WORDS)
    width: tl.constexpr = 4 if FORM == _INT4 else 8
    mask: tl.constexpr = 15 if FORM == _INT4 else 255
    thread = tl.arange(0, _SIGN_LANES)
    row = thread * _SIGN_WIDTH // _LANES
    lane = thread * _SIGN_WIDTH % _LANES
    word = tl.load(words + lane[:, None] + tl.arange(0, _SIGN_WIDTH)[None, :]).to(tl.int32)
    s0 = tl.load(kept + row * _GROUPS + lane // _GROUP).to(tl.float32)
    s1 = tl.load(kept + (row + 2) * _GROUPS + lane // _GROUP).to(tl.float32)
    w0 = _decoded((word >> (row * width)[:, None]) & mask, s0[:, None], FORM)
    w1 = _decoded((word >> ((row + 2) * width)[:, None]) & mask, s1[:, None], FORM)
    for i in range(num_updates):
        entry = table + ((first + i) % _CAPACITY) * 4
        lr = tl.load(entry + 1).to(tl.float32, bitcast=True)
        g = tl.load(entry + 2).to(tl.float32, bitcast=True)
        decay = tl.load(entry + 3).to(tl.float32, bitcast=True)
        bits = sign_bits(tile, thread, tensor, tl.load(entry), seed)
        w0 = _moved(w0, signs_of_half(bits, 0), lr, g, decay, DECAYS)
        w1 = _moved(w1, signs_of_half(bits, 1), lr, g, decay, DECAYS)
    like = side.dtype.element_ty
    e0 = thread[:, None] * _SIGN_WIDTH + tl.arange(0, _SIGN_WIDTH)[None, :]
    e1 = e0 + _SIGN_LANES * _SIGN_WIDTH
    if PERTURB:
        bits = sign_bits(tile, thread, tensor, step, seed)
        z0, z1 = signs_of_half(bits, 0) * eps, signs_of_half(bits, 1) * eps
        if left >= _TILE:  # only then can a thread store 8 neighbours in one go
            tl.store(side + base + e0, (w0 + z0).to(like))
            tl.store(side + base + e1, (w1 + z1).to(like))
            if SIDES == 2:
                tl.store(other + base + e0, (w0 - z0).to(like))
                tl.store(other + base + e1, (w1 - z1).to(like))
        else:
            tl.store(side + base + e0, (w0 + z0).to(like), mask=e0 < left)
            tl.store(side + base + e1, (w1 + z1).to(like), mask=e1 < left)
            if SIDES == 2:
                tl.store(other + base + e0, (w0 - z0).to(like), mask=e0 < left)
                tl.store(other + base + e1, (w1 - z1).to(like), mask=e1 < left)
    else:
        tl.store(side + base + e0, w0.to(like), mask=e0 < left)
        tl.store(side + base + e1, w1.to(like), mask=e1 < left)


@triton.jit(do_not_specialize=["tensor", "step", "seed"])
def _add_kernel(
    codes, scales, rows, columns, count, height, width, tensor, step, seed,
    FORM: tl.constexpr, WORDS: tl.constexpr, RANK: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Add a product of low rank to an (height, width) matrix in tiles, laid out as for a visit."""
    tile = tl.program_id(0).to(tl.int64)
    words, kept = _places(codes, scales, tile, FORM, WORDS)
    for group in range(_GROUPS):
        lane = group * _GROUP + tl.arange(0, _GROUP)
        s0, s1, s2, s3, w0, w1, w2, w3 = _opened(words, kept, group, FORM)
        e0 = tile * _TILE + lane
        e1, e2, e3 = e0 + _LANES, e0 + 2 * _LANES, e0 + 3 * _LANES
        w0 = w0 + low_rank(rows, columns, e0, e0 < count, height, width, RANK)
        w1 = w1 + low_rank(rows, columns, e1, e1 < count, height, width, RANK)
        w2 = w2 + low_rank(rows, columns, e2, e2 < count, height, width, RANK)
        w3 = w3 + low_rank(rows, columns, e3, e3 < count, height, width, RANK)
        u0 = (lane * 0).to(tl.uint32)
        u1, u2, u3 = u0, u0, u0
        if STOCHASTIC:
            u0, u1, u2, u3 = _dithers(tile, lane, tensor, step, seed)
        c0 = _encoded(w0, s0, u0, STOCHASTIC, FORM)
        c1 = _encoded(w1, s1, u1, STOCHASTIC, FORM)
        c2 = _encoded(w2, s2, u2, STOCHASTIC, FORM)
        c3 = _encoded(w3, s3, u3, STOCHASTIC, FORM)
        tl.store(words + lane, _word(c0, c1, c2, c3, FORM).to(codes.dtype.element_ty))


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
    """The kernel of `quantized_pass.visit_tiles`, with the same arguments."""
    word = torch.int16 if CODE_BITS[base] == 4 else torch.int32
    scales = tiles.view(torch.bfloat16)
    side, other = (sides[0], sides[-1]) if sides else (scales, scales)
    places = segment.places(tiles.device)
    grid = (tiles.numel() // tile_bytes(base),)
    arguments = (
        tiles.view(word), scales, side, other, places, len(segment.numbers),
        how.log.table, how.first, how.last - how.first, how.step, unsigned_seed(how.seed), how.eps,
    )  # fmt: skip
    flags: dict[str, Any] = {
        "FORM": _FORMS[base], "WORDS": tile_bytes(base) // word.itemsize, "SIDES": len(sides),
        "PERTURB": perturb, "DECAYS": how.decays, "GRID": segment.grid, "enable_fp_fusion": False,
        "num_warps": NUM_WARPS,
    }  # fmt: skip
    signs = how.noise == "rademacher"
    if signs and sides and not store:
        launch(_signs_kernel, grid, *arguments, **flags)
        return
    stochastic = how.rounding == "stochastic"
    launch(
        _visit_kernel,
        grid,
        *arguments,
        STORE=store,
        STOCHASTIC=stochastic,
        SIGNS=signs,
        COINS=how.noise == "binomial",
        **flags,
    )


def add_low_rank_to_tiles(
    tiles: Tensor, base: Base, rows: Tensor, columns: Tensor, key: NoiseKey, *, stochastic: bool
) -> None:
    """The kernel of `quantized_pass.add_low_rank_to_tiles`, with the same arguments."""
    word = torch.int16 if CODE_BITS[base] == 4 else torch.int32
    (rank, height), width = rows.shape, columns.shape[1]
    launch(
        _add_kernel, (tiles.numel() // tile_bytes(base),),
        tiles.view(word), tiles.view(torch.bfloat16), rows, columns, height * width, height, width,
        key.tensor, key.step, unsigned_seed(key.seed), FORM=_FORMS[base],
        WORDS=tile_bytes(base) // word.itemsize, RANK=rank, STOCHASTIC=stochastic,
        enable_fp_fusion=False, num_warps=NUM_WARPS,
    )  # fmt: skip
