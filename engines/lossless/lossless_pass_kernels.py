# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# The compiler of Triton takes annotations of kernels for code, so kernels have none.
"""Triton kernels of `engines.lossless`, bit for bit the same. Imported only where Triton is there.

One program takes one tile. A thread has the weights that its noise is for, as in
`engines.noise.weight_pass_kernels`, whose arithmetic this is: with normals or binomial draws one lane, of
which it loads the four codes in one word and the four rests in another; with signs 8 neighbours in each half
of the tile. With TRITON_INTERPRET=1 they run on CPU tensors.

Longer than 400 lines: one form of tiles is written and read here.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.costs.quantized import LOSSLESS_WORDS, TILE_ELEMENTS
from engines.kernels.triton_launch import launch
from engines.lossless import lossless_codec
from engines.lossless.lossless_codec import CODES_BYTES, TILE_BYTES
from engines.noise.philox import SIGN_LANES, SIGN_WIDTH
from engines.noise.tiles import LANES, Segment
from engines.noise.visits import Outputs, Visit
from engines.noise.weight_pass_kernels import NUM_WARPS, unsigned_seed, visit_halves, visit_lanes

_LANES = tl.constexpr(LANES)
_TILE = tl.constexpr(TILE_ELEMENTS)
_GROUP = tl.constexpr(32 * NUM_WARPS)
_SIGN_LANES = tl.constexpr(SIGN_LANES)
_SIGN_WIDTH = tl.constexpr(SIGN_WIDTH)
_WINDOW = tl.constexpr(lossless_codec.WINDOW)
_LARGEST_BASE = tl.constexpr(lossless_codec.LARGEST_BASE)
_OWN = tl.constexpr(lossless_codec.OWN_ESCAPES)
_MOST_TOPS = tl.constexpr(lossless_codec.MOST_TOPS)
_CODE_STRIDE = tl.constexpr(TILE_BYTES // 2)
"""Of a tile, in codes of a lane."""
_STRIDE = tl.constexpr(TILE_BYTES // 4)
"""Of a tile, in words."""
_RESTS = tl.constexpr(CODES_BYTES // 4)
_WORDS = tl.constexpr(TILE_BYTES // 4 - LOSSLESS_WORDS)
_ESCAPES = tl.constexpr(lossless_codec.ESCAPES)
_ELSEWHERE = tl.constexpr(lossless_codec.ELSEWHERE)
_ROOM = tl.constexpr(lossless_codec.ROOM)
_NONE = tl.constexpr(0x7FFFFFFF)
"""Above every escape."""
_END = tl.constexpr(TILE_ELEMENTS << 16)
_EXPONENTS = tl.constexpr(0x07800780)
_BOTH_EXPONENTS = tl.constexpr((1 << 7) + (1 << 19))
_RESTS_OF_TWO = tl.constexpr(0x807F807F)


@triton.jit
def _pairs(codes, rests):
    """Weights of lanes in rows 0 and 1, and in rows 2 and 3, as two bf16 in 32 bits that lack 2^base."""
    codes, rests = codes.to(tl.uint32), rests.to(tl.uint32)
    # A product by two powers of two: no bit meets another.
    first = ((codes & 0xFF) * _BOTH_EXPONENTS) & _EXPONENTS | rests & _RESTS_OF_TWO
    turned = (rests >> 8) | (rests << 24)
    return first, (((codes >> 8) & 0xFF) * _BOTH_EXPONENTS) & _EXPONENTS | turned & _RESTS_OF_TWO


@triton.jit
def _lower(pair, scale):
    return (pair << 16).to(tl.float32, bitcast=True) * scale


@triton.jit
def _upper(pair, scale):
    return (pair & 0xFFFF0000).to(tl.float32, bitcast=True) * scale


@triton.jit
def _scale(header):
    """2^base."""
    return (((header & 0xFF) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _patched(w0, w1, w2, w3, lane, entry):
    """The weight of an escape takes its place."""
    place, value = entry >> 16, (entry << 16).to(tl.float32, bitcast=True)
    here = lane * 4
    w0 = tl.where(here == place, value, w0)
    w1 = tl.where(here == place - 1, value, w1)
    w2 = tl.where(here == place - 2, value, w2)
    w3 = tl.where(here == place - 3, value, w3)
    return w0, w1, w2, w3


@triton.jit
def _num_escapes_of(header):
    return (header >> 8) & 0xFFF


@triton.jit
def _check(codes, rests, header):
    """The check bits of a tile, from its lanes' words and its header without them."""
    total = tl.sum((rests + ((codes.to(tl.int32) & 0xFFFF) << 13)).to(tl.uint32), 0) + header.to(tl.uint32)
    return ((total ^ (total >> 12) ^ (total >> 24)) & 0xFFF).to(tl.int32)


