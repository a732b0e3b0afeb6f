"""The few lengths that batches are padded to. Imports no torch.

Every length is a shape of its own, for which CUDA graphs are captured and kernels are chosen, so there are
seven of them at most, multiples of 8 as tensor cores take them.
"""

from __future__ import annotations

MULTIPLE = 8
_SHARES = ((1, 8), (3, 16), (1, 4), (3, 8), (1, 2), (3, 4))


def padded_lengths(seq_len: int) -> tuple[int, ...]:
    """The lengths that batches are padded to, ascending, `seq_len` the last of them. Each is at most half as
    long again as the one before, but for the first."""
    steps = {-(-seq_len * part // (whole * MULTIPLE)) * MULTIPLE for part, whole in _SHARES}
    return (*sorted(step for step in steps if 2 * MULTIPLE <= step < seq_len), seq_len)


def padded_length(longest: int, seq_len: int) -> int:
    """The shortest of `padded_lengths` that holds `longest` tokens."""
    return next(length for length in padded_lengths(seq_len) if length >= longest)
