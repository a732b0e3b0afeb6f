"""What follows from lsp's settings and the shapes of matrices: how large cores are, how they travel, how many
are on the GPU at once. The engine lays its memory out by it, and costs are counted by it. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from engines.settings.lsp import LspSettings
from engines.shapes import BYTES_PER_ELEMENT, ModelShape, Workload

WEIGHT_SLOTS = 3
"""Blocks whose weights are on the GPU at once where they are streamed: one computes, two come up."""

CORE_SLOTS = 4
"""Blocks whose compressed gradients are on the GPU at once."""

UPLOAD_SLOTS = 4
"""Chunks that are on the GPU between their upload and their application."""

CHUNK_ELEMENTS = 8 << 20
"""Cores of neighbouring matrices travel together up to about this size."""

FLOPS_PER_BYTE = 150.0
"""Floating-point operations in the time of one byte of GPU memory, to choose how a core is made: 160 on an
H200 (755 TFLOP/s, 4.8 TB/s), 165 on an RTX 4090."""


def nonzeros_per_row(settings: LspSettings) -> int:
    return settings.r if settings.projector in ("block", "paper") else 1


def core_size(rows: int, columns: int, settings: LspSettings) -> int:
    """Rows and columns of a matrix's core: d, or its own smaller dimension, to a multiple of r. See
    `LspSettings.size_for`."""
    d = min(settings.size_for(rows, columns), rows, columns)
    r = min(nonzeros_per_row(settings), d)
    return d // r * r


def compresses(shape: ModelShape, settings: LspSettings) -> bool:
    """Whether the d that is wanted for any matrix is below its smaller dimension."""
    sides = [(matrix.rows, matrix.columns) for matrix in shape.matrices]
    return any(settings.size_for(*each) < min(each) for each in sides)


def core_elements(shape: ModelShape, settings: LspSettings) -> int:
    """Elements of all cores of one block."""
    return sum(core_size(matrix.rows, matrix.columns, settings) ** 2 for matrix in shape.matrices)


def chunk_ends(sizes: Sequence[int]) -> list[int]:
    """Up to which of its matrices each chunk of a block goes, whose cores have `sizes` elements: neighbours
    that make up `CHUNK_ELEMENTS` at most, or a single larger one."""
    ends, elements = [], 0
    for at, size in enumerate(sizes):
        if elements and elements + size > CHUNK_ELEMENTS:
            ends.append(at)
            elements = 0
        elements += size
    return [*ends, len(sizes)]


def forms_gradient(rows: int, columns: int, d: int, workload: Workload) -> bool:
    """Whether forming the gradient and compressing it costs less than projecting its factors first.

    T tokens: 2 T m n operations and some passes over G, against 2 T d^2 and one pass over each factor.
    """
    tokens, element = workload.batch_size * workload.seq_len, BYTES_PER_ELEMENT[workload.dtype]
    formed = 2.0 * tokens * rows * columns + FLOPS_PER_BYTE * element * (3 * rows * columns + 2 * rows * d)
    factors = 2.0 * tokens * d * d + FLOPS_PER_BYTE * element * tokens * (rows + columns + 2 * d)
    return formed < factors


def streamed_uploads(num_blocks: int) -> list[int]:
    """How often each streamed block comes up in a step: for each of both passes, but for those that are still
    there when a pass turns or a step ends."""
    stay = min(WEIGHT_SLOTS, num_blocks)
    return [2 - (index < stay) - (index >= num_blocks - stay) for index in range(num_blocks)]
