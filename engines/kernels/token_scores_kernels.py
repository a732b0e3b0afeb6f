# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# The compiler of Triton takes annotations of kernels for code, so kernels have none.
"""Triton kernel of `engines.kernels.token_scores`: what a loss needs of a chunk of logits, in one read of
them.

With TRITON_INTERPRET=1 it runs on CPU tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.triton_launch import launch

COLUMNS = 2048
"""Logits per iteration."""


@triton.jit(do_not_specialize=["first", "num_columns"])
def _gather_kernel(
    logits, labels, largest, where, sums, target, first, num_columns, row_stride, COLUMNS: tl.constexpr
):
    """One program per token: folds its logits into the running maximum, sum of exponentials and target."""
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * row_stride
    column = tl.arange(0, COLUMNS)
    top = tl.full((COLUMNS,), -float("inf"), tl.float32)
    place = tl.zeros((COLUMNS,), tl.int32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, num_columns, COLUMNS):
        here = begin + column
        value = tl.load(row + here, mask=here < num_columns, other=-float("inf")).to(tl.float32)
        higher = value > top
        new = tl.where(higher, value, top)
        # Lanes that have seen nothing yet hold -inf: exp(-inf - -inf) would be NaN.
        total = tl.where(total > 0, total * tl.exp(top - new), 0.0) + tl.where(
            value > -float("inf"), tl.exp(value - new), 0.0
        )
        place = tl.where(higher, here, place)
        top = new
    best = tl.max(top, 0)
    chunk_sum = tl.sum(tl.where(total > 0, total * tl.exp(top - best), 0.0), 0)
    # Of equal logits the first, as argmax has it.
    chunk_place = tl.min(tl.where(top == best, place, 2147483647), 0)
    before, sum_before = tl.load(largest + token), tl.load(sums + token)
    overall = tl.maximum(before, best)
    kept = tl.where(sum_before > 0, sum_before * tl.exp(before - overall), 0.0)
    tl.store(sums + token, kept + chunk_sum * tl.exp(best - overall))
    tl.store(largest + token, overall)
    if best > before:
        tl.store(where + token, (first + chunk_place).to(tl.int64))
    label = tl.load(labels + token) - first
    if (label >= 0) & (label < num_columns):
        tl.store(target + token, tl.load(row + label).to(tl.float32))


def gather(
    logits: Tensor, labels: Tensor, first: int, largest: Tensor, where: Tensor, sums: Tensor, target: Tensor
) -> None:
    """Fold (tokens, columns) `logits` of the vocabulary from `first` on into the running values of each
    token.

    `largest`, `sums` (of exp(logit - largest)) and `target` are (tokens,) fp32, `where` and `labels` int64.
    """
    launch(
        _gather_kernel, (labels.numel(),),
        logits, labels, largest, where, sums, target, first, logits.shape[1], logits.stride(0),
        COLUMNS=COLUMNS,
    )  # fmt: skip
