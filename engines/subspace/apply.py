"""Applying a core to its weight: W <- W (1 - lr wd) - lr P dS Q^T.

LSP-Offload (2406.10181), Algorithm 1, lines 16 and 17.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.kernels.triton_launch import has_triton
from engines.noise.stochastic_rounding import is_dithered, updated
from engines.settings.lsp import LspSettings
from engines.subspace.projector import BlockProjector, decompress
from engines.subspace.subspaces import Subspace


def apply_core(
    subspace: Subspace,
    weight: Tensor,
    core: Tensor,
    rate: float,
    settings: LspSettings,
    key: int,
    numbers: Tensor | None = None,
) -> None:
    """Move `weight` (m, n), which may be another than the subspace's, by `core` (d, d) of its dtype.

    `key`, 32 bits, seeds the rounding: the same one gives the same bits. `numbers`: what `kernel_numbers`
    gives for this key, where it lies on the weight's device already.
    """
    left, right, decay = subspace.left, subspace.right, decay_of(rate, settings)
    if is_one_kernel(subspace) and isinstance(left, BlockProjector) and isinstance(right, BlockProjector):
        from engines.subspace import projector_kernels

        if numbers is None:
            numbers = torch.from_numpy(kernel_numbers([key], rate, decay)[0]).to(weight.device)
        dither = is_dithered(weight.dtype, settings.rounding)
        projector_kernels.block_update(weight, core, left.values, right.values, numbers, dither=dither)
    else:
        _move(weight, decompress(core, left, right), rate, decay, settings, key)


def is_one_kernel(subspace: Subspace) -> bool:
    """Whether a core of `subspace` is applied to its weight by one kernel."""
    block_diagonal = isinstance(subspace.left, BlockProjector) and isinstance(subspace.right, BlockProjector)
    return _takes_kernel(subspace.weight) and block_diagonal


def kernel_numbers(keys: Sequence[int], rate: float, decay: float) -> NDArray[np.int32]:
    """(keys, 4): what `projector_kernels.block_update` is told of a step, for each key."""
    numbers = np.zeros((len(keys), 4), dtype=np.int32)
    numbers[:, :2] = np.array([rate, decay], dtype=np.float32).view(np.int32)
    numbers[:, 2] = np.array(keys, dtype=np.uint32).view(np.int32)
    return numbers


def decay_of(rate: float, settings: LspSettings) -> float:
    """What a step at that rate leaves of a weight before its update."""
    return 1.0 - rate * settings.weight_decay


def apply_delta(weight: Tensor, delta: Tensor, rate: float, settings: LspSettings, key: int) -> None:
    """Move `weight` (m, n) by minus `rate` times `delta`, of its shape and dtype, without decay."""
    _move(weight, delta, rate, 1.0, settings, key)


def _move(weight: Tensor, delta: Tensor, rate: float, decay: float, settings: LspSettings, key: int) -> None:
    """weight <- round(weight decay - rate delta), of one shape (m, n)."""
    if not _takes_kernel(weight):
        updated(weight, delta, rate, decay, settings.rounding, key)
        return
    from engines.subspace import projector_kernels

    dither = is_dithered(weight.dtype, settings.rounding)
    projector_kernels.plain_update(weight, delta.contiguous(), rate, decay, key, dither=dither)


def _takes_kernel(weight: Tensor) -> bool:
    return weight.is_cuda and has_triton()


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
