"""What the records of this very machine say of predictions for it. Pure; no torch.

A record of another machine never counts: what a prediction misses is the hardware's own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from profiles.machine import Machine
from profiles.planning.plan import Prediction

FEWEST_FOR_A_BAND = 3
"""Records of a method from which its own spread makes the range; of fewer the range keeps its width."""

MARGIN = 1.05
"""Beyond the outermost ratios that were seen: the next job is not one of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """One record: what was measured over what is predicted today for its job on this machine."""

    engine: str
    ratio: float
    power_w: float | None = None
    """Mean of a GPU's board over the steps, where it was measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Factor:
    """By what predictions of a method are multiplied."""

    expected: float
    low: float | None
    high: float | None
    """The outermost that were seen; `None`: of too few records."""
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    factors: Mapping[str, Factor]
    """By engine."""
    left_out: Mapping[str, int]
    """Why records were left out -> how many."""
    power_w: Mapping[str, float] = field(default_factory=dict)
    """Engine -> median power of a GPU's board in its steps."""

    @property
    def summary(self) -> str:
        parts = [
            f"{engine} x {each.expected:.2f} ({_records(each.count)})"
            for engine, each in self.factors.items()
        ]
        parts += [f"{count} left out: {why}" for why, count in self.left_out.items()]
        return f"Calibrated by records of this machine: {'; '.join(parts)}."


def hardware(machine: Machine) -> tuple[str, ...]:
    """What must be the same for a record to count: GPU and its memory, CPU and its cores."""
    gpu = machine.gpu
    named = ("no GPU",) if gpu is None else (gpu.name, f"{gpu.total_bytes / 2**30:.0f} GiB")
    return (*named, machine.cpu.name, f"{machine.cpu.cores_usable} cores")


def why_other_hardware(theirs: Sequence[str], ours: Sequence[str]) -> str | None:
    """What `theirs` has that `ours` has not, both as `hardware` tells them; `None`: they are the same."""
    return next((each for each in theirs if each not in ours), None) or (
        None if len(theirs) == len(ours) else "no GPU"
    )


def _records(count: int) -> str:
    return "1 record" if count == 1 else f"{count} records"


def calibration_of(seen: Sequence[Seen], left_out: Mapping[str, int]) -> Calibration:
    ratios: dict[str, list[float]] = {}
    for each in seen:
        ratios.setdefault(each.engine, []).append(each.ratio)
    powers: dict[str, list[float]] = {}
    for each in seen:
        if each.power_w is not None:
            powers.setdefault(each.engine, []).append(each.power_w)
    return Calibration(
        factors={engine: _factor(found) for engine, found in ratios.items()},
        left_out=dict(left_out),
        power_w={engine: statistics.median(found) for engine, found in powers.items()},
    )


def _factor(ratios: Sequence[float]) -> Factor:
    middle = math.exp(statistics.median(math.log(each) for each in ratios))
    enough = len(ratios) >= FEWEST_FOR_A_BAND
    return Factor(
        expected=middle,
        low=min(ratios) / MARGIN if enough else None,
        high=max(ratios) * MARGIN if enough else None,
        count=len(ratios),
    )


def calibrated(prediction: Prediction, engine: str, calibration: Calibration | None) -> Prediction:
    """The prediction as this machine's records have it; as it was where there are none of the method."""
    factor = None if calibration is None else calibration.factors.get(engine)
    if factor is None or prediction.step_s is None:
        return prediction
    if factor.low is not None and factor.high is not None:
        low, high = prediction.step_s * factor.low, prediction.step_s * factor.high
    else:
        assert prediction.step_s_low is not None
        assert prediction.step_s_high is not None
        low, high = prediction.step_s_low * factor.expected, prediction.step_s_high * factor.expected
    return replace(
        prediction,
        step_s=prediction.step_s * factor.expected,
        step_s_low=low,
        step_s_high=high,
        basis=(
            f"{prediction.basis.rstrip('.')}; times {factor.expected:.3g}, as "
            f"{_records(factor.count)} of this machine have it."
        ),
    )
