"""The leading eigenvectors of many small symmetric matrices at once, by orthogonal iteration.

In place of a batched `eigh`, to which 40 to 70 ms for each projector point on an H200 (first steps of
reports/results/deepseek-coder-*_h200_20261124), and GPU memory outside torch's. All that is used here are
batched products and sums over fp32: no workspace, the same bits in each run on the same device.

Expected cost for `b` matrices h x h: b (8 h^3 + 14 h^2 r + 28 h r^2) floating-point operations, 0.2 GFLOP for
the largest blocks of a 6.7B model (b = 256, h = 43, r = 8), so what counts is the start of some 7 (1 + 8 r)
kernels: 4 ms a call at 8 microseconds each, 1.6 s for the 448 projectors of such a model. Estimated, not
measured.
"""

from __future__ import annotations

import torch
from torch import Tensor

POWERS = (8, 4, 4, 2, 2, 2, 1)
"""Of the matrix in each step: 23 multiplications for 7 orthonormalisations. High powers part eigenvalues that
are nearly equal, but drown small ones in fp32's rounding, below 0.13 of the largest in the eighth; low powers
find those. At least 0.994 of eigh's energy on gradients of a decoder, on spectra that fall as i^-0.5 to i^-3,
and on noise alone, for h from 7 to 172 and r from 4 to 16; with plain steps it would take 16 for that. Those
are sums over a matrix's blocks: one block whose leading eigenvalues are nearly equal may keep less, at worst
0.95 (r = 4) and 0.79 (r = 1) of eigh's in 8,000 blocks of noise each, h up to 33."""

TINY = torch.finfo(torch.float32).tiny

SHIFT = 1e-5
"""Added to diagonals, at a trace of one: directions without energy keep what they begin with. HAZARD: without
it, or with one that is lost in rounding, a column may cancel to zero."""


def leading_vectors(matrices: Tensor, used: Tensor, r: int) -> Tensor:
    """(b, h, r) orthonormal columns that keep most of each of `matrices` (b, h, h), fp32, semidefinite, of
    trace one or zero: tr(V^T A V) is close to the sum of the r largest eigenvalues.

    `used` (b, h) is True for rows that are there; the others are zero in `matrices` and in what is returned.
    Each matrix has at least r. The columns come in about the order of their eigenvalues.
    """
    height = matrices.shape[1]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(height, r, generator=generator).to(matrices.device)
    power, shifted = matrices, {}
    for exponent in (1, 2, 4, 8):
        shifted[exponent] = power.clone()
        shifted[exponent].diagonal(dim1=1, dim2=2).add_(SHIFT * used)
        power = torch.bmm(power, power)
        power = power / power.diagonal(dim1=1, dim2=2).sum(1).clamp_min(TINY)[:, None, None]
    vectors = start * used[:, :, None]
    for exponent in POWERS:
        vectors = _orthonormal(torch.bmm(shifted[exponent], vectors))
    return vectors


def _orthonormal(columns: Tensor) -> Tensor:
    """Gram and Schmidt's, column by column, each twice: once leaves an angle where columns nearly agree."""
    out = torch.empty_like(columns)
    for k in range(columns.shape[2]):
        column = _unit(columns[:, :, k : k + 1])
        if k > 0:
            before = out[:, :, :k]
            for _ in range(2):
                column = _unit(torch.baddbmm(column, before, before.transpose(1, 2) @ column, alpha=-1.0))
        out[:, :, k : k + 1] = column
    return out


def _unit(column: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(column, dim=1, keepdim=True)
    unit: Tensor = column / norm.clamp_min(TINY)
    return unit
