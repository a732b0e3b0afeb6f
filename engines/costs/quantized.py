"""Bytes of matrices that are kept in tiles: as low-bit values with a scale per group
(`engines.quantized.codec`), or to the bit (`engines.lossless.lossless_codec`)."""

from __future__ import annotations

from engines.costs import transformer
from engines.settings.zeroth_order import Base
from engines.shapes import BYTES_PER_ELEMENT, Dtype, ModelShape

TILE_ELEMENTS = 2048
"""Elements of a tile: those that share 512 Philox calls."""
GROUP_ELEMENTS = 128
"""Elements that share a scale."""
SCALE_BYTES = 2

CODE_BITS: dict[Base, int] = {"int8": 8, "fp8": 8, "int4": 4}


LOSSLESS_WORDS = 8
"""Of 32 bits, at the end of a lossless tile (`engines.lossless.lossless_codec`)."""
LOSSLESS_TILE_BYTES = TILE_ELEMENTS * 12 // 8 + 4 * LOSSLESS_WORDS
"""Of one tile in bf16: 3104 in place of 4096."""


def lossless_bytes(count: int) -> int:
    """Of a matrix of `count` elements in lossless tiles."""
    return -(-count // TILE_ELEMENTS) * LOSSLESS_TILE_BYTES


def tile_bytes(base: Base) -> int:
    """Of one tile: its codes, then its scales. 2080 or 1056; 3104 where nothing is lost."""
    if base == "lossless":
        return LOSSLESS_TILE_BYTES
    return TILE_ELEMENTS * CODE_BITS[base] // 8 + TILE_ELEMENTS // GROUP_ELEMENTS * SCALE_BYTES


def matrix_bytes(count: int, base: Base) -> int:
    """Of a matrix of `count` elements, in whole tiles."""
    return -(-count // TILE_ELEMENTS) * tile_bytes(base)


def block_bytes(shape: ModelShape, dtype: Dtype, base: Base) -> int:
    """Of one block: its matrices as `base` says, its vectors in `dtype`."""
    element = BYTES_PER_ELEMENT[dtype]
    if base == "full":
        return element * shape.block_parameters
    matrices = sum(matrix_bytes(matrix.parameters, base) for matrix in shape.matrices)
    return matrices + element * transformer.vector_parameters(shape)
