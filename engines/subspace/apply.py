"""Applying a core to its weight: W <- W (1 - lr wd) - lr P dS Q^T.

LSP-Offload (2406.10181), Algorithm 1, lines 16 and 17.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engines.kernels.triton_launch import has_triton
from engines.noise.stochastic_rounding import updated
from engines.settings.lsp import LspSettings
from engines.subspace.bias_check import Subspace
from engines.subspace.projector import BlockProjector, decompress


def apply_core(
    subspace: Subspace, weight: Tensor, core: Tensor, rate: float, settings: LspSettings, key: int
) -> None:
    """Move `weight` (m, n), which may be another than the subspace's, by `core` (d, d) of its dtype.

    `key`, 32 bits, seeds the rounding: the same one gives the same bits.
    """
    decay = 1.0 - rate * settings.weight_decay
    dither = settings.rounding == "stochastic" and weight.dtype == torch.bfloat16
    left, right = subspace.left, subspace.right
    if not (weight.is_cuda and has_triton()):
        updated(weight, decompress(core, left, right), rate, decay, settings.rounding, key)
        return
    from engines.subspace import projector_kernels

    if isinstance(left, BlockProjector) and isinstance(right, BlockProjector):
        projector_kernels.block_update(weight, core, left.values, right.values, rate, decay, dither, key)
    else:
        delta = decompress(core, left, right).contiguous()
        projector_kernels.plain_update(weight, delta, rate, decay, dither, key)


def apply_delta(weight: Tensor, delta: Tensor, rate: float, settings: LspSettings, key: int) -> None:
    """Move `weight` (m, n) by minus `rate` times `delta`, of its shape and dtype, without decay."""
    if not (weight.is_cuda and has_triton()):
        updated(weight, delta, rate, 1.0, settings.rounding, key)
        return
    from engines.subspace import projector_kernels

    dither = settings.rounding == "stochastic" and weight.dtype == torch.bfloat16
    projector_kernels.plain_update(weight, delta, rate, 1.0, dither, key)


def realized_of_core(
    subspace: Subspace, moved: Tensor, core: Tensor, rate: float, settings: LspSettings
) -> float | None:
    """How much of the wanted update is in `moved`, the weight (m, n) after `core` was applied to it.

    `None` for an update of nothing.
    """
    wanted = decompress(core, subspace.left, subspace.right).float().mul_(-rate)
    wanted.sub_(subspace.weight.float() * (rate * settings.weight_decay))
    change = moved.float() - subspace.weight.float()
    size = wanted.square().sum()
    return float(change.mul_(wanted).sum() / size) if float(size) > 0 else None
