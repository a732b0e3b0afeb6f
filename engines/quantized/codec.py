"""Matrices as low-bit values with a scale per group, and what a zeroth-order step does to them.

A matrix is a row of tiles of 2048 elements (`engines.noise.tiles`), each stored with all that its elements
need: first their codes, then 16 scales in bf16, one for each 128 neighbours. A matrix is thus
one stretch of memory of whole tiles, 1.016 bytes an element with 8 bits and 0.516 with 4. A lane's four
elements, one in each row of the tile, lie in one word: a kernel loads it at once, and 4-bit codes need no
sorting.

    int8, int4   w = code scale; codes -127 to 127 or -7 to 7
    fp8          w = e4m3(code) scale; the scale is a power of two, which costs a floating-point grid nothing

Scales are made once, from the largest of each group, and stay. They leave room above it (3 codes with int8, a
factor of 1.75 or more with fp8, none with int4), since an update that would lead out of the grid is cut off.
A group that is all zero stays zero.

`visit_tiles` is one pass over a matrix, as `engines.noise.weight_pass.visit` is for one in 16 bits:

    w = code scale - sum of lr (g z + wd w) over the deferred updates, in fp32, not rounded in between
    if it is to be stored: w <- round(w) to the grid, stochastically; the codes are written back
    plus = w + eps z,   minus = w - eps z,   rounded to nearest

Exact, given the quantised model: what is computed between two stores. Approximate: the first rounding to the
grid, and every store. A store is unbiased, but in units of an update its noise is large (EXPERIMENTS.md), so
that stores should be rare (`fold_every`), or not be at all: with `train=lora` the matrices are only read.

Torch operations and the Triton kernels (`engines.quantized.quantized_pass_kernels`) give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engines.costs.quantized import (
    CODE_BITS,
    GROUP_ELEMENTS,
    SCALE_BYTES,
    TILE_ELEMENTS,
    tile_bytes,
)
from engines.noise.tiles import LANES
from engines.settings.zeroth_order import Base

LARGEST_CODE: dict[Base, int] = {"int8": 127, "int4": 7}
FILLED_CODE: dict[Base, int] = {"int8": 124, "int4": 7}
"""Of the largest element of a group, when it is quantised."""
FP8_LARGEST = 448.0
FP8_FILLED = 256.0
FP8_NORMAL = 2.0**-6
"""Smallest normal number of e4m3."""
SMALLEST_SCALE = 2.0**-100

INVERSE_BITS = 0x7EF311C3
"""1 / x is about the float of bits `INVERSE_BITS` - bits(x); three Newton steps make its error 1e-7."""

GROUPS_PER_ROW = LANES // GROUP_ELEMENTS
SCALES_PER_TILE = TILE_ELEMENTS // GROUP_ELEMENTS

_CHUNK_TILES = {"cpu": 128, "cuda": 1 << 11}
"""Tiles at a time: see `engines.noise.tiles`. Packing, too, needs some 30 bytes per element of them."""


def pack(values: Tensor, base: Base, tiles: Tensor) -> None:
    """Quantise `values` (n,) of any float dtype to nearest, into `tiles`, (bytes,) on the same device."""
    tables = tiles.view(-1, tile_bytes(base))
    for first, last in tile_ranges(tables):
        chunk = values[first * TILE_ELEMENTS : last * TILE_ELEMENTS].float()
        groups = torch.zeros((last - first) * TILE_ELEMENTS, dtype=torch.float32, device=values.device)
        groups[: chunk.numel()] = chunk
        groups = groups.view(-1, SCALES_PER_TILE, GROUP_ELEMENTS)
        scales = scales_of(groups.abs().amax(2), base)
        tables[first:last, -SCALES_PER_TILE * SCALE_BYTES :] = scales.to(torch.bfloat16).view(torch.uint8)
        codes = encode(groups, scales.unsqueeze(2), base, None)
        put_codes(codes.view(last - first, 4, LANES), base, tables[first:last])


def unpack(tiles: Tensor, base: Base, count: int) -> Tensor:
    """The `count` elements that `tiles` (bytes) hold: (count,) fp32."""
    tables = tiles.view(-1, tile_bytes(base))
    return decode_codes(codes_of(tables, base), expanded_scales(tables), base).reshape(-1)[:count]


def tile_ranges(tables: Tensor) -> Iterator[tuple[int, int]]:
    step = _CHUNK_TILES[tables.device.type]
    for first in range(0, len(tables), step):
        yield first, min(first + step, len(tables))


def scales_of(largest: Tensor, base: Base) -> Tensor:
    """Rounded up to what bf16 holds, or to a power of two: fp32."""
    # HAZARD: by a tensor, since CUDA multiplies by the rounded inverse of a number, which gives other bits.
    filled = torch.full_like(largest, FP8_FILLED if base == "fp8" else FILLED_CODE[base])
    if base == "fp8":
        bits = (largest / filled).view(torch.int32).add_(0x7FFFFF).bitwise_and_(0x7F800000)
    else:
        bits = (largest / filled).view(torch.int32).add_(0xFFFF).bitwise_and_(-0x10000)
    return bits.view(torch.float32).clamp_(min=SMALLEST_SCALE)


def expanded_scales(tables: Tensor) -> Tensor:
    """Scales of stored tiles (n, bytes) for each element: (n, 4, 512) fp32."""
    kept = tables[:, -SCALES_PER_TILE * SCALE_BYTES :].contiguous().view(torch.bfloat16).float()
    return kept.view(-1, 4, GROUPS_PER_ROW, 1).expand(-1, -1, -1, GROUP_ELEMENTS).reshape(-1, 4, LANES)


def codes_of(tables: Tensor, base: Base) -> Tensor:
    """Codes of stored tiles (n, bytes) by row and lane: (n, 4, 512) int32, of 8 or 4 unsigned bits."""
    stored = tables[:, : TILE_ELEMENTS * CODE_BITS[base] // 8].to(torch.int32)
    if base == "int4":
        pairs = stored.view(-1, LANES, 2)
        stored = torch.stack((pairs & 15, pairs >> 4), dim=3)
    return stored.view(-1, LANES, 4).transpose(1, 2)


def put_codes(codes: Tensor, base: Base, tables: Tensor) -> None:
    """The inverse of `codes_of`."""
    lanes = codes.transpose(1, 2)
    if base == "int4":
        lanes = lanes[:, :, 0::2] | (lanes[:, :, 1::2] << 4)
    tables[:, : TILE_ELEMENTS * CODE_BITS[base] // 8] = lanes.reshape(len(codes), -1).to(torch.uint8)


def decode_codes(codes: Tensor, scales: Tensor, base: Base) -> Tensor:
    """What codes (unsigned bits) stand for, in fp32, exactly: 7 bits times the 8 of a scale."""
    if base == "fp8":
        # The same bits are an fp16 of 2^-8 the size, smallest numbers included.
        half = ((codes & 0x7F) << 7) | ((codes & 0x80) << 8)
        return half.to(torch.int16).view(torch.float16).float() * 256.0 * scales
    unused = 32 - CODE_BITS[base]
    return ((codes << unused) >> unused).float() * scales


def encode(w: Tensor, scales: Tensor, base: Base, uniform: Tensor | None) -> Tensor:
    """Codes (int32, unsigned bits) of fp32 `w`; to nearest, or stochastically by 16 random bits (int32)."""
    if base == "fp8":
        return _encode_fp8(w, scales, uniform)
    inverse = (INVERSE_BITS - scales.view(torch.int32)).view(torch.float32)
    for _ in range(3):
        inverse = (2.0 - scales * inverse) * inverse
    code = torch.floor(w * inverse + 0.5)
    if uniform is not None:
        # What is left is exact, and zero on the grid: without a change nothing moves.
        rest = (w - code * scales) * inverse
        threshold = (uniform.float() + 0.5) * 2.0**-16
        code = code + (rest > threshold).float() - (-rest > threshold).float()
    most = LARGEST_CODE[base]
    return code.clamp_(-most, most).to(torch.int32) & ((1 << CODE_BITS[base]) - 1)


def _encode_fp8(w: Tensor, scales: Tensor, uniform: Tensor | None) -> Tensor:
    """Codes of fp8: random bits (or a half) added below the last place, and what is below cut off."""
    size = (w * (0x7F000000 - scales.view(torch.int32)).view(torch.float32)).abs()
    lift = torch.where(size < FP8_NORMAL, FP8_NORMAL, 0.0)
    added = 1 << 19 if uniform is None else (uniform << 4) + 8
    bits = (size.clamp(max=FP8_LARGEST) + lift).view(torch.int32) + added
    cut = (bits & -0x100000).view(torch.float32) - lift
    cut = cut.clamp(max=FP8_LARGEST)
    code = (cut * 2.0**-8).to(torch.float16).view(torch.int16).to(torch.int32) >> 7
    return code | torch.where((w < 0) & (code > 0), 0x80, 0)
