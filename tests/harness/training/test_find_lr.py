"""`run --find-lr`: the rule, and that it is a fair and repeatable comparison that trains nothing."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from settings_given import given_settings
from train_runs import SETTINGS, run, tiny_job

from engines import load_engine
from engines.base import Evaluation
from engines.errors import NonFiniteLoss, UserError
from harness.progress import Progress
from harness.training.find_lr import PLATEAU, LrSearchResult, Trial, find_lr, rates_around, recommended_rate


def search(engine: str, out: Path | None = None, job: Any = None, **settings: Any) -> LrSearchResult:
    return find_lr(
        job or tiny_job(eval_batches=2), engine, given_settings(engine, settings), out, Progress(quiet=True)
    )


def trial(rate: float, after: float | None, before: float = 6.0) -> Trial:
    state = "nan_loss" if after is None else "ok"
    return Trial(learning_rate=rate, loss_before=before, loss_after=after, end_state=state, steps=40)


# --- the rule -----------------------------------------------------------------------------------------


def test_the_smallest_rate_on_the_plateau_is_recommended() -> None:
    trials = [trial(1e-6, 5.9), trial(3e-6, 5.7), trial(1e-5, 5.1), trial(3e-5, 5.0), trial(1e-4, 5.4)]
    assert recommended_rate(trials) == 1e-5


def test_a_rate_that_diverged_is_left_out_and_the_others_count() -> None:
    assert recommended_rate([trial(1e-6, 5.9), trial(1e-5, 5.5), trial(1e-4, 8.0), trial(1e-3, None)]) == 1e-5


@pytest.mark.parametrize("trials", [[], [trial(1e-6, 6.0), trial(1e-5, 6.1)], [trial(1e-6, None)]])
def test_there_is_no_recommendation_where_nothing_lowered_the_loss(trials: list[Trial]) -> None:
    assert recommended_rate(trials) is None


@given(st.lists(st.one_of(st.none(), st.floats(0, 20)), min_size=1, max_size=9))
def test_the_recommendation_follows_the_rule(losses: list[float | None]) -> None:
    trials = [trial(10.0**number, after) for number, after in enumerate(losses)]
    falls = {t.learning_rate: 6.0 - t.loss_after for t in trials if t.loss_after is not None}
    chosen = recommended_rate(trials)
    if chosen is None:
        assert all(fall <= 0 for fall in falls.values())
        return
    assert falls[chosen] > 0
    assert falls[chosen] >= PLATEAU * max(falls.values())
    assert all(fall < PLATEAU * max(falls.values()) for rate, fall in falls.items() if rate < chosen)


def test_the_grid_is_of_short_decimals_around_its_middle() -> None:
    assert rates_around(1e-6) == (3.3e-08, 1e-07, 3.3e-07, 1e-06, 3e-06, 1e-05, 3e-05)
    assert [float(f"{rate:g}") for rate in rates_around(0.7321)] == list(rates_around(0.7321))


def test_the_flag_is_what_was_tried() -> None:
    trials = (trial(1e-6, 5.9), trial(3e-6, 5.0), trial(1e-5, 5.5))
    finding = LrSearchResult(engine="zo2", measured_on="held-out", trials=trials, recommended=3e-6)
    assert finding.flag == "--set zo2.learning_rate=3e-06"
    assert not finding.at_the_edge


# --- the search ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", list(SETTINGS))
def test_every_engine_is_searched_and_the_same_each_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str
) -> None:
    monkeypatch.setattr("harness.training.find_lr.FACTORS", (1, 30))
    more = {"d": 16, "learn_steps": 5} if engine == "lsp" else {}
    finding = search(engine, tmp_path / "out", **more)
    assert len({t.loss_before for t in finding.trials}) == 1  # from the same weights
    assert all(t.steps == 6 and t.end_state == "ok" for t in finding.trials)
    assert finding.recommended == recommended_rate(finding.trials)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["find_lr.json"]
    kept = json.loads((tmp_path / "out" / "find_lr.json").read_text())
    assert kept["recommended"] == finding.recommended
    assert search(engine, **more) == finding


@pytest.mark.parametrize("engine", ["mezo", "native"])
def test_a_candidate_is_what_a_run_at_that_rate_would_have_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str
) -> None:
    """Apart from warm-up and schedule, which a few steps would see nothing but."""
    monkeypatch.setattr("harness.training.find_lr.FACTORS", (1, 3))
    finding = search(engine, schedule="linear", warmup_steps=100, learning_rate=1e-5)
    last = next(t for t in finding.trials if t.learning_rate == 1e-5)
    run(tmp_path / "out", engine, tiny_job(eval_batches=2), learning_rate=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert evaluations == [last.loss_before, last.loss_after]


def test_no_more_than_forty_steps_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.training.find_lr.FACTORS", (1, 3))
    finding = search("mezo", job=tiny_job(steps=5000, eval_batches=1))
    assert [t.steps for t in finding.trials] == [40, 40]


def test_candidates_that_all_diverge_are_all_tried() -> None:
    states = [t.end_state for t in search("native", learning_rate=1e30).trials]
    assert states == ["nan_loss"] * 7


@pytest.mark.parametrize("how", ["raised", "returned", "evaluated"])
def test_the_end_of_a_candidate(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """However the loss of the largest rate stops being finite, the others are tried to the end."""
    cls = load_engine("native")
    step, evaluate = cls.step, cls.evaluate

    def too_large(self: Any) -> bool:
        return bool(self.settings.learning_rate > 1e-3)

    def bad_step(self: Any, batches: Any) -> Any:
        stats = step(self, batches)
        if too_large(self) and how == "raised":
            raise NonFiniteLoss("nan")
        if too_large(self) and how == "returned":
            return type(stats)(loss=float("nan"))
        return stats

    calls: dict[int, int] = {}

    def bad_evaluate(self: Any, batches: Sequence[Any]) -> Any:
        calls[id(self)] = calls.get(id(self), 0) + 1
        result = evaluate(self, batches)
        if too_large(self) and how == "evaluated" and calls[id(self)] == 2:
            return Evaluation(loss=float("inf"), accuracy=0.0, num_labels=1)
        return result

    monkeypatch.setattr(cls, "step", bad_step)
    monkeypatch.setattr(cls, "evaluate", bad_evaluate)
    monkeypatch.setattr("harness.training.find_lr.FACTORS", (1, 30))
    small, large = search("native").trials
    assert (small.end_state, small.steps) == ("ok", 6)
    assert (large.end_state, large.loss_after) == ("nan_loss", None)


@pytest.mark.parametrize("engine", list(SETTINGS))
def test_no_two_engines_are_there_at_once(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    cls = load_engine(engine)
    setup, made = cls.setup, list[weakref.ref[Any]]()

    def counting_setup(self: Any, blueprint: Any) -> None:
        assert [each for each in made if each() is not None] == []
        made.append(weakref.ref(self))
        setup(self, blueprint)

    monkeypatch.setattr(cls, "setup", counting_setup)
    monkeypatch.setattr("harness.training.find_lr.FACTORS", (1, 3, 10))
    more = {"d": 16, "learn_steps": 5} if engine == "lsp" else {}
    search(engine, job=tiny_job(eval_batches=1, steps=2), **more)
    assert len(made) == 3


def test_finished_trials_are_kept_if_a_later_one_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cls = load_engine("native")
    setup = cls.setup

    def no_room(self: Any, blueprint: Any) -> None:
        if self.settings.learning_rate > 1e-3:
            raise MemoryError
        setup(self, blueprint)

    monkeypatch.setattr(cls, "setup", no_room)
    monkeypatch.setattr("harness.training.find_lr.FACTORS", (1, 3, 1000))
    with pytest.raises(UserError, match="out of host memory"):
        search("native", tmp_path / "out", learning_rate=1e-5)
    kept = json.loads((tmp_path / "out" / "find_lr.json").read_text())
    assert [(t["learning_rate"], t["end_state"]) for t in kept["trials"]] == [(1e-5, "ok"), (3e-5, "ok")]
    assert kept["recommended"] is None


def test_without_held_out_batches_those_of_the_first_steps_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("harness.training.find_lr.FACTORS", (1, 3))
    finding = search("native", job=tiny_job(eval_batches=0))
    assert finding.measured_on == "training"
    assert finding.recommended is not None


def test_what_cannot_be_searched_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="middle of the grid is 0"):
        search("mezo", learning_rate=0.0)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is not a folder"):
        search("mezo", tmp_path / "file")


def test_the_folder_of_a_search_can_be_trained_into(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("harness.training.find_lr.FACTORS", (1,))
    search("native", tmp_path / "out")
    run(tmp_path / "out", "native", tiny_job(steps=1))
    assert {"find_lr.json", "model"} <= {path.name for path in (tmp_path / "out").iterdir()}
