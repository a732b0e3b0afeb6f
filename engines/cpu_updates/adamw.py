"""AdamW on weights, on the CPU: one pass over gradient, weight and moments.

AdamW (1711.05101, with eps outside the root as in torch), for each weight w with gradient g, in fp32:

    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g^2
    w <- w (1 - lr wd) - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

Weights. In fp32 w is the model's own. In bf16 w is split: its high half is the bf16 weight that the model
computes with, the low half, signed, is kept beside it (`rest`), and together they are the 32 bits of w. So w
is an fp32 master copy, of 2 bytes more than the bf16 weight, and the bf16 weight is w rounded to nearest,
halves away from zero (a cast rounds them to even: a difference in one weight of 65,536).

Moments, by `engines.settings.exact_offload.Moments`:

- `fp32`: exact.
- `bf16`: m to nearest, v up or down by chance (to nearest it would stand still: a step changes it by 0.1 %).
  Approximate.
- `int8`: 128 neighbours share a scale, their largest. m is kept as its signed root in 127 steps, v as its
  fourth root in 255; both are rounded by chance. A v that is not zero stays at 2 steps or more, so that the
  smallest step of m is no more than a usual update. Approximate. (FlashOptim compands likewise, with other
  roots.)

Chance is a hash of the element's place and of the update's key, so that the same run gives the same bits.

Bytes of host memory that an update reads and writes for each bf16 weight, gradient included: 26, 18 and 14.
Memory decides the speed: by itself one thread does 1 to 1.5 G weights/s of any kind (2 of them on a shared
machine; EPYC with AVX-512), where 16 cores share some 110 GB/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.cpu_updates.cpu_adam import (
    Memory,
    Step,
    adam_without_compiler,
    add_up,
    addresses,
    compiled,
    factors_of,
)
from engines.cpu_updates.rounding import keep_by_chance, low_half, noise
from engines.settings.exact_offload import MOMENT_GROUP, Moments

CHUNK = 512 * MOMENT_GROUP
"""Elements that torch's operations take at a time."""

_KINDS: dict[Moments, int] = {"fp32": 0, "bf16": 1, "int8": 2}
"""As in `cpu_adam.c`."""

