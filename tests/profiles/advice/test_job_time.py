"""The whole job from its steps, and when two are a tie."""

from __future__ import annotations

from dataclasses import replace

import pytest
from known_shapes import DEEPSEEK_1B, H200

from engines.costs.resources.network import NETWORK_ERROR
from engines.shapes import Workload
from profiles.advice import words
from profiles.advice.amount import Amount
from profiles.advice.calibration import Seen, calibration_of
from profiles.advice.job_time import JobForecast, Rates, are_tied, job_forecast, ranked
from profiles.advice.money import parse_price
from profiles.advice.outlook import JobToPlan
from profiles.planning.plan import Plan
from profiles.planning.predict import COMPILE_LOW_S, COMPILE_S, predict
from profiles.planning.recommend import plan_engine

JOB = JobToPlan(
    shape=DEEPSEEK_1B, workload=Workload(batch_size=4, seq_len=1024), engines=("native",), settings={}
)


def amount(shares: tuple[tuple[int, float], ...], steps: int = 1000) -> Amount:
    return Amount(steps=steps, sequences=4 * steps, tokens=1024 * 4 * steps, shares=shares, basis="a test")


def forecast(
    shares: tuple[tuple[int, float], ...] = ((1024, 1.0),), rates: Rates | None = None
) -> JobForecast:
    context = JOB.context("native", H200)
    return job_forecast(plan(), context, amount(shares), rates or Rates())


def plan() -> Plan:
    return plan_engine(JOB.context("native", H200), JOB.settings_of("native"))


def test_a_job_is_as_long_as_its_steps() -> None:
    told = plan().prediction
    assert told.step_s is not None
    assert told.step_s_low is not None
    found = forecast()
    assert found.band is not None
    assert told.compile_s == COMPILE_S
    assert found.band[1] == pytest.approx(1000 * told.step_s + COMPILE_S)
    assert found.band[0] == pytest.approx(1000 * told.step_s_low + COMPILE_LOW_S)
    assert "1,000 steps" in found.basis["seconds"]
    assert "Compiling, once: 5 to 60 s." in found.basis["seconds"]


def test_a_job_of_one_step_compiles_too_and_a_step_of_any_job_does_not() -> None:
    context = JOB.context("native", H200)
    told = plan().prediction
    one = job_forecast(plan(), context, amount(((1024, 1.0),), steps=1), Rates())
    assert told.step_s is not None
    assert one.seconds == pytest.approx(told.step_s + COMPILE_S)
    step = job_forecast(plan(), context, JOB.amount_or_step, Rates())
    assert step.seconds == pytest.approx(told.step_s)
    eager = plan_engine(context, JOB.settings_of("native").replaced(compile=False)).prediction
    assert eager.compile_s is None
    without_gpu = plan_engine(JOB.context("native", replace(H200, gpu=None)), JOB.settings_of("native"))
    assert without_gpu.prediction.compile_s is None


def test_what_one_step_in_many_does_is_paid_as_often_as_it_comes() -> None:
    context = JOB.context("galore", H200)
    its = plan_engine(context, JOB.settings_of("galore").replaced(update_proj_gap=400))
    told = its.prediction
    assert told.step_s is not None
    assert told.rare_s is not None
    assert told.rare_s > 10 * told.step_s
    assert told.rare_every == 400
    found = job_forecast(its, context, amount(((1024, 1.0),), steps=1000), Rates())
    # Steps 0, 400 and 800.
    assert found.seconds == pytest.approx(1000 * told.step_s + COMPILE_S + 3 * told.rare_s)
    assert "One step in 400" in found.basis["seconds"]
    assert plan().prediction.rare_s is None
    without_gpu = plan_engine(JOB.context("galore", replace(H200, gpu=None)), JOB.settings_of("galore"))
    assert without_gpu.prediction.rare_s is None


def test_shorter_sequences_take_less_time() -> None:
    whole, half = forecast().seconds, forecast(((256, 0.5), (1024, 0.5))).seconds
    short = forecast(((256, 1.0),)).seconds
    assert whole is not None
    assert half is not None
    assert short is not None
    assert short < half < whole
    assert half == pytest.approx((short + whole) / 2)


def test_energy_and_money_follow_from_hours() -> None:
    rates = Rates(power_w=1000.0, prices=(parse_price("2USD/h@2026-11-29"),))
    found = forecast(rates=rates)
    assert found.seconds is not None
    assert found.energy_kwh == pytest.approx(found.seconds / 3600)
    assert found.costs[0].expected == pytest.approx(2 * found.seconds / 3600)
    assert forecast().energy_kwh is None
    assert "as typed" in found.basis["energy_kwh"]


def test_several_machines_take_power_and_money_each() -> None:
    job = replace(JOB, engines=("zo2",), workload=Workload(batch_size=4, seq_len=1024, accumulation=2))
    calibration = calibration_of([Seen(engine="zo2", ratio=1.0, power_w=500.0)], {})
    prices = (parse_price("2USD/h@2026-11-29"),)
    far = replace(job, nodes=2).context("zo2", H200)
    both = plan_engine(far, job.settings_of("zo2"))
    typed = job_forecast(both, far, amount(((1024, 1.0),)), Rates(power_w=1000.0, prices=prices))
    boards = job_forecast(both, far, amount(((1024, 1.0),)), Rates(), calibration)
    assert typed.seconds is not None
    assert typed.energy_kwh == pytest.approx(2 * typed.seconds / 3600)
    assert typed.costs[0].expected == pytest.approx(2 * 2 * typed.seconds / 3600)
    assert typed.costs[0].basis == "2 x 2 USD/h as of 2026-11-29"
    assert "each of 2 machines" in typed.basis["energy_kwh"]
    assert boards.seconds is not None
    assert boards.energy_kwh == pytest.approx(boards.seconds / 3600)
    assert "each of 2 GPUs' boards" in boards.basis["energy_kwh"]


