"""Noise by counter: z[e] is a function of (seed, step, tensor, element e).

Philox 4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns the counter
(c low, tensor, step, c high), c = 512 tile + lane, under the key (seed low, seed high) into four 32-bit
words, and Box-Muller turns those into the normals of the elements of that lane in the tile's four rows
(`engines.noise.tiles`). Therefore noise is never stored, does not depend on the order of calls, and a tensor
may be processed in ranges of whole tiles.

A sign takes one random bit per element instead of a normal. A Philox call has 128 of them, 16 for each of
eight tiles in a row: for elements 8 l to 8 l + 7 of each half of the tile, l being the lane that calls. So a
sign costs a few instructions where a normal costs about 40.

A binomial draw is the number of bits that are set in a word, less 16, over sqrt(8): 32 tosses of a coin, of
mean 0 and variance 1. It is near a normal and takes half of one's instructions; words are those of normals,
in the same places. Its fourth moment is 2.9375 where a normal's is 3, P(|z| > 2) 0.050 (0.046), P(|z| > 4)
1.9e-5 (6.3e-5), and |z| is at most 5.66.

Rounding takes 16 random bits per element. With normals they are the halves of the words that give the *other*
pair's radius: they are uniform and independent of the element's own z, cost no further Philox call, and have
zero correlation with every other z, whose sign is in another word. With binomial draws, which take whole
words, they are the halves of the exclusive or of the other pair's two words, with the same properties. Words
whose bits are taken as finely as for signs leave none for rounding, which takes calls of its own, one for 8
neighbours.

Three implementations: torch operations for any device, NumPy's for small tensors on a CPU
(`engines.noise.philox_on_cpu`), where calls cost most, and Triton kernels for CUDA
(`engines.noise.weight_pass_kernels`). Beyond the integer stream, logarithm, sine, cosine and square root are
short polynomials and Newton steps in single precision, written here as separate multiplications and additions
in one fixed order. IEEE 754 leaves no freedom in those, so all give the same bits on every device, whatever
the vector width; library functions would differ in the last place, on the CPU even with the position of an
element in the vector register.

The uniforms have 24 bits, so |z| is at most 5.77; a normal exceeds that once in 1.2e8 draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.noise.philox_constants import (
    COINS,
    COINS_SCALE,
    COS_C,
    LOG_Q,
    MINUS_2_LN_2,
    MULTIPLIERS,
    ROOT_BITS,
    ROUNDS,
    SIN_S,
    SQRT_HALF_BITS,
    WEYL,
)
from engines.noise.philox_on_cpu import MOST_LANES, bits_set, philox_rounds, transform_to_normals
from engines.noise.tiles import CHUNK_LANES, LANES, TILE, TileRange, chunks, one, scatter

SIGN_LANES = 128
"""Lanes that call Philox for the signs of a tile, or of eight tiles in a row."""
SIGN_WIDTH = 8
"""Neighbours in a half of the tile that are one lane's."""
SIGN_TILES = 8
"""Tiles whose signs one Philox call has: 2 `SIGN_WIDTH` bits of it each."""
DITHER = 1 << 62
"""Added to a counter: a stream apart, for the rounding of updates whose noise are signs."""
_WORD = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseKey:
    """Names one tensor's noise at one step."""

    seed: int
    """Any 64-bit number; a negative one counts by its two's complement. Zero is as good as any."""
    step: int
    tensor: int

    def __post_init__(self) -> None:
        if not (0 <= self.step <= _WORD and 0 <= self.tensor <= _WORD):
            raise ValueError("step and tensor of a noise key are 32-bit numbers")


def normal(key: NoiseKey, count: int, device: torch.device | str = "cpu", start: int = 0) -> Tensor:
    """Elements `start` to `start + count` of the noise named by `key`: (count,) fp32, by torch operations."""
    out = torch.empty(count, dtype=torch.float32, device=device)
    segment = one(key.tensor, count)
    for ranges in chunks(segment, start, CHUNK_LANES[out.device.type]):
        scatter(draw_normals(key.seed, key.step, ranges, out.device, uniform=False)[0], out, ranges)
    return out