@triton.jit
def _entry(words, header, matrix, number):
    """An escape of a tile, or `_NONE`. `words` are those at the end of the tile, `matrix` those of
    the first tile of its matrix."""
    inside = number < _num_escapes_of(header)
    if number < _OWN:
        entry = tl.load(words + _ESCAPES + number, mask=inside, other=_NONE)
    else:
        place = tl.load(words + _ELSEWHERE) + number - _OWN
        entry = tl.load(matrix + place.to(tl.int64) * _STRIDE + _ROOM, mask=inside, other=_NONE)
    return entry


@triton.jit
def _opened(codes, words, header, matrix, lane, number, limit):
    """Weights (fp32) of lanes in each row of a tile, whose first escape is `number`; and the number of the
    first one that is not below `limit`, an entry."""
    scale = _scale(header)
    first, second = _pairs(tl.load(codes + lane), tl.load(words - _WORDS + _RESTS + lane))
    w0, w1, w2, w3 = _lower(first, scale), _upper(first, scale), _lower(second, scale), _upper(second, scale)
    entry = _entry(words, header, matrix, number)
    while entry < limit:
        w0, w1, w2, w3 = _patched(w0, w1, w2, w3, lane, entry)
        number += 1
        entry = _entry(words, header, matrix, number)
    return w0, w1, w2, w3, number


@triton.jit
def _whose(index, places, num_matrices, GRID: tl.constexpr):
    """Of a tile by its index among all: its number in its matrix, tensor, place of its first element,
    elements from there on, and the index of the first tile of its matrix: see `Segment.places`. Matrices
    begin at multiples of GRID."""
    mine = places
    for i in range(1, num_matrices):
        mine = tl.where(tl.load(places + i * 4) <= index, places + i * 4, mine)
    begin = tl.load(mine)
    tile = index - begin
    left = tl.minimum(tl.load(mine + 3) - tile * _TILE, _TILE).to(tl.int32)
    # Said here, where the sum is made: the compiler forgets it of what a function returns.
    start = tl.multiple_of(tl.load(mine + 1) + tile * _TILE, GRID)
    return tile, tl.load(mine + 2), start, left, begin


@triton.jit
def _words_of(words, index, begin):
    """Of the tile with that index: the words of the first tile of its matrix, its own, and its header."""
    matrix = words + begin * _STRIDE + _WORDS
    mine = words + index * _STRIDE + _WORDS
    return matrix, mine, tl.load(mine)