@pytest.mark.parametrize(("named", "fastest"), [(None, 10 * 125e6), (10 * 125e6, 10 * 125e6)])
def test_a_network_that_nobody_measured_widens_the_range_of_the_hours(
    named: float | None, fastest: float
) -> None:
    """By its factor each way, and where nobody named its rate by that of a ten times faster one."""
    job = replace(JOB, engines=("lsp",), workload=Workload(batch_size=4, seq_len=1024, accumulation=2))
    job = replace(job, nodes=2, network_bytes_per_s=named)
    context = job.context("lsp", H200)
    plan = plan_engine(context, job.settings_of("lsp"))
    typed = plan.settings.typed
    alone = predict(context.cost(typed), H200, context.workload)
    least_s = replace(context, network_bytes_per_s=fastest).network_s(typed) / NETWORK_ERROR
    most_s = context.network_s(typed) * NETWORK_ERROR
    found = plan.prediction
    assert alone.step_s_low is not None
    assert alone.step_s_high is not None
    assert found.step_s_low == pytest.approx(alone.step_s_low + least_s)
    assert found.step_s_high == pytest.approx(alone.step_s_high + most_s)
    hours = job_forecast(plan, context, amount(((1024, 1.0),)), Rates())
    assert hours.seconds is not None
    assert hours.seconds_low is not None
    assert hours.seconds_high is not None
    assert found.step_s is not None
    # Compiling has a range of its own.
    assert hours.seconds_high - hours.seconds > 999 * (found.step_s_high - found.step_s)
    assert hours.seconds - hours.seconds_low > 999 * (found.step_s - found.step_s_low)


def test_overlapping_ranges_are_a_tie_and_nothing_else_is() -> None:
    def of(low: float, high: float) -> JobForecast:
        return replace(forecast(), seconds_low=low, seconds=(low + high) / 2, seconds_high=high)

    assert are_tied(of(1, 3), of(2, 4))
    assert are_tied(of(2, 4), of(1, 3))
    assert not are_tied(of(1, 2), of(2.5, 4))
    timeless = replace(forecast(), seconds_low=None, seconds=None, seconds_high=None)
    assert not are_tied(of(1, 2), timeless)
    assert ranked([timeless, of(5, 7), of(1, 2)])[0].seconds == 1.5


def test_records_of_this_machine_scale_the_job_too() -> None:
    calibration = calibration_of([Seen(engine="native", ratio=2.0)], {})
    context = JOB.context("native", H200)
    plain, scaled = (
        job_forecast(plan(), context, amount(((1024, 1.0),)), Rates(), c) for c in (None, calibration)
    )
    assert plain.seconds is not None
    assert scaled.seconds is not None
    assert scaled.seconds - COMPILE_S == pytest.approx(2 * (plain.seconds - COMPILE_S))


def test_power_that_was_measured_counts_where_none_is_typed() -> None:
    calibration = calibration_of([Seen(engine="native", ratio=1.0, power_w=500.0)], {})
    context = JOB.context("native", H200)
    found = job_forecast(plan(), context, amount(((1024, 1.0),)), Rates(), calibration)
    assert found.seconds is not None
    assert found.energy_kwh == pytest.approx(500 * found.seconds / 3.6e6)
    assert "board alone" in found.basis["energy_kwh"]
    typed = job_forecast(plan(), context, amount(((1024, 1.0),)), Rates(power_w=900.0), calibration)
    assert "as typed" in typed.basis["energy_kwh"]


def test_without_a_step_time_there_are_no_hours() -> None:
    context = replace(
        JOB.context("native", H200),
        machine=replace(
            H200,
            gpu=replace(
                H200.gpu, matmul_bf16_flops=replace(H200.cpu.matmul_bf16_flops, value=None, origin="absent")
            ),
        ),
    )  # type: ignore[type-var]
    found = job_forecast(
        plan_engine(context, JOB.settings_of("native")), context, amount(((1024, 1.0),)), Rates()
    )
    assert found.band is None
    assert "not in the machine profile" in found.basis["seconds"]


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (0.654, 1.89, "0.654 to 1.89 s"),
        (6600, 19260, "1.83 to 5.35 h"),
        (1.2, 3.4, "1.20 to 3.40 s"),
        (0.001, 150, "1.00 ms to 2.50 min"),
        (74160, 214272, "0.858 to 2.48 days"),
        (0.5, 1.13, "0.500 to 1.13 s"),
        (84, 194, "1.40 to 3.23 min"),
    ],
)
def test_a_range_is_in_one_unit_where_that_can_be_read(low: float, high: float, told: str) -> None:
    assert words.band(low, high) == told


@pytest.mark.parametrize(
    ("value", "told"),
    [(0.0116, "0.0116"), (0.13, "0.130"), (1.3, "1.30"), (105, "105"), (999.7, "1,000"), (2258, "2,260")],
)
def test_three_digits_are_written_out(value: float, told: str) -> None:
    assert words.three_digits(value) == told
