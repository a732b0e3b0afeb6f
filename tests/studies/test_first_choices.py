"""Who is predicted to be first, and who is: of jobs made up here, and of those that were measured."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from engines import ENGINES
from profiles.machine import load_machine
from tests.studies.first_choices import (
    LEAST_METHODS,
    MAKE_COPIES,
    Choice,
    Taken,
    choices_of,
    drawn,
    summary,
    text_of,
    toml_of,
)
from tests.studies.prediction_grid import GridCell, grid_cells

LIST = Path(__file__).parent / "first_choices.toml"
RESULTS = Path(__file__).parents[2] / "reports" / "results"
ROWS = RESULTS / "deepseek-coder-1.3b-rows_h200_20261129"


def taken(engine: str, predicted_s: float, measured_s: float, *, width: float = 1.05) -> Taken:
    return Taken(
        engine=engine,
        predicted_s=predicted_s,
        low_s=predicted_s / width,
        high_s=predicted_s * width,
        measured_s=measured_s,
    )


def choice(*methods: Taken) -> Choice:
    return Choice(job="a job", methods=methods)


def test_a_right_choice_costs_nothing() -> None:
    found = choice(taken("native", 1.0, 1.3), taken("lora", 0.5, 0.9), taken("lsp", 3.0, 2.0))
    assert found.predicted.engine == found.quickest.engine == "lora"
    assert found.costs == 1.0
    assert found.is_told
    assert found.pairs() == (3, 3)


@pytest.mark.parametrize(("width", "is_told"), [(1.05, False), (1.5, True)])
def test_a_wrong_choice_costs_what_its_step_takes_more(width: float, is_told: bool) -> None:
    found = choice(taken("native", 1.0, 3.0, width=width), taken("lsp", 2.0, 1.5, width=width))
    assert found.costs == 2.0
    assert found.is_told == is_told
    assert found.pairs() == (0, 1)


def test_steps_that_are_alike_are_no_pair() -> None:
    assert choice(taken("native", 1.0, 1.0), taken("lsp", 0.9, 1.09)).pairs() == (0, 0)


def test_methods_that_train_adapters_stand_apart() -> None:
    found = choice(taken("lora", 0.5, 0.5), taken("qlora", 0.6, 0.6), taken("lsp", 2.0, 3.0))
    assert found.without_adapters() is None
    rest = choice(*found.methods, taken("native", 3.0, 2.0)).without_adapters()
    assert rest is not None
    assert [each.engine for each in rest.methods] == ["lsp", "native"]
    assert rest.costs == 1.5
    assert "in 0 of 1 jobs" in summary("Without adapters", [rest])
    assert summary("Without adapters", []) == "Without adapters: no job that two ran"


def test_a_comparison_that_is_published() -> None:
    (found,) = choices_of(ROWS)
    assert found.job == "deepseek-coder-1.3b 4 x 1024"
    assert len(found.methods) == 8, "lsp and exact-offload of that day were slower than today's"
    assert found.quickest.engine == found.predicted.engine == "lora"
    text = text_of([found])
    assert "All methods: the quickest was predicted to be first in 1 of 1 jobs" in text
    (as_planned,) = choices_of(ROWS, as_planned=True)
    assert {each.measured_s for each in as_planned.methods} == {each.measured_s for each in found.methods}
    assert as_planned.methods != found.methods


def jobs_in(cells: list[GridCell]) -> Counter[tuple[object, ...]]:
    return Counter((cell.model, cell.batch, cell.tokens, cell.vram, cell.link) for cell in cells)


def test_jobs_are_drawn_by_lot_and_alike_for_all_methods(tmp_path: Path) -> None:
    machine = load_machine(ROWS / "machine.json")
    cells = list(drawn(7, 2, machine))
    assert cells == list(drawn(7, 2, machine)) != list(drawn(8, 2, machine))
    assert len(jobs_in(cells)) == 2
    path = tmp_path / "jobs.toml"
    path.write_text(toml_of(cells), encoding="utf-8")
    assert grid_cells(path) == cells


def test_the_list_has_jobs_for_several_methods_each() -> None:
    cells = grid_cells(LIST)
    assert len({cell.name for cell in cells}) == len(cells)
    assert len(jobs_in(cells)) >= 4
    assert min(jobs_in(cells).values()) >= LEAST_METHODS
    assert all(ENGINES[cell.engine].order == "first" for cell in cells)
    assert not any(cell.link and cell.engine in MAKE_COPIES for cell in cells)