_DTYPES: dict[Moments, tuple[torch.dtype, torch.dtype]] = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "int8": (torch.int8, torch.uint8),
}
"""Of m and v."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AdamWMemory:
    """Weights that are updated together, and their optimizer's state: flat, contiguous, on the CPU."""

    weight: Tensor
    """(n,), fp32 or bf16: what the model computes with."""
    rest: Tensor | None
    """(n,) int16, of bf16 weights: their low halves."""
    kind: Moments
    moment: Tensor
    variance: Tensor
    """(n,), of the kind's dtypes."""
    moment_scales: Tensor | None
    variance_scales: Tensor | None
    """(n / 128, rounded up) fp32, of int8 moments."""

    def part(self, begin: int, end: int) -> AdamWMemory:
        """Elements `begin` to `end` - 1, in the same memory; `begin` is a multiple of `MOMENT_GROUP`."""
        groups = slice(begin // MOMENT_GROUP, -(-end // MOMENT_GROUP))
        return AdamWMemory(
            weight=self.weight[begin:end],
            rest=None if self.rest is None else self.rest[begin:end],
            kind=self.kind,
            moment=self.moment[begin:end],
            variance=self.variance[begin:end],
            moment_scales=None if self.moment_scales is None else self.moment_scales[groups],
            variance_scales=None if self.variance_scales is None else self.variance_scales[groups],
        )

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds beside the weights, by name."""
        named = {
            "rest": self.rest,
            "moment": self.moment,
            "variance": self.variance,
            "moment_scales": self.moment_scales,
            "variance_scales": self.variance_scales,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def state_tensors(
    elements: int, dtype: torch.dtype, kind: Moments
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor of `AdamWMemory.state`, for so many weights of `dtype`."""
    first, second = _DTYPES[kind]
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "moment": (first, (elements,)),
        "variance": (second, (elements,)),
    }
    if dtype == torch.bfloat16:
        found["rest"] = (torch.int16, (elements,))
    if kind == "int8":
        groups = (-(-elements // MOMENT_GROUP),)
        found |= {"moment_scales": (torch.float32, groups), "variance_scales": (torch.float32, groups)}
    return found


def adamw(
    gradient: Tensor | Sequence[Tensor],
    memory: AdamWMemory,
    updates: int,
    *,
    learning_rate: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    scale: float,
    key: int,
) -> None:
    """One update in place of all that `memory` holds; `gradient` (n,), of the weights' dtype, is only read.
    Where it is several, those of as many processes, their sum counts, in their order, each addition rounded
    to their dtype.

    `updates` counts from 1, this one included. The gradient, which is finite, is multiplied by `scale` first.
    `key`, 32 bits, is that of the noise that rounds moments.

    Runs on as many threads as the calling thread has from torch, without the interpreter's lock but for some
    microseconds.
    """
    step = Step(
        adam=factors_of(updates, beta1, beta2, eps, scale),
        keep_weight=1.0 - learning_rate * weight_decay,
        rate=learning_rate,
        key=key & 0xFFFFFFFF,
    )
    library = compiled()
    several = () if isinstance(gradient, Tensor) else gradient
    if library is None:
        if not isinstance(gradient, Tensor):
            summed = torch.empty_like(gradient[0])
            add_up(summed, gradient)
            gradient = summed
        adamw_without_compiler(gradient, memory, step)
        return

    def address(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    library.adamw(
        Memory(
            weight=address(memory.weight),
            rest=address(memory.rest),
            moment=address(memory.moment),
            variance=address(memory.variance),
            moment_scales=address(memory.moment_scales),
            variance_scales=address(memory.variance_scales),
            gradient=address(gradient if isinstance(gradient, Tensor) else None),
        ),
        memory.weight.dtype == torch.bfloat16,
        _KINDS[memory.kind],
        memory.weight.numel(),
        step,
        torch.get_num_threads(),
        *addresses(several),
    )


def master(weight: Tensor, rest: Tensor | None) -> Tensor:
    """The fp32 weights, a copy, of bf16 ones and their low halves; fp32 ones as they are."""
    if rest is None:
        return weight
    return ((weight.view(torch.int16).int() << 16) + rest.int()).view(torch.float32)


def adamw_without_compiler(gradient: Tensor, memory: AdamWMemory, step: Step) -> None:
    """What `cpu_adam.c` does, operation by operation."""
    for begin in range(0, gradient.numel(), CHUNK):
        end = min(begin + CHUNK, gradient.numel())
        _update(gradient[begin:end].float(), memory.part(begin, end), step, begin)


def _update(gradient: Tensor, memory: AdamWMemory, step: Any, begin: int) -> None:
    moment, variance, root, way = adam_without_compiler(gradient, *opened_moments(memory), step.adam)
    weight = master(memory.weight, memory.rest)
    weight = (weight * step.keep_weight).sub_(way.mul_(step.rate))
    if memory.rest is None:
        memory.weight.copy_(weight)
    else:
        bits = weight.view(torch.int32)
        memory.weight.view(torch.int16).copy_(low_half((bits + 0x8000) >> 16))
        memory.rest.copy_(low_half(bits))
    _close(memory, moment, variance, root, step.key, begin)


def opened_moments(memory: AdamWMemory) -> tuple[Tensor, Tensor]:
    """Both moments in fp32, (n,) each, to be read: those kept in fp32 are themselves."""
    if memory.moment_scales is None or memory.variance_scales is None:
        return memory.moment.float(), memory.variance.float()
    n = memory.moment.numel()
    moment_unit = _of_each(memory.moment_scales * np.float32(1.0 / 16129.0).item(), n)
    variance_unit = _of_each(memory.variance_scales * np.float32(1.0 / 4228250625.0).item(), n)
    root, fourth = memory.moment.float(), memory.variance.float()
    square = fourth * fourth
    return root * root.abs() * moment_unit, square * square * variance_unit


def _of_each(scales: Tensor, n: int) -> Tensor:
    return scales.repeat_interleave(MOMENT_GROUP)[:n]


def _close(memory: AdamWMemory, moment: Tensor, variance: Tensor, root: Tensor, key: int, begin: int) -> None:
    if memory.kind == "fp32":
        memory.moment.copy_(moment)
        memory.variance.copy_(variance)
        return
    drawn = noise(key, begin, moment.numel())
    if memory.moment_scales is None or memory.variance_scales is None:
        memory.moment.copy_(moment)
        keep_by_chance(memory.variance, variance, drawn)
        return
    up, second_up = (
        part.astype(np.float32) * np.float32(1.0 / 65536.0) for part in (drawn >> 16, drawn & 0xFFFF)
    )
    largest, largest_root = _largest(moment.abs()), _largest(root)
    memory.moment_scales.copy_(largest)
    memory.variance_scales.copy_(largest_root.square())
    # HAZARD: one over a subnormal number is infinite, and that times zero no number.
    one_over = torch.where(largest >= torch.finfo(torch.float32).tiny, largest, 1.0).reciprocal()
    one_over_root = torch.where(largest_root > 0, largest_root, 1.0).reciprocal()
    m, r = moment.numpy(), root.numpy()
    share, root_share = (_of_each(each, m.size).numpy() for each in (one_over, one_over_root))
    kept = (np.sqrt(np.abs(m) * share) * np.float32(127.0) + up).astype(np.int32).clip(max=127)
    fourth = (np.sqrt(r * root_share) * np.float32(255.0) + second_up).astype(np.int32).clip(max=255)
    memory.moment.copy_(torch.from_numpy(np.where(m < 0, -kept, kept)))
    memory.variance.copy_(torch.from_numpy(np.where((r > 0) & (fourth < 2), 2, fourth)))


def _largest(values: Tensor) -> Tensor:
    """Of each group."""
    short = -values.numel() % MOMENT_GROUP
    return torch.nn.functional.pad(values, (0, short)).view(-1, MOMENT_GROUP).amax(dim=1)
