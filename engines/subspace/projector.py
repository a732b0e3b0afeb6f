"""(d, r)-sparse projectors: compress a gradient, expand an update, move moments to another subspace.

LSP-Offload (2406.10181), Definition 1 and Algorithm 1. A projector P (rows x d) has r nonzeros in each row.
For a weight matrix of m x n with P (m x d) and Q (n x d):

    core of a gradient      S = P^T G Q                       d x d     `compress`
    expanded update         P S Q^T                           m x n     `decompress`
    bias                    b(G) = P P^T G Q Q^T - G          m x n     `projector_search.bias`
    moments, new subspace   M <- A M B, V <- (A*A) V (B*B)    d x d     `transport_moments`
                            with A = P_new^T P_old, B = Q_old^T Q_new

All of them are made of two linear maps, x P (`Projector.project`) and x P^T (`Projector.lift`), whose cost
follows the nonzeros: t rows r products for x of t rows. P is never scattered into a dense matrix for them.

Three kinds, all of Definition 1's form:

- `block`: rows in d/r blocks of neighbours, each with a dense factor of r orthonormal columns, so that
  P^T P = I. The columns are the top r left singular vectors of the block's rows of a calibration gradient
  (`projector_search.block_pair`): the best that this form can do for P, in closed form. No index is stored.
- `one_hot`: r = 1, a balanced random hash with signs, columns normalised: a count sketch with P^T P = I.
- `paper`: r distinct random places per row, normal values, learned by Adam
  (`projector_search.learn`).

Where the paper and the official code disagree, or the paper disagrees with itself, `paper` does this:

- Positions are drawn without replacement, as Definition 1's exactly r nonzeros ask; the official code
  draws with replacement and lets duplicates overwrite each other.
- Values are normal with standard deviation 1/sqrt(r), as the official code has it (the paper's
  N(0, 1/sqrt r) leaves open whether that is the variance), not its 'binary' form, whose every value is -1.
- The regulariser is ||P||_F + ||Q||_F, the paper's displayed problem (its Algorithm 1 squares the first).
- Learning stops at alpha, as in the paper; the official code always runs its fixed number of iterations.
- Ours: learning takes G / ||G||_F for G, so that the regulariser's weight means the same whatever the
  gradient's scale, and it returns the best values it saw, since Adam's last are not always its best.

An unlearned pair of kind `paper` never passes an alpha below one: with these initial values P P^T is not
normalised, and the relative bias is about sqrt(a b - 1) with a = 1 + 2/r + m/d and b = 1 + 2/r + n/d, 3.4 at
d = m/2 = n/2 and r = 4. The first check of a matrix therefore always leads to learning. Where learning is cut
short, Adam hides the pair's scale, not its direction.

A projector's tensors stay where they are when it is replaced (`Projector.assign`): CUDA graphs know them by
their place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.kernels.triton_launch import has_triton


class Projector(Protocol):
    """A rows x d matrix with r nonzeros in each row, of the dtype of the weights."""

    d: int

    @property
    def rows(self) -> int: ...

    @property
    def r(self) -> int: ...

    def project(self, x: Tensor) -> Tensor:
        """x P: (t, rows) to (t, d), of the dtype of `x`, which is the projector's. Sums are in fp32."""

    def lift(self, x: Tensor) -> Tensor:
        """x P^T: (t, d) to (t, rows), of the dtype of `x`, which is the projector's. Sums are in fp32."""

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix itself (rows, d), for learning and for tests."""

    def cast(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Projector:
        """The same with values of another dtype, on `device`."""

    def tensors(self) -> Mapping[str, Tensor]:
        """What makes it: `values` (rows, r) and, if sparse, `indices` (rows, r). `assign` writes them."""

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Become the projector that has these `tensors`, of the same shapes; values are rounded."""


