"""What a zeroth-order step does to a weight, in one pass over it, with noise that is made where it is needed.

`visit`, z being the noise of the tensor (`engines.philox`):

    w <- round(w - lr (g z_s + wd w))      for each pending update, z_s being the noise of its step s
    theta = w,   plus = w + eps z,   minus = w - eps z

`round` is to the weights' dtype, by default stochastic: up with the probability that is the distance to the
neighbour below, in units of the distance of the neighbours. The expectation of a rounded weight is then the
weight, so that updates far below half a unit in the last place arrive (nearest rounding loses them whole).
fp32 is rounded to nearest; its unit is small enough.

With `noise="rademacher"` z is a sign, the perturbation of SPSA (Spall, IEEE Trans. Automatic Control 37(3),
1992), and E z z^T = I as well.

Two implementations: torch operations for any device, and Triton kernels (`engines.noise_kernels`) for CUDA,
which give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from engines.base import Update
from engines.philox import draw_normals, draw_signs, normals_at, signs_at
from engines.segments import CHUNK_LANES, LANES, TILE, Piece, Segment, chunks, scatter
from engines.settings import MOST_PENDING

Rounding = Literal["stochastic", "nearest"]
Noise = Literal["gaussian", "rademacher"]

LOG_CAPACITY = MOST_PENDING
"""Updates that can be pending at once."""

FP16_NORMAL = 2.0**-14
"""Smallest normal number of fp16."""


class UpdateLog:
    """The latest updates, by position from 0, where the kernels can read them: on the device.

    Rates are kept in fp32, in which the arithmetic is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.length = 0
        self._updates: list[Update | None] = [None] * LOG_CAPACITY
        self.table = torch.zeros((LOG_CAPACITY, 4), dtype=torch.int32, device=device)
        """Row: number of the noise, then the bits of learning rate, coefficient and weight decay."""
        self._staging = torch.zeros((LOG_CAPACITY, 4), dtype=torch.int32)
        self._copied: list[Any] = []
        """When the latest rows of either half have been copied."""
        if device.type == "cuda":
            self._staging = self._staging.pin_memory()
            self._copied = [torch.cuda.Event(blocking=True) for _ in range(2)]  # type: ignore[no-untyped-call]

    def append(self, update: Update) -> None:
        row = self.length % LOG_CAPACITY
        half, place = divmod(row, LOG_CAPACITY // 2)
        if self._copied and place == 0:
            # HAZARD: rows are copied behind the host's back, and a replay waits for nothing in between.
            self._copied[half].synchronize()
        rates = (update.learning_rate, update.coefficient, update.weight_decay)
        self._updates[row] = update
        self._staging[row, 0] = update.draw - (1 << 32 if update.draw >> 31 else 0)
        for column, rate in enumerate(rates, 1):
            # c_float takes what is beyond fp32 to infinity, which then shows as a loss that is not finite.
            self._staging[row, column] = int.from_bytes(bytes(c_float(rate)), "little", signed=True)
        self.table[row].copy_(self._staging[row], non_blocking=True)
        if self._copied and place == LOG_CAPACITY // 2 - 1:
            self._copied[half].record()
        self.length += 1

    def between(self, first: int, last: int) -> list[Update]:
        """Updates at positions `first` to `last` - 1. Raises `ValueError` for one that is gone."""
        if not max(0, self.length - LOG_CAPACITY) <= first <= last <= self.length:
            raise ValueError(f"updates {first} to {last} are not in the log")
        return [found for i in range(first, last) if (found := self._updates[i % LOG_CAPACITY]) is not None]

    def in_fp32(self, first: int, last: int) -> list[Entry]:
        """As `between`, with rates as the table has them."""
        return [_in_fp32(update) for update in self.between(first, last)]


@dataclass(frozen=True, slots=True)
class Entry:
    """An update as the arithmetic takes it."""

    draw: int
    learning_rate: float
    coefficient: float
    weight_decay: float


def _in_fp32(update: Update) -> Entry:
    rates = (update.learning_rate, update.coefficient, update.weight_decay)
    return Entry(update.draw, *(c_float(rate).value for rate in rates))


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """What is to be done to weights, for `visit`."""

    seed: int
    log: UpdateLog
    first: int
    last: int
    """Positions of the pending updates in the log, the last one excluded."""
    rounding: Rounding = "stochastic"
    step: int = 0
    eps: float = 0.0
    """Of the perturbation."""
    noise: Noise = "gaussian"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """Where a visit's results go; `None`: they are not wanted. `theta` may be the weight itself."""

    theta: Tensor | None = None
    plus: Tensor | None = None
    minus: Tensor | None = None


def visit(weight: Tensor, segment: Segment, how: Visit, out: Outputs, start: int = 0) -> None:
    """One pass over `weight`, flat memory laid out as `segment` says: see the module's docstring.

    Outputs have the weight's dtype and layout, and are rounded once (the perturbed ones to nearest).
    `start`, a multiple of `TILE`, is where the memory begins within the one tensor of the segment.
    """
    if start % TILE:
        raise ValueError(f"a piece of a tensor begins at a multiple of {TILE}")
    if weight.is_cuda and has_triton():
        from engines import noise_kernels

        noise_kernels.visit(weight, segment, how, out, start)
        return
    stochastic = how.rounding == "stochastic" and weight.dtype in (torch.bfloat16, torch.float16)
    updates = how.log.in_fp32(how.first, how.last)
    perturbed = out.plus is not None or out.minus is not None
    for pieces in chunks(segment, start, CHUNK_LANES[weight.device.type]):
        current = torch.cat([piece.of(weight) for piece in pieces]).float()
        for update in updates:
            z, uniform = _draw(how, update.draw, pieces, weight.device, uniform=stochastic)
            z.mul_(update.coefficient)
            if update.weight_decay != 0.0:
                _decay(z, current, update.weight_decay, pieces)
            moved = current - z.mul_(update.learning_rate)
            current = (
                moved.to(weight.dtype).float() if uniform is None else dither(moved, uniform, weight.dtype)
            )
        if out.theta is not None:
            scatter(current, out.theta, pieces)
        if perturbed:
            z, _ = _draw(how, how.step, pieces, weight.device, uniform=False)
            z.mul_(how.eps)  # not torch.add(..., alpha=eps): it may fuse the two roundings into one, or not
            if out.plus is not None:
                scatter(current + z, out.plus, pieces)
            if out.minus is not None:
                scatter(current - z, out.minus, pieces)


def rows(weight: Tensor, number: int, indices: Tensor, how: Visit) -> Tensor:
    """weight[indices] + eps z, of the dtype of `weight` (n, width): (*indices.shape, width).

    For embeddings: noise is drawn for the rows that are looked up only. `how.eps` may be negative.
    """
    if weight.is_cuda and has_triton():
        from engines import noise_kernels

        return noise_kernels.rows(weight, number, indices, how)
    width = weight.shape[1]
    flat = indices.reshape(-1)
    used, places = torch.unique(flat, return_inverse=True)
    element = used.unsqueeze(1) * width + torch.arange(width, device=weight.device)
    draw = signs_at if how.noise == "rademacher" else normals_at
    z = draw(element.view(-1), number, how.step, how.seed).view(-1, width)
    moved = (z.mul_(how.eps) + weight[used].float()).to(weight.dtype)
    return moved[places].view(*indices.shape, width)


def tiles(
    how: Visit, number: int, step: int, first: int, last: int, device: torch.device, *, uniform: bool
) -> tuple[Tensor, Tensor | None]:
    """Noise of tiles `first` to `last` - 1 of a tensor, (2048 each,) fp32; and 16 random bits, (2048 each,)
    int32, of each element if wanted."""
    piece = Piece(number, 0, (last - first) * TILE, first * LANES, decays=False)
    return _draw(how, step, [piece], device, uniform=uniform)


def _draw(
    how: Visit, step: int, pieces: Sequence[Piece], device: torch.device, *, uniform: bool
) -> tuple[Tensor, Tensor | None]:
    """As `engines.philox.draw_normals`, of the noise that is wanted."""
    draw = draw_signs if how.noise == "rademacher" else draw_normals
    return draw(how.seed, step, pieces, device, uniform=uniform)


def _decay(z: Tensor, current: Tensor, weight_decay: float, pieces: Sequence[Piece]) -> None:
    first = 0
    for piece in pieces:
        here = slice(first, first + piece.count)
        if piece.decays:
            z[here].add_(current[here] * weight_decay)
        first += piece.count


def dither(value: Tensor, uniform: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 `value` rounded stochastically to `dtype`, bf16 or fp16, as fp32; `uniform` (int32) has 16 bits.

    Adding random bits below the last place that stays, then cutting off, carries with the right probability.
    In fp16 a number below 2^-14 has the unit 2^-24 whatever its exponent: 2^-14 is added to it and taken off
    again, so that its unit is at the usual place.
    """
    if dtype == torch.bfloat16:
        bits = value.view(torch.int32) + uniform
        return bits.bitwise_and_(-0x10000).view(torch.float32)
    size = value.abs()
    lift = torch.where(size < FP16_NORMAL, FP16_NORMAL, 0.0)
    bits = (size + lift).view(torch.int32) + (uniform >> 3)
    cut = bits.bitwise_and_(-0x2000).view(torch.float32) - lift
    return torch.where(value < 0, -cut, cut)


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None
