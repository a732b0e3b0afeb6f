"""Where the low-rank factors of a block's matrices lie in flat memory, and which noise they are drawn as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from engines.noise.tiles import Segment
from engines.zeroth_order.low_rank.linear_matrices import LinearMatrix


@dataclass(frozen=True, slots=True)
class MatrixRows:
    """Where the matrices of a block have so many rows each, of their outputs or of their inputs, in flat
    memory: one matrix after the other, or a row of all of them after the other (`together`)."""

    sizes: Sequence[int]
    """Elements in a row of each matrix."""
    rows: int
    grid: int
    """Elements that each matrix begins at a multiple of."""
    together: bool

    @property
    def width(self) -> int:
        """Of a row of all matrices."""
        return sum(_up(size, self.grid) for size in self.sizes)

    @property
    def size(self) -> int:
        """Elements of the memory."""
        if self.together:
            return self.rows * self.width
        return sum(_up(self.rows * size, self.grid) for size in self.sizes)

    def start(self, matrix: int) -> int:
        rows = 1 if self.together else self.rows
        return sum(_up(rows * size, self.grid) for size in self.sizes[:matrix])

    def view(self, flat: Tensor, matrix: int, start: int = 0) -> Tensor:
        """(rows, elements) of a matrix in `flat`, whole memory of which the block's begins at `start`."""
        size = self.sizes[matrix]
        stride = self.width if self.together else size
        return flat.as_strided((self.rows, size), (stride, 1), start + self.start(matrix))

    def segment(self, numbers: Sequence[int], rows: int, start: int = 0) -> Segment:
        """The last `rows` rows as noise of `numbers`, one for each matrix, or one for all `together`."""
        if not self.sizes:
            return Segment([], [], [], [])
        if self.together:
            counts, begins = [rows * self.width], [(self.rows - rows) * self.width]
        else:
            counts = [rows * size for size in self.sizes]
            begins = [self.start(k) + (self.rows - rows) * size for k, size in enumerate(self.sizes)]
        return Segment(numbers, [start + begin for begin in begins], counts, [False] * len(counts))


@dataclass(frozen=True, slots=True)
class BlockRows:
    """Where what the matrices of a block have lies, in memory of its visit or in that of all blocks."""

    u: MatrixRows
    """U, and the accumulators."""
    v: MatrixRows
    both: MatrixRows
    """What stands beside products: the accumulators' rows, then those of U."""
    u_alone: MatrixRows
    v_alone: MatrixRows
    """While a window is folded: one matrix after the other, however their noise is drawn."""

    @staticmethod
    def of(matrices: Sequence[LinearMatrix], rank: int, grid: int, together: bool) -> BlockRows:
        outputs, inputs = ([found.sizes[which] for found in matrices] for which in (0, 1))
        return BlockRows(
            u=MatrixRows(outputs, rank, grid, together),
            v=MatrixRows(inputs, rank, grid, together),
            both=MatrixRows(outputs, 2 * rank, grid, together),
            u_alone=MatrixRows(outputs, rank, grid, together=False),
            v_alone=MatrixRows(inputs, rank, grid, together=False),
        )

    def drawn_v(self, matrix: int, number: int) -> tuple[int, int, int]:
        """`drawn_v` of a matrix whose V is drawn with that `number`."""
        if self.v.together:
            return number, self.v.size, self.v.start(matrix)
        return number, self.v.rows * self.v.sizes[matrix], 0


def _up(count: int, grid: int) -> int:
    return -(-count // grid) * grid
