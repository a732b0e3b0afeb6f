"""The page of the studies on SmolLM2 tells what the published records hold."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from smollm2_tables import (
    PICTURES,
    TASKS,
    _steps_to,
    beside,
    choices_table,
    first_rung,
    methods_of,
    picture,
    seconds_table,
    table,
)

from harness.quality.documents import QualityTarget

PAGE = Path(__file__).parent / "smollm2" / "README.md"


@pytest.mark.parametrize("task", TASKS)
def test_the_page_has_the_tables_of_the_records(task: str) -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for line in (*table(task), *first_rung(task)):
        assert line in lines


@pytest.mark.parametrize("task", PICTURES)
def test_the_pictures_are_of_the_records(task: str) -> None:
    assert (PAGE.parent / PICTURES[task]).read_text(encoding="utf-8") == picture(task)
    assert f"({PICTURES[task]})" in PAGE.read_text(encoding="utf-8")


def test_the_page_has_the_seconds_of_the_records() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    told = list(seconds_table())
    assert len(told) == 6
    for line in told:
        assert line in lines


def test_the_page_has_what_three_rules_would_have_chosen() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    for line in choices_table():
        assert line in lines


def test_lsp_at_half_lies_within_a_point_of_native_and_zo2_is_mezo() -> None:
    by_label = {each.label: each for each in methods_of("SST-2, bf16")}
    native, half = by_label["native"], by_label["lsp, d = n/2"]
    assert len(native.tests) == len(half.tests) == 3
    assert beside(half, native) == "same"
    assert by_label["zo2"].tests == by_label["mezo"].tests


def test_accuracy_and_loss_chose_weights_of_the_same_trainings() -> None:
    by_accuracy, by_loss = (
        {each.label: each.finals for each in methods_of(task)}
        for task in ("SST-2, fp32", "SST-2, fp32, chosen by the loss")
    )
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    for label, finals in by_accuracy.items():
        told = []
        for mine, other in zip(finals, by_loss[label], strict=True):
            curves = [
                [
                    (each.step, each.metrics["loss"], each.metrics["accuracy"])
                    for each in one.learned.evaluations
                ]
                for one in (mine, other)
            ]
            assert curves[0] == curves[1]
            assert other.learned.test is not None
            told.append(f"{other.learned.test['accuracy']:.3f}")
        assert f"{told[0]}, {told[1]} and {told[2]}" in page


def test_a_value_is_reached_where_the_next_evaluation_confirms_it() -> None:
    trial = methods_of("SST-2, bf16")[0].finals[0]
    values = [each.metrics["accuracy"] for each in trial.learned.evaluations]
    assert _steps_to(QualityTarget(metric="accuracy", value=max(values) + 0.01), trial) is None
    first = _steps_to(QualityTarget(metric="accuracy", value=min(values)), trial)
    assert first == trial.learned.evaluations[0].step