class SparseProjector:
    """r nonzeros per row at any places.

    Both maps are weighted sums of rows of x^T (`embedding_bag`), over the nonzeros of a row of P, or of a
    column; for the second the nonzeros are kept in the order of columns too.
    """

    def __init__(self, indices: Tensor, values: Tensor, d: int) -> None:
        """`indices` (rows, r) int32, ascending and distinct in each row; `values` (rows, r)."""
        self.d = d
        self.indices = indices
        self.values = values
        self._by_column = torch.empty_like(indices.view(-1))
        self._column_values = torch.empty_like(values.view(-1))
        self._column_ends = torch.empty(d + 1, dtype=torch.int32, device=indices.device)
        self._sort()

    def _sort(self) -> None:
        """The nonzeros by column, rows ascending within one."""
        column = self.indices.view(-1).long()
        order = column.argsort(stable=True)
        self._by_column.copy_(order // self.r)
        self._column_values.copy_(self.values.view(-1)[order])
        counts = torch.bincount(column, minlength=self.d)
        self._column_ends[0] = 0
        self._column_ends[1:] = counts.cumsum(0)

    @property
    def rows(self) -> int:
        return self.indices.shape[0]

    @property
    def r(self) -> int:
        return self.indices.shape[1]

    def project(self, x: Tensor) -> Tensor:
        return F.embedding_bag(
            self._by_column,
            x.T.contiguous(),
            self._column_ends,
            mode="sum",
            per_sample_weights=self._column_values,
            include_last_offset=True,
        ).T

    def lift(self, x: Tensor) -> Tensor:
        return F.embedding_bag(self.indices, x.T.contiguous(), mode="sum", per_sample_weights=self.values).T

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        # Deterministic: no two nonzeros share a place.
        out = torch.zeros(self.rows, self.d, dtype=dtype, device=self.values.device)
        return out.scatter_(1, self.indices.long(), self.values.to(dtype))

    def gather(self, dense: Tensor) -> Tensor:
        """The entries of `dense` (rows, d) at the nonzeros' places, (rows, r)."""
        return dense.gather(1, self.indices.long())

    def with_values(self, values: Tensor) -> SparseProjector:
        """The same places with other `values` (rows, r)."""
        return SparseProjector(self.indices, values, self.d)

    def cast(self, dtype: torch.dtype, device: torch.device | str | None = None) -> SparseProjector:
        device = self.indices.device if device is None else device
        return SparseProjector(self.indices.to(device), self.values.to(device, dtype), self.d)

    def tensors(self) -> Mapping[str, Tensor]:
        return {"indices": self.indices, "values": self.values}

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        self.indices.copy_(tensors["indices"])
        self.values.copy_(tensors["values"])
        self._sort()


class BlockProjector:
    """Block-diagonal: rows in d/r blocks of neighbours, columns k r to (k + 1) r being those of block k.

    Block k has the rows from ceil(k rows / blocks) on, so that sizes differ by one at most. Both maps are
    batched products, or a Triton kernel on a GPU (`engines.subspace.projector_kernels`).
    """

    def __init__(self, values: Tensor, d: int) -> None:
        """`values` (rows, r), row i being that of P in the columns of its block.

        Raises `ValueError` if r does not divide d or d is larger than rows.
        """
        self.d = d
        self.values = values
        self._places = block_rows(self.rows, count_blocks(self.rows, self.r, d)).to(values.device)

    @property
    def rows(self) -> int:
        return self.values.shape[0]

    @property
    def r(self) -> int:
        return self.values.shape[1]

    @property
    def blocks(self) -> int:
        return self.d // self.r

    def project(self, x: Tensor) -> Tensor:
        if x.is_cuda and has_triton():
            from engines.subspace import projector_kernels

            return projector_kernels.block_project(x, self.values, self.d)
        t = x.shape[0]
        parts = in_blocks(x.T, self._places).transpose(1, 2)  # (blocks, t, height)
        return torch.bmm(parts, self._factors()).transpose(0, 1).reshape(t, self.d)

    def lift(self, x: Tensor) -> Tensor:
        if x.is_cuda and has_triton():
            from engines.subspace import projector_kernels

            return projector_kernels.block_lift(x, self.values, self.d)
        parts = x.view(x.shape[0], self.blocks, self.r).transpose(0, 1)
        lifted = torch.bmm(self._factors(), parts.transpose(1, 2))  # (blocks, height, t)
        return lifted.flatten(0, 1)[self._places.view(-1) >= 0].T

    def _factors(self) -> Tensor:
        """(blocks, height, r), zeros where a block has a row less than the highest."""
        return in_blocks(self.values, self._places)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        row = torch.arange(self.rows, device=self.values.device)
        columns = (row * self.blocks // self.rows)[:, None] * self.r
        columns = columns + torch.arange(self.r, device=self.values.device)
        out = torch.zeros(self.rows, self.d, dtype=dtype, device=self.values.device)
        return out.scatter_(1, columns, self.values.to(dtype))

    def cast(self, dtype: torch.dtype, device: torch.device | str | None = None) -> BlockProjector:
        device = self.values.device if device is None else device
        return BlockProjector(self.values.to(device, dtype), self.d)

    def tensors(self) -> Mapping[str, Tensor]:
        return {"values": self.values}

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        self.values.copy_(tensors["values"])


def count_blocks(rows: int, r: int, d: int) -> int:
    """d / r; `ValueError` where no projector has that many, as a block would lack columns or rows."""
    if not 0 < r <= d <= rows or d % r:
        raise ValueError(f"no {rows} x {d} projector of blocks {r} columns wide")
    return d // r


def block_rows(rows: int, blocks: int) -> Tensor:
    """(blocks, height) int64: the rows of each block in order, -1 after the last of a shorter one."""
    first = (torch.arange(blocks + 1) * rows + blocks - 1) // blocks
    place = first[:-1, None] + torch.arange(-(-rows // blocks))
    return torch.where(place < first[1:, None], place, -1)


def in_blocks(tensor: Tensor, places: Tensor) -> Tensor:
    """Rows of `tensor` (rows, t) by block, (blocks, height, t), with zeros at the places of -1."""
    if places.numel() == tensor.shape[0]:
        return tensor.reshape(*places.shape, tensor.shape[1])
    padded = torch.cat((tensor, tensor.new_zeros(1, tensor.shape[1])))
    return padded[places]


def random_projector(rows: int, d: int, r: int, seed: int) -> SparseProjector:
    """The paper's initial projector, fp32 on the CPU: r distinct random places per row, values N(0, 1/r).

    The same arguments give the same projector on every machine with the same torch. Raises `ValueError`
    if r is larger than d.
    """
    if not 0 < r <= d:
        raise ValueError(f"a row of {d} places cannot have {r} nonzeros")
    generator = torch.Generator().manual_seed(seed)
    # Floyd's sampling, all rows at once: every subset of r places is equally likely, in r draws per row.
    picked = torch.full((rows, r), -1, dtype=torch.int64)
    for count, last in enumerate(range(d - r, d)):
        drawn = torch.randint(0, last + 1, (rows,), generator=generator)
        taken = (picked == drawn[:, None]).any(dim=1)
        picked[:, count] = torch.where(taken, last, drawn)
    values = torch.randn(rows, r, generator=generator) / math.sqrt(r)
    return SparseProjector(picked.sort(dim=1).values.to(torch.int32), values, d)


def one_hot_projector(rows: int, d: int, seed: int) -> SparseProjector:
    """One signed place per row, fp32 on the CPU, the places shared out evenly: P^T P = I for d <= rows.

    Its relative bias on any gradient is about sqrt(1 - d^2 / (m n)).
    """
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(rows, generator=generator) % d
    signs = torch.randint(0, 2, (rows,), generator=generator) * 2.0 - 1.0
    count = torch.bincount(places, minlength=d)[places]
    return SparseProjector(places.to(torch.int32)[:, None], (signs / count.sqrt())[:, None], d)


def random_block_projector(rows: int, d: int, r: int, seed: int) -> BlockProjector:
    """Random orthonormal columns in each block, fp32 on the CPU. The same arguments give the same projector.

    Raises `ValueError` if r does not divide d or d is larger than rows.
    """
    generator = torch.Generator().manual_seed(seed)
    places = block_rows(rows, count_blocks(rows, r, d))
    factors = torch.randn(*places.shape, r, generator=generator) * (places >= 0)[:, :, None]
    return BlockProjector(torch.linalg.qr(factors).Q[places >= 0], d)


def compress(gradient: Tensor, left: Projector, right: Projector) -> Tensor:
    """P^T G Q (d, d), of `gradient` (m, n), all of one dtype. Sums are in fp32, each product is rounded."""
    if left.rows >= right.rows:  # the larger dimension goes first: the second product is then the smaller one
        return right.project(left.project(gradient.T).T.contiguous())
    return left.project(right.project(gradient).T.contiguous()).T


def decompress(core: Tensor, left: Projector, right: Projector) -> Tensor:
    """P S Q^T (m, n), of `core` (d, d), all of one dtype. Sums are in fp32, each product is rounded."""
    if left.rows >= right.rows:
        return left.lift(right.lift(core).T.contiguous()).T
    return right.lift(left.lift(core.T).T.contiguous())


def transport_moments(
    moment: Tensor,
    variance: Tensor,
    left_old: Projector,
    left_new: Projector,
    right_old: Projector,
    right_new: Projector,
) -> tuple[Tensor, Tensor]:
    """Adam's moments (d, d), fp32, in the new subspace: A M B and (A*A) V (B*B), squares elementwise.

    A = P_new^T P_old and B = Q_old^T Q_new (Algorithm 1, lines 8 and 9).
    """
    a = left_new.dense().T @ left_old.dense()
    b = right_old.dense().T @ right_new.dense()
    return a @ moment @ b, a.square() @ variance @ b.square()
