"""(d, r)-sparse projectors: compress a gradient, expand an update, measure and learn the subspace.

LSP-Offload (2406.10181), Definition 1 and Algorithm 1. A projector P (rows x d) has exactly r nonzeros in
each row. For a weight matrix of m x n with P (m x d) and Q (n x d):

    core of a gradient      S = P^T G Q                       d x d     `compress`
    expanded update         P S Q^T                           m x n     `decompress`
    bias                    b(G) = P P^T G Q Q^T - G          m x n     `bias`
    moments, new subspace   M <- A M B, V <- (A*A) V (B*B)    d x d     `transport_moments`
                            with A = P_new^T P_old, B = Q_old^T Q_new

Where the paper and the official code disagree, or the paper disagrees with itself:

- Positions are drawn without replacement, as Definition 1's exactly r nonzeros ask; the official code
  draws with replacement and lets duplicates overwrite each other.
- Values are normal with standard deviation 1/sqrt(r), as the official code has it (the paper's
  N(0, 1/sqrt r) leaves open whether that is the variance), not its 'binary' form, whose every value is -1.
- The regulariser is ||P||_F + ||Q||_F, the paper's displayed problem (its Algorithm 1 squares the first).
- Learning stops at alpha, as in the paper; the official code always runs its fixed number of iterations.
- Ours: learning takes G / ||G||_F for G, so that the regulariser's weight means the same whatever the
  gradient's scale, and it returns the best values it saw, since Adam's last are not always its best.

An unlearned pair never passes an alpha below one: with these initial values P P^T is not normalised, and
the relative bias is about sqrt(a b - 1) with a = 1 + 2/r + m/d and b = 1 + 2/r + n/d, 3.4 at d = m/2 = n/2
and r = 4. The first check of a matrix therefore always leads to learning. Where learning is cut short, Adam
hides the pair's scale, not its direction.

This version scatters P and Q into dense matrices and multiplies; `compress` and `decompress` are the
seam for kernels whose cost follows the nonzeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

StopReason = Literal["alpha", "steps", "timeout"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Projector:
    """A rows x d matrix with r nonzeros in each row."""

    indices: Tensor
    """Columns of the nonzeros (rows, r), int32, ascending and distinct in each row."""
    values: Tensor
    """The nonzeros (rows, r), fp32."""
    d: int

    @property
    def rows(self) -> int:
        return self.indices.shape[0]

    @property
    def r(self) -> int:
        return self.indices.shape[1]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix itself (rows, d). Deterministic: no two nonzeros share a place."""
        out = torch.zeros(self.rows, self.d, dtype=dtype, device=self.values.device)
        return out.scatter_(1, self.indices.long(), self.values.to(dtype))

    def gather(self, dense: Tensor) -> Tensor:
        """The entries of `dense` (rows, d) at the nonzeros' places, (rows, r)."""
        return dense.gather(1, self.indices.long())

    def to(self, device: torch.device | str) -> Projector:
        return replace(self, indices=self.indices.to(device), values=self.values.to(device))


