"""Which methods wait for the processor, and what unlike processors make of a comparison."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.settings.parse import settings_of_document
from harness.host_speed import explains, predicted_at, started_s, unlike_speeds
from harness.records.comparison import other_host
from harness.records.job import make_job
from harness.records.run import Run, load_run
from harness.resolve import resolve_shape
from profiles.language import Language, speaking
from profiles.machine import Machine, load_machine
from reports.findings.host_speed import about_speeds

FOLDER = Path(__file__).parents[1] / "studies" / "prediction_grid_h200_second_afternoon"
MACHINE = load_machine(FOLDER / "machine.json")
EAGER = load_run(FOLDER / "runs" / "native-eager-qwen-0.5b-2x256-16gb.json")
"""Its steps wait for the processor; starting an operation took it 22.6 us."""
SHAPE = resolve_shape(make_job(EAGER.job, EAGER.id))


def took(run: Run, started_s: float, step_s: float, **settings: Any) -> Run:
    """`run` on a processor of another speed, perhaps with other settings."""
    summary = replace(run.summary, forward_launch_s=started_s, step_s_median=step_s)
    return replace(
        run, summary=summary, plan=replace(run.plan, settings=settings_of_document(run.engine, settings))
    )


def as_engine(run: Run, engine: str, started_s: float, step_s: float, **settings: Any) -> Run:
    return took(
        replace(run, engine=engine, plan=replace(run.plan, engine=engine)), started_s, step_s, **settings
    )


def slow_and_quick(step_s: float) -> list[Run]:
    """Native, eager, on a slow processor, and a method that waits for it too, on a quick one."""
    return [
        took(EAGER, 24e-6, 0.100, compile=False, graphs=False),
        as_engine(EAGER, "backward-optimizer", 15e-6, step_s, graphs=False),
    ]


def test_a_step_that_waits_is_predicted_longer_on_a_slower_processor() -> None:
    """By as much for each microsecond; the optimizer comes when all has been started, and takes as long."""
    steps_s = []
    for each_s in (15e-6, 24e-6, 33e-6):
        predicted = predicted_at(EAGER, MACHINE, SHAPE, each_s)
        assert predicted is not None
        assert predicted.step_s is not None
        steps_s.append(predicted.step_s)
    quick_s, slow_s, slowest_s = steps_s
    assert slowest_s - slow_s == pytest.approx(slow_s - quick_s)
    assert 1.5 * quick_s < slow_s < 24 / 15 * quick_s
    emulated = replace(EAGER, environment=replace(EAGER.environment, emulated="a card"))
    assert predicted_at(emulated, MACHINE, SHAPE, 15e-6) is None


def test_what_starting_took_in_the_steps_is_the_profile_at_the_speed_of_the_loop() -> None:
    """Around them, not after them, where both have timed the loop with one Python."""
    cpu = MACHINE.cpu
    timed = replace(cpu, python_turn_s=replace(cpu.forward_launch_s, value=45e-9))
    timed = replace(timed, forward_launch_s=replace(cpu.forward_launch_s, value=18e-6))
    machine = replace(MACHINE, cpu=timed)
    turns = replace(EAGER.summary, python_turn_before_s=32e-9, python_turn_after_s=58e-9)
    run = replace(EAGER, summary=turns)
    assert started_s(run, machine) == pytest.approx(18e-6)
    after = EAGER.summary.forward_launch_s
    assert started_s(run, MACHINE) == started_s(EAGER, machine) == after
    other = replace(run, environment=replace(run.environment, python="3.99"))
    assert started_s(other, machine) == after


def test_an_order_that_the_processors_made_is_found() -> None:
    found = unlike_speeds(slow_and_quick(0.090), MACHINE, SHAPE)
    assert found is not None
    assert (found.quick_s, found.slow_s) == (15e-6, 24e-6)
    assert [one.engine for one in found.waiting] == ["native", "backward-optimizer"]
    assert found.turned == ("native", "backward-optimizer")
    native = found.waiting[0]
    assert native.step_slow_s == pytest.approx(native.step_s)
    assert native.step_quick_s == pytest.approx(15 / 24 * native.step_s, rel=0.01)
    same = unlike_speeds(slow_and_quick(0.010), MACHINE, SHAPE)
    assert same is not None
    assert same.turned is None, "ten times as fast is no processor's doing"


def test_nothing_is_said_where_the_gpu_decides_or_processors_were_alike() -> None:
    quick, slow = took(EAGER, 15e-6, 0.1), as_engine(EAGER, "lora", 24e-6, 0.12)
    assert unlike_speeds([quick, slow], MACHINE, SHAPE) is None, "compiled and captured"
    alike = [took(run, 15e-6, 0.1, compile=False, graphs=False) for run in (EAGER, EAGER)]
    assert unlike_speeds(alike, MACHINE, SHAPE) is None
    assert unlike_speeds(slow_and_quick(0.09), None, SHAPE) is None
    assert unlike_speeds(slow_and_quick(0.09), MACHINE, None) is None
    untimed = [took(run, 0.0, 0.1) for run in slow_and_quick(0.09)]
    assert unlike_speeds(untimed, MACHINE, SHAPE) is None


@pytest.mark.parametrize(
    ("language", "words", "order"),
    [
        (
            "en",
            "starting an operation took 15.0 us in some runs and 24.0 us in others",
            "native may be faster",
        ),
        (
            "ja",
            "演算1つの開始に 15.0 マイクロ秒の実行と 24.0 マイクロ秒の実行",
            "native が backward-optimizer より速い可能性",
        ),
    ],
)
def test_a_report_says_it_in_a_sentence(language: Language, words: str, order: str) -> None:
    runs = slow_and_quick(0.090)
    turns = replace(runs[0].summary, python_turn_before_s=60e-9, python_turn_after_s=62e-9)
    runs[0] = replace(runs[0], summary=turns)
    with speaking(language):
        (text,) = about_speeds(runs, MACHINE, SHAPE)
    assert words in text
    assert order in text
    assert ("61.0 ns" if language == "en" else "61.0 ナノ秒") in text
    assert about_speeds(runs, None, SHAPE) == ()


def test_the_processor_explains_a_range_that_was_missed() -> None:
    predicted = EAGER.predicted
    assert predicted is not None
    at_speed = predicted_at(EAGER, MACHINE, SHAPE, 40e-6)
    assert at_speed is not None
    assert at_speed.step_s is not None
    assert predicted.step_s_high is not None
    long_s = max(at_speed.step_s, 1.01 * predicted.step_s_high)
    settings = dict(EAGER.plan.settings)
    assert explains(took(EAGER, 40e-6, long_s, **settings), MACHINE, SHAPE)
    assert not explains(took(EAGER, 15e-6, long_s, **settings), MACHINE, SHAPE)
    assert not explains(took(EAGER, 40e-6, predicted.step_s_high, **settings), MACHINE, SHAPE), "inside it"
    assert not explains(replace(EAGER, predicted=None), MACHINE, SHAPE)


def test_a_profile_with_both_speeds_describes_both() -> None:
    """What a run of 24 us says of a profile of 13.9 us, and of one whose windows saw that too."""
    cpu = MACHINE.cpu
    starts = replace(cpu.forward_launch_s, low=13.9e-6, value=15e-6, high=24e-6)
    turn = replace(starts, low=32e-9, value=34e-9, high=60e-9)

    def with_cpu(**figures: object) -> Machine:
        return replace(MACHINE, cpu=replace(cpu, forward_launch_s=starts, **figures))  # type: ignore[arg-type]

    runs = [took(EAGER, 24e-6, 0.1)]
    found = other_host(runs, with_cpu())
    assert found is not None
    assert found.is_slower
    assert other_host(runs, with_cpu(python_turn_s=turn)) is None
    assert other_host([took(EAGER, 40e-6, 0.1)], with_cpu(python_turn_s=turn)) is not None
