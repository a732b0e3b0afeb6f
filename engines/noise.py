"""Noise by counter, and what is done with it: z[e] is a function of (seed, step, tensor, element e).

Elements are taken in tiles of 2048, four rows of 512 lanes. Philox 4x32-7 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011) turns the counter (c low, tensor, step, c high), c = 512 tile + lane,
under the key (seed low, seed high) into four 32-bit words, and Box-Muller turns those into the normals of
the elements of that lane in the tile's four rows. Therefore noise is never stored, does not depend on the
order of calls, and a tensor may be processed in pieces of whole tiles.

`visit` is all that a zeroth-order step does to a weight, in one pass over it:

    w <- round(w - lr (g z_s + wd w))      for each pending update, z_s being the noise of its step s
    theta = w,   plus = w + eps z,   minus = w - eps z

`round` is to the weights' dtype, by default stochastic: up with the probability that is the distance to the
neighbour below, in units of the distance of the neighbours. The expectation of a rounded weight is then the
weight, so that updates far below half a unit in the last place arrive (nearest rounding loses them whole).
Its 16 random bits per element are the halves of the words that give the *other* pair's radius: they are
uniform and independent of the element's own z, cost no further Philox call, and have zero correlation with
every other z, whose sign is in another word. fp32 is rounded to nearest; its unit is small enough.

With `noise="rademacher"` z is a sign, the perturbation of SPSA (Spall, IEEE Trans. Automatic Control 37(3),
1992): one random bit per element instead of a normal, and E z z^T = I as well. A Philox call has 128 of
them, 16 for each of eight tiles in a row: for elements 8 l to 8 l + 7 of each half of the tile, l being the
lane that calls. Words whose bits are taken so finely leave none for rounding, which takes calls of its own,
one for 8 neighbours. So a sign costs a few instructions where a normal costs about 50.

Two implementations: torch operations for any device, and Triton kernels (`engines.noise_kernels`) for CUDA.
Beyond the integer stream, logarithm, sine, cosine and square root are short polynomials and Newton steps in
single precision, written here as separate multiplications and additions in one fixed order. IEEE 754 leaves
no freedom in those, so both give the same bits on every device, whatever the vector width; library functions
would differ in the last place, on the CPU even with the position of an element in the vector register.

The uniforms have 24 bits, so |z| is at most 5.77; a normal exceeds that once in 1.2e8 draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import c_float
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import gcd
from typing import Any, Literal

import torch
from torch import Tensor

from engines.base import Update
from engines.settings import MOST_PENDING

LANES = 512
TILE = 4 * LANES
"""Elements that share 512 Philox calls."""

SIGN_LANES = 128
"""Lanes that call Philox for the signs of a tile, or of eight tiles in a row."""
SIGN_WIDTH = 8
"""Neighbours in a half of the tile that are one lane's."""
SIGN_TILES = 8
"""Tiles whose signs one Philox call has: 2 `SIGN_WIDTH` bits of it each."""
DITHER = 1 << 62
"""Added to a counter: a stream apart, for the rounding of updates whose noise are signs."""

Rounding = Literal["stochastic", "nearest"]
Noise = Literal["gaussian", "rademacher"]

ROUNDS = 7
"""The fewest that pass all of BigCrush (Salmon et al., table 2)."""
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF

# Least-squares fits on Chebyshev nodes, rounded to single precision, from the lowest power up. They are as
# short as the noise allows, since arithmetic is what limits its rate on a GPU: a perturbation of 1e-5
# relative error is far below what rounding the perturbed weight to 16 bits does.
# -2 ln(1 + f) = f (-2 + f Q(f)) for f in [sqrt(1/2) - 1, sqrt(2) - 1], relative error 1e-5;
LOG_Q = (0.999794602394104, -0.6655375361442566, 0.508656919002533, -0.4378918409347534, 0.2794889211654663)
# sin(pi w) = w S(w^2) for |w| <= 1/2, error 1.1e-6;
SIN_S = (3.1415903568267822, -5.1674065589904785, 2.5440104007720947, -0.5594624280929565)
# cos(pi w) = C(w^2) for |w| <= 1/2, error 6.8e-6.
COS_C = (0.9999932646751404, -4.933934688568115, 4.041248321533203, -1.2220317125320435)
MINUS_2_LN_2 = -1.3862943649291992
ROOT_BITS = 0x5F3759DF
"""1 / sqrt(x) is about the float of bits `ROOT_BITS` - bits(x) / 2; two Newton steps make its error 5e-6."""
SQRT_HALF_BITS = 0x3F3504F3
"""sqrt(1/2) as a float's bits: mantissas are taken from [sqrt(1/2), sqrt(2)), where ln is smallest."""

