"""(d, r)-sparse projectors: compress a gradient, expand an update, measure the bias, find the subspace.

LSP-Offload (2406.10181), Definition 1 and Algorithm 1. A projector P (rows x d) has r nonzeros in each row.
For a weight matrix of m x n with P (m x d) and Q (n x d):

    core of a gradient      S = P^T G Q                       d x d     `compress`
    expanded update         P S Q^T                           m x n     `decompress`
    bias                    b(G) = P P^T G Q Q^T - G          m x n     `bias`
    moments, new subspace   M <- A M B, V <- (A*A) V (B*B)    d x d     `transport_moments`
                            with A = P_new^T P_old, B = Q_old^T Q_new

All of them are made of two linear maps, x P (`Projector.project`) and x P^T (`Projector.lift`), whose cost
follows the nonzeros: t rows r products for x of t rows. P is never scattered into a dense matrix for them.

Three kinds, all of Definition 1's form:

- `block`: rows in d/r blocks of neighbours, each with a dense factor of r orthonormal columns, so that
  P^T P = I. The columns are the top r left singular vectors of the block's rows of a calibration gradient
  (`block_pair`): the best that this form can do for P, in closed form. No index is stored.
- `one_hot`: r = 1, a balanced random hash with signs, columns normalised: a count sketch with P^T P = I.
- `paper`: r distinct random places per row, normal values, learned by Adam (`learn`).

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engines.noise import has_triton
from engines.subspace_iteration import leading_vectors

StopReason = Literal["alpha", "steps", "timeout", "closed_form", "redrawn"]


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
        """What makes it, by name, for checkpoints: written over in place by `assign`."""

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
    batched products, or a Triton kernel on a GPU (`engines.projector_kernels`).
    """

    def __init__(self, values: Tensor, d: int) -> None:
        """`values` (rows, r), row i being that of P in the columns of its block.

        Raises `ValueError` if r does not divide d or d is larger than rows.
        """
        self.d = d
        self.values = values
        self._places = block_rows(self.rows, _num_blocks(self.rows, self.r, d)).to(values.device)

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
            from engines import projector_kernels

            return projector_kernels.block_project(x, self.values, self.d)
        t = x.shape[0]
        parts = _in_blocks(x.T, self._places).transpose(1, 2)  # (blocks, t, height)
        return torch.bmm(parts, self._factors()).transpose(0, 1).reshape(t, self.d)

    def lift(self, x: Tensor) -> Tensor:
        if x.is_cuda and has_triton():
            from engines import projector_kernels

            return projector_kernels.block_lift(x, self.values, self.d)
        parts = x.view(x.shape[0], self.blocks, self.r).transpose(0, 1)
        lifted = torch.bmm(self._factors(), parts.transpose(1, 2))  # (blocks, height, t)
        return lifted.flatten(0, 1)[self._places.view(-1) >= 0].T

    def _factors(self) -> Tensor:
        """(blocks, height, r), zeros where a block has a row less than the highest."""
        return _in_blocks(self.values, self._places)

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


def _num_blocks(rows: int, r: int, d: int) -> int:
    """d / r; `ValueError` where no projector has that many, as a block would lack columns or rows."""
    if not 0 < r <= d <= rows or d % r:
        raise ValueError(f"no {rows} x {d} projector of blocks {r} columns wide")
    return d // r


