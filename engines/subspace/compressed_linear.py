"""Linear layers whose weight's gradient is compressed where it arises, and never stored.

In y = x W^T the gradient of W is G = dY^T X. Its core S = P^T G Q = (dY P)^T (X Q) needs neither G nor, once
X Q is there, X: what is kept for the backward pass shrinks from (tokens, n) to (tokens, d).
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any, Protocol, cast

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


def compress_gradient(module: nn.Linear | Conv1D, collector: Collector, width: int | None) -> None:
    """Let `module` hand its weight's gradient to `collector` instead of leaving it in `weight.grad`.

    The weight itself takes no part in autograd any more; the bias does, if it is trained. `width` is that of
    what `collector` keeps of the input, in regions that are compiled; `None`: the input itself.
    """
    weight: Any = module.weight  # Conv1D is without annotations
    weight.requires_grad_(False)
    number = next(_numbers)
    _collectors[number] = collector
    own = vars(module)
    own["_compressed"] = _Compressed(collector, width, isinstance(module, Conv1D))
    # A tensor and not a number: a number would be part of the compiled code, which all blocks share.
    module.register_buffer("compressed_number", torch.tensor(number), persistent=False)
    kind: Any = type(module)
    module.__class__ = _compressing(kind)


def restore(module: nn.Module) -> None:
    """Take back what `compress_gradient` did."""
    if vars(module).pop("_compressed", None) is not None:
        module.__class__ = type(module).__mro__[1]
        _collectors.pop(int(cast(Tensor, module._buffers.pop("compressed_number"))))


@cache
def _compressing(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` with another forward. A class, which compiled code may be shared by: a `forward` of each
    module's own would be a region of its own."""
    return type(f"Compressing{kind.__name__}", (kind,), {"forward": _forward})


class _Compressed:
    """How a module compresses."""

    def __init__(self, collector: Collector, width: int | None, stored_transposed: bool) -> None:
        self.collector = collector
        self.width = width
        self.stored_transposed = stored_transposed


_numbers = itertools.count()
_collectors: dict[int, Collector] = {}
"""By the number that a module's buffer holds: compiled code reaches them by it."""


def _forward(module: nn.Linear | Conv1D, x: Tensor) -> Tensor:
    how: _Compressed = vars(module)["_compressed"]
    weight: Any = module.weight
    bias: Any = module.bias
    if not torch.is_grad_enabled():
        return _multiply(x, weight, bias, how.stored_transposed)
    if torch.compiler.is_compiling():
        number: Any = module.compressed_number
        return _traced(x, weight, bias, number, how.width, how.stored_transposed)
    arguments = (x, weight, bias, how.collector, how.stored_transposed)
    return cast(Tensor, _Linear.apply(*arguments))  # type: ignore[no-untyped-call]


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, stored_transposed: bool) -> Tensor:
    return F.linear(x, weight.T if stored_transposed else weight, bias)


class _Linear(torch.autograd.Function):
    """y = x W^T + b for x (..., in): hands dY (tokens, out) to the collector in place of forming dW."""

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


# In compiled code: operations, and no autograd function, whose products a recomputed region would keep.


def _traced(
    x: Tensor, weight: Tensor, bias: Tensor | None, number: Tensor, width: int | None, stored_transposed: bool
) -> Tensor:
    """`_Linear` for the compiler, as three operations: what is kept, the product, what is collected."""
    flat = x.reshape(-1, x.shape[-1])
    kept = flat.detach() if width is None else torch.ops.lspzo.keep(flat.detach(), number, width)
    y = torch.ops.lspzo.multiply(flat, kept, weight, bias, number, stored_transposed)
    return cast(Tensor, y.reshape(*x.shape[:-1], y.shape[-1]))


@torch.library.custom_op("lspzo::keep", mutates_args=())
def _keep(x: Tensor, number: Tensor, width: int) -> Tensor:
    """What the collector of that number keeps of `x` (tokens, inputs): (tokens, width)."""
    return _collectors[int(number)].keep(x)


@_keep.register_fake
def _(x: Tensor, number: Tensor, width: int) -> Tensor:
    return x.new_empty(x.shape[0], width)


@torch.library.custom_op("lspzo::multiply", mutates_args=())
def _multiply_op(
    x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor | None, number: Tensor, stored_transposed: bool
) -> Tensor:
    """The layer's output, (tokens, outputs), of `x` (tokens, inputs); `kept` is for its backward pass."""
    return _multiply(x, weight, bias, stored_transposed)


@_multiply_op.register_fake
def _(
    x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor | None, number: Tensor, stored_transposed: bool
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if stored_transposed else 0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, kept, weight, bias, number, stored_transposed = inputs
    ctx.stored_transposed = stored_transposed
    ctx.has_bias = bias is not None
    ctx.save_for_backward(kept, weight, number)


def _back(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    kept, weight, number = ctx.saved_tensors
    # HAZARD: the compiler drops an operation whose result nobody uses, so this one gives the input's
    # gradient, and has collected the weight's by then.
    of_x = torch.ops.lspzo.collect(gradient, kept, weight, number, ctx.stored_transposed)
    of_bias = gradient.sum(0) if ctx.has_bias and ctx.needs_input_grad[3] else None
    return of_x, None, None, of_bias, None, None


_multiply_op.register_autograd(_back, setup_context=_save)


@torch.library.custom_op("lspzo::collect", mutates_args=())
def _collect(
    gradient: Tensor, kept: Tensor, weight: Tensor, number: Tensor, stored_transposed: bool
) -> Tensor:
    """Let the collector take the weight's gradient; that of the input, (tokens, inputs)."""
    _collectors[int(number)].collect(kept, gradient)
    return gradient @ (weight.T if stored_transposed else weight)


@_collect.register_fake
def _(gradient: Tensor, kept: Tensor, weight: Tensor, number: Tensor, stored_transposed: bool) -> Tensor:
    return gradient.new_empty(gradient.shape[0], weight.shape[0 if stored_transposed else 1])