_CHUNK_LANES = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Lanes at a time: on a CPU few enough that the temporaries stay in cache, many enough to hide what some
hundred torch calls cost. Small tensors share a chunk."""

LARGE = 1 << 24
"""Elements above which a tensor has a kernel launch of its own, and no table of its tiles."""

MOST_IN_TABLE = 1 << 31
"""Elements that the 32-bit offsets of that table reach."""

MOST_ALIGNED = 8
"""Elements of 16 bits in the widest load of a GPU thread."""

LOG_CAPACITY = MOST_PENDING
"""Updates that can be pending at once."""


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

    @property
    def seed_words(self) -> tuple[int, int]:
        """(low, high)."""
        return self.seed & _WORD, (self.seed >> 32) & _WORD


class UpdateLog:
    """The latest updates, by position from 0, where the kernels can read them: on the device.

    Rates are kept in fp32, in which the arithmetic is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.length = 0
        self._updates: list[Update | None] = [None] * LOG_CAPACITY
        self.table = torch.zeros((LOG_CAPACITY, 4), dtype=torch.int32, device=device)
        """Row: number of the noise, then the bits of learning rate, coefficient and weight decay."""
        self._staging = torch.zeros((LOG_CAPACITY, 4), dtype=torch.int32)
        self._copied: list[Any] = []
        """When the latest rows of either half have been copied."""
        if device.type == "cuda":
            self._staging = self._staging.pin_memory()
            self._copied = [torch.cuda.Event(blocking=True) for _ in range(2)]  # type: ignore[no-untyped-call]

    def append(self, update: Update) -> None:
        row = self.length % LOG_CAPACITY
        half, place = divmod(row, LOG_CAPACITY // 2)
        if self._copied and place == 0:
            # HAZARD: rows are copied behind the host's back, and a replay waits for nothing in between.
            self._copied[half].synchronize()
        rates = (update.learning_rate, update.coefficient, update.weight_decay)
        self._updates[row] = update
        self._staging[row, 0] = update.draw - (1 << 32 if update.draw >> 31 else 0)
        for column, rate in enumerate(rates, 1):
            # c_float takes what is beyond fp32 to infinity, which then shows as a loss that is not finite.
            self._staging[row, column] = int.from_bytes(bytes(c_float(rate)), "little", signed=True)
        self.table[row].copy_(self._staging[row], non_blocking=True)
        if self._copied and place == LOG_CAPACITY // 2 - 1:
            self._copied[half].record()
        self.length += 1

    def between(self, first: int, last: int) -> list[Update]:
        """Updates at positions `first` to `last` - 1. Raises `ValueError` for one that is gone."""
        if not max(0, self.length - LOG_CAPACITY) <= first <= last <= self.length:
            raise ValueError(f"updates {first} to {last} are not in the log")
        return [found for i in range(first, last) if (found := self._updates[i % LOG_CAPACITY]) is not None]

    def in_fp32(self, first: int, last: int) -> list[Entry]:
        """As `between`, with rates as the table has them."""
        return [_in_fp32(update) for update in self.between(first, last)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """What is to be done to weights, for `visit`."""

    seed: int
    log: UpdateLog
    first: int
    last: int
    """Positions of the pending updates in the log, the last one excluded."""
    rounding: Rounding = "stochastic"
    step: int = 0
    eps: float = 0.0
    """Of the perturbation."""
    noise: Noise = "gaussian"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """Where a visit's results go; `None`: they are not wanted. `theta` may be the weight itself."""

    theta: Tensor | None = None
    plus: Tensor | None = None
    minus: Tensor | None = None


class Segment:
    """Tensors one after the other in flat memory.

    `numbers` are the tensors' parts of their noise keys, `offsets` and `counts` their places, in elements,
    and `decays` says on which of them weight decay acts.
    """

    __slots__ = ("_places", "_tiles", "counts", "decays", "grid", "numbers", "offsets")

    def __init__(
        self, numbers: Sequence[int], offsets: Sequence[int], counts: Sequence[int], decays: Sequence[bool]
    ) -> None:
        self.numbers = tuple(numbers)
        self.offsets = tuple(offsets)
        self.counts = tuple(counts)
        self.decays = tuple(decays)
        self.grid = gcd(MOST_ALIGNED, *offsets)
        """Elements that every tensor begins at a multiple of, up to `MOST_ALIGNED`."""
        self._tiles: Tensor | None = None
        self._places: Tensor | None = None

    def is_large(self, index: int) -> bool:
        """Whether a tensor is too long, or lies too far, for the table of tiles."""
        count = self.counts[index]
        return count > LARGE or self.offsets[index] + count > MOST_IN_TABLE

    def tiles(self, device: torch.device) -> Tensor:
        """(n, 4) int32: offset, tensor, tile of the tensor, and elements in it (with bit 16 set where weight
        decay acts), of every tile of the tensors that are not large."""
        if self._tiles is None:
            tables = [torch.empty((0, 4), dtype=torch.int32)]
            for index, (number, offset, count, decays) in enumerate(
                zip(self.numbers, self.offsets, self.counts, self.decays, strict=True)
            ):
                if self.is_large(index):
                    continue
                tile = torch.arange(-(-count // TILE))
                inside = (count - tile * TILE).clamp(max=TILE) | (int(decays) << 16)
                columns = (offset + tile * TILE, torch.full_like(tile, number), tile, inside)
                tables.append(torch.stack(columns, 1).to(torch.int32))
            self._tiles = torch.cat(tables).to(device)
        return self._tiles

    def places(self, device: torch.device) -> Tensor:
        """(tensors, 4) int64: the number of tiles of those before, and the tensor's offset, number and
        count."""
        if self._places is None:
            tiles = [-(-count // TILE) for count in self.counts]
            before = [sum(tiles[:index]) for index in range(len(tiles))]
            rows = list(zip(before, self.offsets, self.numbers, self.counts, strict=True))
            self._places = torch.tensor(rows, dtype=torch.int64).to(device)
        return self._places


def one(number: int, count: int, *, decays: bool = False) -> Segment:
    """A segment of one tensor that begins where its memory begins."""
    return Segment((number,), (0,), (count,), (decays,))


def visit(weight: Tensor, segment: Segment, how: Visit, out: Outputs, start: int = 0) -> None:
    """One pass over `weight`, flat memory laid out as `segment` says: see the module's docstring.

    Outputs have the weight's dtype and layout, and are rounded once (the perturbed ones to nearest).
    `start`, a multiple of `TILE`, is where the memory begins within the one tensor of the segment.
    """
    if start % TILE:
        raise ValueError(f"a piece of a tensor begins at a multiple of {TILE}")
    if weight.is_cuda and has_triton():
        from engines import noise_kernels

        noise_kernels.visit(weight, segment, how, out, start)
        return
    stochastic = how.rounding == "stochastic" and weight.dtype in (torch.bfloat16, torch.float16)
    updates = how.log.in_fp32(how.first, how.last)
    perturbed = out.plus is not None or out.minus is not None
    for pieces in _chunks(segment, start, _CHUNK_LANES[weight.device.type]):
        current = torch.cat([piece.of(weight) for piece in pieces]).float()
        for update in updates:
            z, uniform = _draw(how, update.draw, pieces, weight.device, uniform=stochastic)
            z.mul_(update.coefficient)
            if update.weight_decay != 0.0:
                _decay(z, current, update.weight_decay, pieces)
            moved = current - z.mul_(update.learning_rate)
            current = (
                moved.to(weight.dtype).float() if uniform is None else dither(moved, uniform, weight.dtype)
            )
        if out.theta is not None:
            _scatter(current, out.theta, pieces)
        if perturbed:
            z, _ = _draw(how, how.step, pieces, weight.device, uniform=False)
            z.mul_(how.eps)  # not torch.add(..., alpha=eps): it may fuse the two roundings into one, or not
            if out.plus is not None:
                _scatter(current + z, out.plus, pieces)
            if out.minus is not None:
                _scatter(current - z, out.minus, pieces)


def rows(weight: Tensor, number: int, indices: Tensor, how: Visit) -> Tensor:
    """weight[indices] + eps z, of the dtype of `weight` (n, width): (*indices.shape, width).

    For embeddings: noise is drawn for the rows that are looked up only. `how.eps` may be negative.
    """
    if weight.is_cuda and has_triton():
        from engines import noise_kernels

        return noise_kernels.rows(weight, number, indices, how)
    width = weight.shape[1]
    flat = indices.reshape(-1)
    used, places = torch.unique(flat, return_inverse=True)
    element = used.unsqueeze(1) * width + torch.arange(width, device=weight.device)
    tile, place = element // TILE, element % TILE
    counter = (tile * LANES + place % LANES).view(-1)
    if how.noise == "rademacher":
        z = _signs_at(element.view(-1), number, how, weight.device).view(-1, width)
    else:
        words = _words([_Counted(number, counter)], how.step, how.seed, weight.device)
        z = _box_muller(words).gather(0, (place // LANES).view(1, -1)).view(-1, width)
    moved = (z.mul_(how.eps) + weight[used].float()).to(weight.dtype)
    return moved[places].view(*indices.shape, width)


def normal(key: NoiseKey, count: int, device: torch.device | str = "cpu", start: int = 0) -> Tensor:
    """Elements `start` to `start + count` of the noise named by `key`: (count,) fp32, by torch operations."""
    out = torch.empty(count, dtype=torch.float32, device=device)
    segment = one(key.tensor, count)
    for pieces in _chunks(segment, start, _CHUNK_LANES[out.device.type]):
        _scatter(_normals(key.seed, key.step, pieces, out.device, uniform=False)[0], out, pieces)
    return out


def signs(key: NoiseKey, count: int, device: torch.device | str = "cpu", start: int = 0) -> Tensor:
    """As `normal`, of Rademacher noise: (count,) fp32, each 1 or -1."""
    out = torch.empty(count, dtype=torch.float32, device=device)
    for pieces in _chunks(one(key.tensor, count), start, _CHUNK_LANES[out.device.type]):
        _scatter(_signs(key.seed, key.step, pieces, out.device, uniform=False)[0], out, pieces)
    return out


def tiles(
    number: int, step: int, seed: int, first: int, last: int, device: torch.device, *, uniform: bool
) -> tuple[Tensor, Tensor | None]:
    """Normals of tiles `first` to `last` - 1 of a tensor, (2048 each,) fp32; and 16 random bits, (2048 each,)
    int32, of each element if wanted."""
    piece = _Piece(number, 0, (last - first) * TILE, first * LANES, decays=False)
    return _normals(seed, step, [piece], device, uniform=uniform)


@dataclass(frozen=True, slots=True)
class Entry:
    """An update as the arithmetic takes it."""

    draw: int
    learning_rate: float
    coefficient: float
    weight_decay: float


def dither_bits(key: NoiseKey, count: int, device: torch.device, start: int) -> Tensor:
    """Random bits for rounding, of a stream apart from `key`'s noise: (count,) int32 of 16 bits.

    `start`, a multiple of `TILE`, is the element that the first ones are for.
    """
    pieces = next(_chunks(one(key.tensor, count), start, count + LANES))
    spans = [(piece, start // TILE, start // TILE + -(-count // TILE)) for piece in pieces]
    return _dither_bits(key.seed, key.step, spans, device)


def _in_fp32(update: Update) -> Entry:
    rates = (update.learning_rate, update.coefficient, update.weight_decay)
    return Entry(update.draw, *(c_float(rate).value for rate in rates))


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Whole tiles of one tensor, or its last, shorter one."""

    number: int
    place: int
    """Of its first element in the flat memory."""
    count: int
    first_lane: int
    """Counter of its first Philox call."""
    decays: bool

    @property
    def num_lanes(self) -> int:
        if self.count >= LANES:
            return -(-self.count // TILE) * LANES
        return self.count  # one row of a short tile

    def of(self, flat: Tensor) -> Tensor:
        return flat.view(-1)[self.place : self.place + self.count]

    def elements(self, values: Tensor) -> Tensor:
        """(4, num_lanes) by word to (count,) by element."""
        if self.count < LANES:
            return values[0]
        return values.view(4, -1, LANES).transpose(0, 1).reshape(-1)[: self.count]


@dataclass(frozen=True, slots=True)
class _Counted:
    """Philox calls of any counters, (n,) int64, of one tensor."""

    number: int
    counters: Tensor

    @property
    def num_lanes(self) -> int:
        return self.counters.numel()


def _chunks(segment: Segment, start: int, most_lanes: int) -> Iterator[list[_Piece]]:
    """Pieces of the tensors in order, as many at a time as make up about `most_lanes`."""
    pieces: list[_Piece] = []
    room = most_lanes
    tensors = zip(segment.numbers, segment.offsets, segment.counts, segment.decays, strict=True)
    for number, offset, count, decays in tensors:
        done = 0
        while done < count:
            take = min(count - done, max(1, room // LANES) * TILE)
            pieces.append(_Piece(number, offset + done, take, (start + done) // TILE * LANES, decays))
            done += take
            room -= pieces[-1].num_lanes
            if room <= 0:
                yield pieces
                pieces, room = [], most_lanes
    if pieces:
        yield pieces


def _decay(z: Tensor, current: Tensor, weight_decay: float, pieces: Sequence[_Piece]) -> None:
    first = 0
    for piece in pieces:
        here = slice(first, first + piece.count)
        if piece.decays:
            z[here].add_(current[here] * weight_decay)
        first += piece.count


def _scatter(values: Tensor, out: Tensor, pieces: Sequence[_Piece]) -> None:
    first = 0
    for piece in pieces:
        piece.of(out).copy_(values[first : first + piece.count])
        first += piece.count


def _draw(
    how: Visit, step: int, pieces: Sequence[_Piece], device: torch.device, *, uniform: bool
) -> tuple[Tensor, Tensor | None]:
    """Noise of all pieces, (count,) fp32, and if wanted their 16 random bits for rounding, (count,) int32."""
    draw = _signs if how.noise == "rademacher" else _normals
    return draw(how.seed, step, pieces, device, uniform=uniform)


def _signs(
    seed: int, step: int, pieces: Sequence[_Piece], device: torch.device, *, uniform: bool
) -> tuple[Tensor, Tensor | None]:
    """As `_draw`."""
    spans = []
    for piece in pieces:
        tile = piece.first_lane // LANES
        spans.append((piece, tile, tile + -(-piece.count // TILE)))
    calls = [
        _Counted(piece.number, _counters(first // SIGN_TILES, -(-last // SIGN_TILES), device))
        for piece, first, last in spans
    ]
    even, odd = _words(calls, step, seed, device)
    found, begin = [], 0
    shift = torch.arange(2 * SIGN_WIDTH, device=device).view(2, 1, SIGN_WIDTH)
    for (piece, first, last), call in zip(spans, calls, strict=True):
        here = slice(begin, begin + call.num_lanes)
        begin += call.num_lanes
        words = torch.stack((even[0, here], odd[0, here], even[1, here], odd[1, here]))
        halves = torch.stack((words & 0xFFFF, words >> 16), 1).view(SIGN_TILES, -1, SIGN_LANES)
        skipped = first % SIGN_TILES
        of_tiles = halves.transpose(0, 1).reshape(-1, SIGN_LANES)[skipped : skipped + last - first]
        bits = (of_tiles.to(torch.int32).view(-1, 1, SIGN_LANES, 1) >> shift) & 1
        found.append(bits.view(-1)[: piece.count])
    z = torch.cat(found).to(torch.float32).mul_(-2.0).add_(1.0)
    return z, _dither_bits(seed, step, spans, device) if uniform else None


def _dither_bits(
    seed: int, step: int, spans: Sequence[tuple[_Piece, int, int]], device: torch.device
) -> Tensor:
    calls = [
        _Counted(piece.number, _counters(2 * first, 2 * last, device) + DITHER)
        for piece, first, last in spans
    ]
    even, odd = _words(calls, step, seed, device)
    words = torch.stack((even[0], odd[0], even[1], odd[1]), 1).unsqueeze(2)
    bits = torch.cat((words & 0xFFFF, words >> 16), 2).to(torch.int32).view(-1, SIGN_WIDTH)
    found, begin = [], 0
    for (piece, _, _), call in zip(spans, calls, strict=True):
        found.append(bits[begin : begin + call.num_lanes].view(-1)[: piece.count])
        begin += call.num_lanes
    return torch.cat(found)


def _counters(first: int, last: int, device: torch.device) -> Tensor:
    """Of all lanes of groups `first` to `last` - 1."""
    return torch.arange(first * SIGN_LANES, last * SIGN_LANES, device=device)


def _signs_at(element: Tensor, number: int, how: Visit, device: torch.device) -> Tensor:
    """Signs of any elements, (n,) int64: (n,) fp32."""
    tile, place = element // TILE, element % TILE
    lane = place % (SIGN_LANES * SIGN_WIDTH) // SIGN_WIDTH
    counter = tile // SIGN_TILES * SIGN_LANES + lane
    even, odd = _words([_Counted(number, counter)], how.step, how.seed, device)
    words = torch.stack((even[0], odd[0], even[1], odd[1]))
    word = words.gather(0, (tile % SIGN_TILES // 2).view(1, -1)).view(-1)
    half = place // (SIGN_LANES * SIGN_WIDTH)
    shift = 2 * SIGN_WIDTH * (tile % 2) + SIGN_WIDTH * half + place % SIGN_WIDTH
    return ((word >> shift) & 1).to(torch.float32).mul_(-2.0).add_(1.0)


def _normals(
    seed: int, step: int, pieces: Sequence[_Piece], device: torch.device, *, uniform: bool
) -> tuple[Tensor, Tensor | None]:
    """As `_draw`."""
    words = _words(pieces, step, seed, device)
    bits = _other_radius(words[0]) if uniform else None  # before the words are overwritten
    normals = _box_muller(words)
    return _by_element(normals, pieces), None if bits is None else _by_element(bits, pieces)


def _by_element(values: Tensor, pieces: Sequence[_Piece]) -> Tensor:
    first, parts = 0, []
    for piece in pieces:
        parts.append(piece.elements(values[:, first : first + piece.num_lanes]))
        first += piece.num_lanes
    return torch.cat(parts)


def _other_radius(even: Tensor) -> Tensor:
    """Halves of words 2 and 0, for the elements of words 0 to 3: (4, n) int32 of 16 bits."""
    low, high = even & 0xFFFF, even >> 16
    return torch.stack((high[1], low[1], high[0], low[0])).to(torch.int32)


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


FP16_NORMAL = 2.0**-14
"""Smallest normal number of fp16."""


def philox_words(key: NoiseKey, first_lane: int, num_lanes: int, device: torch.device) -> Tensor:
    """The integer stream: (4, num_lanes) int64 of 32-bit words, of the counters from `first_lane` on."""
    lanes = torch.arange(first_lane, first_lane + num_lanes, device=device)
    even, odd = _words([_Counted(key.tensor, lanes)], key.step, key.seed, device)
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def _words(
    pieces: Sequence[_Piece | _Counted], step: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Words 0 and 2, and words 1 and 3, of the Philox calls of all pieces."""
    total = sum(piece.num_lanes for piece in pieces)
    even = torch.empty((2, total), dtype=torch.int64, device=device)
    odd = torch.empty_like(even)
    first = 0
    for piece in pieces:
        here = slice(first, first + piece.num_lanes)
        if isinstance(piece, _Counted):
            even[0, here] = piece.counters
        else:
            torch.arange(piece.first_lane, piece.first_lane + piece.num_lanes, out=even[0, here])
        odd[0, here].fill_(piece.number)
        first += piece.num_lanes
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
    k0, k1 = key
    keys = torch.tensor(
        [[(k + i * w) & _WORD for k, w in zip((k0, k1), WEYL, strict=True)] for i in range(ROUNDS)],
        device=even.device,
    )
    product = torch.empty_like(even)
    for i in range(ROUNDS):
        torch.mul(even[1], MULTIPLIERS[1], out=product[0])
        torch.mul(even[0], MULTIPLIERS[0], out=product[1])
        torch.bitwise_right_shift(product, 32, out=even)
        even.bitwise_xor_(odd).bitwise_xor_(keys[i].unsqueeze(1)).bitwise_and_(_WORD)
        odd, product = product, odd
    return even, odd.bitwise_and_(_WORD)


def _box_muller(words: tuple[Tensor, Tensor]) -> Tensor:
    """Normals of (2, n) words each, which are overwritten: (4, n) fp32, by word.

    Of a pair of words the first gives the radius sqrt(-2 ln u), u = (upper 24 bits + 1) / 2^24; the
    second gives the angle pi w, w in [-1/2, 1/2) from its bits 7 to 30, and a sign from bit 31.
    """
    even, odd = words
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


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        value.add_(coefficient).mul_(x)
    return value.add_(coefficients[0])
