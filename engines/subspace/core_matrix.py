"""How a gradient is compressed: one weight matrix, what its forward pass keeps, and its core.

Where cores lie, on the GPU and on the host, is in `engines.subspace.cores`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engines.settings.lsp_layout import forms_gradient
from engines.shapes import Workload
from engines.subspace.projector import compress
from engines.subspace.residual import Residual, make_residual
from engines.subspace.subspaces import Subspace


class Calibrator(Protocol):
    """Says when gradients are formed to test the projectors, and tests them."""

    calibrates: bool
    """The backward pass under way tests the bias of every matrix."""

    def check(self, matrix: CoreMatrix, gradient: Tensor) -> None:
        """Test the pair on this gradient (m, n), before its core is made."""


@dataclass(kw_only=True, eq=False)
class CoreMatrix:
    """A weight matrix in its subspace, and where its core lies. An
    `engines.subspace.compressed_linear.Collector`."""

    calibrator: Calibrator
    subspace: Subspace
    forms_gradient: bool
    """G is formed and compressed, which costs less than compressing its factors."""
    core: Tensor
    """(d, d) on the GPU, in its block's slot: the compressed gradient, of the weights' dtype."""
    sum: Tensor | None
    """(d, d) fp32: the sum over micro-batches, if there are several."""
    residual: Residual | None
    """What the core leaves out takes a step too."""
    offset: int
    """Of its core, in elements, in its chunk."""
    is_collected: bool = False
    """The core holds gradient of the backward pass under way."""

    def of(self, chunk: Tensor) -> Tensor:
        """Its part, (d, d), of what a chunk holds, (elements,)."""
        d = self.subspace.d
        return chunk[self.offset : self.offset + d * d].view(d, d)

    @property
    def kept_width(self) -> int | None:
        """Columns of what `keep` gives in a step that tests no projector; `None`: its input."""
        return None if self.forms_gradient else self.subspace.d

    def keep(self, x: Tensor) -> Tensor:
        """What the forward pass keeps of its input (tokens, in): it, or its compression (tokens, d)."""
        if self.forms_gradient or self.calibrator.calibrates:
            return x
        subspace = self.subspace
        return (subspace.left if subspace.inputs_are_rows else subspace.right).project(x)

    @torch.no_grad()
    def collect(self, kept: Tensor, gradient: Tensor) -> None:
        """S = (dY P)^T (X Q), (d, d), of dY (tokens, out); with P and Q swapped where W^T is stored."""
        subspace = self.subspace
        whole = self.forms_gradient or self.calibrator.calibrates
        if not whole:
            gradient = (subspace.right if subspace.inputs_are_rows else subspace.left).project(gradient)
        above, across = (kept, gradient) if subspace.inputs_are_rows else (gradient, kept)
        if whole:
            formed = above.T @ across
            if self.calibrator.calibrates:
                self.calibrator.check(self, formed)
            core = compress(formed, subspace.left, subspace.right)
            if self.residual is not None:
                self.residual.take(formed, core, subspace.left, subspace.right, adds=self.is_collected)
            self._take(core)
        elif self.sum is not None and above.is_cuda and above.dtype != torch.float32:
            self._take(torch.ops.aten.mm.dtype(above.T, across, torch.float32))
        elif self.sum is None and not self.is_collected:
            torch.mm(above.T, across, out=self.core)
            self.is_collected = True
        else:
            self._take(above.T @ across)

    def _take(self, core: Tensor) -> None:
        if self.sum is not None:
            self.sum.add_(core)
        elif self.is_collected:
            self.core.add_(core)
        else:
            self.core.copy_(core)
        self.is_collected = True

    def finish(self) -> None:
        """The backward pass of the block is over."""
        if self.sum is not None:
            self.core.copy_(self.sum)
        elif not self.is_collected:
            self.core.zero_()
        if self.residual is not None:
            self.residual.finish(self.core if self.is_collected else None)


def core_matrices(
    subspaces: Sequence[Subspace],
    core: Tensor,
    sums: Tensor | None,
    calibrator: Calibrator,
    workload: Workload,
    residual: float,
    buffers: Iterator[Tensor],
) -> list[CoreMatrix]:
    """Of a chunk, whose cores lie one after the other in `core` (elements,), and their sums in `sums`. Each
    takes the next of `buffers` for what `residual`, if any, steps along."""
    offset, found = 0, []
    for each in subspaces:
        d, rows, columns = each.d, each.left.rows, each.right.rows
        found.append(
            CoreMatrix(
                calibrator=calibrator,
                subspace=each,
                forms_gradient=residual > 0 or forms_gradient(rows, columns, d, workload),
                core=core[offset : offset + d * d].view(d, d),
                sum=None if sums is None else sums[offset : offset + d * d].view(d, d),
                residual=make_residual(residual, each.weight.shape, next(buffers)) if residual else None,
                offset=offset,
            )
        )
        offset += d * d
    return found


class IdleMatrixWarning(UserWarning):
    """A matrix in a subspace took no part in a step."""


def warn_of_idle(matrices: Iterable[CoreMatrix]) -> None:
    """Name those of which the step that has ended collected no gradient."""
    idle = [each.subspace.name for each in matrices if not each.is_collected]
    if idle:
        names = f"{idle[0]} and {len(idle) - 1} more" if len(idle) > 1 else idle[0]
        warnings.warn(
            f"no gradient was collected of {names}: lsp does not train a weight that the model uses without "
            "calling its layer (an expert without tokens waits for some); use native where it matters",
            IdleMatrixWarning,
            stacklevel=3,
        )