def block_rows(rows: int, blocks: int) -> Tensor:
    """(blocks, height) int64: the rows of each block in order, -1 after the last of a shorter one."""
    first = (torch.arange(blocks + 1) * rows + blocks - 1) // blocks
    place = first[:-1, None] + torch.arange(-(-rows // blocks))
    return torch.where(place < first[1:, None], place, -1)


def _in_blocks(tensor: Tensor, places: Tensor) -> Tensor:
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
    places = block_rows(rows, _num_blocks(rows, r, d))
    factors = torch.randn(*places.shape, r, generator=generator) * (places >= 0)[:, :, None]
    return BlockProjector(torch.linalg.qr(factors).Q[places >= 0], d)


def identity_projector(rows: int) -> SparseProjector:
    """The identity as a (rows, 1)-sparse projector, fp32 on the CPU: compression changes nothing."""
    return SparseProjector(torch.arange(rows, dtype=torch.int32)[:, None], torch.ones(rows, 1), rows)


def compress(gradient: Tensor, left: Projector, right: Projector) -> Tensor:
    """P^T G Q (d, d), of `gradient` (m, n), all of one dtype. Sums are in fp32, each product is rounded."""
    if left.rows >= right.rows:  # the larger side goes first: the second product is then the smaller one
        return right.project(left.project(gradient.T).T.contiguous())
    return left.project(right.project(gradient).T.contiguous()).T


def decompress(core: Tensor, left: Projector, right: Projector) -> Tensor:
    """P S Q^T (m, n), of `core` (d, d), all of one dtype. Sums are in fp32, each product is rounded."""
    if left.rows >= right.rows:
        return left.lift(right.lift(core).T.contiguous()).T
    return right.lift(left.lift(core.T).T.contiguous())


def bias(gradient: Tensor, left: Projector, right: Projector) -> Tensor:
    """b(G) = P P^T G Q Q^T - G, (m, n) in fp32."""
    gradient, left, right = gradient.float(), left.cast(torch.float32), right.cast(torch.float32)
    return decompress(compress(gradient, left, right).contiguous(), left, right).sub_(gradient)


def relative_bias(gradient: Tensor, left: Projector, right: Projector) -> float:
    """||b(G)||_F / ||G||_F; 0 for a gradient that is zero, NaN for one that is not finite.

    Waits for the GPU.
    """
    gradient = gradient.float()
    size = torch.linalg.vector_norm(gradient)
    ratio = torch.linalg.vector_norm(bias(gradient, left, right)) / size
    return float(torch.where(size == 0, torch.zeros_like(ratio), ratio))


def block_pair(gradient: Tensor, d: int, r: int) -> tuple[BlockProjector, BlockProjector]:
    """The pair of block-diagonal projectors for `gradient` (m, n), fp32 on its device, in closed form.

    P has in each block the top r left singular vectors of the block's rows of G, the minimiser of
    ||P P^T G - G||_F over this form; then Q likewise for (P^T G)^T. They are found to a percent of the
    energy that such vectors keep (`engines.subspace_iteration`). `gradient` must be finite. Raises
    `ValueError` if r does not divide d or d is larger than m or n.
    """
    gradient = gradient.float()
    left = _block_side(gradient, d, r)
    return left, _block_side(left.project(gradient.T), d, r)


def _block_side(gradient: Tensor, d: int, r: int) -> BlockProjector:
    """The projector of the rows of `gradient` (rows, t), fp32."""
    places = block_rows(gradient.shape[0], _num_blocks(gradient.shape[0], r, d)).to(gradient.device)
    used = places >= 0
    # Squares of small gradients underflow: a block is brought to a largest entry, then its Gram matrix to a
    # trace, of one.
    tiny = torch.finfo(gradient.dtype).tiny
    parts = _in_blocks(gradient, places)
    parts = parts / torch.linalg.vector_norm(parts, math.inf, dim=(1, 2), keepdim=True).clamp_min(tiny)
    gram = torch.bmm(parts, parts.transpose(1, 2))
    gram /= gram.diagonal(dim1=1, dim2=2).sum(1).clamp_min(tiny)[:, None, None]
    return BlockProjector(leading_vectors(gram, used, r)[used].contiguous(), d)


@dataclass(frozen=True, kw_only=True)
class LearningGradient:
    loss: Tensor
    """||b(G)||_F + beta (||P||_F + ||Q||_F), a scalar on the device."""
    bias_norm: Tensor
    left: Tensor
    """Derivatives with respect to the values of P, (m, r) fp32, and of Q, (n, r)."""
    right: Tensor


def learning_gradient(
    gradient: Tensor, left: SparseProjector, right: SparseProjector, beta: float
) -> LearningGradient:
    """Loss of the learning problem and its derivatives with respect to the projectors' values.

    With E = b / ||b||_F, C = P^T G Q and F = P^T E Q:

        d||b|| / dP = (E Q) C^T + (G Q) F^T         d||b|| / dQ = (E^T P) C + (G^T P) F

    of which the nonzeros' places are kept. Products are of dense matrices: learning is rare, and the GPU's
    rate for those is what makes it short.
    """
    p, q = left.dense(gradient.dtype), right.dense(gradient.dtype)
    gradient_q, gradient_p = gradient @ q, gradient.T @ p
    core = p.T @ gradient_q
    error = (p @ core @ q.T).sub_(gradient)
    norm = torch.linalg.vector_norm(error)
    error.div_(norm.clamp_min(torch.finfo(norm.dtype).tiny))
    error_q, error_p = error @ q, error.T @ p
    error_core = p.T @ error_q
    by_p = left.gather(error_q @ core.T + gradient_q @ error_core.T)
    by_q = right.gather(error_p @ core + gradient_p @ error_core)
    size_p, size_q = torch.linalg.vector_norm(left.values), torch.linalg.vector_norm(right.values)
    tiny = torch.finfo(size_p.dtype).tiny
    return LearningGradient(
        loss=norm + beta * (size_p + size_q),
        bias_norm=norm,
        left=by_p + beta * left.values / size_p.clamp_min(tiny),
        right=by_q + beta * right.values / size_q.clamp_min(tiny),
    )


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A learned pair and what learning did."""

    left: SparseProjector
    right: SparseProjector
    bias_before: float
    """Relative bias of the pair that learning began with, and of the pair returned."""
    bias_after: float
    steps: int
    """Adam steps taken."""
    stop: StopReason


def learn(
    gradient: Tensor,
    left: SparseProjector,
    right: SparseProjector,
    *,
    alpha: float,
    beta: float,
    steps: int,
    rate: float,
    time_limit_s: float,
    clock: Callable[[], float],
) -> Learned:
    """Minimise ||b(G)||_F + beta (||P||_F + ||Q||_F) over the values of both projectors (fp32) by Adam.

    Stops when the relative bias is at most `alpha`, after `steps` steps of learning rate `rate`, or when
    `clock` (seconds) has gone on by `time_limit_s`. The pair returned is the one of smallest bias seen, the
    first pair included. `gradient` must be finite and not zero. Waits for the GPU once a step.
    """
    end_s = clock() + time_limit_s
    target = gradient.float()
    target = target / torch.linalg.vector_norm(target)
    left, right = (side.with_values(side.values.clone().requires_grad_()) for side in (left, right))
    adam = torch.optim.Adam([left.values, right.values], lr=rate)
    best = (math.inf, left.values, right.values)
    before = math.nan
    taken = 0
    stop: StopReason
    while True:
        with torch.no_grad():
            slope = learning_gradient(target, left, right, beta)
        now = float(slope.bias_norm)
        if taken == 0:
            before = now
        if now < best[0]:
            best = (now, left.values.detach().clone(), right.values.detach().clone())
        if now <= alpha:
            stop = "alpha"
        elif taken == steps:
            stop = "steps"
        elif clock() >= end_s:
            stop = "timeout"
        else:
            left.values.grad, right.values.grad = slope.left, slope.right
            adam.step()
            taken += 1
            continue
        break
    return Learned(
        left=left.with_values(best[1].detach()),
        right=right.with_values(best[2].detach()),
        bias_before=before,
        bias_after=best[0],
        steps=taken,
        stop=stop,
    )


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
