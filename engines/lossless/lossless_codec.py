"""bf16 matrices in three quarters of their bytes, without losing a bit.

The exponents of trained weights are much alike: of 2048 neighbours nearly all lie in a window of 15, so four
bits say which. Sign and mantissa, which look like noise, stay as they are. (Fixed lengths, as ZipServ,
2603.17435, has them for inference; Huffman codes, as in DFloat11, 2504.11651, would save another tenth, but
cannot be decoded in a few instructions.) A matrix is a row of tiles of 2048 elements (`engines.noise.tiles`),
stored in 3104 bytes each, 12.1 bits a weight:

    1024 bytes   codes: a 16-bit word for each lane, four bits for each row of the tile, the first row lowest
    2048 bytes   rests: a 32-bit word for each lane, sign and mantissa of each row
      32 bytes   eight 32-bit words: a header; the first 5 escapes; where the others are; room

Code 0 is zero, so that pruned weights cost nothing, code c > 0 is exponent base + c, with a base from 0 to
127 for each tile. The header is the base in 8 bits, the number of escapes in 12 and 12 of check, so that what
memory, disk or link have damaged is not trained on: the sum of rests, codes x 2^13 and the header's lower
bits, mod 2^32, with its three parts of 12 bits put together by exclusive or.

Signs and mantissas lie so that a mask leaves those of rows 0 and 1 where two neighbours in
bf16 have them, and a rotation by 8 and the mask those of rows 2 and 3: bytes m0 s3, m2 s0, m1 s2, m3 s1, the
lowest first, signs on top. A kernel puts the codes into such a pair's exponents and multiplies by 2^base.

An *escape* is a weight whose exponent is no code's: its place, 4 x lane + row, above its 16 bits. They are in
order. Escapes of a tile beyond 5 lie in the last words of the matrix's tiles, from the
one on that the tile names: each has room for one.
Weights of a normal distribution have 0.2 to 0.3 escapes a tile, those of trained models about 1. A matrix
with more than there is room for, 5 a tile and then 1 more a tile in all, cannot be kept so: it stays whole,
from the start or from the update on that made it so (`engines.lossless.whole_matrices`).

Bits depend on the weights alone: the base is the one with the fewest escapes, or the one below the largest
exponent where that has 5 or fewer.

Torch operations and the Triton kernels (`engines.lossless.lossless_pass_kernels`) give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from engines.costs.quantized import LOSSLESS_TILE_BYTES, TILE_ELEMENTS, lossless_bytes
from engines.noise.tiles import LANES, Segment

TILE_BYTES = LOSSLESS_TILE_BYTES
CODES_BYTES = LANES * 2
RESTS_BYTES = LANES * 4
WINDOW = 15
"""Exponents that have a code of their own."""
LARGEST_BASE = 127
"""2^base is a number in fp32."""
OWN_ESCAPES = 5
"""Of a tile, in its own words; any more are elsewhere."""
MOST_TOPS = 32
"""Windows below so many of the largest exponents of a tile are tried."""

HEADER, ESCAPES, ELSEWHERE, ROOM = 0, 1, 1 + OWN_ESCAPES, 2 + OWN_ESCAPES
"""Places among the eight words at a stored tile's end."""

_CHUNK_TILES = 1 << 10
"""Tiles at a time, so that temporaries stay small."""


