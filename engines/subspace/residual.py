"""What projectors leave out of a gradient, as a step of its own.

LSP-Offload (2406.10181) drops G - P P^T G Q Q^T. Fira (2410.01623) does not, for one projector a matrix: it
takes a step along it too, of the length that Adam gives to what is kept, without any state for it. Here, for
two:

    R = G - P S Q^T with S = P^T G Q        W <- W - lr share (||dS|| / ||S||) R

dS is on the host while R is there, so that the ratio is that of the step before: no waiting, and 0 in the
first step. R is on the GPU for the time of its block's backward pass alone, and nothing of it goes over the
link. It has no momentum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.settings.lsp import LspSettings
from engines.subspace.apply import apply_delta
from engines.subspace.projector import Projector, decompress
from engines.subspace.subspaces import Subspace


@dataclass(kw_only=True, eq=False)
class Residual:
    """That of one matrix. Its tensors stay where they are: CUDA graphs know their places."""

    share: float
    left_out: Tensor
    """(m, n) of the weights' dtype: R, from `finish` on its step. Matrices of other blocks take turns on it.

    HAZARD: it is applied on the stream of the backward pass before the next block's writes to it.
    """
    ratio: Tensor
    """(1,) fp32: ||dS|| / ||S|| of the last update."""
    core_norm: Tensor
    """(1,) fp32: ||S||.

    HAZARD: it must not change before the core's update has been applied, which the block's next forward waits
    for.
    """

    def take(self, gradient: Tensor, core: Tensor, left: Projector, right: Projector, *, adds: bool) -> None:
        """What `core` (d, d) leaves out of `gradient` (m, n); it `adds` to what came in this pass before."""
        found = gradient - decompress(core.contiguous(), left, right)
        if adds:
            self.left_out.add_(found)
        else:
            self.left_out.copy_(found)

    def finish(self, core: Tensor | None) -> None:
        """The block's backward pass is over: `core` is whole, or there is no gradient. May be captured."""
        if core is None:
            self.left_out.zero_()
            return
        self.core_norm.copy_(torch.linalg.vector_norm(core, dtype=torch.float32))
        self.left_out.mul_(self.ratio * self.share)
        # As with the core: what is not finite changes no weight.
        self.left_out.masked_fill_(~self.core_norm.isfinite(), 0.0)

    def follow(self, direction: Tensor) -> None:
        """Adam has made `direction` (d, d) of the core."""
        length = torch.linalg.vector_norm(direction, dtype=torch.float32)
        self.ratio.copy_(torch.where(self.core_norm > 0, length / self.core_norm, 0.0))

    def apply(self, weight: Tensor, rate: float, settings: LspSettings, key: int) -> None:
        """Move `weight` (m, n). `key`, 32 bits, seeds the rounding; decay comes with the core's update."""
        apply_delta(weight, self.left_out, rate, settings, key)


def make_residual(share: float, shape: torch.Size, left_out: Tensor) -> Residual:
    """For a matrix of `shape` (m, n); `left_out` is a buffer for the largest matrix at its place in a
    block."""
    rows, columns = shape
    device = left_out.device
    return Residual(
        share=share,
        left_out=left_out[: rows * columns].view(rows, columns),
        ratio=torch.zeros(1, device=device),
        core_norm=torch.zeros(1, device=device),
    )


def residual_buffers(
    subspaces: Sequence[Sequence[Subspace]], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """(elements,) of the weights' dtype for each place in a block, as the largest matrix there needs."""
    places = max(len(members) for members in subspaces)
    sizes = [
        max(members[place].weight.numel() for members in subspaces if place < len(members))
        for place in range(places)
    ]
    return [torch.zeros(size, dtype=dtype, device=device) for size in sizes]
