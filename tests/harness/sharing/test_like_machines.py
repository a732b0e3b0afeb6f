from __future__ import annotations

from dataclasses import fields, replace

import pytest

from engines import public_engines
from engines.settings.parse import parse_settings
from harness.sharing.like_machines import OTHER_WORK, SHARED, beside_catalogue, beside_like_machines
from harness.sharing.reading import shared_results
from harness.sharing.shared_result import SharedMachine, SharedMethod, Submission
from profiles.language import speaking, translated
from profiles.machine import Machine
from profiles.planning.plan import Plan
from run_records import make_machine, make_plan, make_test_job

JOB = make_test_job()


def shared(*step_s: float, card: str = "another", longer: int = 0, **settings: str | int) -> Submission:
    return Submission(
        day="2026-11-29",
        machine=SharedMachine(
            gpu=card, gpu_memory_bytes=24 * 2**30, link=None, cpu="a CPU", cores=8, host_memory_bytes=2**36
        ),
        model=JOB.model.name, parameters=10**9, layers=None, random_weights=True, batch_size=JOB.batch_size,
        seq_len=JOB.seq_len + longer, accumulation=JOB.accumulation, dtype=JOB.dtype, checkpointing=True,
        data="random", program="0.1.0", commit=None, torch=None,
        methods=(
            SharedMethod(
                engine="zo2", settings=dict(settings), runs=1, step_s=step_s,
                tokens_per_s=None, gpu_bytes=None, host_bytes=None, predicted_step_s=None,
            ),
        ),
    )  # fmt: skip


def test_only_the_same_card_job_and_work_count() -> None:
    plan = make_plan("zo2")
    step_s = plan.prediction.step_s
    assert step_s is not None
    machine = make_machine()
    assert machine.gpu is not None
    card = machine.gpu.name
    others = [
        shared(2 * step_s, card=card), shared(0.5 * step_s, card=card), shared(3 * step_s, card=card),
        shared(9 * step_s), shared(9 * step_s, card=card, base="int8"),
        shared(9 * step_s, card=card, longer=1), shared(card=card), shared(9 * step_s, card=card, queries=4),
    ]  # fmt: skip
    (found,) = beside_like_machines(JOB, machine, [plan, make_plan("native")], others)
    assert found.step_s == pytest.approx((0.5 * step_s, 2 * step_s, 3 * step_s))
    assert found.slower == 2
    assert "is better than 2 of 3 like machines" in found.told
    with speaking("ja"):
        assert "同じカードのマシン 3 台中 2 台の実測より速い" in translated(found.told)
    assert beside_like_machines(JOB, replace(machine, gpu=None), [plan], others) == ()


def test_machines_of_the_catalogue_are_held_against_what_was_shared_with_their_card() -> None:
    machine, plan = make_machine(), make_plan("zo2")
    assert machine.gpu is not None
    assert plan.prediction.step_s is not None
    others = [shared(2 * plan.prediction.step_s, card=machine.gpu.name)]
    asked: list[str] = []

    def plans_on(there: Machine) -> list[Plan]:
        asked.append(there.name)
        return [plan]

    cards = {"this-card": machine, "no-card": replace(machine, gpu=None, name="no card")}
    (found,) = beside_catalogue(JOB, cards, plans_on, others)
    assert asked == [machine.name]
    assert found.told.startswith("on this-card, zo2: predicted ")
    assert "is better than 1 of 1 shared results with that card" in found.told
    with speaking("ja"):
        assert translated(found.told).startswith("this-card の zo2")
    on_two = [replace(each, gpus=2) for each in others]
    assert beside_catalogue(JOB, cards, plans_on, on_two) == ()


def test_the_first_set_of_shared_results_is_read() -> None:
    assert len(shared_results(SHARED)) >= 7


def test_settings_that_make_other_work_are_settings() -> None:
    """A name of an earlier version would find nothing, and call everything alike."""
    known = {field.name for engine in public_engines() for field in fields(parse_settings(engine, {}))}
    assert set(OTHER_WORK) <= known
