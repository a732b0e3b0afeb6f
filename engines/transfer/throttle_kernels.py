# mypy: disable-error-code="untyped-decorator, no-untyped-def"
# The compiler of Triton takes annotations of kernels for code, so kernels have none.
"""Triton kernels that hold a stream until a copy's time is up. Imported only where Triton is there.

One warp each, so they take a corner of one multiprocessor. Times are those of the GPU's own clock
(`%globaltimer`, nanoseconds), which all streams share.

State of a direction, four int64:
- deadline: when the last copy's time was up;
- end: when its stream was let go, a little later;
- busy: the sum of all copies' times so far where none is under way; else minus (start of the copy under way
  less that sum), so that one word, read at any moment, gives the sum up to then;
- seen: the other direction's sum when the copy under way began.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.kernels.triton_launch import launch

GAP_NS = 40_000
"""Copies that follow each other within this time count as back to back: between a copy and the kernels around
it the GPU changes engines, which takes 5 to 15 us each time, depending on the machine."""

_GAP = tl.constexpr(GAP_NS)
_DEADLINE, _END, _BUSY, _SEEN = (tl.constexpr(index) for index in range(4))


@triton.jit
def _now():
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def _sum_at(word, now):
    """Time that a direction has been busy up to `now`, from its word `busy`."""
    return tl.where(word < 0, now + word, word)


@triton.jit
def _begin(own, other):
    now = _now()
    deadline, end = tl.load(own + _DEADLINE), tl.load(own + _END)
    start = tl.where(now - end < _GAP, deadline, now)
    tl.store(own + _DEADLINE, start)
    tl.store(own + _BUSY, tl.load(own + _BUSY) - start)
    tl.store(own + _SEEN, _sum_at(tl.load(other + _BUSY, volatile=True), start))


@triton.jit
def _worked(now, start, seen, other, share):
    """Nanoseconds of work at the rate alone that the time since `start` was good for."""
    word = tl.load(other + _BUSY, volatile=True)
    both = tl.minimum(tl.maximum(_sum_at(word, now) - seen, 0), now - start)
    return (now - start - both).to(tl.float32) + both.to(tl.float32) * share


@triton.jit(do_not_specialize=["cost_ns"])
def _hold(own, other, cost_ns, share):
    start, seen = tl.load(own + _DEADLINE), tl.load(own + _SEEN)
    cost = cost_ns.to(tl.float32)
    now = _now()
    worked = _worked(now, start, seen, other, share)
    while worked < cost:
        now = _now()
        worked = _worked(now, start, seen, other, share)
    late = tl.minimum((worked - cost).to(tl.int64), _GAP)
    tl.store(own + _DEADLINE, now - late)
    tl.store(own + _END, now)
    tl.store(own + _BUSY, tl.load(own + _BUSY) + now)


def new_state(device: torch.device) -> Tensor:
    """State of a direction that has not copied yet: int64, shape (4,)."""
    return torch.zeros(4, dtype=torch.int64, device=device)


def begin(own: Tensor, other: Tensor) -> None:
    """A copy begins here in the current stream. Wants the two directions' states."""
    launch(_begin, (1,), own, other, num_warps=1)


def hold(own: Tensor, other: Tensor, cost_ns: int, share: float) -> None:
    """Hold the current stream until the copy since `begin` has had the time for `cost_ns` of work.

    Time during which the other direction copies counts only by the factor `share`.
    """
    launch(_hold, (1,), own, other, cost_ns, share, num_warps=1)
