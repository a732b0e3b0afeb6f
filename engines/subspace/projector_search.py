"""How well a pair of projectors keeps a gradient, and finding a pair that keeps it better.

LSP-Offload (2406.10181), Algorithm 1; `engines.subspace.projector` has the notation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from engines.subspace.projector import (
    BlockProjector,
    Projector,
    SparseProjector,
    block_rows,
    compress,
    count_blocks,
    decompress,
    in_blocks,
)
from engines.subspace.subspace_iteration import leading_vectors

StopReason = Literal["alpha", "steps", "timeout", "closed_form", "redrawn"]


def bias(gradient: Tensor, left: Projector, right: Projector) -> Tensor:
    """b(G) = P P^T G Q Q^T - G, (m, n) in fp32."""
    gradient, left, right = gradient.float(), left.cast(torch.float32), right.cast(torch.float32)
    return decompress(compress(gradient, left, right).contiguous(), left, right).sub_(gradient)


def relative_bias(gradient: Tensor, left: Projector, right: Projector) -> float:
    """||b(G)||_F / ||G||_F of `gradient` (m, n); 0 for one that is zero, NaN for one that is not finite.

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
    energy that such vectors keep (`engines.subspace.subspace_iteration`). `gradient` must be finite. Raises
    `ValueError` if r does not divide d or d is larger than m or n.
    """
    gradient = gradient.float()
    left = _rows_projector(gradient, d, r)
    return left, _rows_projector(left.project(gradient.T), d, r)


def _rows_projector(gradient: Tensor, d: int, r: int) -> BlockProjector:
    """The projector of the rows of `gradient` (rows, t), fp32."""
    places = block_rows(gradient.shape[0], count_blocks(gradient.shape[0], r, d)).to(gradient.device)
    used = places >= 0
    # Squares of small gradients underflow: a block is brought to a largest entry, then its Gram matrix to a
    # trace, of one.
    tiny = torch.finfo(gradient.dtype).tiny
    parts = in_blocks(gradient, places)
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
    """Loss of the learning problem for G (m, n), its derivatives by the values of P (m, r) and Q (n, r).

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
    first pair included. `gradient` (m, n) must be finite and not zero. Waits for the GPU once a step.
    """
    end_s = clock() + time_limit_s
    target = gradient.float()
    target = target / torch.linalg.vector_norm(target)
    left, right = (each.with_values(each.values.clone().requires_grad_()) for each in (left, right))
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
