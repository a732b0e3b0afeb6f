"""A plan's whole job: hours, energy and money, each with low, expected and high. Pure; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from engines.settings.given import GivenSettings
from profiles.advice.amount import Amount
from profiles.advice.calibration import Calibration, calibrated
from profiles.advice.money import Cost, Price, costs_of
from profiles.planning.context import PlanningContext
from profiles.planning.plan import Plan
from profiles.planning.predict import COMPILE_HIGH_S, COMPILE_LOW_S
from profiles.units import format_bytes

RARE_ERROR = 2.0
"""Factor each way of what one step in so many takes beside: the figures are of one H200."""

Band = tuple[float, float, float]
"""Low, expected, high."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobForecast:
    """What all steps of a job take with one plan; `None` is 'not known'."""

    engine: str
    steps: int
    tokens: int
    """Padding not counted."""
    seconds_low: float | None = None
    seconds: float | None = None
    seconds_high: float | None = None
    """Of training, compiling included; without the rest of the set-up, evaluation and checkpoints."""
    energy_kwh_low: float | None = None
    energy_kwh: float | None = None
    energy_kwh_high: float | None = None
    costs: tuple[Cost, ...] = ()
    basis: dict[str, str] = field(default_factory=dict)
    """Number -> what it rests on."""

    @property
    def band(self) -> Band | None:
        """Seconds."""
        if self.seconds_low is None or self.seconds is None or self.seconds_high is None:
            return None
        return self.seconds_low, self.seconds, self.seconds_high


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What an hour takes beside time, as typed."""

    power_w: float | None = None
    """Of a whole machine under load."""
    prices: tuple[Price, ...] = ()


def job_forecast(
    plan: Plan, context: PlanningContext, amount: Amount, rates: Rates, calibration: Calibration | None = None
) -> JobForecast:
    """What the whole job takes by `plan`, which was made in `context`. Steps of shorter sequences are
    forecast by themselves, with the plan's settings."""
    seconds = _seconds(plan.settings, context, amount, calibration)
    cost = context.cost(plan.settings.typed)
    basis = {
        "steps": amount.basis,
        "tokens": amount.basis,
        "peak_gpu_bytes": sum_of_parts(cost.gpu_memory_bytes),
        "peak_host_bytes": sum_of_parts(cost.host_memory_bytes),
    }
    if seconds is None:
        basis["seconds"] = plan.prediction.basis
        return JobForecast(engine=plan.engine, steps=amount.steps, tokens=amount.tokens, basis=basis)
    basis["seconds"] = f"{amount.steps:,} steps; {plan.prediction.basis}"
    if plan.prediction.compile_s is not None and amount.is_whole_job:  # else nobody knows how many share it
        low, expected, high = seconds
        seconds = low + COMPILE_LOW_S, expected + plan.prediction.compile_s, high + COMPILE_HIGH_S
        basis["seconds"] += f" Compiling, once: {COMPILE_LOW_S:g} to {COMPILE_HIGH_S:g} s."
    rare_s = plan.prediction.rare_job_s(amount.steps)
    if rare_s > 0 and amount.is_whole_job:
        low, expected, high = seconds
        seconds = low + rare_s / RARE_ERROR, expected + rare_s, high + rare_s * RARE_ERROR
        basis["seconds"] += (
            f" One step in {plan.prediction.rare_every} has more to do: {rare_s:.3g} s in all."
        )
    kwh = None
    power_w, power_basis = _power(context, rates, calibration)
    if power_w is not None:
        low, expected, high = (power_w * each / 3.6e6 for each in seconds)
        kwh = low, expected, high
        basis["energy_kwh"] = power_basis
    low_h, hours, high_h = (each / 3600 for each in seconds)
    return JobForecast(
        engine=plan.engine,
        steps=amount.steps,
        tokens=amount.tokens,
        seconds_low=seconds[0],
        seconds=seconds[1],
        seconds_high=seconds[2],
        energy_kwh_low=None if kwh is None else kwh[0],
        energy_kwh=None if kwh is None else kwh[1],
        energy_kwh_high=None if kwh is None else kwh[2],
        costs=costs_of(rates.prices, (low_h, hours, high_h), kwh, machines=context.nodes),
        basis=basis,
    )


def sum_of_parts(parts: Mapping[str, int]) -> str:
    """Memory by kind, such as `weights 2.4 GiB + buffers 1.0 GiB`."""
    return " + ".join(f"{name} {format_bytes(count)}" for name, count in parts.items() if count)


def _power(
    context: PlanningContext, rates: Rates, calibration: Calibration | None
) -> tuple[float | None, str]:
    """Watts of all machines, or of all GPUs, and where they come from."""
    machines, boards = context.nodes, context.ranks
    if rates.power_w is not None:
        each = f" of each of {machines} machines" if machines > 1 else ""
        return machines * rates.power_w, f"{rates.power_w:g} W{each} all the time, as typed"
    power_w = None if calibration is None else calibration.power_w.get(context.engine)
    if power_w is None:
        return None, ""
    whose = "the GPU's board alone" if boards == 1 else f"each of {boards} GPUs' boards alone"
    return boards * power_w, f"{power_w:.3g} W, of {whose}, as records of this machine measured"


def _seconds(
    settings: GivenSettings, context: PlanningContext, amount: Amount, calibration: Calibration | None
) -> Band | None:
    low = expected = high = 0.0
    for seq_len, share in amount.shares:
        shorter = replace(context, workload=replace(context.workload, seq_len=seq_len))
        prediction = calibrated(shorter.predict(settings.typed), context.engine, calibration)
        if prediction.step_s_low is None or prediction.step_s is None or prediction.step_s_high is None:
            return None
        steps = share * amount.steps
        low += steps * prediction.step_s_low
        expected += steps * prediction.step_s
        high += steps * prediction.step_s_high
    return low, expected, high


def are_tied(one: JobForecast, other: JobForecast) -> bool:
    """Their ranges overlap, so that which is faster is not known."""
    if one.band is None or other.band is None:
        return False
    return one.band[0] <= other.band[2] and other.band[0] <= one.band[2]


def ranked(forecasts: Sequence[JobForecast]) -> list[JobForecast]:
    """The one that ends first, first; those without a time last."""
    return sorted(forecasts, key=lambda each: (each.seconds is None, each.seconds or 0.0))
