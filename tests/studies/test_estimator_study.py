"""The study of estimators: its table is that of its runs, and it runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from estimator_study import ESTIMATORS, Trial, best_rate, load_trials, settings_of, table, trial
from projector_gradients import Source

from tiny_models import tiny_batches, tiny_blueprint

ROOT = Path(__file__).parents[2]
STORED = [
    ROOT / "tests" / "studies" / "estimators" / name for name in ("estimators.json", "many_queries.json")
]
BY_UPLOADS = STORED[0].with_name("by_uploads.json")


def tiny_source() -> Source:
    batches = tiny_batches(40, "llama", batch_size=8)
    return Source(
        name="tiny", model=tiny_blueprint("llama").reference, learning_rate=1e-3, stages=(0, 3), layers=(0,),
        batch=lambda number: dict(batches[number % len(batches)].inputs),
    )  # fmt: skip


@pytest.mark.parametrize("path", [*STORED, BY_UPLOADS], ids=lambda path: path.stem)
def test_the_table_in_the_log_is_that_of_the_stored_trials(path: Path) -> None:
    log = (ROOT / "engines" / "EXPERIMENTS.md").read_text(encoding="utf-8")
    assert table(load_trials(path)) in log


def test_every_estimator_was_studied() -> None:
    dropped = {"lezo, half"}  # no better for the same passes, so that the engines have it no more
    studied = {each.estimator for path in (*STORED, BY_UPLOADS) for each in load_trials(path)}
    assert studied == set(ESTIMATORS) | dropped


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_trials_had_the_same_budget_and_start(path: Path) -> None:
    trials = load_trials(path)
    assert len({each.start_loss for each in trials}) == 1
    for each in trials:
        assert 2000 - each.forwards_per_step < each.steps * each.forwards_per_step <= 2000


def test_trials_by_uploads_had_the_same_steps_and_start() -> None:
    trials = load_trials(BY_UPLOADS)
    assert {each.estimator for each in trials} == {"mezo", "grzo", "grzo, window 1"}
    assert {each.steps for each in trials} == {150}
    assert len({each.start_loss for each in trials}) == 1


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_trial_spends_its_budget(name: str) -> None:
    settings = settings_of(name, 1e-4, "all")
    found = trial(tiny_source(), name, settings, 0, 2 * settings.forward_passes + 1, "cpu", "fp32")
    assert found.steps == 2
    assert found.forwards_per_step == settings.forward_passes
    assert found.losses[-1] is not None
    assert found.losses[-1] != found.start_loss


def test_rates_of_fzoo_are_in_units_of_eps() -> None:
    settings = settings_of("fzoo, 8", 1e-3, "all")
    assert settings.learning_rate == pytest.approx(1e-3 * settings.eps)


def test_the_best_rate_is_the_first_seeds_of_those_that_stayed_finite() -> None:
    one = Trial(
        estimator="mezo", learning_rate=1e-3, seed=0, forwards_per_step=2, steps=1, losses=(2.0, 2.0, 1.5),
        accuracies=(None, None, None), seconds=1.0, start_loss=2.0,
    )  # fmt: skip
    lost = replace(one, learning_rate=1e-2, losses=(2.0, None, None))
    late = replace(one, learning_rate=1e-4, seed=1, losses=(1.0, 1.0, 1.0))
    assert best_rate([one, lost, late]) == 1e-3
    assert best_rate([lost]) is None
