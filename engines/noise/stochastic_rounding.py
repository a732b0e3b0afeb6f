"""Updates of weights, rounded once to the weights' dtype, stochastically where nearest rounding would lose
them.

bf16 keeps 8 bits: an update of less than 1/512 of a weight is lost whole by rounding to nearest. Rounded up
with the probability that is the distance to the neighbour below, in units of the distance of the neighbours,
the expectation of the stored weight is the wanted one.

The random bits are a hash of (key, element): the 32-bit finalizer of MurmurHash3 (Appleby, public domain),
whose every output bit depends on every input bit. Torch operations and the Triton kernel
(`engines.subspace.projector_kernels`) give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engines.noise.weight_pass import dither
from engines.settings.checks import Rounding

GOLDEN = 0x9E3779B1
"""Odd, near 2^32 over the golden ratio: neighbours' hashes start far apart."""
MIX_1, MIX_2 = 0x85EBCA6B, 0xC2B2AE35
_WORD = 0xFFFFFFFF


def is_dithered(dtype: torch.dtype, rounding: Rounding) -> bool:
    """Whether weights of `dtype` are rounded stochastically: bf16 alone loses updates."""
    return rounding == "stochastic" and dtype == torch.bfloat16


def updated(weight: Tensor, delta: Tensor, rate: float, decay: float, rounding: Rounding, key: int) -> None:
    """weight <- round(weight decay - rate delta), in fp32 up to the rounding, by torch operations.

    `weight` (bf16 or fp32) and `delta` have one shape, any; `key` (32 bits) names the tensor and the step.
    """
    value = (weight.float() * decay).sub_(delta.float() * rate)
    if is_dithered(weight.dtype, rounding):
        value = dithered(value, key)
    weight.copy_(value)


def dithered(value: Tensor, key: int) -> Tensor:
    """fp32 `value`, of any shape, rounded stochastically to what bf16 can hold, as fp32 of that shape."""
    element = torch.arange(value.numel(), device=value.device).view(value.shape)
    uniform = (random_words(element, key) >> 16).to(torch.int32)
    return dither(value.contiguous(), uniform, torch.bfloat16)


def random_words(element: Tensor, key: int) -> Tensor:
    """32 random bits for each `element` (int64, any shape), as int64 of that shape."""
    word = (element * GOLDEN + key) & _WORD
    word = ((word ^ (word >> 16)) * MIX_1) & _WORD
    word = ((word ^ (word >> 13)) * MIX_2) & _WORD
    return word ^ (word >> 16)
