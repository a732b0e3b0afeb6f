"""Philox's rounds and Box and Muller's transform for small tensors on a CPU, by NumPy.

The operations of `engines.noise.philox` in the same order, and so its bits, at two fifths of what calls of
torch cost. NumPy has one thread and torch several: large tensors stay with torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engines.noise.philox_constants import (
    COS_C,
    LOG_Q,
    MINUS_2_LN_2,
    MULTIPLIERS,
    ROOT_BITS,
    SIN_S,
    SQRT_HALF_BITS,
)

MOST_LANES = 1 << 13
"""Of one call by NumPy."""

_F32 = npt.NDArray[np.float32]
_HALF, _WORD = np.uint64(32), np.uint64(0xFFFFFFFF)
_FIRST, _SECOND = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])


def philox_rounds(even: Tensor, odd: Tensor, keys: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Words 0 and 2, and words 1 and 3, after a round under each of `keys`, two words each: (2, n) int64 of
    32-bit words, of counters that are overwritten."""
    words, passed = even.numpy().view(np.uint64), odd.numpy().view(np.uint64)
    product = np.empty_like(words)
    for low, high in keys:
        np.multiply(words[1], _SECOND, out=product[0])
        np.multiply(words[0], _FIRST, out=product[1])
        np.right_shift(product, _HALF, out=words)
        np.bitwise_xor(words, passed, out=words)
        np.bitwise_xor(words[0], np.uint64(low), out=words[0])
        np.bitwise_xor(words[1], np.uint64(high), out=words[1])
        np.bitwise_and(words, _WORD, out=words)
        passed, product = product, passed
    np.bitwise_and(passed, _WORD, out=passed)
    return even, torch.from_numpy(passed.view(np.int64))


def bits_set(words: Tensor) -> Tensor:
    """How many bits of each word are 1: int64."""
    return torch.from_numpy(np.bitwise_count(words.numpy())).to(torch.int64)


def transform_to_normals(even: Tensor, odd: Tensor) -> Tensor:
    """Normals of (2, n) int64 words each, which are overwritten: (4, n) fp32, by word."""
    uniform, turn = even.numpy(), odd.numpy()
    uniform >>= 8
    uniform += 1
    bits = uniform.astype(np.float32).view(np.int32)
    bits -= np.int32(SQRT_HALF_BITS)
    exponent = ((bits >> 23) - np.int32(24)).astype(np.float32)
    bits &= np.int32(0x7FFFFF)
    bits += np.int32(SQRT_HALF_BITS)
    f = bits.view(np.float32)
    f -= np.float32(1.0)
    square = _horner(LOG_Q, f)
    square *= f
    square += np.float32(-2.0)
    square *= f
    exponent *= np.float32(MINUS_2_LN_2)
    square += exponent
    half = square * np.float32(0.5)
    root = (np.int32(ROOT_BITS) - (square.view(np.int32) >> 1)).view(np.float32)
    for _ in range(2):
        newer = half * root
        newer *= root
        newer *= np.float32(-1.0)
        newer += np.float32(1.5)
        newer *= root
        root = newer
    square *= root  # now the radius

    angle = turn.astype(np.int32)
    sign = square.view(np.int32)
    sign ^= angle & np.int32(-0x80000000)
    angle <<= 1
    angle >>= 8
    w = angle.astype(np.float32)
    w *= np.float32(2.0**-24)
    of_angle = w * w
    sine = _horner(SIN_S, of_angle)
    sine *= w
    z = np.empty((2, 2, even.shape[1]), np.float32)
    np.multiply(square, _horner(COS_C, of_angle), out=z[:, 0])
    np.multiply(square, sine, out=z[:, 1])
    return torch.from_numpy(z).view(4, -1)


def _horner(coefficients: Sequence[float], x: _F32) -> _F32:
    value = x * np.float32(coefficients[-1])
    for coefficient in coefficients[-2:0:-1]:
        value += np.float32(coefficient)
        value *= x
    value += np.float32(coefficients[0])
    return value
