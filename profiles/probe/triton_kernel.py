# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# The compiler of Triton takes annotations of kernels for code, so kernels have none.
"""A kernel that does next to nothing, to time its launch. Imports Triton, which needs a GPU to be of use."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_one(values, COUNT: tl.constexpr):
    """`values` (float32, `COUNT` of them, a power of two) plus one."""
    places = values + tl.arange(0, COUNT)
    tl.store(places, tl.load(places) + 1.0)