def _parts(tiles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of stored tiles, (tiles, bytes): codes (tiles, 512) int16, rests (tiles, 512) int32, words
    (tiles, 8) int32."""
    rests_end = CODES_BYTES + RESTS_BYTES
    return (
        tiles[:, :CODES_BYTES].view(torch.int16),
        tiles[:, CODES_BYTES:rests_end].view(torch.int32),
        tiles[:, rests_end:].view(torch.int32),
    )


def write_tiles(weights: Tensor, tiles: Tensor) -> Tensor:
    """Write the bits of bf16 `weights` (n,) to `tiles`, (bytes,) on the same device.

    Returns whether all of them found room, () bool on that device; if not, `tiles` are what they were.
    """
    made = torch.empty_like(tiles).view(-1, TILE_BYTES)
    _, _, words = _parts(made)
    late: list[Tensor] = []
    for first in range(0, len(made), _CHUNK_TILES):
        here = made[first : first + _CHUNK_TILES]
        start = first * TILE_ELEMENTS
        late.append(_encode_tiles(weights[start : start + len(here) * TILE_ELEMENTS], here))
    ends, has_room = find_places(words[:, HEADER])
    words[:, ELSEWHERE] = ends - _num_others(words[:, HEADER])
    others = torch.cat(late)[: len(words)]
    words[: len(others), ROOM] = others
    tiles.copy_(torch.where(has_room, made.view(-1), tiles))
    return has_room


def find_places(headers: Tensor) -> tuple[Tensor, Tensor]:
    """Where the escapes beyond the fifth of each tile end among those of all, (tiles,) int32, by the headers
    of a matrix; and whether there is room for so many, () bool."""
    ends = _num_others(headers).cumsum(0, dtype=torch.int32)
    return ends, ends[-1] <= len(headers)


def _num_others(headers: Tensor) -> Tensor:
    return (num_escapes(headers) - OWN_ESCAPES).clamp_(min=0)


def _encode_tiles(weights: Tensor, tables: Tensor) -> Tensor:
    """Write all of some tiles but where other escapes are; those, (n,) int32, in order."""
    bits = torch.zeros(len(tables) * TILE_ELEMENTS, dtype=torch.int32, device=weights.device)
    bits[: weights.numel()] = weights.view(torch.int16)
    rows = (bits & 0xFFFF).view(-1, 4, LANES)
    exponent, nonzero = (rows >> 7) & 0xFF, rows & 0x7FFF > 0
    base = _bases(torch.where(nonzero, exponent, 256).view(len(tables), -1)).view(-1, 1, 1)
    inside = (exponent > base) & (exponent <= base + WINDOW)
    code = torch.where(inside, exponent - base, 0)
    codes, rests, words = _parts(tables)
    codes.copy_(reduce(or_, (code[:, row] << (4 * row) for row in range(4))))
    rests.copy_(reduce(or_, (_rest(rows[:, row], row) for row in range(4))))
    by_lane = (nonzero & ~inside).transpose(1, 2).reshape(len(tables), -1)
    words.zero_()
    header = base.view(-1) | (by_lane.sum(1, dtype=torch.int32) << 8)
    words[:, HEADER] = header | (_check(codes, rests, header) << 20)
    tile, place = by_lane.nonzero(as_tuple=True)
    lane, row = place // 4, place % 4
    entry = (place << 16).to(torch.int32) | rows[tile, row, lane]
    rank = by_lane.cumsum(1)[tile, place] - 1
    own = rank < OWN_ESCAPES
    words[tile[own], ESCAPES + rank[own]] = entry[own]
    return entry[~own]


def num_escapes(header: Tensor) -> Tensor:
    return (header >> 8) & 0xFFF


def _check(codes: Tensor, rests: Tensor, header: Tensor) -> Tensor:
    """The check bits of tiles, (tiles,) int32, from (tiles, 512) of each and headers without them."""
    total = (rests.long() + ((codes.long() & 0xFFFF) << 13)).sum(1) + header
    return ((total ^ (total >> 12) ^ ((total >> 24) & 0xFF)) & 0xFFF).to(torch.int32)


def _rest(bits: Tensor, row: int) -> Tensor:
    """Sign and mantissa of a row's weights (16 bits in int32), where the word of their lanes has them."""
    rest = (bits & 0x807F) << (16 * (row % 2))
    return rest if row < 2 else (rest << 8) | ((rest >> 24) & 0xFF)


def _bases(exponent: Tensor) -> Tensor:
    """The base of each tile, (tiles,) int32, from exponents (tiles, 2048), which of zeros are 256."""
    counts = torch.zeros((len(exponent), 257), dtype=torch.int64, device=exponent.device)
    counts.scatter_add_(1, exponent.long(), torch.ones_like(exponent, dtype=torch.int64))
    upto = counts[:, :256].cumsum(1)
    bases = (torch.arange(256, device=exponent.device) - WINDOW).clamp(0, LARGEST_BASE)
    escapes = upto[:, -1:] - (upto[:, bases + WINDOW] - upto[:, bases])
    # By the exponent that ends the window, from the largest one down.
    there = counts[:, :256] > 0
    there[:, 0] = False
    rank = there.flip(1).cumsum(1).flip(1)
    escapes = torch.where(there & (rank <= MOST_TOPS), escapes, TILE_ELEMENTS + 1)
    top = (there.long() * torch.arange(256, device=exponent.device)).amax(1, keepdim=True)
    best = 255 - escapes.flip(1).argmin(1, keepdim=True)
    simple = (top == 0) | (escapes.gather(1, top) <= OWN_ESCAPES)
    return bases[torch.where(simple, top, best)].view(-1).to(torch.int32)


def read_tiles(tiles: Tensor, count: int, out: Tensor) -> Tensor:
    """The `count` weights that `tiles` (bytes) hold, bit for bit: to `out`, (count,) bf16. Returns whether
    they are what was written, () bool."""
    tables = tiles.view(-1, TILE_BYTES)
    codes, rests, words = _parts(tables)
    room, header = words[:, ROOM], words[:, HEADER]
    intact = (_check(codes, rests, header & 0xFFFFF) == (header >> 20) & 0xFFF).all()
    if not intact:
        return intact
    for first in range(0, len(tables), _CHUNK_TILES):
        start = first * TILE_ELEMENTS
        here = _decode_tiles(tables[first : first + _CHUNK_TILES], room)
        out[start : start + len(here)].view(torch.int16).copy_(here[: count - start])
    return intact


def _decode_tiles(tables: Tensor, room: Tensor) -> Tensor:
    codes, rests, words = _parts(tables)
    header = words[:, HEADER]
    turned = ((rests >> 8) & 0xFFFFFF) | (rests << 24)
    pairs = (rests, rests >> 16, turned, turned >> 16)
    rest = torch.stack([pair & 0x807F for pair in pairs], 1)
    row = torch.arange(4, device=tables.device, dtype=torch.int32).view(1, 4, 1)
    code = (codes.to(torch.int32).unsqueeze(1) >> (4 * row)) & 15
    exponent = torch.where(code > 0, code + (header & 0xFF).view(-1, 1, 1), 0)
    bits = (rest | exponent << 7).view(len(tables), -1)
    count = num_escapes(header)
    most = int(count.max())
    rank = torch.arange(most, device=tables.device)
    tile, number = (rank < count.view(-1, 1)).nonzero(as_tuple=True)
    own = number < OWN_ESCAPES
    entry = torch.empty(len(tile), dtype=torch.int32, device=tables.device)
    entry[own] = words[tile[own], ESCAPES + number[own]]
    entry[~own] = room[words[tile[~own], ELSEWHERE] + number[~own] - OWN_ESCAPES]
    lane, row = entry >> 18, (entry >> 16) & 3
    bits[tile, (row * LANES + lane).long()] = entry & 0xFFFF
    return bits.to(torch.int16).view(-1)


def matrices(kept: Tensor, segment: Segment) -> Iterator[tuple[Tensor, int, slice]]:
    """Stored tiles, number and place in flat memory of each matrix."""
    start = 0
    for number, offset, count in zip(segment.numbers, segment.offsets, segment.counts, strict=True):
        stop = start + lossless_bytes(count)
        yield kept[start:stop], number, slice(offset, offset + count)
        start = stop