def signs(key: NoiseKey, count: int, device: torch.device | str = "cpu", start: int = 0) -> Tensor:
    """Elements `start` to `start + count` of `key`'s Rademacher noise: (count,) fp32, each 1 or -1."""
    out = torch.empty(count, dtype=torch.float32, device=device)
    for ranges in chunks(one(key.tensor, count), start, CHUNK_LANES[out.device.type]):
        scatter(draw_signs(key.seed, key.step, ranges, out.device, uniform=False)[0], out, ranges)
    return out


def binomials(key: NoiseKey, count: int, device: torch.device | str = "cpu", start: int = 0) -> Tensor:
    """Elements `start` to `start + count` of `key`'s binomial noise: (count,) fp32."""
    out = torch.empty(count, dtype=torch.float32, device=device)
    for ranges in chunks(one(key.tensor, count), start, CHUNK_LANES[out.device.type]):
        scatter(draw_binomials(key.seed, key.step, ranges, out.device, uniform=False)[0], out, ranges)
    return out


def dither_bits(key: NoiseKey, count: int, device: torch.device, start: int) -> Tensor:
    """Random bits for rounding, of a stream apart from `key`'s noise: (count,) int32 of 16 bits.

    `start`, a multiple of `TILE`, is the element that the first ones are for.
    """
    ranges = next(chunks(one(key.tensor, count), start, count + LANES))
    spans = [(tiles, start // TILE, start // TILE + -(-count // TILE)) for tiles in ranges]
    return _dither_bits(key.seed, key.step, spans, device)


def philox_words(key: NoiseKey, first_lane: int, num_lanes: int, device: torch.device) -> Tensor:
    """The integer stream: (4, num_lanes) int64 of 32-bit words, of the counters from `first_lane` on."""
    lanes = torch.arange(first_lane, first_lane + num_lanes, device=device)
    even, odd = _words([_Counted(key.tensor, lanes)], key.step, key.seed, device)
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def draw_normals(
    seed: int, step: int, ranges: Sequence[TileRange], device: torch.device, *, uniform: bool
) -> tuple[Tensor, Tensor | None]:
    """Normals of all ranges, (count,) fp32; 16 random bits for rounding each, (count,) int32, if wanted."""
    words = _words(ranges, step, seed, device)
    bits = _halves(words[0]) if uniform else None  # before the words are overwritten
    normals = _box_muller(words)
    return _by_element(normals, ranges), None if bits is None else _by_element(bits, ranges)


def draw_binomials(
    seed: int, step: int, ranges: Sequence[TileRange], device: torch.device, *, uniform: bool
) -> tuple[Tensor, Tensor | None]:
    """Binomial draws of all ranges, (count,) fp32; 16 random bits for rounding each, (count,) int32, if
    wanted."""
    even, odd = _words(ranges, step, seed, device)
    bits = _halves(even ^ odd) if uniform else None
    return _by_element(binomials_of(even, odd), ranges), None if bits is None else _by_element(bits, ranges)


def draw_signs(
    seed: int, step: int, ranges: Sequence[TileRange], device: torch.device, *, uniform: bool
) -> tuple[Tensor, Tensor | None]:
    """Signs of all ranges, (count,) fp32; 16 random bits for rounding each, (count,) int32, if wanted."""
    spans = []
    for tiles in ranges:
        tile = tiles.first_lane // LANES
        spans.append((tiles, tile, tile + -(-tiles.count // TILE)))
    calls = [
        _Counted(tiles.number, _counters(first // SIGN_TILES, -(-last // SIGN_TILES), device))
        for tiles, first, last in spans
    ]
    even, odd = _words(calls, step, seed, device)
    found, begin = [], 0
    shift = torch.arange(2 * SIGN_WIDTH, device=device).view(2, 1, SIGN_WIDTH)
    for (tiles, first, last), call in zip(spans, calls, strict=True):
        here = slice(begin, begin + call.num_lanes)
        begin += call.num_lanes
        words = torch.stack((even[0, here], odd[0, here], even[1, here], odd[1, here]))
        halves = torch.stack((words & 0xFFFF, words >> 16), 1).view(SIGN_TILES, -1, SIGN_LANES)
        skipped = first % SIGN_TILES
        of_tiles = halves.transpose(0, 1).reshape(-1, SIGN_LANES)[skipped : skipped + last - first]
        bits = (of_tiles.to(torch.int32).view(-1, 1, SIGN_LANES, 1) >> shift) & 1
        found.append(bits.view(-1)[: tiles.count])
    z = torch.cat(found).to(torch.float32).mul_(-2.0).add_(1.0)
    return z, _dither_bits(seed, step, spans, device) if uniform else None


def _dither_bits(
    seed: int, step: int, spans: Sequence[tuple[TileRange, int, int]], device: torch.device
) -> Tensor:
    calls = [
        _Counted(tiles.number, _counters(2 * first, 2 * last, device) + DITHER)
        for tiles, first, last in spans
    ]
    even, odd = _words(calls, step, seed, device)
    words = torch.stack((even[0], odd[0], even[1], odd[1]), 1).unsqueeze(2)
    bits = torch.cat((words & 0xFFFF, words >> 16), 2).to(torch.int32).view(-1, SIGN_WIDTH)
    found, begin = [], 0
    for (tiles, _, _), call in zip(spans, calls, strict=True):
        found.append(bits[begin : begin + call.num_lanes].view(-1)[: tiles.count])
        begin += call.num_lanes
    return torch.cat(found)


def normals_at(element: Tensor, number: int, step: int, seed: int) -> Tensor:
    """Normals of any elements of tensor `number`, (n,) int64: (n,) fp32."""
    tile, place = element // TILE, element % TILE
    words = _words([_Counted(number, tile * LANES + place % LANES)], step, seed, element.device)
    return _box_muller(words).gather(0, (place // LANES).view(1, -1)).view(-1)


def binomials_at(element: Tensor, number: int, step: int, seed: int) -> Tensor:
    """Binomial draws of any elements of tensor `number`, (n,) int64: (n,) fp32."""
    tile, place = element // TILE, element % TILE
    words = _words([_Counted(number, tile * LANES + place % LANES)], step, seed, element.device)
    return binomials_of(*words).gather(0, (place // LANES).view(1, -1)).view(-1)


def signs_at(element: Tensor, number: int, step: int, seed: int) -> Tensor:
    """Signs, 1 or -1, of any elements of tensor `number`, (n,) int64: (n,) fp32."""
    tile, place = element // TILE, element % TILE
    lane = place % (SIGN_LANES * SIGN_WIDTH) // SIGN_WIDTH
    counter = tile // SIGN_TILES * SIGN_LANES + lane
    even, odd = _words([_Counted(number, counter)], step, seed, element.device)
    words = torch.stack((even[0], odd[0], even[1], odd[1]))
    word = words.gather(0, (tile % SIGN_TILES // 2).view(1, -1)).view(-1)
    half = place // (SIGN_LANES * SIGN_WIDTH)
    shift = 2 * SIGN_WIDTH * (tile % 2) + SIGN_WIDTH * half + place % SIGN_WIDTH
    return ((word >> shift) & 1).to(torch.float32).mul_(-2.0).add_(1.0)


@dataclass(frozen=True, slots=True)
class _Counted:
    """Philox calls of any counters, (n,) int64, of one tensor."""

    number: int
    counters: Tensor

    @property
    def num_lanes(self) -> int:
        return self.counters.numel()


def _counters(first: int, last: int, device: torch.device) -> Tensor:
    """Of all lanes of groups `first` to `last` - 1."""
    return torch.arange(first * SIGN_LANES, last * SIGN_LANES, device=device)


def _by_element(values: Tensor, ranges: Sequence[TileRange]) -> Tensor:
    first, parts = 0, []
    for tiles in ranges:
        parts.append(tiles.elements(values[:, first : first + tiles.num_lanes]))
        first += tiles.num_lanes
    return torch.cat(parts)


def _halves(words: Tensor) -> Tensor:
    """Halves of the second word and of the first, (2, n), for the elements of words 0 to 3 of their calls:
    (4, n) int32 of 16 bits."""
    low, high = words & 0xFFFF, words >> 16
    return torch.stack((high[1], low[1], high[0], low[0])).to(torch.int32)


def _words(
    ranges: Sequence[TileRange | _Counted], step: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Words 0 and 2, and words 1 and 3, of the Philox calls of all ranges."""
    total = sum(tiles.num_lanes for tiles in ranges)
    even = torch.empty((2, total), dtype=torch.int64, device=device)
    odd = torch.empty_like(even)
    first = 0
    for tiles in ranges:
        here = slice(first, first + tiles.num_lanes)
        if isinstance(tiles, _Counted):
            even[0, here] = tiles.counters
        else:
            torch.arange(tiles.first_lane, tiles.first_lane + tiles.num_lanes, out=even[0, here])
        odd[0, here].fill_(tiles.number)
        first += tiles.num_lanes
    torch.bitwise_right_shift(even[0], 32, out=odd[1])
    even[0].bitwise_and_(_WORD)
    even[1].fill_(step)
    return philox(even, odd, (seed & _WORD, (seed >> 32) & _WORD))


def philox(even: Tensor, odd: Tensor, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Philox 4x32 on counters (even[0], odd[0], even[1], odd[1]); the words in the same order.

    (2, n) int64 tensors of 32-bit words, overwritten. A 64-bit product may wrap to a negative number; its
    upper and lower words are right all the same. A product is kept whole as the words that a round only
    passes on, until the mask of the next round takes its upper half off.
    """
    of_rounds = [[(k + i * w) & _WORD for k, w in zip(key, WEYL, strict=True)] for i in range(ROUNDS)]
    if _is_small(even):
        return philox_rounds(even, odd, of_rounds)
    keys = torch.tensor(of_rounds, device=even.device)
    product = torch.empty_like(even)
    for each in keys.unsqueeze(2).unbind():
        torch.mul(even[1], MULTIPLIERS[1], out=product[0])
        torch.mul(even[0], MULTIPLIERS[0], out=product[1])
        torch.bitwise_right_shift(product, 32, out=even)
        even.bitwise_xor_(odd).bitwise_xor_(each).bitwise_and_(_WORD)
        odd, product = product, odd
    return even, odd.bitwise_and_(_WORD)


def _box_muller(words: tuple[Tensor, Tensor]) -> Tensor:
    """Normals of (2, n) words each, which are overwritten: (4, n) fp32, by word.

    Of a pair of words the first gives the radius sqrt(-2 ln u), u = (upper 24 bits + 1) / 2^24; the
    second gives the angle pi w, w in [-1/2, 1/2) from its bits 7 to 30, and a sign from bit 31.
    """
    even, odd = words
    if _is_small(even):
        return transform_to_normals(even, odd)
    # u = 2^exponent (1 + f) by the bits of the float that holds u 2^24, which is exact.
    bits = even.bitwise_right_shift_(8).add_(1).to(torch.float32).view(torch.int32).sub_(SQRT_HALF_BITS)
    exponent = (bits >> 23).sub_(24).to(torch.float32)
    f = bits.bitwise_and_(0x7FFFFF).add_(SQRT_HALF_BITS).view(torch.float32).sub_(1.0)
    square = _horner(LOG_Q, f).mul_(f).add_(-2.0).mul_(f).add_(exponent.mul_(MINUS_2_LN_2))
    half = square * 0.5
    root = (ROOT_BITS - (square.view(torch.int32) >> 1)).view(torch.float32)
    for _ in range(2):
        root = (half * root).mul_(root).mul_(-1.0).add_(1.5).mul_(root)
    radius = square.mul_(root)

    angle = odd.to(torch.int32)
    radius.view(torch.int32).bitwise_xor_(angle & -0x80000000)
    w = angle.bitwise_left_shift_(1).bitwise_right_shift_(8).to(torch.float32).mul_(2.0**-24)
    square = w * w
    sine = _horner(SIN_S, square).mul_(w)
    cosine = _horner(COS_C, square)
    z = torch.empty((2, 2, even.shape[1]), dtype=torch.float32, device=even.device)
    torch.mul(radius, cosine, out=z[:, 0])
    torch.mul(radius, sine, out=z[:, 1])
    return z.view(4, -1)


def binomials_of(even: Tensor, odd: Tensor) -> Tensor:
    """Binomial draws of (2, n) words each: (4, n) fp32, by word."""
    words = torch.stack((even, odd), 1)
    if words.device.type == "cpu":
        count = bits_set(words)
    else:  # of pairs of bits, then of fours, then of eights, which a multiplication adds up
        count = words - ((words >> 1) & 0x55555555)
        count = (count & 0x33333333) + ((count >> 2) & 0x33333333)
        count = ((((count + (count >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24) & 0xFF
    return (count - COINS // 2).to(torch.float32).mul_(COINS_SCALE).view(4, -1)


def _is_small(words: Tensor) -> bool:
    return words.device.type == "cpu" and words.shape[1] <= MOST_LANES


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        value.add_(coefficient).mul_(x)
    return value.add_(coefficients[0])