def random_projector(rows: int, d: int, r: int, seed: int) -> Projector:
    """The paper's initial projector, on the CPU: r distinct random places per row, values N(0, 1/r).

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
    return Projector(indices=picked.sort(dim=1).values.to(torch.int32), values=values, d=d)


def identity_projector(rows: int) -> Projector:
    """The identity as a (rows, 1)-sparse projector: compression changes nothing."""
    return Projector(
        indices=torch.arange(rows, dtype=torch.int32)[:, None], values=torch.ones(rows, 1), d=rows
    )


def compress(gradient: Tensor, left: Projector, right: Projector) -> Tensor:
    """P^T G Q in fp32, of `gradient` (m, n) in fp32 or bf16.

    Sums are in fp32. For a bf16 gradient the projectors' values and the inner product are rounded to bf16,
    the type that the tensor cores take.
    """
    dtype = gradient.dtype
    p, q = left.dense(dtype), right.dense(dtype)
    # The larger side goes first: the second product is then the smaller one.
    if left.rows >= right.rows:
        return _product(_product(p.T, gradient).to(dtype), q)
    return _product(p.T, _product(gradient, q).to(dtype))


def decompress(core: Tensor, left: Projector, right: Projector, dtype: torch.dtype = torch.float32) -> Tensor:
    """P S Q^T (m, n) in fp32, of `core` (d, d).

    `dtype` is what the factors of each product are rounded to; sums are in fp32.
    """
    p, q, core = left.dense(dtype), right.dense(dtype), core.to(dtype)
    if left.rows >= right.rows:
        return _product(p, _product(core, q.T).to(dtype))
    return _product(_product(p, core).to(dtype), q.T)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b with fp32 sums and an fp32 result."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        product: Tensor = torch.ops.aten.mm.dtype(a, b, torch.float32)
        return product
    return a.float() @ b.float()


def bias(gradient: Tensor, left: Projector, right: Projector) -> Tensor:
    """b(G) = P P^T G Q Q^T - G, (m, n) in fp32."""
    gradient = gradient.float()
    return decompress(compress(gradient, left, right), left, right).sub_(gradient)


def relative_bias(gradient: Tensor, left: Projector, right: Projector) -> float:
    """||b(G)||_F / ||G||_F; 0 for a gradient that is zero, NaN for one that is not finite.

    Waits for the GPU.
    """
    size = torch.linalg.vector_norm(gradient.float())
    ratio = torch.linalg.vector_norm(bias(gradient, left, right)) / size
    return float(torch.where(size == 0, torch.zeros_like(ratio), ratio))


@dataclass(frozen=True, kw_only=True)
class LearningGradient:
    loss: Tensor
    """||b(G)||_F + beta (||P||_F + ||Q||_F), a scalar on the device."""
    bias_norm: Tensor
    left: Tensor
    """Derivatives with respect to the values of P, (m, r) fp32, and of Q, (n, r)."""
    right: Tensor


def learning_gradient(gradient: Tensor, left: Projector, right: Projector, beta: float) -> LearningGradient:
    """Loss of the learning problem and its derivatives with respect to the projectors' values.

    With E = b / ||b||_F, C = P^T G Q and F = P^T E Q:

        d||b|| / dP = (E Q) C^T + (G Q) F^T         d||b|| / dQ = (E^T P) C + (G^T P) F

    of which the nonzeros' places are kept.
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

    left: Projector
    right: Projector
    bias_before: float
    """Relative bias of the pair that learning began with, and of the pair returned."""
    bias_after: float
    steps: int
    """Adam steps taken."""
    stop: StopReason


def learn(
    gradient: Tensor,
    left: Projector,
    right: Projector,
    *,
    alpha: float,
    beta: float,
    steps: int,
    rate: float,
    time_limit_s: float,
    clock: Callable[[], float],
) -> Learned:
    """Minimise ||b(G)||_F + beta (||P||_F + ||Q||_F) over the values of both projectors by Adam.

    Stops when the relative bias is at most `alpha`, after `steps` steps of learning rate `rate`, or when
    `clock` (seconds) has gone on by `time_limit_s`. The pair returned is the one of smallest bias seen, the
    first pair included. `gradient` must be finite and not zero. Waits for the GPU once a step.
    """
    end_s = clock() + time_limit_s
    target = gradient.float()
    target = target / torch.linalg.vector_norm(target)
    left = replace(left, values=left.values.clone().requires_grad_())
    right = replace(right, values=right.values.clone().requires_grad_())
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
        left=replace(left, values=best[1].detach()),
        right=replace(right, values=best[2].detach()),
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
    """Adam's moments (d, d) in the new subspace: A M B and (A*A) V (B*B), squares elementwise.

    A = P_new^T P_old and B = Q_old^T Q_new (Algorithm 1, lines 8 and 9).
    """
    a = left_new.dense().T @ left_old.dense()
    b = right_old.dense().T @ right_new.dense()
    return a @ moment @ b, a.square() @ variance @ b.square()
