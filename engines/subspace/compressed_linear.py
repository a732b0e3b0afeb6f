"""Linear layers whose weight's gradient is compressed where it arises, and never stored.

In y = x W^T the gradient of W is G = dY^T X. Its core S = P^T G Q = (dY P)^T (X Q) needs neither G nor, once
X Q is there, X: what is kept for the backward pass shrinks from (tokens, n) to (tokens, d).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Collector(Protocol):
    """Takes the two factors of one weight's gradient."""

    def keep(self, x: Tensor) -> Tensor:
        """What backward needs of the layer's input `x` (tokens, inputs)."""

    def collect(self, kept: Tensor, gradient: Tensor) -> None:
        """`gradient` is that of the layer's output, (tokens, outputs)."""


def compress_gradient(module: nn.Linear | Conv1D, collector: Collector) -> None:
    """Let `module` hand its weight's gradient to `collector` instead of leaving it in `weight.grad`.

    The weight itself takes no part in autograd any more; the bias does, if it is trained.
    """
    weight: Any = module.weight  # Conv1D is without annotations
    weight.requires_grad_(False)
    vars(module)["forward"] = partial(_forward, module, collector)


def restore(module: nn.Module) -> None:
    """Take back what `compress_gradient` did."""
    vars(module).pop("forward", None)


def _forward(module: nn.Linear | Conv1D, collector: Collector, x: Tensor) -> Tensor:
    weight: Any = module.weight
    bias: Any = module.bias
    stored_transposed = isinstance(module, Conv1D)
    if not torch.is_grad_enabled():
        return _multiply(x, weight, bias, stored_transposed)
    out: Tensor = _Linear.apply(x, weight, bias, collector, stored_transposed)  # type: ignore[no-untyped-call]
    return out


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, stored_transposed: bool) -> Tensor:
    return F.linear(x, weight.T if stored_transposed else weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        collector: Collector,
        stored_transposed: bool,
    ) -> Tensor:
        ctx.collector = collector
        ctx.stored_transposed = stored_transposed
        ctx.save_for_backward(collector.keep(x.reshape(-1, x.shape[-1])), weight)
        out = _multiply(x, weight, bias, stored_transposed)
        # The same memory, but no view of it to autograd: a model may write to it (Longformer scales it).
        plain: Tensor = torch.ops.aten._unsafe_view.default(out, list(out.shape))
        return plain

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight = ctx.saved_tensors
        gradient = gradients[0]
        flat = gradient.reshape(-1, gradient.shape[-1])
        ctx.collector.collect(kept, flat)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ (weight.T if ctx.stored_transposed else weight)
        of_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        return of_x, None, of_bias, None, None
