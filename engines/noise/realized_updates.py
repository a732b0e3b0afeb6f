"""How much of an update survives the rounding to the dtype of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from engines.noise import weight_pass
from engines.noise.tiles import one
from engines.noise.visits import Outputs, Visit

CHUNK = 1 << 20
SAMPLE = 1 << 24
"""Elements of which the fraction is measured: enough for 1 % at updates of 1e-7 in bf16."""


def realized_fraction(weight: Tensor, number: int, how: Visit) -> float | None:
    """Fraction of the wanted change that the updates of `how` make to `weight`: its projection,

    <rounded change, wanted change> / <wanted change, wanted change>, on up to `SAMPLE` elements. 1: all of
    it; 0: all was lost in rounding, which may also bring it a little beyond either. Nothing is written.

    `weight` is of any shape, in fp32, bf16 or fp16, and `number` its part of the noise key. `None` without an
    update or a change.
    """
    if how.first == how.last:
        return None
    sample = weight.view(-1)[:SAMPLE]
    realized = norm = 0.0
    for start in range(0, sample.numel(), CHUNK):  # in chunks: it must not be the run's peak
        before = sample[start : start + CHUNK]
        exact = before.float()
        segment = one(number, before.numel(), decays=weight.dim() >= 2)
        stored, wanted = torch.empty_like(before), torch.empty_like(exact)
        weight_pass.visit(before, segment, how, Outputs(theta=stored), start=start)
        weight_pass.visit(exact, segment, how, Outputs(theta=wanted), start=start)
        change = wanted.double() - exact.double()
        realized += float(((stored.double() - exact.double()) * change).sum())
        norm += float(change.square().sum())
    return realized / norm if norm > 0.0 else None
