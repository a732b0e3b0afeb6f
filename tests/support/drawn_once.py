"""Noise of small tensors on the CPU, drawn once for all who ask for it.

Steps without gradients draw it again at each visit of a weight, and tests have two to four engines draw the
same: that was two fifths of their time. What is drawn is a function of its key alone, which
`tests/engines/noise` holds, where it is drawn anew each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engines.noise import weight_pass
from engines.noise.tiles import TileRange

NAMES = ("draw_binomials", "draw_normals", "draw_signs")
MOST_ELEMENTS, MOST_DRAWS = 1 << 13, 1 << 16
"""Of one draw that is kept, and how many are: 3 KiB each, since models of tests are tiny. Tests of different
modules train the same models with the same seed, so that all that a process draws is worth keeping."""
Drawn = tuple[Tensor, Tensor | None]
_kept: dict[Any, Drawn] = {}


def draw(
    name: str, own: Callable[..., Drawn], seed: int, step: int, ranges: Sequence[TileRange],
    device: torch.device, *, uniform: bool,
) -> Drawn:  # fmt: skip
    """What `own`, of this name, gives, for the caller to change."""
    if torch.device(device).type != "cpu" or sum(tiles.count for tiles in ranges) > MOST_ELEMENTS:
        return own(seed, step, ranges, device, uniform=uniform)
    key = (name, seed, step, tuple(ranges), uniform)
    if (found := _kept.get(key)) is None:
        if len(_kept) >= MOST_DRAWS:
            _kept.clear()
        found = _kept[key] = own(seed, step, ranges, device, uniform=uniform)
    noise, bits = found
    return noise.clone(), None if bits is None else bits.clone()


@contextlib.contextmanager
def drawn_once() -> Iterator[None]:
    """Of all engines of this process."""
    originals = {name: getattr(weight_pass, name) for name in NAMES}
    for name, own in originals.items():
        setattr(weight_pass, name, partial(draw, name, own))
    try:
        yield
    finally:
        for name, own in originals.items():
            setattr(weight_pass, name, own)
