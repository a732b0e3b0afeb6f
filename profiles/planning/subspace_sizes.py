"""Sizes of subspaces that are considered for `lsp`. Pure; no torch.

`lsp.d=auto` asks for the largest subspace for each shape of weights whose traffic hides.

A weight's core of d x d elements goes down, through Adam on the CPU and up, which takes each of them a time
proportional to d^2; the GPU's time with the weight is about proportional to its m n elements. So each shape
gets the same share s = d^2 / (m n), and all weights keep their own resources busy for the same part of their
own GPU time. s is the largest for which, over one block, no resource is predicted to take more than
`HIDING_SHARE` of the GPU's time, and memory suffices.

d is rounded down to a multiple of 64, which suits tensor cores (of 8 below 64), and is at most the weight's
smaller dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import isqrt

from engines.costs.resources.traffic import SWITCH_INTERVAL_S, Traffic
from engines.shapes import ModelShape, Workload
from profiles.machine import Machine
from profiles.planning.context import BESIDE_GPU
from profiles.planning.layer_times import resource_s
from profiles.units import format_seconds

HIDING_SHARE = 0.85
"""What is to hide may take this share of the GPU's time: both are predicted, and what does not hide costs its
whole time. Without it d of 0.6 n was planned for DeepSeek-Coder 6.7B, and the step took 0.533 s instead of
0.430 (reports/results/deepseek-coder-6.7b-planned-earlier_h200_20261127)."""

STREAMED_SHARE = 1.1
"""Where weights are streamed, what is to hide may take this share of what they take anyway."""

STEPS = (64, 8, 1)
SHARES = 64
"""s is looked for among k / 64."""

MOST_WITHOUT_GPU = SHARES * 9 // 16
"""d = 3 n / 4 for a square weight, where nothing hides: more brings little of native's quality back."""

LADDER_STEP = 128
LADDER_MIN_SHARE = 8
"""The smallest single d considered is hidden / 8: published runs go from hidden / 12 to more than hidden /
2."""

Sides = tuple[int, int]
"""Of a weight, the larger one first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SubspaceSizes:
    d: Mapping[Sides, int]
    reason: str

    @property
    def text(self) -> str:
        """For `LspSettings.d_by_shape`."""
        return ",".join(f"{rows}x{columns}:{d}" for (rows, columns), d in self.d.items())


def hides(times: Mapping[str, float], gpu_s: float, streamed_s: float = 0.0) -> bool:
    """Whether no resource takes more of `times` than the GPU's time hides, or streaming the weights does."""
    slowest_s = max(times[name] for name in BESIDE_GPU)
    return slowest_s <= max(HIDING_SHARE * gpu_s, STREAMED_SHARE * streamed_s)


def largest_hidden(
    shape: ModelShape,
    machine: Machine,
    workload: Workload,
    cost: Callable[[str], Traffic],
    fits: Callable[[str], bool],
    *,
    block_major: bool = False,
) -> SubspaceSizes:
    """`cost` counts a step for a `d_by_shape`; `fits` says whether there is memory for one. `block_major`:
    all micro-batches hide an update, and the weights may be streamed."""
    sides = sorted({(max(m.rows, m.columns), min(m.rows, m.columns)) for m in shape.matrices})
    most = MOST_WITHOUT_GPU if machine.gpu is None else SHARES
    tried: list[SubspaceSizes] = []
    for k in range(most, 0, -1):
        d = {each: size_of(each, k) for each in sides}
        if tried and d == tried[-1].d:
            continue
        sizes = SubspaceSizes(d=d, reason="")
        tried.append(sizes)
        if not fits(sizes.text):
            continue
        if machine.gpu is None:
            return replace(sizes, reason="the largest considered that fit; without a GPU nothing hides")
        times = _block_s(cost(sizes.text), machine, workload)
        least = _block_s(cost(_smallest(sides).text), machine, workload) if block_major else None
        if times is None:
            return replace(
                _smallest(sides), reason="the machine profile lacks figures, so the smallest are safe"
            )
        slowest = max(BESIDE_GPU, key=times.__getitem__)
        # Only the last micro-batch has anything to update, so only its compute can hide that.
        gpu_s = times["gpu"] / (1 if block_major else workload.accumulation)
        if hides(times, gpu_s, 0.0 if least is None else max(least["h2d"], least["d2h"])):
            measure = (
                f"{slowest} {format_seconds(times[slowest])} against {format_seconds(gpu_s)} of GPU time"
            )
            return replace(
                sizes, reason=f"the largest that hide behind their block and fit ({measure} a block)"
            )
    return replace(tried[-1], reason="the smallest considered; even so they do not hide, or do not fit")


def _block_s(cost: Traffic, machine: Machine, workload: Workload) -> dict[str, float] | None:
    """`resource_s` of a block in the middle: those at the ends may be there already. Updates have what lies
    between two chunks in them."""
    blocks = [layer for layer in cost.layers if layer.name.startswith("block.")]
    middle = blocks[len(blocks) // 2]
    times = resource_s(replace(cost, layers=(middle,)), machine, workload)
    between_s = SWITCH_INTERVAL_S * middle.cpu_chunks
    return times and {
        name: time_s + between_s * (name in ("cpu", "host memory")) for name, time_s in times.items()
    }


def size_of(sides: Sides, k: int) -> int:
    """d for s = k / 64, at least one and at most the smaller dimension."""
    wanted = isqrt(k * sides[0] * sides[1] // SHARES)
    if wanted >= sides[1]:
        return sides[1]
    step = next(each for each in STEPS if each <= max(1, wanted))
    return max(1, wanted // step * step)


def _smallest(sides: Iterable[Sides]) -> SubspaceSizes:
    return SubspaceSizes(d={each: size_of(each, 1) for each in sides}, reason="")


def lsp_ladder(hidden: int) -> list[int]:
    """Sizes d that are considered, ascending: multiples of 128 from hidden / 8 to 3 hidden / 4, beyond which
    little more of native's quality comes back; powers of two where that is below 256."""
    top = max(1, 3 * hidden // 4)
    if top >= 2 * LADDER_STEP:
        ladder = list(range(LADDER_STEP, top + 1, LADDER_STEP))
    else:
        ladder = [2**k for k in range(top.bit_length()) if 2**k <= top]
    return [d for d in ladder if d * LADDER_MIN_SHARE >= hidden]
