"""What `recommend` says to a person."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from known_shapes import OPT_1B
from rich.console import Console, RenderableType
from tiny_machine import make_machine

from harness.cli.advice_tables import recommendation_text
from harness.pipeline import job_to_plan
from harness.recommendation import Recommendation, recommended, with_target, with_what_if
from profiles.advice.amount import Asked, DataLengths, amount_of
from profiles.advice.job_time import Rates
from profiles.advice.money import parse_price
from profiles.advice.target import parse_target
from profiles.machine import Machine
from run_records import make_machine as make_gpu_machine
from run_records import make_plan, make_test_job

ENGINES = ("native", "torchao-offload", "lsp", "mezo", "zo2")


def drawn(table: RenderableType, width: int = 100) -> str:
    text = io.StringIO()
    Console(file=text, width=width, highlight=False).print(table)
    return text.getvalue()


def in_a_line(table: RenderableType) -> str:
    return " ".join(drawn(table, 400).split())


def answer_of(
    machine: Machine,
    engines: Sequence[str] = ENGINES,
    asked: Asked | None = None,
    rates: Rates | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    **fields: Any,
) -> Recommendation:
    job = make_test_job(batch_size=2, seq_len=512, settings=settings or {}, **fields)
    amount = amount_of(job.workload, asked or Asked(), None)
    return recommended(job, job_to_plan(job, OPT_1B, engines, amount), machine, rates=rates or Rates())


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("of_job", [False, True])
def test_method_names_are_whole_and_lines_fit(width: int, gpu: bool, of_job: bool) -> None:
    asked = Asked(examples=1000) if of_job else None
    said = drawn(recommendation_text(answer_of(make_machine(gpu=gpu), asked=asked)), width)
    assert max(map(len, said.splitlines())) <= width
    rows = {line.split()[0] for line in said.splitlines() if line.strip()}
    assert set(ENGINES) <= rows


def test_plans_say_why_not_and_give_each_setting_once() -> None:
    said = in_a_line(
        recommendation_text(answer_of(make_machine(gpu=False), settings={"native": {"learning_rate": 1e-5}}))
    )
    assert "torchao-offload cannot run here: needs a CUDA GPU" in said
    assert said.count("resident_blocks=0") == 1
    assert said.count(" learning_rate=1e-05") == 1
    answer = replace(
        answer_of(make_gpu_machine(), ["zo2"]), plans=(make_plan("zo2", fits=False),), ways_out=()
    )
    one = in_a_line(recommendation_text(answer))
    assert "does not fit: 12.5 GB of GPU memory are missing" in one
    assert "no way out" in one
    assert "resident_blocks=0" in one  # without a reason it is told by itself


def test_a_plan_without_a_step_time_says_why() -> None:
    plan = make_plan("zo2")
    unmeasured = replace(
        plan,
        prediction=replace(plan.prediction, step_s=None, basis="No step time: the disk was not measured."),
    )
    for each, times in ((unmeasured, 1), (plan, 0), (replace(unmeasured, available=False), 0)):
        answer = replace(answer_of(make_gpu_machine(), ["zo2"]), plans=(each,))
        assert (
            in_a_line(recommendation_text(answer)).count("No step time: the disk was not measured") == times
        )


def test_micro_batches_are_told_where_there_are_several() -> None:
    said = drawn(recommendation_text(answer_of(make_machine(), ["native"], accumulation=4)), 200)
    assert "batch 2 x 512 tokens, 4 micro-batches a step" in said


def test_the_whole_job_has_hours_energy_and_cost_and_kinds_stand_apart() -> None:
    rates = Rates(power_w=500.0, prices=(parse_price("31JPY/kWh@2026-11-29"),))
    said = drawn(
        recommendation_text(answer_of(make_machine(), asked=Asked(examples=10**6), rates=rates)), 220
    )
    assert "The job: 500,000 steps, 512,000,000 tokens (--examples 1,000,000" in said
    assert "kWh" in said
    assert "JPY (" in said
    assert said.index("With gradients (first order)") < said.index("Without gradients (zeroth order)")
    bare = drawn(recommendation_text(answer_of(make_machine())), 220)
    assert "kWh" not in bare
    assert "The job:" not in bare


def test_upgrades_and_machines_for_a_target_are_tables() -> None:
    machine = make_gpu_machine()
    job = make_test_job(batch_size=2, seq_len=512)
    planned = job_to_plan(job, OPT_1B, ["native", "zo2"], amount_of(job.workload, Asked(steps=1000), None))
    answer = recommended(job, planned, machine, rates=Rates())
    answer = with_target(with_what_if(answer, planned), planned, parse_target("hours=8"))
    said = drawn(recommendation_text(answer), 220)
    assert "memory channels, twice as many" in said
    assert "The largest model that each method fits here" in said
    assert "rtx-3090" in said
    assert "yes" in said
    none_left = "--batch-size 3 with --accumulation 1 leaves none for it"
    assert "leaves none for it" not in said
    assert none_left in in_a_line(recommendation_text(replace(answer, job=replace(job, batch_size=3))))


def test_a_job_of_shorter_sequences_says_of_which_its_time_is() -> None:
    data = DataLengths(
        sequences=100, tokens=20_000, shares=((128, 0.5), (384, 0.5)), description="100 rows of a test"
    )
    job = make_test_job(batch_size=2, seq_len=512)
    for asked, said, epochs in ((Asked(), "50 steps", ""), (Asked(epochs=0.02), "1 step", ", 0.02 epochs")):
        amount = amount_of(job.workload, asked, data)
        answer = recommended(
            job, job_to_plan(job, OPT_1B, ["native"], amount), make_gpu_machine(), rates=Rates()
        )
        told = in_a_line(recommendation_text(answer))
        assert f"The job: {said}, " in told
        assert f"(100 training sequences{epochs}; 100 rows of a test)" in told
        assert "have 256 tokens on average, padding included" in told
        assert "a step below is one of 512 tokens" in told
        (forecast,), (plan,) = answer.forecasts, answer.plans
        assert plan.prediction.compile_s is not None
        assert forecast.seconds is not None
        assert forecast.seconds > plan.prediction.compile_s
        assert f"compiling takes about {plan.prediction.compile_s:.1f} s once, " in told
    assert "on average" not in in_a_line(
        recommendation_text(answer_of(make_gpu_machine(), asked=Asked(steps=1)))
    )
