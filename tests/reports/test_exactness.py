"""What a report says of the losses of an offloading engine and of its reference engine."""

from __future__ import annotations

from typing import Any

import pytest

from harness.records.run import Run
from reports.criteria import default_criteria
from reports.decide import decide
from reports.findings.exactness import compare_with_reference, exact
from reports.measured.measurements import group
from run_records import make_plan, make_run, make_test_job

LOSSES = (3.0, 2.9, 2.8, 2.8, 2.7, 2.6, 2.6, 2.5, 2.5, 2.4)


def run_of(engine: str, losses: tuple[float | None, ...] = LOSSES, seed: int = 0, **settings: Any) -> Run:
    plan = make_plan(engine, settings=settings)
    return make_run(engine, losses=losses, plan=plan, job=make_test_job(seed=seed))


def said(*runs: Run) -> tuple[bool, list[str]]:
    """Whether the report calls them exact, and warnings of the opposite."""
    warnings = decide(runs, default_criteria(), None).warnings
    return exact(group(runs, None)) is not None, [text for text in warnings if "different losses" in text]


def test_the_same_losses_are_told() -> None:
    runs = run_of("mezo"), run_of("zo2", resident_blocks="3", fold_every=8)
    assert said(*runs) == (True, [])
    assert "in all 10 steps" in str(exact(group(runs, None)))


def test_one_other_bit_is_a_warning() -> None:
    other = (*LOSSES[:6], 2.6000000000000005, *LOSSES[7:])
    told, warnings = said(run_of("mezo"), run_of("zo2", other))
    assert not told
    assert len(warnings) == 1
    assert "in 1 of 10 steps" in warnings[0]
    assert "up to 4.44e-16" in warnings[0]


def test_a_loss_that_is_not_finite_on_one_side_is_a_difference() -> None:
    runs = [run_of("mezo"), run_of("zo2", (*LOSSES[:9], None))]
    found = compare_with_reference("zo2", "mezo", group(runs, None))
    assert found is not None
    assert (found.differ, found.steps) == (1, 10)


@pytest.mark.parametrize(
    ("mezo", "zo2"),
    [
        ({}, {"learning_rate": 1e-5}),
        ({}, {"base": "int8"}),
        ({"base": "int8", "fold_every": 4}, {"base": "int8", "fold_every": 8}),
        ({"seed": 1}, {}),
        ({}, {"forgotten_setting": 1}),
    ],
)
def test_unlike_runs_are_not_compared(mezo: dict[str, Any], zo2: dict[str, Any]) -> None:
    assert said(run_of("mezo", **mezo), run_of("zo2", (1.0,) * 10, **zo2)) == (False, [])


def test_a_base_folded_alike_is_compared() -> None:
    settings: dict[str, Any] = {"base": "int8", "fold_every": 4}
    assert said(run_of("mezo", **settings), run_of("zo2", **settings)) == (True, [])


def test_runs_of_several_seeds_go_with_their_own() -> None:
    other = tuple(loss - 1 for loss in LOSSES)
    runs = [run_of("mezo", LOSSES), run_of("mezo", other, 1), run_of("zo2", other, 1), run_of("zo2", LOSSES)]
    found = compare_with_reference("zo2", "mezo", group(runs, None))
    assert found is not None
    assert (found.differ, found.steps) == (0, 20)


def test_without_a_twin_nothing_is_said() -> None:
    assert said(run_of("zo2")) == (False, [])
    assert said(run_of("mezo"), make_run("zo2", end_state="oom_gpu")) == (False, [])