@triton.jit(do_not_specialize=["num_matrices", "first", "num_updates", "step", "seed", "eps"])
def _visit_kernel(
    codes, words, theta, plus, minus, places, num_matrices, table, first, num_updates, step, seed, eps,
    DECAYS: tl.constexpr, MODE: tl.constexpr, THETA: tl.constexpr, PLUS: tl.constexpr, MINUS: tl.constexpr,
    COINS: tl.constexpr, GRID: tl.constexpr,
):  # fmt: skip
    """`codes` and `words` are the same memory, as int16 and as int32."""
    index = tl.program_id(0).to(tl.int64)
    tile, tensor, start, left, begin = _whose(index, places, num_matrices, GRID)
    matrix, mine, header = _words_of(words, index, begin)
    like = plus.dtype.element_ty
    escape = header * 0
    for group in range(_LANES // _GROUP):
        lane = group * _GROUP + tl.arange(0, _GROUP)
        limit = (group + 1) * (_GROUP * 4 << 16)
        w0, w1, w2, w3, escape = _opened(
            codes + index * _CODE_STRIDE, mine, header, matrix, lane, escape, limit
        )
        visit_lanes(
            w0, w1, w2, w3, lane, theta, plus, minus, start, left, tile, tensor, 1.0, table, first,
            num_updates, step, seed, eps, like, DECAYS, MODE, THETA, PLUS, MINUS, COINS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_matrices", "first", "num_updates", "step", "seed", "eps"])
def _signs_kernel(
    codes, words, theta, plus, minus, places, num_matrices, table, first, num_updates, step, seed, eps,
    DECAYS: tl.constexpr, MODE: tl.constexpr, THETA: tl.constexpr, PLUS: tl.constexpr, MINUS: tl.constexpr,
    GRID: tl.constexpr,
):  # fmt: skip
    """Likewise with signs. Two threads have elements in the same words, and both load them."""
    index = tl.program_id(0).to(tl.int64)
    tile, tensor, start, left, begin = _whose(index, places, num_matrices, GRID)
    matrix, mine, header = _words_of(words, index, begin)
    like = plus.dtype.element_ty
    thread, neighbour = tl.arange(0, _SIGN_LANES), tl.arange(0, _SIGN_WIDTH)[None, :]
    is_upper = (thread * _SIGN_WIDTH >= _LANES)[:, None]
    lane = (thread * _SIGN_WIDTH % _LANES)[:, None] + neighbour
    scale = _scale(header)
    low, high = _pairs(tl.load(codes + index * _CODE_STRIDE + lane), tl.load(mine - _WORDS + _RESTS + lane))
    w0 = tl.where(is_upper, _upper(low, scale), _lower(low, scale))
    w1 = tl.where(is_upper, _upper(high, scale), _lower(high, scale))
    here, escape = lane * 4 + is_upper.to(tl.int32), header * 0
    entry = _entry(mine, header, matrix, escape)
    while entry < _END:
        value = (entry << 16).to(tl.float32, bitcast=True)
        w0 = tl.where(here == entry >> 16, value, w0)
        w1 = tl.where(here == (entry >> 16) - 2, value, w1)
        escape += 1
        entry = _entry(mine, header, matrix, escape)
    if left == _TILE:  # only then can a thread store 8 neighbours in one go
        visit_halves(
            w0, w1, theta, plus, minus, start, _TILE, tile, tensor, 1.0, table, first, num_updates, step,
            seed, eps, like, DECAYS, MODE, THETA, PLUS, MINUS,
        )  # fmt: skip
    else:
        visit_halves(
            w0, w1, theta, plus, minus, start, left, tile, tensor, 1.0, table, first, num_updates, step, seed,
            eps, like, DECAYS, MODE, THETA, PLUS, MINUS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_matrices"])
def _decode_kernel(codes, words, out, damaged, places, num_matrices, GRID: tl.constexpr):
    """To `out` (int16). Nothing but bits is moved, so that every NaN stays the one it is. `damaged` becomes 1
    if a tile is not what was written."""
    index = tl.program_id(0).to(tl.int64)
    _, _, start, left, begin = _whose(index, places, num_matrices, GRID)
    matrix, mine, header = _words_of(words, index, begin)
    lane = tl.arange(0, _LANES)
    w0, w1, w2, w3, _ = _opened(codes + index * _CODE_STRIDE, mine, header, matrix, lane, header * 0, _END)
    # The words are those that `_opened` has loaded.
    found = _check(
        tl.load(codes + index * _CODE_STRIDE + lane),
        tl.load(mine - _WORDS + _RESTS + lane),
        header & 0xFFFFF,
    )
    tl.store(damaged, 1, mask=found != (header >> 20) & 0xFFF)
    target = out + start + lane
    if left == _TILE:  # only then can a thread store 4 neighbours in one go
        tl.store(target, _high_half(w0))
        tl.store(target + _LANES, _high_half(w1))
        tl.store(target + 2 * _LANES, _high_half(w2))
        tl.store(target + 3 * _LANES, _high_half(w3))
    else:
        tl.store(target, _high_half(w0), mask=lane < left)
        tl.store(target + _LANES, _high_half(w1), mask=lane + _LANES < left)
        tl.store(target + 2 * _LANES, _high_half(w2), mask=lane + 2 * _LANES < left)
        tl.store(target + 3 * _LANES, _high_half(w3), mask=lane + 3 * _LANES < left)


@triton.jit
def _high_half(value):
    return (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16)


@triton.jit
def _is_escape(bits, base):
    """Whether a weight (16 bits in int32) is none of a code's; int32."""
    exponent = bits >> 7 & 0xFF
    return (((exponent <= base) | (exponent > base + _WINDOW)) & ((bits & 0x7FFF) > 0)).to(tl.int32)


@triton.jit
def _num_escapes(b0, b1, b2, b3, base):
    each = _is_escape(b0, base) + _is_escape(b1, base) + _is_escape(b2, base) + _is_escape(b3, base)
    return tl.sum(each, 0)


@triton.jit
def _base_below(top):
    return tl.minimum(tl.maximum(top - _WINDOW, 0), _LARGEST_BASE)


@triton.jit
def _below(bits, limit):
    exponent = bits >> 7 & 0xFF
    return tl.where(exponent < limit, exponent, 0)


@triton.jit
def _largest_below(b0, b1, b2, b3, limit):
    """The largest exponent in a tile that is below a limit, or 0."""
    both = tl.maximum(_below(b0, limit), _below(b1, limit))
    return tl.max(tl.maximum(both, tl.maximum(_below(b2, limit), _below(b3, limit))), 0)


@triton.jit
def _code(bits, base):
    exponent = bits >> 7 & 0xFF
    return tl.where((exponent > base) & (exponent <= base + _WINDOW), exponent - base, 0)


@triton.jit
def _put(words, matrix, place, bits, escapes, rank, elsewhere):
    """Write the escapes of one row: the first of a tile in it, the others from `elsewhere` on."""
    entry = (place << 16) | bits
    tl.store(words + _ESCAPES + rank, entry, mask=(escapes > 0) & (rank < _OWN))
    at = elsewhere + rank - _OWN
    tl.store(matrix + at.to(tl.int64) * _STRIDE + _ROOM, entry, mask=(escapes > 0) & (rank >= _OWN))


@triton.jit
def _put_escapes(words, matrix, lane, b0, b1, b2, b3, base, elsewhere):
    """In the order of their places."""
    x0, x1, x2, x3 = _is_escape(b0, base), _is_escape(b1, base), _is_escape(b2, base), _is_escape(b3, base)
    mine = x0 + x1 + x2 + x3
    rank = tl.cumsum(mine, 0) - mine
    here = lane * 4
    _put(words, matrix, here, b0, x0, rank, elsewhere)
    _put(words, matrix, here + 1, b1, x1, rank + x0, elsewhere)
    _put(words, matrix, here + 2, b2, x2, rank + x0 + x1, elsewhere)
    _put(words, matrix, here + 3, b3, x3, rank + x0 + x1 + x2, elsewhere)


@triton.jit
def _weights(weights, tile, count, lane):
    """The 16 bits of lanes in each row of a tile, int32."""
    source, left = weights + tile * _TILE + lane, count - tile * _TILE
    b0 = tl.load(source, mask=lane < left, other=0).to(tl.int32) & 0xFFFF
    b1 = tl.load(source + _LANES, mask=lane + _LANES < left, other=0).to(tl.int32) & 0xFFFF
    b2 = tl.load(source + 2 * _LANES, mask=lane + 2 * _LANES < left, other=0).to(tl.int32) & 0xFFFF
    b3 = tl.load(source + 3 * _LANES, mask=lane + 3 * _LANES < left, other=0).to(tl.int32) & 0xFFFF
    return b0, b1, b2, b3


@triton.jit
def _choose_kernel(weights, headers, count):
    """Base and number of escapes of a tile, as its header has them. `weights` are int16."""
    tile = tl.program_id(0).to(tl.int64)
    b0, b1, b2, b3 = _weights(weights, tile, count, tl.arange(0, _LANES))
    top = _largest_below(b0, b1, b2, b3, 256)
    base = _base_below(top)
    fewest = _num_escapes(b0, b1, b2, b3, base)
    if fewest > _OWN:
        for _ in range(1, _MOST_TOPS):
            top = _largest_below(b0, b1, b2, b3, top)
            other = _base_below(top)
            escapes = tl.where(top > 0, _num_escapes(b0, b1, b2, b3, other), _TILE + 1)
            base = tl.where(escapes < fewest, other, base)
            fewest = tl.minimum(escapes, fewest)
    tl.store(headers + tile, base | (fewest << 8))


@triton.jit
def _encode_kernel(weights, codes, words, headers, ends, count, num_tiles):
    """A tile, if all of its matrix find room: `ends` are from `lossless_codec.find_places`. `codes` and
    `words` as for `_visit_kernel`."""
    tile = tl.program_id(0).to(tl.int64)
    num_elsewhere = tl.load(ends + num_tiles - 1)
    if num_elsewhere <= num_tiles:
        header = tl.load(headers + tile)
        base, fewest = header & 0xFF, _num_escapes_of(header)
        lane = tl.arange(0, _LANES)
        b0, b1, b2, b3 = _weights(weights, tile, count, lane)
        all_codes = (
            _code(b0, base) | (_code(b1, base) << 4) | (_code(b2, base) << 8) | (_code(b3, base) << 12)
        )
        first = b0 & 0x807F | (b1 & 0x807F) << 16
        second = (b2 & 0x807F | (b3 & 0x807F) << 16).to(tl.uint32)
        rests = first.to(tl.uint32) | (second << 8) | (second >> 24)
        mine = words + tile * _STRIDE
        tl.store(codes + tile * _CODE_STRIDE + lane, all_codes.to(tl.int16))
        rests = rests.to(tl.int32, bitcast=True)
        tl.store(mine + _RESTS + lane, rests)
        mine += _WORDS
        tl.store(mine, header | (_check(all_codes, rests, header) << 20))
        elsewhere = tl.load(ends + tile) - tl.maximum(fewest - _OWN, 0)
        tl.store(mine + _ELSEWHERE, elsewhere)
        word = tl.arange(0, 8)
        unused = (word >= tl.minimum(fewest, _OWN) + _ESCAPES) & (word < _ELSEWHERE)
        # The room of the first tiles has escapes of others, which write them.
        tl.store(mine + word, word * 0, mask=unused | ((word == _ROOM) & (tile >= num_elsewhere)))
        if fewest > 0:
            _put_escapes(mine, words + _WORDS, lane, b0, b1, b2, b3, base, elsewhere)


def visit_lossless(kept: Tensor, segment: Segment, how: Visit, out: Outputs) -> None:
    """The kernel of `lossless_pass.visit_lossless`, with the same arguments."""
    any_out = next(each for each in (out.theta, out.plus, out.minus) if each is not None)
    theta, plus, minus = (any_out if each is None else each for each in (out.theta, out.plus, out.minus))
    flags: dict[str, Any] = {
        "DECAYS": how.decays,
        "MODE": 1 if how.rounding == "stochastic" else 0,
        "THETA": out.theta is not None,
        "PLUS": out.plus is not None,
        "MINUS": out.minus is not None,
        "enable_fp_fusion": False,
        "num_warps": NUM_WARPS,
    }
    arguments = (
        kept.view(torch.int16), kept.view(torch.int32), theta, plus, minus, segment.places(kept.device),
        len(segment.numbers), how.log.table, how.first, how.last - how.first, how.step,
        unsigned_seed(how.seed), how.eps,
    )  # fmt: skip
    grid = (kept.numel() // TILE_BYTES,)
    kernel = _signs_kernel
    if how.noise != "rademacher":
        kernel, flags["COINS"] = _visit_kernel, how.noise == "binomial"
    launch(kernel, grid, *arguments, **flags, GRID=segment.grid)


def decode_lossless(kept: Tensor, segment: Segment, out: Tensor, damaged: Tensor) -> None:
    """The kernel of `lossless_pass.decode_lossless`, with the same arguments."""
    launch(
        _decode_kernel, (kept.numel() // TILE_BYTES,),
        kept.view(torch.int16), kept.view(torch.int32), out.view(torch.int16), damaged,
        segment.places(kept.device), len(segment.numbers), GRID=segment.grid, num_warps=NUM_WARPS,
    )  # fmt: skip


def encode_lossless(weights: Tensor, segment: Segment, kept: Tensor) -> Tensor:
    """The kernels of `lossless_pass.encode_lossless`, with the same arguments."""
    found = [_encode_matrix(weights[here], mine) for mine, _, here in lossless_codec.matrices(kept, segment)]
    return torch.stack(found)


def _encode_matrix(weights: Tensor, kept: Tensor) -> Tensor:
    bits, codes, words = weights.view(torch.int16), kept.view(torch.int16), kept.view(torch.int32)
    count, num_tiles = weights.numel(), kept.numel() // TILE_BYTES
    headers = torch.empty(num_tiles, dtype=torch.int32, device=kept.device)
    launch(_choose_kernel, (num_tiles,), bits, headers, count, num_warps=NUM_WARPS)
    ends, has_room = lossless_codec.find_places(headers)
    launch(
        _encode_kernel, (num_tiles,), bits, codes, words, headers, ends, count, num_tiles,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return has_room
