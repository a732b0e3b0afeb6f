# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# The compiler of Triton takes annotations of kernels for code, so kernels have none.
"""Triton kernel of `engines.zeroth_order.unit_forward`: layer norm of a stacked batch, each half with
weights of its own.

torch's layer norm takes one set of weights, so it would need two launches and a copy that puts their results
together (EXPERIMENTS.md). With TRITON_INTERPRET=1 it runs on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.triton_launch import launch


@triton.jit(do_not_specialize=["half", "eps"])
def _layer_norm_kernel(
    x, out, weight_plus, bias_plus, weight_minus, bias_minus, half, width, eps, COLUMNS: tl.constexpr
):
    """One program per row. Two passes over the row in registers: mean first, then deviations."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(value, 0) / width
    centred = tl.where(inside, value - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    if row < half:
        weight = tl.load(weight_plus + column, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(bias_plus + column, mask=inside, other=0.0).to(tl.float32)
    else:
        weight = tl.load(weight_minus + column, mask=inside, other=0.0).to(tl.float32)
        bias = tl.load(bias_minus + column, mask=inside, other=0.0).to(tl.float32)
    result = centred * scale * weight + bias
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=inside)


def layer_norm(x: Tensor, plus: tuple[Tensor, Tensor], minus: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """Layer norm over the last dimension of `x` (rows, ..., width), its first half of rows with weight and
    bias of `plus`, its second with those of `minus`, (width,) each. Computed in fp32, rounded once."""
    x = x.contiguous()
    width = x.shape[-1]
    out = torch.empty_like(x)
    num_rows = x.numel() // width
    columns = triton.next_power_of_2(width)
    launch(
        _layer_norm_kernel, (num_rows,), x, out, *plus, *minus, num_rows // 2, width, eps,
        COLUMNS=columns, num_warps=min(16, max(1, columns // 512)),
    )  # fmt: skip
    return out
