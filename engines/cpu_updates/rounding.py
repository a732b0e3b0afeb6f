"""Rounding fp32 to bf16 on the CPU by chance, by torch's and numpy's operations, as `cpu_adam.c` does it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NEXT_UPDATE = 0x9E3779B9
"""What the key of the noise grows by from one update to the next."""


def noise_key(seed: int, block: int, chunk: int) -> int:
    """32 bits, another for each chunk of a block: of the noise of its first update."""
    return (0x85EBCA6B * (seed + 1) + 0xC2B2AE35 * (4096 * block + chunk)) & 0xFFFFFFFF


def noise(key: int, begin: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """32 bits for each of `count` elements from number `begin` on: the end of MurmurHash3."""
    x = np.arange(begin, begin + count, dtype=np.uint32) ^ np.uint32(key)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def low_half(bits: Tensor) -> Tensor:
    """(n,) int16 of (n,) int32."""
    return bits.bitwise_and(0xFFFF).to(torch.int32).view(torch.int16)[::2]


def keep_by_chance(kept: Tensor, value: Tensor, drawn: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> None:
    """Leave `value` (n,) fp32 in `kept` (n,) bf16, rounded up or down, more often to the nearer."""
    raised = value.view(torch.int32) + torch.from_numpy((drawn & 0xFFFF).view(np.int32))
    kept.view(torch.int16).copy_(low_half(raised >> 16))
