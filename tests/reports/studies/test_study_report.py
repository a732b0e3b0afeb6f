"""The report on a study: its answer, its curves, both languages, and records that are wrong."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from study_records import START, read_study, rising, study_plan, trial, write_study, write_trial

from engines.errors import UserError
from harness.quality.documents import parse_budget
from harness.records.environment import busy_notes
from profiles.language import speaking
from reports.commands import export_tables
from reports.load import load_folder
from reports.render import in_short, write_report
from reports.studies.answer import command, study_verdict
from reports.studies.curves import curve, middle_curve, quality_chart
from reports.studies.pages import study_document
from reports.studies.read import load_study

ENGINES = ("native", "lora", "mezo")


def two_methods(folder: Path, **asked: Any) -> Path:
    return write_study(
        folder,
        study_plan(ENGINES[:2], **asked),
        {
            "native": [rising(at) for at in (40.0, 50.0, 60.0)],
            "lora": [rising(at) for at in (10.0, 11.0, 12.0)],
        },
    )


def test_the_method_that_reached_the_target_first_is_the_answer(tmp_path: Path) -> None:
    folder = two_methods(tmp_path / "study")
    verdict = write_report(folder)
    assert (verdict.state, verdict.method) == ("GO", "lora")
    assert "11.0 s (10.0 to 12.0 s)" in verdict.sentence
    assert "50.0 %" in verdict.sentence
    assert "94.0 %" in verdict.sentence
    names = {path.name for path in folder.glob("*")}
    assert {"report.md", "report.html", "report.json", "verdict.json"} <= names
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html.count("<polyline") == 8  # three seeds and their median, of two methods
    assert "http" not in re.sub(r"http-equiv|https?://www.w3.org/\S+", "", html)


@pytest.mark.parametrize("budget", ["300h", "2h", "1500ktokens", "90s"])
def test_the_command_that_goes_on_says_the_budget_as_it_is_read(budget: str) -> None:
    study = read_study(study_plan(ENGINES[:1], budget=budget), {"native": [rising(10.0)]})
    words = command(study, ".").split()
    assert parse_budget(words[words.index("--budget") + 1]) == study.plan.budget


def test_one_engine_with_several_settings_is_several_methods(tmp_path: Path) -> None:
    curves = {
        "native": [rising(at) for at in (40.0, 50.0, 60.0)],
        "lsp:half": [rising(at) for at in (10.0, 11.0, 12.0)],
        "lsp:quarter": [rising(at, to=0.8) for at in (20.0, 21.0, 22.0)],
    }
    folder = write_study(tmp_path / "study", study_plan(tuple(curves)), curves)
    study = load_study(folder)
    verdict = study_verdict(study)
    assert (verdict.state, verdict.method) == ("GO", "lsp:half")
    assert {each.engine: each.state for each in verdict.methods} == {
        "lsp:half": "GO", "native": "GO", "lsp:quarter": "NO-GO",
    }  # fmt: skip
    assert verdict.settings == "--set lsp:half.learning_rate=0.0001"
    assert not study.broken
    drawn = quality_chart(study, study.result.methods)
    assert drawn is not None
    assert all(f">{name}<" in drawn.svg for name in curves)
    dashes = set(re.findall('stroke-width="2".*?stroke-dasharray="(.*?)"', drawn.svg))
    assert len(dashes) == 3
    write_report(folder)
    table = (folder / "report.md").read_text(encoding="utf-8")
    assert "| lsp:half |" in table
    assert "| lsp:quarter |" in table


def test_of_a_tie_in_time_the_better_one_is_the_answer(tmp_path: Path) -> None:
    curves = {
        "native": [rising(at, to=0.99) for at in (10.0, 12.0, 14.0)],
        "lora": [rising(at, to=0.92) for at in (9.0, 11.0, 13.0)],
    }
    assert study_verdict(read_study(study_plan(ENGINES[:2]), curves)).method == "native"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.floats(1.0, 90.0), min_size=3, max_size=3),
            st.floats(0.9, 1.0),
            st.sampled_from([1, 2, 3]),
        ),
        min_size=2,
        max_size=3,
    )
)
def test_the_answer_is_never_beaten_in_time_and_in_quality(
    methods: list[tuple[list[float], float, int]],
) -> None:
    plan = study_plan(ENGINES[: len(methods)])
    curves = {
        engine: [
            rising(at, to=to) if seed < hits else [(50.0, START), (100.0, START)]
            for seed, at in enumerate(times)
        ]
        for engine, (times, to, hits) in zip(ENGINES, methods, strict=False)
    }
    study = read_study(plan, curves)
    verdict = study_verdict(study)
    reached = {each.engine: each for each in study.result.methods if each.reached is not None}
    assert (verdict.method is None) == (not reached)
    assert (verdict.state == "GO") == bool(reached)
    document = study_document(study, verdict)
    assert document.front.sentence == verdict.sentence
    if verdict.method is None:
        return
    mine = reached[verdict.method]
    for other in reached.values():
        assert mine.reached
        assert other.reached
        assert mine.test
        assert other.test
        faster, better = other.reached.median < mine.reached.median, other.test.median > mine.test.median
        assert not (faster and better), (mine, other)
    # The tile, the table and the sentence have one time and one test value.
    tile = document.front.tiles[0].value
    table = next(sheet.table for sheet in document.sheets if sheet.key == "study_methods")
    assert table.rows[0][0] == verdict.method
    assert table.rows[0][table.keys.index("study_target")].startswith(tile)
    assert tile in verdict.sentence
    assert document.front.tiles[1].value in verdict.sentence


@pytest.mark.parametrize(
    ("seeds", "hits", "state"),
    [(3, 3, "GO"), (2, 2, "CONDITIONAL GO"), (3, 2, "INCONCLUSIVE"), (3, 0, "NO-GO")],
)
def test_states(tmp_path: Path, seeds: int, hits: int, state: str) -> None:
    flat = [(50.0, 0.6), (100.0, 0.7)]
    curves = {"native": [rising(30.0) if seed < hits else flat for seed in range(seeds)]}
    study = read_study(study_plan(["native"], seeds=seeds), curves)
    verdict = study_verdict(study)
    assert verdict.state == state
    if state == "NO-GO":
        assert "70.0 %" in verdict.sentence
    assert (
        study_document(study, verdict).front.criteria[0].outcome
        == ({"GO": "pass", "CONDITIONAL GO": "pass", "NO-GO": "fail", "INCONCLUSIVE": "unknown"}[state])
    )


@pytest.mark.parametrize(("other", "overlap"), [(0.76, False), (0.95, True)])
def test_values_are_said_to_overlap_where_they_do(tmp_path: Path, other: float, overlap: bool) -> None:
    """Of two seeds none is better by rule; 76 % was said to overlap with 99 % for that."""
    curves = {"native": [rising(30.0, to=0.99), rising(30.0, to=0.94)], "lora": [rising(30.0, to=other)] * 2}
    write_report(write_study(tmp_path / "study", study_plan(ENGINES[:2], seeds=2), curves))
    assert ("overlap with the best method's" in (tmp_path / "study" / "report.md").read_text()) is overlap


def test_a_target_that_one_evaluation_met_says_why_it_was_not_reached(tmp_path: Path) -> None:
    """A median that meets the target beside 'not reached' reads as a contradiction."""

    def sentence(best: float) -> str:
        curve = [(50.0, 0.6), (75.0, best), (100.0, 0.7)]
        plan = study_plan(["native"])
        return study_verdict(read_study(plan, {"native": [curve] * len(plan.seeds)})).sentence

    target = study_plan(["native"]).target.value
    assert "two evaluations in a row" in sentence(target + 0.01)
    assert "in a row" not in sentence(target - 0.01)


def test_missing_trials_are_no_no_and_name_the_command(tmp_path: Path) -> None:
    study = read_study(study_plan(["native"]), {"native": [[(50.0, 0.6)]]})
    verdict = study_verdict(study)
    assert verdict.state == "INCONCLUSIVE"
    assert "--resume" in verdict.next_command
    assert "--budget 7200s" in verdict.next_command


def test_a_seed_that_was_stopped_is_no_miss(tmp_path: Path) -> None:
    folder = two_methods(tmp_path / "study")
    plan = study_plan(ENGINES[:2])
    for method in ENGINES[:2]:
        write_trial(folder, trial(plan, method, 2, rising(20.0), end_state="interrupted"))
    verdict = study_verdict(load_study(folder))
    assert verdict.state == "INCONCLUSIVE"
    assert "is not known" in verdict.sentence
    assert "--resume" in verdict.next_command


def test_every_page_is_there_in_japanese_with_the_same_numbers(tmp_path: Path) -> None:
    folder = two_methods(tmp_path / "study")
    write_report(folder)
    before = (folder / "report.json").read_bytes()
    shown = write_report(folder, language="ja")
    assert (folder / "report.json").read_bytes() == before
    assert "採用できます" in in_short(shown, "ja")
    english = (folder / "report.md").read_text(encoding="utf-8")
    japanese = (folder / "report.ja.md").read_text(encoding="utf-8")
    for number in ("94.0 %", "50.0 %", "5.00 GiB"):
        assert number in english
        assert number in japanese
    study = load_study(folder)
    documents = []
    for language in ("en", "ja"):
        with speaking(language):  # type: ignore[arg-type]
            documents.append(study_document(study, study_verdict(study)))
    assert [one.key for one in documents[0].sections] == [one.key for one in documents[1].sections]
    for mine, other in zip(*(one.sheets for one in documents), strict=True):
        for row, beside in zip(mine.table.values, other.table.values, strict=True):
            for value, same in zip(row, beside, strict=True):
                assert not isinstance(value, float) or value == same


def test_the_bold_line_is_the_median_of_the_seeds(tmp_path: Path) -> None:
    plan = study_plan(["native"])
    found = [
        curve(trial(plan, "native", seed, rising(at)), "accuracy") for seed, at in enumerate((10, 20, 60))
    ]
    assert middle_curve(found) == ((0.0, START), (10.0, START), (20.0, 0.95), (22.0, 0.95), (100.0, 0.95))
    study = read_study(plan, {"native": [rising(10.0)] * 3})
    drawn = quality_chart(study, study.result.methods)
    assert drawn is not None
    assert "target 90.0 %" in drawn.svg
    assert "before training" in drawn.svg


def test_times_far_apart_are_on_a_logarithmic_axis(tmp_path: Path) -> None:
    curves = {"native": [rising(1.0, end=3.0)] * 3, "mezo": [rising(60.0, end=300.0)] * 3}
    study = read_study(study_plan(["native", "mezo"]), curves)
    drawn = quality_chart(study, study.result.methods)
    assert drawn is not None
    assert "logarithmic" in drawn.svg


def test_tables_are_written_for_programs(tmp_path: Path) -> None:
    folder = two_methods(tmp_path / "study")
    there = export_tables(folder, "csv", None)
    frame = pd.read_csv(there / "evaluations.csv")
    assert len(frame) == 2 * 3 * 5
    assert set(frame["method"]) == {"native", "lora"}
    assert (there / "study_methods.csv").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"engine": "abc"}, "none of the study's"),
        ({"rung": 7}, "rung"),
        ({"seed": 99}, "seed"),
        ({"learned": {"train_s": -1.0}}, "times"),
        ({"learned": {"train_s": math.inf}}, "times"),
        ({"learned": {"evaluations": [{"step": 0, "train_s": 0.0, "metrics": {"loss": 1.0}}]}}, "lacks"),
        ({"id": None}, "id"),
    ],
)
def test_a_trial_that_cannot_be_is_left_out_with_its_reason(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = two_methods(tmp_path / "study")
    path = next((folder / "trials").glob("native-*seed0.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    study = load_study(folder)
    assert len(study.trials) == 5
    assert said in study.broken[0].reason
    markdown = write_report(folder) and (folder / "report.md").read_text()
    assert markdown
    assert f"trials/{path.name}" in markdown


def test_a_machine_that_was_busy_is_a_risk(tmp_path: Path) -> None:
    folder = two_methods(tmp_path / "study")
    assert "Of the machine" not in " ".join(write_report(folder).warnings)
    for number, path in enumerate(sorted((folder / "trials").glob("*.json"))[:4]):
        values = json.loads(path.read_text())
        values["environment"]["notes"] = list(busy_notes(7.0 + number, 2))
        path.write_text(json.dumps(values))
    (told,) = [each for each in write_report(folder).warnings if each.startswith("Of the machine")]
    assert re.match(
        r"Of the machine, in 4 of 6 trials: the processor is busy .*: \d+ processes for 2 cores", told
    )
    with speaking("ja"):
        told_there = " ".join(study_verdict(load_study(folder)).warnings)
    assert "6 件の試行中 4 件" in told_there
    assert "processor" not in told_there


def test_hostile_names_are_text(tmp_path: Path) -> None:
    folder = two_methods(tmp_path / "study")
    for path in (folder / "trials").glob("*.json"):
        values = json.loads(path.read_text())
        values["environment"]["gpu_name"] = "<script>alert(1)</script>|`x`"
        path.write_text(json.dumps(values))
    write_report(folder)
    assert "<script" not in (folder / "report.html").read_text()
    assert "<script" not in (folder / "report.md").read_text()


def test_a_study_of_so_many_tokens_may_go_on_with_other_cores(tmp_path: Path) -> None:
    from dataclasses import replace

    from run_records import make_environment

    for budget, is_refused in (("1500ktokens", False), ("2h", True)):
        folder = two_methods(tmp_path / budget, budget=budget)
        other = trial(study_plan(ENGINES[:2], budget=budget), "native", 2, rising(5.0))
        cores = other.environment.cores_usable
        write_trial(folder, replace(other, environment=make_environment(cores_usable=cores + 1)))
        if is_refused:
            with pytest.raises(UserError, match="unlike: cores_usable"):
                write_report(folder)
            continue
        write_report(folder)
        told = f"different numbers of CPU cores ({cores}, {cores + 1})"
        assert told in (folder / "report.md").read_text(encoding="utf-8").replace("\\", "")


def test_what_is_no_study_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = two_methods(tmp_path / "study")
    with pytest.raises(UserError, match="is a study"):
        load_folder(folder)
    with pytest.raises(UserError, match="judged by its own target"):
        write_report(folder, tmp_path / "criteria.toml")
    other = trial(study_plan(ENGINES[:2]), "native", 0, rising(5.0))
    from dataclasses import replace

    from run_records import make_environment

    write_trial(folder, replace(other, environment=make_environment(torch="9.9")))
    with pytest.raises(UserError, match="unlike: torch"):
        write_report(folder)
    (folder / "study.json").write_text("{}")
    with pytest.raises(UserError, match="schema_version"):
        write_report(folder)
