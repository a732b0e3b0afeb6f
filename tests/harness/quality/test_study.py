"""Studies of what methods learn: planned beforehand, equal for all, gone on with, judged by their spread."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.errors import UserError
from engines.shapes import Workload
from harness.cli.options import engine_names, method_names
from harness.cli.quality import answer_lines
from harness.quality.documents import (
    KEPT,
    SHARES,
    QualityTarget,
    TrialRecord,
    load_plan,
    next_rates,
    parse_budget,
    parse_quality_target,
    rungs_of,
)
from harness.quality.judge import over_seeds, time_to
from harness.quality.study import (
    MOST_EVALUATED_TOKENS,
    StudyRequest,
    prepare_study,
    rows_together,
    run_study,
)
from harness.quality.trials import PreparedStudy
from harness.records.environment import read_environment
from harness.records.job import Job, load_job, make_job
from harness.records.learning import Evaluated, LearningLength, LearningOutcome
from harness.records.run import EndState, Summary
from harness.records.settings import left_out, parse_assignments
from harness.runs.launch import Outcome
from harness.runs.worker import Request
from profiles.machine import save_machine
from run_records import make_machine


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("accuracy", "is not METRIC>=VALUE"),
        ("accuracy>=high", "is not METRIC>=VALUE"),
        ("speed>=3", "there is no metric 'speed'; choose from"),
        ("accuracy<=0.9", "accuracy is better when it is higher; write accuracy>="),
        ("perplexity_per_token>=20", "better when it is lower"),
        ("accuracy>=90", "nothing reaches it; write 0.9 for 90 %"),
        ("perplexity_per_token<=0.5", "from 1 to inf: nothing reaches it"),
        ("matthews>=2", "from -1 to 1"),
    ],
)
def test_a_target_that_is_none_is_refused_in_one_line(text: str, why: str) -> None:
    with pytest.raises(UserError, match=why) as refused:
        parse_quality_target(text)
    assert len(str(refused.value)) < 250


def test_targets_and_budgets_are_read() -> None:
    assert parse_quality_target("accuracy >= 0.9") == QualityTarget(metric="accuracy", value=0.9)
    assert str(parse_quality_target("perplexity_per_token<=20")) == "perplexity_per_token<=20"
    assert str(parse_quality_target("loss<=0.12345678")) == "loss<=0.12345678"  # commands have it so
    assert parse_budget("2h").seconds == 7200
    assert parse_budget("1.5min").seconds == 90
    assert parse_budget("5Mtokens").tokens == 5e6
    assert [str(parse_budget(each)) for each in ("2h", "90s", "30s")] == ["2 h", "1.5 min", "30 s"]
    for wrong in ("2", "h", "0s", "-3h", "1.2.3h", "5apples", "."):
        with pytest.raises(UserError, match="is no time and no number of tokens"):
            parse_budget(wrong)


def test_all_trials_of_a_method_take_its_budget() -> None:
    rungs = rungs_of(parse_budget("2h"), 3, Workload(batch_size=1, seq_len=8))
    trials = [rung.rates if rung.rates > 1 else 3 for rung in rungs]
    assert sum(n * (r.length.seconds or 0) for n, r in zip(trials, rungs, strict=True)) == pytest.approx(7200)
    assert [rung.rates for rung in rungs] == list(KEPT)
    assert sum(SHARES) == 1
    with pytest.raises(UserError, match="a trial has 0 steps, and 5 evaluations; give 640 tokens or more"):
        rungs_of(parse_budget("100tokens"), 3, Workload(batch_size=1, seq_len=8))


def evaluated(*values: float) -> list[Evaluated]:
    return [
        Evaluated(step=i, train_s=10.0 * i, metrics={"accuracy": each, "loss": 1.0})
        for i, each in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ((0.5, 0.8, 0.91, 0.92), 20.0),
        ((0.5, 0.93, 0.8, 0.92, 0.91), 30.0),
        ((0.5, 0.6, 0.7), None),
        ((0.5, 0.6, 0.95), None),  # nothing confirms it
        ((0.9, 0.9), 0.0),
    ],
)
def test_a_target_counts_when_the_next_evaluation_confirms_it(
    values: tuple[float, ...], seconds: float | None
) -> None:
    assert time_to(QualityTarget(metric="accuracy", value=0.9), evaluated(*values)) == seconds


def test_methods_are_told_apart_by_the_spread_over_seeds() -> None:
    assert over_seeds([0.9, 0.91, 0.92], [0.8, 0.85, 0.86], "accuracy") == "better"
    assert over_seeds([0.8, 0.85, 0.86], [0.9, 0.91, 0.92], "accuracy") == "worse"
    assert over_seeds([0.90, 0.905, 0.902], [0.901, 0.906, 0.9], "accuracy") == "same"
    assert over_seeds([0.897, 0.902, 0.899], [0.907, 0.9, 0.902], "accuracy") == "same"  # a point, not more
    assert over_seeds([0.90, 0.915, 0.902], [0.901, 0.912, 0.903], "accuracy") == "undecided"
    assert over_seeds([0.8, 0.9, 0.95], [0.85, 0.9, 0.91], "accuracy") == "undecided"
    assert over_seeds([0.9, 0.9], [0.1, 0.1], "accuracy") == "undecided"
    assert over_seeds([20.0, 21.0, 22.0], [30.0, 31.0, 33.0], "perplexity_per_token") == "better"
    assert over_seeds([20.0, 20.15, 20.3], [20.1, 20.0, 20.3], "perplexity_per_token") == "undecided"
    assert over_seeds([20.0, 20.05, 20.1], [20.1, 20.0, 20.1], "perplexity_per_token") == "same"


def job(**values: Any) -> Job:
    given: dict[str, Any] = {
        "model": {"name": "tiny-llama", "random_weights": True}, "seq_len": 32, "batch_size": 2,
        "dtype": "fp32", "data": {"train": "builtin"},
    }  # fmt: skip
    return make_job(given | values, "test job")


def prepared(out: Path, settings: dict[str, dict[str, Any]] | None = None, **asked: Any) -> PreparedStudy:
    profile = out.parent / "machine.json"
    save_machine(make_machine(), profile)
    study = StudyRequest(
        engines=("native", "mezo"), out=out, target=QualityTarget(metric="accuracy", value=0.9),
        budget=parse_budget("100ktokens"), profile=profile, quiet=True,
    )  # fmt: skip
    return prepare_study(job(settings=settings or {}), replace(study, **asked))


class Launcher:
    """Plays trials: accuracy depends on the method and how far its rate is from the best."""

    def __init__(self, state: Callable[[Request], EndState] = lambda request: "ok") -> None:
        self.ids: list[str] = []
        self._state = state

    def __call__(self, request: Request, out: Path, on_event: object) -> tuple[Outcome, LearningOutcome]:
        self.ids.append(request.id)
        state = self._state(request)
        outcome = Outcome(
            end_state=state, end_reason=None if state == "ok" else "it failed", samples=(),
            summary=Summary(setup_s=1.0), by_user=state == "interrupted",
        )  # fmt: skip
        if state != "ok":
            return outcome, LearningOutcome()
        rate = float(request.plan.settings["learning_rate"])
        top = 0.95 if request.plan.engine == "native" else 0.85
        value = top - (0.2 if rate != BEST[request.plan.engine] else 0.0) + 0.001 * request.job.seed
        found = evaluated(0.5, value - 0.1, value, value)
        test = {"accuracy": value - 0.01}
        return outcome, LearningOutcome(
            evaluations=tuple(found), test_before={"accuracy": 0.5, "majority_class": 0.6}, test=test,
            steps=3, train_s=30.0, eval_s=2.0,
        )  # fmt: skip


BEST = {"native": 3e-4, "mezo": 1e-6}


def test_halving_keeps_the_better_rates_and_the_last_rung_has_all_seeds(tmp_path: Path) -> None:
    ready = prepared(tmp_path / "out")
    launched = Launcher()
    lines: list[str] = []
    result = run_study(ready, report=lines.append, launch=launched)
    counts = [sum(f"rung{rung}" in each for each in launched.ids) for rung in range(3)]
    assert counts == [8, 4, 6]
    assert {each for each in launched.ids if "native-rung2" in each} == {
        f"native-rung2-lr0.0003-seed{seed}" for seed in range(3)
    }
    first, second = result.methods
    assert (first.engine, second.engine) == ("native", "mezo")
    assert first.time_to_target_s == (20.0, 20.0, 20.0)
    assert second.time_to_target_s == (None, None, None)
    assert first.beside_best is None
    assert second.beside_best == "worse"
    assert first.test is not None
    assert first.test.median == pytest.approx(0.941)
    assert (result.zero_shot, result.majority_class) == (0.5, 0.6)
    assert first.search_s == 6 * 30.0
    assert load_plan(ready.out) == ready.plan
    rows = list(csv.DictReader((ready.out / "curves.csv").read_text().splitlines()))
    assert len(rows) == 18 * 4
    assert json.loads((ready.out / "quality.json").read_text())["target"] == "accuracy>=0.9"


def test_an_engine_with_several_settings_is_a_method_with_each_of_them(tmp_path: Path) -> None:
    settings = {"mezo": {"eps": 0.01}, "mezo:many": {"queries": 4}}
    names = ("native", "mezo", "mezo:many")
    ready = prepared(tmp_path / "out", settings, engines=names)
    typed = {name: plan.settings.typed for name, plan in ready.plans.items()}
    assert [(typed[name].queries, typed[name].eps) for name in names[1:]] == [(1, 0.01), (4, 0.01)]
    assert [method.name for method in ready.plan.methods] == list(names)
    launched = Launcher()
    result = run_study(ready, report=lambda line: None, launch=launched)
    assert len(set(launched.ids)) == 27
    assert sum(each.startswith("mezo-many-rung") for each in launched.ids) == 9
    assert [each.name for each in result.methods] == list(names)
    assert {each.name for each in result.methods if each.beside_best == "worse"} == set(names[1:])
    record = json.loads((ready.out / "trials/mezo-many-rung2-lr1e-06-seed0.json").read_text())
    assert (record["engine"], record["variant"]) == ("mezo", "many")
    assert "variant" not in json.loads((ready.out / "trials/mezo-rung2-lr1e-06-seed0.json").read_text())
    rows = list(csv.DictReader((ready.out / "curves.csv").read_text().splitlines()))
    assert {row["engine"] for row in rows} == set(names)
    assert load_plan(ready.out) == ready.plan
    assert load_job(ready.out / "job.toml") == ready.plan.job
    idle = Launcher()
    again = prepared(tmp_path / "out", settings, engines=names, resume=True)
    assert run_study(again, report=lambda line: None, launch=idle) == result
    assert idle.ids == []
    with pytest.raises(UserError, match="has another job"):
        prepared(tmp_path / "out", {**settings, "mezo:many": {"queries": 8}}, engines=names, resume=True)
    with pytest.raises(UserError, match="has other methods"):
        prepared(tmp_path / "out", settings, engines=("native", "mezo"), resume=True)


def test_settings_are_of_all_methods_of_an_engine_or_of_one() -> None:
    names = ["native", "lsp:half", "lsp:quarter"]
    given = ["lsp:half.d=32", "lsp:quarter.d=16", "lsp.d=64", "lsp.r=2", "learning_rate=1e-3"]
    found = job(settings={name: dict(each) for name, each in parse_assignments(given, names).items()})
    half, quarter = (found.settings_of(name).typed for name in names[1:])
    assert [(each.d, each.r, each.learning_rate) for each in (half, quarter)] == [
        (32, 2, 1e-3),
        (16, 2, 1e-3),
    ]
    assert found.settings_of("native")["learning_rate"] == 1e-3
    assert left_out([*given, "mezo.eps=1"], names) == ["mezo.eps=1"]
    for wrong, why in (
        ("lsp:third.d=8", "'lsp:third' does not run; methods are: native, lsp:half"),
        ("lsp:half.eps=1", "lsp"),
        ("zz:half.d=1", "there is no engine 'zz:half'"),
    ):
        with pytest.raises(UserError, match=why) as refused:
            parse_assignments([wrong], names)
        assert len(str(refused.value)) < 1000
        assert "\n" not in str(refused.value)


def test_methods_are_named_as_a_user_types_them() -> None:
    assert method_names("native, lsp:half,lsp:quarter") == ["native", "lsp:half", "lsp:quarter"]
    assert method_names(None) == engine_names(None)
    for wrong, why in (
        ("lsp:", "what follows the colon is no name"),
        ("lsp:a/b", "what follows the colon is no name"),
        ("nothing:a", "there is no such engine"),
    ):
        with pytest.raises(UserError, match=why):
            method_names(wrong)
    with pytest.raises(UserError, match="several settings of one engine are for --target and --budget"):
        engine_names("lsp:half")


def test_the_answer_says_what_it_rests_on(tmp_path: Path) -> None:
    result = run_study(prepared(tmp_path / "out"), report=lambda line: None, launch=Launcher())
    (edge,) = [line for line in answer_lines(result) if "edge" in line]
    assert edge.endswith("a better one may lie beyond: native (0.0003)")
    assert not any("one process" in line for line in answer_lines(result))
    shared = replace(result, shared_process=True)
    assert "all trials of a method were in one process" in answer_lines(shared)[-1]


def test_methods_search_one_after_the_other_and_take_turns_in_final_trials(tmp_path: Path) -> None:
    launched = Launcher()
    run_study(
        prepared(tmp_path / "out", budget=parse_budget("1h")), report=lambda line: None, launch=launched
    )
    search = [each.partition("-")[0] for each in launched.ids if "rung2" not in each]
    assert search == ["native"] * 6 + ["mezo"] * 6
    last = [each.partition("-")[0] for each in launched.ids if "rung2" in each]
    assert last == ["native", "mezo", "mezo", "native", "native", "mezo"]


def test_short_final_trials_follow_their_methods_search(tmp_path: Path) -> None:
    launched = Launcher()
    run_study(prepared(tmp_path / "out"), report=lambda line: None, launch=launched)
    assert [each.partition("-")[0] for each in launched.ids] == ["native"] * 9 + ["mezo"] * 9


def test_a_study_that_was_stopped_does_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stops = Launcher(lambda request: "interrupted" if "mezo-rung1" in request.id else "ok")
    with pytest.raises(KeyboardInterrupt):
        run_study(prepared(out), report=lambda line: None, launch=stops)
    again = Launcher()
    result = run_study(prepared(out, resume=True), report=lambda line: None, launch=again)
    assert set(again.ids) & set(stops.ids) == {stops.ids[-1]}
    assert len(set(again.ids) | set(stops.ids)) == 18
    assert result.methods[0].engine == "native"
    idle = Launcher()
    assert run_study(prepared(out, resume=True), report=lambda line: None, launch=idle) == result
    assert idle.ids == []
    with pytest.raises(UserError, match="has another target; give the same flags"):
        prepared(out, resume=True, target=QualityTarget(metric="loss", value=1.0))
    with pytest.raises(UserError, match="is not empty"):
        prepared(out)


def test_a_method_whose_trials_fail_is_a_row_with_its_reason(tmp_path: Path) -> None:
    launched = Launcher(lambda request: "oom_gpu" if request.plan.engine == "mezo" else "ok")
    result = run_study(prepared(tmp_path / "out"), report=lambda line: None, launch=launched)
    failed = next(each for each in result.methods if each.engine == "mezo")
    assert failed.why_not == "oom_gpu: it failed"
    assert failed.test is None
    assert sum("mezo" in each for each in launched.ids) == 4


def test_a_rate_that_diverges_is_not_kept(tmp_path: Path) -> None:
    launched = Launcher(lambda request: "nan_loss" if "lr0.0003-" in request.id else "ok")
    result = run_study(prepared(tmp_path / "out"), report=lambda line: None, launch=launched)
    assert result.methods[0].learning_rate != 3e-4


def test_of_equal_rates_the_one_with_the_smaller_loss_is_kept() -> None:
    def trial(rate: float, loss: float, accuracy: float = 0.5) -> TrialRecord:
        found = Evaluated(step=1, train_s=1.0, metrics={"accuracy": accuracy, "loss": loss})
        return TrialRecord(
            id="t", engine="mezo", rung=0, learning_rate=rate, seed=0, end_state="ok", end_reason=None,
            time="", learned=LearningOutcome(evaluations=(found,)), environment=read_environment(),
        )  # fmt: skip

    records = [
        trial(1e-7, 0.7),
        trial(3e-7, 0.6),
        trial(1e-6, 0.6),
        trial(3e-6, math.nan),
        trial(1e-5, 9, 0.6),
    ]
    assert next_rates(records, "accuracy", 4) == [1e-5, 3e-7, 1e-6, 1e-7]


def test_evaluations_have_large_batches_where_the_gpu_has_room(tmp_path: Path) -> None:
    ready = prepared(tmp_path / "out")
    assert ready.machine.gpu is not None
    rows = rows_together(ready)
    assert rows == MOST_EVALUATED_TOKENS // 32
    (tmp_path / "small").mkdir()
    used_bytes = max(each.prediction.peak_gpu_bytes for each in ready.plans.values())
    small = replace(
        ready, machine=replace(ready.machine, gpu=replace(ready.machine.gpu, total_bytes=used_bytes))
    )
    assert rows_together(small) == 2
    assert rows_together(replace(ready, machine=replace(ready.machine, gpu=None))) == 2


def test_what_cannot_be_studied_is_refused_before_the_machine_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="this task has no such metric; choose from: accuracy, loss"):
        prepared(out, target=QualityTarget(metric="matthews", value=0.3))
    with pytest.raises(UserError, match="--seeds"):
        prepared(out, seeds=0)
    with pytest.raises(UserError, match="is too short"):
        prepared(out, budget=parse_budget("10tokens"))
    assert not out.exists()


def test_a_budget_of_time_that_is_too_short_says_one_that_is_enough(tmp_path: Path) -> None:
    """And no more than that: a budget in seconds is told in seconds."""
    with pytest.raises(UserError, match="is too short for native: a trial has") as refused:
        prepared(tmp_path / "out", budget=parse_budget("0.01s"))
    enough = refused.value.remedy.removeprefix("give ").removesuffix(" or more")
    assert enough.endswith("s")
    assert prepared(tmp_path / "out", budget=parse_budget(enough)).plan.methods[0].fits


def test_a_template_is_not_proposed_where_there_is_one(tmp_path: Path) -> None:
    profile = tmp_path / "machine.json"
    save_machine(make_machine(), profile)
    study = StudyRequest(
        engines=("mezo",), out=tmp_path / "out", target=QualityTarget(metric="answer_f1", value=0.9),
        budget=parse_budget("100ktokens"), profile=profile, quiet=True,
    )  # fmt: skip
    (tmp_path / "rows.tsv").write_text("".join(f"film {i}\t{i % 2}\n" for i in range(40)))
    data = {"train": str(tmp_path / "rows.tsv")}
    with pytest.raises(UserError, match="or use --template"):
        prepare_study(job(data=data), study)
    with pytest.raises(UserError) as refused:
        prepare_study(job(data={**data, "template": "{text} It was", "labels": ["bad", "good"]}), study)
    assert refused.value.remedy == "choose from: accuracy, f1, matthews, loss"


def test_a_length_ends_by_time_or_by_steps() -> None:
    by_time = LearningLength(evaluations=5, seconds=10.0)
    assert [by_time.evaluations_due(1, each) for each in (0.0, 1.9, 2.0, 9.9, 10.0, 30.0)] == [
        0,
        0,
        1,
        4,
        5,
        5,
    ]
    assert not by_time.is_over(10**6, 9.99)
    by_steps = LearningLength(evaluations=5, steps=7)
    assert [by_steps.evaluations_due(step, 1e9) for step in range(8)] == [0, 0, 1, 2, 2, 3, 4, 5]
    assert by_steps.is_over(7, 0.0)
