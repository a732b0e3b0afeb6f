"""Seeds derived from a seed and a purpose, so that random streams do not depend on the order of use."""

from __future__ import annotations

import hashlib

MOST_SEED = 2**63 - 1
"""The largest that torch's generators, kernels and update logs all take as it is."""


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that is a function of `seed` and `purpose` alone, the same on every platform."""
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()) >> 1
